"""The harness of the reader fuzz lane finds what it is there to find."""

from __future__ import annotations

import operator
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from fuzz import readers
from fuzz.readers import CEILING, LONGEST, assert_contract, mutations, run


def loop(path: Path) -> None:
    while True:
        pass


def sentence(text: str, kind: type[Exception] = ValueError):
    def read(path: Path) -> None:
        raise kind(text.format(path=path))

    return read


@pytest.mark.parametrize(
    ("read", "part"),
    [
        (loop, "more than 0.2 s"),
        (lambda path: np.ones(64 << 20, np.uint8), "MiB of memory"),
        (lambda path: np.ones(2 * CEILING, np.uint8), "MemoryError"),
        (sentence("{path}", KeyError), "KeyError"),
        (sentence("{path}", AssertionError), "AssertionError"),
        (lambda path: b"\xff".decode(), "UnicodeDecodeError"),
        (sentence("something is wrong"), "without the file's name"),
        (sentence("{path}" + "x" * LONGEST), "a message of"),
        (lambda path: exec("pass"), "exec"),
        (lambda path: subprocess.run(["true"], check=True), "subprocess"),
        (lambda path: path.write_text("other"), "open"),
        (lambda path: os.remove(path), "os.remove"),
    ],
)
def test_a_broken_contract_is_found(tmp_path, read, part, monkeypatch):
    monkeypatch.setattr(readers, "SECONDS", 0.2)
    path = tmp_path / "file.txt"
    path.write_text("content")
    with pytest.raises(AssertionError, match=part):
        assert_contract(read, path)


def test_a_kept_contract_passes(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("content")
    assert assert_contract(Path.read_text, path) == "content"
    assert isinstance(assert_contract(sentence("{path}: bad"), path), ValueError)
    list_of_two = sentence("{path}: bad\n" + "x" * LONGEST)
    assert isinstance(assert_contract(list_of_two, path, longest=1000), ValueError)


def test_mutations_repeat_and_differ():
    good = b"name 12 -3.5\nother 7\n" * 5
    found = [mutations(good, seed) for seed in range(300)]
    assert found == [mutations(good, seed) for seed in range(300)]
    assert len(set(found)) > 250
    assert mutations(b"", 1) is not None


def test_a_wrong_value_is_found_with_its_seed(tmp_path):
    """A reader that forgets the bytes behind the tenth."""
    good = b"0123456789abcdef"
    with pytest.raises(AssertionError, match=r"seed \d+, kept as .*read wrong"):
        run(lambda path: path.read_bytes()[:16], "n.txt", good, range(50), tmp_path, right=operator.eq)
    assert run(Path.read_bytes, "n.txt", good, range(50), tmp_path, right=operator.eq) == (50, 0)
