"""normface_ext.engine.files: sentences of a bounded length that name the file, whatever the file is."""

from __future__ import annotations

import os
import pickle

import pytest

from normface_ext.engine import files


@pytest.mark.parametrize("length", [0, 1, 299, 300, 301, 5000])
def test_clip_keeps_both_ends_and_the_length(length):
    text = ("start" + "x" * length + "end")[: max(length, 8)]
    cut = files.clip(text)
    assert len(cut) <= files.LONGEST and cut[:5] == "start" and cut[-1] == text[-1]
    assert (cut == text) == (len(text) <= files.LONGEST)
    assert files.clip("a\nb\u2028c\r\nd\n") == "a b c d" and files.clip("a\n") == "a"


def test_quoted():
    assert files.quoted("a\n\udcff") == "'a\\n\\udcff'"
    assert files.quoted("x" * 100, 5) == "'xxxxx'... (100 characters)"
    assert files.quoted(b"\0" * 100, 2) == "b'\\x00\\x00'... (100 bytes)"


def test_file_name():
    assert files.file_name("a/b.txt") == "a/b.txt"
    assert files.file_name(os.fsdecode(b"caf\xe9.txt")) == "caf\\xe9.txt"
    long = files.file_name("folder/" * 100 + "b.txt")
    assert len(long) <= 120 and long.endswith("folder/b.txt")


def test_listing_counts_what_does_not_fit():
    short = files.listing("head:", ["one", "two"], 0, "\nhint")
    assert short == "head:\none\ntwo\nhint"
    many = files.listing("head:", ["x" * 1000] * 50, 7)
    rows = many.splitlines()
    assert len(many) <= files.LONGEST_LIST and max(map(len, rows)) <= files.LONGEST
    assert rows[-1] == f"... and {57 - (len(rows) - 2)} more"


def test_read_bytes(tmp_path):
    path = tmp_path / "f.bin"
    path.write_bytes(b"12345")
    assert files.read_bytes(path, 5, "five bytes") == b"12345"
    with pytest.raises(ValueError, match=r"f\.bin: expected five bytes of at most 4 bytes, got 5"):
        files.read_bytes(path, 4, "five bytes")
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        files.read_bytes(tmp_path, 4, "a file")
    with pytest.raises(FileNotFoundError, match="none"):
        files.read_bytes(tmp_path / "none", 4, "a file")


def test_read_bytes_of_a_pipe_is_bounded():
    reading, writing = os.pipe()
    os.write(writing, b"12345")
    with pytest.raises(ValueError, match="at most 4 bytes, got more"):
        files.read_bytes(f"/dev/fd/{reading}", 4, "a file")
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize(
    "error",
    [KeyError("k"), EOFError(), RecursionError("deep"), MemoryError(), pickle.UnpicklingError("x" * 5000),
     OverflowError("big"), OSError("without a file"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "start")],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_reading_names_the_file_in_any_error(error):
    with pytest.raises(ValueError) as raised, files.reading("f.bin", "a list"):
        raise error
    text = str(raised.value)
    assert type(raised.value) is ValueError and raised.value.__cause__ is error
    assert text.startswith(f"f.bin: expected a list, got {type(error).__name__}") and len(text) <= 300


def test_reading_leaves_what_is_no_fault_of_the_file():
    for error in (KeyboardInterrupt(), FileNotFoundError(2, "No such file", "f.bin")):
        with pytest.raises(type(error)) as raised, files.reading("f.bin", "a list"):
            raise error
        assert raised.value is error
