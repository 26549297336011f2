"""Lists of pairs: the LFW pairs file, plain "i j same" lines, and "image image same" lines."""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ..engine.arguments import integer
from ..engine.files import clip, file_name, quoted
from ._checks import as_rows, as_same, as_whole, columns
from ._text import lines, refused, whole, words_of


def folds_of(op: str, folds: object) -> int:
    return integer(op, "folds", folds, 1, 1 << 31)


_Line: TypeAlias = "tuple[str, list[str]]"


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


class _Table:
    """Pairs as they are read: numbers of eight bytes, not objects, however long the file is."""

    def __init__(self) -> None:
        self.first, self.second, self.fold = array("q"), array("q"), array("q")
        self.same = bytearray()

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


def read_names(path: str | os.PathLike[str]) -> list[str]:
    """One image name for each feature row, a line each.

    Raises:
        OSError, ValueError: a file that cannot be read or is no text, naming file and line.
    """
    return [line for _, line in lines(path)]


def _pair_lines(path: str | os.PathLike[str]) -> Iterator[_Line]:
    """("file:line", words) for every line that is no # comment."""
    for where, line in lines(path):
        if not line.startswith("#"):
            yield where, words_of(line)


def _rows_by_name(where: str, names: Sequence[str], key: Callable[[str], str]) -> dict[str, int]:
    if isinstance(names, str):
        raise TypeError(f"{where}: expected a row of names, got one str")
    rows: dict[str, int] = {}
    for row, name in enumerate(names):
        if not isinstance(name, str):
            raise TypeError(f"{where}: expected names of type str, got {type(name).__name__} at row {row}")
        image = key(name)
        if rows.setdefault(image, row) != row:
            got = f"{quoted(image)} at rows {rows[image]} and {row}"
            raise refused(where, "each image once", got)
    return rows


def _path(name: str) -> str:
    return name.replace("\\", "/").removeprefix("./")


def _stem(name: str) -> str:
    return re.sub(r"\.[A-Za-z]{2,5}\Z", "", _path(name).rpartition("/")[2])


def read_lfw_pairs(path: str | os.PathLike[str], names: Sequence[str]) -> Pairs:
    """The LFW "View 2" file (pairs.txt): a header "folds pairs", then per fold same and different pairs.

    Same pairs are lines "name i j", different ones "name i other j" of two names; image i of a name is the
    feature row called ``name_000i``. Each fold has ``pairs`` same and ``pairs`` different lines, 10 and 300
    in LFW.

    Args:
        names: the image of each feature row, such as ``Al_Gore/Al_Gore_0003.jpg`` or ``Al_Gore_0003``:
            folders and extensions are ignored.

    Raises:
        OSError: as ``open`` has it.
        ValueError: a malformed line, a missing image, a fold with other numbers of same and different pairs,
            naming file and line.
    """
    return _lfw_pairs(path, _pair_lines(path), _rows_by_name("names", names, _stem))


def _lfw_pairs(path: str | os.PathLike[str], found: Iterator[_Line], rows: dict[str, int]) -> Pairs:
    where, header = next(found, (file_name(path), []))
    if len(header) not in (1, 2):
        raise refused(where, "a header line 'folds pairs', such as '10 300'", f"{len(header)} words")
    counts = [whole(where, word, "a count in the header") for word in header]
    folds, per_kind = counts if len(counts) == 2 else (1, counts[0])
    if folds == 0 or per_kind == 0:
        raise refused(where, "counts above 0 in the header", f"{folds} folds of {per_kind} pairs")
    expected = f"{folds} x 2 x {per_kind} = {2 * folds * per_kind} pairs after the header"

    def row_of(where: str, name: str, number: str) -> int:
        image = f"{name}_{whole(where, number, 'an image number'):04d}"
        if image not in rows:
            raise refused(where, f"a feature row for image {clip(image, 60)}", "none in the names")
        return rows[image]

    table = _Table()
    same_in_fold = 0
    for where, words in found:
        if len(words) not in (3, 4):
            raise refused(where, "'name i j' or 'name i other j'", f"{len(words)} words")
        if len(words) == 4 and words[0] == words[2]:
            raise refused(where, "'name i j' for two images of one person", f"{quoted(words[0])} twice")
        if len(table) == 2 * folds * per_kind:
            raise refused(where, expected, "more")
        first = row_of(where, words[0], words[1])
        table.add(first, row_of(where, words[-2 if len(words) == 4 else 0], words[-1]), len(words) == 3)
        fold, place = divmod(len(table) - 1, 2 * per_kind)
        table.fold.append(fold)
        same_in_fold += len(words) == 3
        if place == 2 * per_kind - 1:
            if same_in_fold != per_kind:
                raise refused(
                    where,
                    f"{per_kind} same and {per_kind} different pairs in each fold",
                    f"{same_in_fold} same pairs in fold {fold + 1}, which ends here",
                )
            same_in_fold = 0
    if len(table) != 2 * folds * per_kind:
        raise refused(file_name(path), expected, str(len(table)))
    return table.pairs()


