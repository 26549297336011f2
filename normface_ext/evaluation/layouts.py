"""What the lines of a list of pairs mean: each layout takes a line's cells and adds its pair to a table.

A layout says of the first line that does not fit what it expected there, and keeps nothing it is not sure of.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ..engine.files import clip, file_name, quoted
from ._text import refused, whole
from .pairs import Pairs, Table

Same = npt.NDArray[np.bool_]


def same_path(name: str) -> str:
    """With / for \\, and without ./ before it."""
    return name.replace("\\", "/").removeprefix("./")


def stem(name: str) -> str:
    return re.sub(r"\.[A-Za-z]{2,5}\Z", "", same_path(name).rpartition("/")[2])


class NumberedRows:
    """Images are row numbers."""

    names: tuple[str, ...] = ()
    what = "i j"

    def __init__(self, rows: int | None = None) -> None:
        self.rows = rows

    def image(self, where: str, word: str) -> int:
        row = whole(where, word, "a whole number")
        if self.rows is not None and row >= self.rows:
            raise refused(where, f"a row number in [0, {self.rows})", str(row))
        return row

    def numbered(self, where: str, name: str, number: str) -> int:
        raise refused(where, "row numbers, or `names` to look up images in", quoted(name))


class NamedRows:
    """Images are names of feature rows, each of one row."""

    what = "image image"

    def __init__(self, where: str, names: Sequence[str]) -> None:
        if isinstance(names, str):
            raise TypeError(f"{where}: expected a row of names, got one str")
        for row, name in enumerate(names):
            if not isinstance(name, str):
                raise TypeError(
                    f"{where}: expected names of type str, got {type(name).__name__} at row {row}"
                )
        self.where: str = where
        self.names: tuple[str, ...] = tuple(names)
        self.by_path: dict[str, int] = self._by(same_path)

    def _by(self, key: Callable[[str], str]) -> dict[str, int]:
        rows: dict[str, int] = {}
        for row, name in enumerate(self.names):
            image = key(name)
            if rows.setdefault(image, row) != row:
                raise refused(
                    self.where, "each image once", f"{quoted(image)} at rows {rows[image]} and {row}"
                )
        return rows

    @cached_property
    def by_stem(self) -> dict[str, int]:
        """Of LFW's layout alone: images of two folders may have one file name elsewhere."""
        return self._by(stem)

    def image(self, where: str, word: str) -> int:
        row = self.by_path.get(same_path(word))
        if row is None:
            raise refused(where, "a name of a feature row", f"{quoted(word)}, which is not in the names")
        return row

    def numbered(self, where: str, name: str, number: str) -> int:
        image = f"{name}_{whole(where, number, 'an image number'):04d}"
        row = self.by_stem.get(image)
        if row is None:
            raise refused(where, f"a feature row for image {clip(image, 60)}", "none in the names")
        return row


class CollectedRows:
    """Images are names, and get rows in the order in which they occur."""

    what = "image image"

    def __init__(self) -> None:
        self._rows: dict[str, int] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._rows)

    def image(self, where: str, word: str) -> int:
        if not word or word.isdecimal():
            raise refused(where, "the name of an image", quoted(word))
        return self._rows.setdefault(same_path(word), len(self._rows))

    def numbered(self, where: str, name: str, number: str) -> int:
        count = whole(where, number, "an image number")
        if name.isdecimal():  # a list of row numbers has such lines
            raise refused(where, "the name of a person", quoted(name))
        return self.image(where, f"{name}/{name}_{count:04d}.jpg")


Rows = NumberedRows | NamedRows | CollectedRows

_ZERO_ONE = {"0": False, "1": True}
_ANSWERS = (_ZERO_ONE, {"-1": False, "1": True}, {"false": False, "true": True}, {"0.0": False, "1.0": True})


class Answers:
    """Whether a pair is one person: 1 and 0; unless strict also 1 and -1, true and false; all in one way."""

    def __init__(self, strict: bool) -> None:
        self._ways: Sequence[Mapping[str, bool]] = _ANSWERS[:1] if strict else _ANSWERS

    def __call__(self, where: str, word: str) -> bool:
        ways = [way for way in self._ways if word.lower() in way]
        if not ways:
            plain = word.isdigit() and len(word) < 40
            raise refused(where, "same to be 0 or 1", word if plain else quoted(word, 40))
        self._ways = ways
        return ways[0][word.lower()]


class Layout:
    """Takes lines one by one; ``table`` has the pairs so far."""

    name = ""
    #: How many cells a line may have: of a line with others this layout has nothing to say.
    widths: tuple[int, ...] = (3, 4)

    def __init__(self, rows: Rows) -> None:
        self.rows: Rows = rows
        self.table: Table = Table()

    def take(self, where: str, cells: list[str]) -> None:
        """Adds what the line says, or raises ValueError."""
        raise NotImplementedError

    def end(self, path: str | os.PathLike[str], folds: int) -> Pairs:
        """All pairs, or ValueError where some are missing."""
        if len(self.table) == 0:
            raise refused(file_name(path), "at least one pair", "none")
        return self.table.pairs(None if self.table.fold else folds)


