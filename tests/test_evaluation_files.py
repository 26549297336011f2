"""The readers of normface_ext.evaluation: what is written is read; what is broken is named, file and line."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fuzz.readers import assert_contract

from normface_ext import evaluation as ev

NAMES = [f"P_{i}_{j:04d}.jpg" for i in range(4) for j in (1, 2)]
LFW = [
    "2 2",
    *("P_0 1 2", "P_1 1 2", "P_0 1 P_1 2", "P_1 1 P_2 2"),
    *("P_2 1 2", "P_3 1 2", "P_2 1 P_3 2", "P_3 1 P_0 2"),
]
INDEX = ["0 1 1", "2 3 1", "0 3 0", "2 5 0", "4 5 1", "6 7 1", "4 7 0", "6 1 0"]
NAMED = [f"{NAMES[int(i)]} {NAMES[int(j)]} {same}" for i, j, same in map(str.split, INDEX)]
SPLITS = [
    "split number, pair number, first name, second name, is same, is same",
    *("1, 1, a/0, a/1, 1, 1", "1, 2, a/0, b/1, 0, 0", "2, 1, b/0, b/1, 1, 1", "2, 2, b/0, a/1, 0, 0"),
]

READERS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "lfw": (lambda path: ev.read_lfw_pairs(path, NAMES), LFW),
    "index": (lambda path: ev.read_index_pairs(path, 2, rows=8), INDEX),
    "named": (lambda path: ev.read_name_pairs(path, NAMES, 2), NAMED),
    "names": (ev.read_names, NAMES),
    "splits": (lambda path: ev.read_ytf_splits(path, splits=2, pairs_per_split=2), SPLITS),
}
by_reader = pytest.mark.parametrize("kind", READERS)


def read(kind: str, path: Path, data: bytes) -> object:
    path.write_bytes(data)
    return READERS[kind][0](path)


def refused(kind: str, path: Path, data: bytes, sentence: str) -> None:
    path.write_bytes(data)
    error = assert_contract(READERS[kind][0], path)
    assert isinstance(error, ValueError), f"read: {error}"
    assert re.search(sentence, str(error)), error


def plain(value: object) -> object:
    if isinstance(value, list):
        return value
    columns = (value.first, value.second, value.same, value.fold)
    return [np.asarray(column).tolist() for column in columns]


def text(lines: list[str], end: str = "\n") -> str:
    return end.join(lines) + end


def test_pairs_are_read_in_three_formats(tmp_path: Path):
    lfw = read("lfw", tmp_path / "a", text(LFW).encode())
    assert plain(lfw) == [
        [0, 2, 0, 2, 4, 6, 4, 6],
        [1, 3, 3, 5, 5, 7, 7, 1],
        [True, True, False, False] * 2,
        [0, 0, 0, 0, 1, 1, 1, 1],
    ]
    for kind, lines in (("index", INDEX), ("named", NAMED)):
        assert plain(read(kind, tmp_path / "a", text(lines).encode())) == plain(lfw)
        folds = [f"{line} {7 + 2 * i}" for i, line in enumerate(lines)]
        assert read(kind, tmp_path / "a", text(folds).encode()).fold.tolist() == list(range(7, 23, 2))
        commas = [", ".join(line.split()) for line in lines]
        assert plain(read(kind, tmp_path / "a", text(commas).encode())) == plain(lfw)


@by_reader
def test_encodings_and_line_ends_of_other_systems(kind: str, tmp_path: Path):
    lines = READERS[kind][1]
    truth = plain(read(kind, tmp_path / "a", text(lines).encode()))
    for end in ("\n", "\r\n", "\r"):
        for encoding in ("utf-8", "utf-8-sig", "utf-16"):
            assert plain(read(kind, tmp_path / "a", text(lines, end).encode(encoding))) == truth
    big = b"\xfe\xff" + text(lines).encode("utf-16-be")
    assert plain(read(kind, tmp_path / "a", big)) == truth
    spaced = "\n\n" + "".join(f" \t{line}\t\n\n" for line in lines)
    assert plain(read(kind, tmp_path / "a", spaced.encode())) == truth
    assert plain(read(kind, tmp_path / "a", text(lines).encode()[:-1])) == truth  # no end of the last line


@pytest.mark.parametrize("kind", ["lfw", "index", "named"])
def test_comments_are_no_pairs(kind: str, tmp_path: Path):
    lines = READERS[kind][1]
    truth = plain(read(kind, tmp_path / "a", text(lines).encode()))
    remarks = ["# 1 2 3", *(part for line in lines for part in (line, "#", "  # 0 1 1"))]
    assert plain(read(kind, tmp_path / "a", text(remarks).encode())) == truth


@by_reader
@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"\xff", "2: expected UTF-8 text"),
        (b"caf\xe9 1 2", "2: expected UTF-8 text"),
        (b"\xed\xa0\x80", "2: expected UTF-8 text"),
        (b"0 1 1\0", r"2: expected text, got the control character '\\x00'"),
        (b"0\f1 1", r"2: expected text, got the control character '\\x0c'"),
        (b"0\x1c1 1", "2: expected text, got the control character"),
        (b"7" * (1 << 20), "2: expected a line of at most 16384 characters"),
        (b"12 " * (1 << 20), "2: expected a line of at most 16384 characters"),
    ],
)
def test_what_is_no_line_of_text_is_named(kind: str, tmp_path: Path, data: bytes, sentence: str):
    first, *others = (line.encode() for line in READERS[kind][1])
    refused(kind, tmp_path / "list.txt", b"\n".join([first, data, *others]), f"list.txt:{sentence}")


@by_reader
def test_files_that_cannot_be_read_are_named(kind: str, tmp_path: Path):
    reader = READERS[kind][0]
    with pytest.raises(FileNotFoundError, match=r"no\.txt"):
        reader(tmp_path / "no.txt")
    with pytest.raises(IsADirectoryError, match=re.escape(tmp_path.name)):
        reader(tmp_path)
    path = tmp_path / "sparse.npy"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a terabyte, of which nothing is stored
    assert isinstance(assert_contract(reader, path), ValueError)
    path.write_bytes("0 1 1\n".encode("utf-16-le"))  # without its mark
    assert isinstance(assert_contract(reader, path), ValueError)
    path.write_bytes(b"\xff\xfe0\0 ")  # UTF-16, cut in a character
    assert isinstance(assert_contract(reader, path), ValueError)


BAD_NUMBERS = [
    "-1",
    "+1",
    "1.0",
    "1_0",
    "0x1",
    "1e0",
    "\u0661",
    "9" * 30,
    "9" * 5000,
    str(1 << 63),
    "nan",
    "''",
]


@pytest.mark.parametrize("word", BAD_NUMBERS, ids=range(len(BAD_NUMBERS)))
def test_numbers_that_are_none_are_named(word: str, tmp_path: Path):
    path = tmp_path / "list.txt"
    for kind, line, at in (
        ("index", f"{word} 1 1", 3),
        ("index", f"1 {word} 1", 3),
        ("index", f"1 2 {word}", 3),
        ("index", f"1, {word}, 1", 3),
        ("named", f"{NAMES[0]} {NAMES[1]} {word}", 3),
        ("lfw", f"P_0 {word} 2", 3),
        ("lfw", f"P_0 1 P_1 {word}", 3),
        ("splits", f"{word}, 1, a/0, b/0, 1, 1", 3),
        ("splits", f"1, 1, a/0, b/0, {word}x, 1", 3),
    ):
        lines = [*READERS[kind][1][:2], line]
        refused(kind, path, text(lines).encode(), rf"list\.txt:{at}: expected .*, got ")
    for header in (f"{word} 2", f"2 {word}", word):
        refused("lfw", path, text([header, *LFW[1:]]).encode(), r"list\.txt:1: expected .*, got ")
    folds = [f"{line} {0 if i != 3 else word}" for i, line in enumerate(INDEX)]
    refused("index", path, text(folds).encode(), r"list\.txt:4: expected a fold number, got ")


@pytest.mark.parametrize(
    ("kind", "lines", "sentence"),
    [
        ("index", ["0,1,,1"], ":1: expected same to be 0 or 1, got ''"),
        ("index", [*INDEX[:3], "0,,1,1"], ":4: expected 3 words as in the lines before, got 4"),
        ("index", ["0,,1,1"], ":1: expected a whole number, got ''"),
        ("index", [*INDEX[:3], "0 1, 1"], ":4: expected .*got 2 words"),
        ("index", [*INDEX[:3], "1 8 1"], r":4: expected a row number in \[0, 8\), got 8"),
        ("index", [*INDEX[:3], "1 2 2"], ":4: expected same to be 0 or 1, got 2"),
        ("index", ["# nothing"], ": expected at least one pair"),
        ("index", [], ": expected at least one pair"),
        ("named", [*NAMED[:3], "P_0_0001.jpg P_0_0002.png 1"], ":4: expected a name .*got 'P_0_0002.png'"),
        ("named", [*NAMED[:3], "P_0_0001.jpg other/P_0_0002.jpg 1"], ":4: expected a name"),
        ("lfw", [*LFW[:2], "P_1 1 P_1 2", *LFW[3:]], ":3: expected 'name i j' .*got 'P_1' twice"),
        ("lfw", ["-2 -2", *LFW[1:]], ":1: expected a count in the header, got '-2'"),
        ("lfw", ["0 2", *LFW[1:]], ":1: expected counts above 0"),
        ("lfw", ["2 0"], ":1: expected counts above 0"),
        ("lfw", [*LFW, LFW[1]], ":10: expected 2 x 2 x 2 = 8 pairs after the header, got more"),
        ("lfw", LFW[:-1], ": expected 2 x 2 x 2 = 8 pairs after the header, got 7"),
        ("lfw", ["9000000000000000000 " * 2, *LFW[1:]], ": expected 9.* pairs after the header, got 8"),
        ("lfw", ["4 1", *LFW[1:]], ":3: expected 1 same and 1 different pairs in each fold, got 2 same"),
        ("lfw", [LFW[0], *sorted(LFW[1:], key=len)], ":5: expected 2 same .*got 4 same pairs in fold 1"),
        ("splits", ["x," * 5000, *SPLITS[1:]], ":1: expected a header with the columns"),
        (
            "splits",
            [f"{i}, 1, a/0, a/1, 1, 1" for i in range(3000)],
            ": expected 2 splits, got 3000",
        ),
    ],
)
def test_lists_that_are_wrong_are_named(kind: str, lines: list[str], sentence: str, tmp_path: Path):
    refused(kind, tmp_path / "list.txt", text(lines).encode(), rf"list\.txt{sentence}")


def test_splits_without_a_header_are_read_in_the_released_order(tmp_path: Path):
    with_header = read("splits", tmp_path / "a", text(SPLITS).encode())
    assert plain(read("splits", tmp_path / "a", text(SPLITS[1:]).encode())) == plain(with_header)
    good = SPLITS[1]
    for row in (good[:-3], good + ", 1", "x" + good[1:], good[:-1] + "no"):
        refused("splits", tmp_path / "a", text([row, *SPLITS[1:]]).encode(), "a:1: expected a header")


def test_names_that_are_no_images_each(tmp_path: Path):
    path = tmp_path / "pairs.txt"
    path.write_text(text(NAMED))
    for reader in (ev.read_lfw_pairs, ev.read_name_pairs):
        for names, error in ((NAMES[:1] * 2, ValueError), ("P_0_0001", TypeError), ([1, 2], TypeError)):
            with pytest.raises(error, match=r"^names: expected"):
                reader(path, names)
    same_file_name = [f"p{i}/1.jpg" for i in range(3)]
    path.write_text("p0/1.jpg ./p1/1.jpg 1\np0\\1.jpg p2/1.jpg 0\n")
    pairs = ev.read_name_pairs(path, same_file_name, 1)
    assert (pairs.first.tolist(), pairs.second.tolist()) == ([0, 0], [1, 2])


def test_memory_of_long_lists_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "pairs.txt"
    path.write_bytes(b"0 1 1\n2 3 0\n" * 100_000)
    monkeypatch.setattr("fuzz.readers.SECONDS", 60.0)  # of a good file
    monkeypatch.setattr("fuzz.readers.ROOM", 4 << 20)
    monkeypatch.setattr("fuzz.readers.MULTIPLE", 12)
    assert len(assert_contract(ev.read_index_pairs, path)) == 200_000
    path.write_bytes(b"12 " * (16 << 20))
    monkeypatch.setattr("fuzz.readers.MULTIPLE", 0)
    for reader, _ in READERS.values():
        assert isinstance(assert_contract(reader, path), ValueError)