def _labelled(
    path: str | os.PathLike[str],
    found: Iterator[_Line],
    folds: int,
    what: str,
    row_of: Callable[[str, str], int],
) -> Pairs:
    """Lines of two images, same, and in all or none a fold."""
    table, width = _Table(), 0
    for where, words in found:
        if len(words) not in (3, 4):
            raise refused(where, f"'{what} same' or '{what} same fold'", f"{len(words)} words")
        width = width or len(words)
        if len(words) != width:
            raise refused(where, f"{width} words as in the lines before", str(len(words)))
        same = whole(where, words[2], "same to be 0 or 1")
        if same > 1:
            raise refused(where, "same to be 0 or 1", str(same))
        table.add(row_of(where, words[0]), row_of(where, words[1]), same == 1)
        if width == 4:
            table.fold.append(whole(where, words[3], "a fold number"))
    if len(table) == 0:
        raise refused(file_name(path), "at least one pair", "none")
    return table.pairs(folds if width == 3 else None)


def read_index_pairs(path: str | os.PathLike[str], folds: int = 10, *, rows: int | None = None) -> Pairs:
    """Lines "i j same" or "i j same fold": row numbers from 0, same is 0 or 1.

    Words stand between blanks, or between commas; a line that starts with # is a comment. Without a fold
    column, same and different pairs are each cut into ``folds`` runs in file order.

    Args:
        rows: how many feature rows there are, if known: a line that names another is refused.

    Raises:
        OSError: as ``open`` has it.
        ValueError: a malformed line, naming file and line.
    """
    count = folds_of("read_index_pairs", folds)

    def row_of(where: str, word: str) -> int:
        row = whole(where, word, "a whole number")
        if rows is not None and row >= rows:
            raise refused(where, f"a row number in [0, {rows})", str(row))
        return row

    return _labelled(path, _pair_lines(path), count, "i j", row_of)


def read_name_pairs(path: str | os.PathLike[str], names: Sequence[str], folds: int = 10) -> Pairs:
    """Lines "image image same" or "image image same fold", else as for ``read_index_pairs``.

    Args:
        names: the image of each feature row. A line has the same name, with its folders and extension.

    Raises:
        OSError: as ``open`` has it.
        ValueError: a malformed line or an image that has no row, naming file and line.
    """
    count = folds_of("read_name_pairs", folds)
    return _name_pairs(path, _pair_lines(path), _rows_by_name("names", names, _path), count)


def _name_pairs(
    path: str | os.PathLike[str], found: Iterator[_Line], rows: dict[str, int], folds: int
) -> Pairs:
    def row_of(where: str, word: str) -> int:
        row = rows.get(_path(word))
        if row is None:
            raise refused(where, "a name of a feature row", f"{quoted(word)}, which is not in the names")
        return row

    return _labelled(path, found, folds, "image image", row_of)


def read_pairs_of_names(
    path: str | os.PathLike[str], names: Sequence[str], folds: int, names_path: str | os.PathLike[str]
) -> Pairs:
    """Whichever of ``read_lfw_pairs``, known by its header, and ``read_name_pairs`` the file is for."""
    count, where = folds_of("read_pairs_of_names", folds), file_name(names_path)
    found = _pair_lines(path)
    first = next(found, None)
    if first is None or len(first[1]) < 3:
        return _lfw_pairs(path, chain([first] if first else [], found), _rows_by_name(where, names, _stem))
    return _name_pairs(path, chain([first], found), _rows_by_name(where, names, _path), count)
