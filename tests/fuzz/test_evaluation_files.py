"""Mutated files for the readers of normface_ext.evaluation: pairs, names, splits and features."""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzz.readers import run

from normface_ext import evaluation as ev

ROUNDS = [
    pytest.param(range(60), id="slice"),
    pytest.param(range(1000, 1500), id="more", marks=pytest.mark.slow),
    pytest.param(range(1000, 6000), id="long", marks=pytest.mark.fuzz),
]
NAMES = [f"P_{i}_{j:04d}.jpg" for i in range(4) for j in (1, 2)]
ROWS = {name: row for row, name in enumerate(NAMES)}


def rows_of(data: bytes) -> list[str]:
    """Lines with something on them, written once more."""
    wide = data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    whole = data.decode("utf-16" if wide else "utf-8-sig")
    return [line.strip(" \t") for line in re.split("\r\n|\r|\n", whole) if line.strip(" \t")]


def cells(line: str) -> list[str]:
    return [cell.strip(" \t") for cell in line.split(",")] if "," in line else line.split()


def is_number(word: str) -> bool:
    return word.isascii() and word.isdigit() and int(word) < 1 << 63


def listed(data: bytes) -> list[list[str]]:
    return [cells(line) for line in rows_of(data) if line[0] != "#"]


def labelled_is_right(row: Callable[[str], int]) -> Callable[[ev.Pairs, bytes], bool]:
    def right(pairs: ev.Pairs, data: bytes) -> bool:
        table = listed(data)
        first, second, same = ([line[i] for line in table] for i in range(3))
        labels = list(map(int, same))
        folds = [int(line[3]) for line in table if len(line) == 4]
        return (
            pairs.first.tolist() == list(map(row, first))
            and pairs.second.tolist() == list(map(row, second))
            and pairs.same.tolist() == labels
            and all(map(is_number, same))
            and {len(line) for line in table} in ({3}, {4})
            and (pairs.fold.tolist() == folds if folds else bool((pairs.fold < 2).all()))
        )

    return right


def index_row(word: str) -> int:
    return int(word) if is_number(word) and int(word) < 8 else -1


def name_row(word: str) -> int:
    return ROWS[word.replace("\\", "/").removeprefix("./")]


def lfw_is_right(pairs: ev.Pairs, data: bytes) -> bool:
    header, *table = listed(data)
    folds, per_kind = map(int, header if len(header) == 2 else ["1", *header])
    for at, line in enumerate(table):
        images = [(line[0], line[1]), (line[-2] if len(line) == 4 else line[0], line[-1])]
        rows = [ROWS[f"{name}_{int(number):04d}.jpg"] for name, number in images if is_number(number)]
        same = images[0][0] == images[1][0]
        if [pairs.first[at], pairs.second[at]] != rows or pairs.same[at] != same or same != (len(line) == 3):
            return False
    kinds = [(pairs.fold[pairs.same == kind] == fold).sum() for kind in (0, 1) for fold in range(folds)]
    return len(pairs) == len(table) == 2 * folds * per_kind and set(kinds) == {per_kind} and min(kinds) > 0


def splits_are_right(pairs: ev.VideoPairs, data: bytes) -> bool:
    table = [[cell.strip() for cell in line.split(",")] for line in rows_of(data)]
    names = ["split number", "pair number", "first name", "second name", "is same", "is same"]
    if not table[0][0].isdigit():
        names = [" ".join(cell.lower().split()) for cell in table.pop(0)]
    names = ["split number" if name.startswith("split") else name for name in names]
    names = ["is same" if name == "same" else name for name in names]
    split, first, second, same = (
        [line[names.index(name)] for line in table]
        for name in ("split number", "first name", "second name", "is same")
    )
    return (
        (pairs.first, pairs.second) == (tuple(first), tuple(second))
        and all(a and b and a != b for a, b in zip(first, second, strict=True))
        and ["01"[int(flag)] for flag in pairs.same] == same
        and all(map(is_number, split))
        and pairs.fold.tolist() == list(map(int, split))
        and sorted(map(split.count, set(split))) == [2, 2]
    )


LFW = """2 2
P_0 1 2\nP_1\t1\t2\nP_0 1 P_1 2\nP_1 1 P_2 2
P_2 1 2\nP_3 1 2\nP_2 1 P_3 2\nP_3 1 P_0 2\n"""
INDEX = "# i j same\n0 1 1\n2\t3\t1\n0, 3, 0\n2 5 0\n4 5 1\n6,7,1\n\n4 7 0\n6 1 0\n"
FOLDS = "0 1 1 5\n2 3 1 6\n0 3 0 5\n2 5 0 6\n"
NAMED = "".join(
    f"{NAMES[i]} {NAMES[j]} {int(i // 2 == j // 2)}\n" for i, j in ((0, 1), (2, 3), (0, 3), (4, 7))
)
SPLITS = """split number, pair number, first name, second name, is same, is same
1, 1, a/0, a/1, 1, 1\n1, 2, a/0, b/1, 0, 0\n2, 1, b/0, b/1, 1, 1\n2, 2, b/0, a/1, 0, 0\n"""

LISTS: dict[str, tuple[Callable[[Path], Any], str, Callable[[Any, bytes], bool]]] = {
    "lfw": (lambda path: ev.read_lfw_pairs(path, NAMES), LFW, lfw_is_right),
    "index": (lambda path: ev.read_index_pairs(path, 2, rows=8), INDEX, labelled_is_right(index_row)),
    "folds": (lambda path: ev.read_index_pairs(path, 2, rows=8), FOLDS, labelled_is_right(index_row)),
    "named": (lambda path: ev.read_name_pairs(path, NAMES, 2), NAMED, labelled_is_right(name_row)),
    "names": (ev.read_names, "\n".join(NAMES), lambda names, data: names == rows_of(data)),
    "splits": (
        lambda path: ev.read_ytf_splits(path, splits=2, pairs_per_split=2), SPLITS, splits_are_right
    ),
}  # fmt: skip


@pytest.mark.parametrize("seeds", ROUNDS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("kind", LISTS)
def test_list(tmp_path: Path, kind: str, encoding: str, seeds: range) -> None:
    reader, good, right = LISTS[kind]
    read, refused = run(reader, "list.txt", good.encode(encoding), seeds, tmp_path, right=right)
    # In UTF-16 a byte more or less spoils all that follows: there the good file alone may be read.
    assert refused > 0 and (read > 0 or encoding == "utf-16")


@pytest.mark.parametrize("seeds", ROUNDS)
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f4", ">f8", "<f2", "<i4"])
def test_features(tmp_path: Path, dtype: str, order: str, seeds: range) -> None:
    good = io.BytesIO()
    np.save(good, np.asarray(np.random.default_rng(0).normal(0, 50, (8, 6)), dtype=dtype, order=order))

    def is_right(value: np.ndarray, data: bytes) -> bool:
        """What NumPy reads, from a file without bytes that it leaves; the same numbers, none of them cut."""
        file = io.BytesIO(data)
        with np.errstate(all="ignore"):
            truth = np.load(file, allow_pickle=False)
        assert file.read() == b"" and truth.ndim == 2 and truth.dtype.kind in "iuf"
        assert value.dtype in (np.float32, np.float64) and np.isfinite(value).all()
        return value.shape == truth.shape and np.array_equal(value, truth)

    read, refused = run(ev.read_features, "F.npy", good.getvalue(), seeds, tmp_path, right=is_right)
    assert read > 0 and refused > 0
