"""Pairs of feature rows: who is compared with whom, whether that is one person, and in which fold."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..engine.arguments import integer
from ._checks import as_rows, as_same, as_whole, columns


def folds_of(op: str, folds: object) -> int:
    return integer(op, "folds", folds, 1, 1 << 31)


@dataclass(frozen=True)
class Pairs:
    """P pairs of feature rows: ``first`` and ``second`` [P] int64, ``same`` [P] bool, ``fold`` [P] int64.

    ``same`` is given as bools or as numbers that are 0 and 1.

    Raises:
        ValueError: columns of different lengths; ``same`` with other values, by the first; rows that are no
            integers; folds that are no whole numbers.
    """

    first: npt.NDArray[np.int64]
    second: npt.NDArray[np.int64]
    same: npt.NDArray[np.bool_]
    fold: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        held = {
            "first": as_rows("Pairs", "first", self.first),
            "second": as_rows("Pairs", "second", self.second),
            "same": as_same("Pairs", self.same),
            "fold": as_whole("Pairs", "fold", self.fold),
        }
        columns("Pairs", held, "arrays")
        for name, value in held.items():
            object.__setattr__(self, name, value)  # what was checked is what is used

    def __len__(self) -> int:
        return len(self.same)

    @classmethod
    def in_folds(cls, first: object, second: object, same: object, folds: int = 10) -> Pairs:
        """Cuts same and different pairs, each in the order given, into ``folds`` runs of equal length.

        With fewer pairs than folds some folds stay empty.
        """
        op = "Pairs.in_folds"
        count = folds_of(op, folds)
        is_same = as_same(op, same)
        fold = np.zeros(len(is_same), dtype=np.int64)
        for kind in (is_same, ~is_same):
            pairs = int(kind.sum())
            fold[kind] = np.arange(pairs) * count // max(pairs, 1)
        return cls(as_rows(op, "first", first), as_rows(op, "second", second), is_same, fold)


class Table:
    """Pairs as they are read: numbers of eight bytes, not objects, however long the file is."""

    def __init__(self) -> None:
        self.first: array[int] = array("q")
        self.second: array[int] = array("q")
        self.fold: array[int] = array("q")
        self.same: bytearray = bytearray()

    def __len__(self) -> int:
        return len(self.same)

    def add(self, first: int, second: int, same: bool) -> None:
        self.first.append(first)
        self.second.append(second)
        self.same.append(same)

    def pairs(self, folds: int | None = None) -> Pairs:
        """In ``folds`` runs, or in the folds that were read."""
        first, second = (np.frombuffer(part, dtype=np.int64) for part in (self.first, self.second))
        same = np.frombuffer(self.same, dtype=np.bool_)
        if folds is None:
            return Pairs(first, second, same, np.frombuffer(self.fold, dtype=np.int64))
        return Pairs.in_folds(first, second, same, folds)