class Columns(Layout):
    """A pair in each line: two images, same, and in all lines or none a fold.

    Args:
        places: of "first", "second", "same" and "fold" their column, or None where a header names them.
        header: from the cells of the first line to the places; None: there is no header.
        labels: same of each pair, for lines without it.
    """

    def __init__(
        self,
        rows: Rows,
        name: str,
        places: Mapping[str, int],
        *,
        header: Callable[[str, list[str]], Mapping[str, int]] | None = None,
        labels: Same | None = None,
        strict: bool = False,
        fixed: bool = False,  # other columns are left alone
    ) -> None:
        super().__init__(rows)
        self.name: str = name
        self._places = places
        self._header = header
        self._labels = labels
        self._same, self._width = Answers(strict), 0
        least = 1 + max(places.values(), default=0)
        # A fold may follow; not where names are whatever stands there: "Al Gore 1 2" is LFW's, with a blank.
        self._fold_last = not fixed and labels is None and not isinstance(rows, CollectedRows)
        self.widths: tuple[int, ...] = tuple(range(least, 1000 if fixed else least + 1 + self._fold_last))
        if header is not None:  # any; what the header says decides
            self.widths = ()

    def _begin(self, cells: list[str]) -> None:
        self._width, last = len(cells), max(self._places.values()) + 1
        if self._fold_last and len(cells) > last:
            self._places = {**self._places, "fold": last}

    @property
    def expected(self) -> str:
        order = sorted(self._places, key=lambda part: self._places[part])
        words = " ".join("image" if part in ("first", "second") else part for part in order)
        words = words.replace("image image", self.rows.what)
        fold = f" or '{words} fold'" if self._fold_last and "fold" not in self._places else ""
        return f"'{words}'{fold}"

    def take(self, where: str, cells: list[str]) -> None:
        if self._header is not None:
            self._places, self._header, self._width = self._header(where, cells), None, len(cells)
            return
        if self.widths and len(cells) not in self.widths:
            raise refused(where, self.expected, f"{len(cells)} words")
        if not self._width:
            self._begin(cells)
        if len(cells) != self._width:
            raise refused(where, f"{self._width} words as in the lines before", str(len(cells)))
        places, at = self._places, len(self.table)
        if self._labels is None:
            same = self._same(where, cells[places["same"]])
        elif at < len(self._labels):
            same = bool(self._labels[at])
        else:
            raise refused(where, f"{len(self._labels)} pairs, as many as `labels`", "more")
        fold = whole(where, cells[places["fold"]], "a fold number") if "fold" in places else None
        first = self.rows.image(where, cells[places["first"]])
        self.table.add(first, self.rows.image(where, cells[places["second"]]), same)
        if fold is not None:
            self.table.fold.append(fold)

    def end(self, path: str | os.PathLike[str], folds: int) -> Pairs:
        if self._labels is not None and len(self.table) != len(self._labels):
            expected = f"{len(self._labels)} pairs, as many as `labels`"
            raise refused(file_name(path), expected, str(len(self.table)))
        return super().end(path, folds)


class TwoLines(Layout):
    """Lines "image label": the first and second, the third and fourth, ... are a pair (CALFW, CPLFW).

    Both lines of a pair have its label: 0 for different people, 1 or any other number for one person.
    """

    name = "two lines per pair, image same"
    widths: tuple[int, ...] = (2,)

    def __init__(self, rows: Rows) -> None:
        super().__init__(rows)
        self._half, self._image, self._label, self._most = "", 0, 0, 0

    def take(self, where: str, cells: list[str]) -> None:
        if len(cells) != 2:
            raise refused(where, "'image same' in two lines per pair", f"{len(cells)} words")
        image = self.rows.image(where, cells[0])
        label = whole(where, cells[1], "0, or a number above it for one person")
        if not self._half:
            self._half, self._image, self._label = where, image, label
            return
        if label != self._label:
            expected = "the same label as on the line before, the pair's other image"
            raise refused(where, expected, quoted(cells[1]))
        self.table.add(self._image, image, label > 0)
        self._half, self._most = "", max(self._most, label)

    def end(self, path: str | os.PathLike[str], folds: int) -> Pairs:
        if self._half:
            raise refused(self._half, "a second image of this pair on the next line", "the end of the file")
        same, pairs = sum(self.table.same), len(self.table)
        if self._most > 1 and 2 * same != pairs:  # lines "image person" look like this too
            expected = "as many pairs with 0 as with another label in two lines per pair"
            raise refused(file_name(path), expected, f"{same} of {pairs} with another")
        return super().end(path, folds)
