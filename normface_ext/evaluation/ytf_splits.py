"""The splits of YouTube Faces: pairs of videos by name, in ten folds."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..engine.arguments import integer
from ..engine.files import file_name, quoted
from ._checks import as_same, as_whole, columns
from ._text import lines, refused, whole


@dataclass(frozen=True)
class VideoPairs:
    """P pairs of videos by name: ``first``, ``second``; ``same`` [P] bool; ``fold`` [P] int64.

    ``same`` is given as bools or as numbers that are 0 and 1.

    Raises:
        ValueError: columns of different lengths; ``same`` with other values, by the first; folds that are no
            whole numbers.
        TypeError: a name that is no str.
    """

    first: tuple[str, ...]
    second: tuple[str, ...]
    same: npt.NDArray[np.bool_]
    fold: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        op = "VideoPairs"
        for name, names in (("first", self.first), ("second", self.second)):
            row = isinstance(names, (tuple, list)) or (isinstance(names, np.ndarray) and names.ndim == 1)
            wrong = [video for video in names if not isinstance(video, str)] if row else [names]
            if wrong:
                got = ", ".join(sorted({type(video).__name__ for video in wrong}))[:100]
                raise TypeError(f"{op}: expected `{name}` to be names of videos, each a str, got {got}")
        same, fold = as_same(op, self.same), as_whole(op, "fold", self.fold)
        columns(op, {"first": self.first, "second": self.second, "same": same, "fold": fold}, "columns")
        object.__setattr__(self, "same", same)  # what was checked is what is used
        object.__setattr__(self, "fold", fold)

    def __len__(self) -> int:
        return len(self.same)

    @property
    def videos(self) -> list[str]:
        """The name of every video in some pair, once, sorted."""
        return sorted({*self.first, *self.second})


#: What ``splits.txt`` has as it is released: split number, pair number, two names, "is same" twice.
_RELEASED = {"split": 0, "first": 2, "second": 3, "same": 4}


def _columns(where: str, cells: list[str]) -> dict[str, int]:
    """Where the columns are, by their names in the header; of several "is same" the first."""
    names = [" ".join(cell.lower().split()) for cell in cells]
    meanings = {
        "split": lambda name: name.startswith("split"),
        "first": lambda name: name == "first name",
        "second": lambda name: name == "second name",
        "same": lambda name: name in ("is same", "same"),
    }
    found = {}
    for meaning, fits in meanings.items():
        places = [i for i, name in enumerate(names) if fits(name)]
        if not places:
            expected = "a header with the columns 'split number', 'first name', 'second name' and 'is same'"
            raise refused(where, expected, quoted(", ".join(cells)))
        found[meaning] = places[0]
    return found


def _is_released_row(cells: list[str]) -> bool:
    numbers = (cells[i] for i in (0, 1, 4, 5)) if len(cells) == 6 else ("",)
    return all(cell.isdecimal() for cell in numbers)


def read_ytf_splits(
    path: str | os.PathLike[str], *, splits: int | None = 10, pairs_per_split: int | None = 500
) -> VideoPairs:
    """The splits file of YouTube Faces: a header line, then a comma-separated row per pair of videos.

    The released ``splits.txt`` has the columns "split number, pair number, first name, second name, is
    same, is same". They are found by name, so that other orders are read too; the first "is same" counts.
    Without a header, rows of six columns are read in the released order. Videos are named "person/number".

    Args:
        path: the file.
        splits: how many there must be, 10 in the data set; ``None`` accepts any number.
        pairs_per_split: likewise, 500 in the data set.

    Raises:
        OSError: as ``open`` has it.
        ValueError: a malformed header or row, a pair of a video with itself, or a file with other numbers of
            splits or pairs, naming file and line.
    """
    op, name = "read_ytf_splits", file_name(path)
    splits = None if splits is None else integer(op, "splits", splits, 1)
    pairs_per_split = None if pairs_per_split is None else integer(op, "pairs_per_split", pairs_per_split, 1)
    column: dict[str, int] = {}
    width = 0
    first: list[str] = []
    second: list[str] = []
    same: list[bool] = []
    fold: list[int] = []
    for where, line in lines(path):
        cells = [cell.strip() for cell in line.split(",")]
        if not column:
            width = len(cells)
            released = _is_released_row(cells)
            column = _RELEASED if released else _columns(where, cells)
            if not released:
                continue
        if len(cells) != width:
            raise refused(where, f"{width} columns as in the header", str(len(cells)))
        one, other, flag = (cells[column[part]] for part in ("first", "second", "same"))
        split = whole(where, cells[column["split"]], "a split number")
        if flag not in ("0", "1"):
            raise refused(where, "'is same' to be 0 or 1", quoted(flag))
        if not one or not other or one == other:
            raise refused(where, "the names of two videos", f"{quoted(one)} and {quoted(other)}")
        first.append(one)
        second.append(other)
        same.append(flag == "1")
        fold.append(split)
    if not column:
        raise refused(name, "a header and a row per pair", "an empty file")
    numbers, counts = np.unique(np.array(fold, dtype=np.int64), return_counts=True)
    if splits is not None and len(numbers) != splits:
        raise refused(name, f"{splits} splits", f"{len(numbers)}: {numbers[:20].tolist()}")
    wrong = counts != pairs_per_split
    if pairs_per_split is not None and wrong.any():
        at = int(wrong.argmax())
        found = f"{counts[at]} in split {numbers[at]}"
        raise refused(name, f"{pairs_per_split} pairs in each split", found)
    return VideoPairs(tuple(first), tuple(second), np.array(same, dtype=bool), np.array(fold, dtype=np.int64))
