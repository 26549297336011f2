"""One reader for lists of pairs: it tries every layout at once and drops those that a line contradicts.

What is left at the end is what the file says. Where two layouts are left that say different things, the
reader does not choose: it names the line where they part, and the argument that settles it.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..engine.arguments import choice, integer, shown
from ..engine.files import clip, file_name, quoted
from ._checks import as_same
from ._text import SEPARATORS, encoding_of, lines, refused, text_encoding
from .layout_lfw import Lfw, LfwTable
from .layouts import Answers, CollectedRows, Columns, Layout, NamedRows, NumberedRows, Rows, Same, TwoLines
from .lists import read_names
from .pairs import Pairs, folds_of

#: What a header may call a column, in small letters, without blanks, dashes and underscores.
_IMAGES = ("", "image", "img", "path", "file", "filename", "name", "id")
_HEADER = {
    "first": {"first", "i", "left"} | {word + mark for word in _IMAGES for mark in ("1", "a")} - {"1"},
    "second": {"second", "j", "right"} | {word + mark for word in _IMAGES for mark in ("2", "b")} - {"2"},
    "same": {"same", "issame", "label", "labels", "target", "match", "ismatch", "y"},
    "fold": {"fold", "split"},
}
_PARTS = tuple(_HEADER)
_SIGNS = ("tab", "comma", "semicolon", "blank")
LAYOUTS = ("image image same", "same image image", "lfw", "two lines")
"""What ``read_pairs`` may be told that a list is."""


@dataclass(frozen=True)
class PairList:
    """A list of pairs as it was read.

    ``names``: the image of each row, as given, or in the order of the list; empty where the list has row
    numbers. ``found``: what the reader took the file for, in one line.
    """

    pairs: Pairs
    names: tuple[str, ...]
    found: str


class _Reading:
    """One way to read the file, until a line does not fit."""

    def __init__(self, layout: Layout, separator: str) -> None:
        self.layout, self.separator = layout, separator
        self.of_kind, self.likely, self.cells, self.error = True, False, 0, ""
        self.at = array("q")  # the line of each pair

    def take(self, where: str, line: str) -> bool:
        self.likely = self.separator == "blank"  # of a line whose quotes are none
        try:
            cells = SEPARATORS[self.separator](where, line)
            self.likely, self.cells = len(cells) in self.layout.widths, len(cells)
            numbers = [cell.isdecimal() for cell in cells[:2]]
            self.of_kind = any(numbers) if isinstance(self.layout.rows, NumberedRows) else not all(numbers)
            self.layout.take(where, cells)
        except ValueError as error:
            self.error = str(error)
            return False
        if len(self.layout.table) > len(self.at):
            self.at.append(int(where.rpartition(":")[2]))
        return True

    def describe(self) -> str:
        sign = {"mixed": "blanks or commas"}.get(self.separator, f"{self.separator}s")
        return f"'{self.layout.name}' between {sign}"


def _plain(name: str) -> str:
    return "".join(name.lower().split()).replace("_", "").replace("-", "")


def _header(where: str, cells: list[str], known: Mapping[str, set[str]], needed: int) -> dict[str, int]:
    """The place of each column, by its name in the first line; the first ``needed`` have to be there."""
    plain = [_plain(cell) for cell in cells]
    places: dict[str, int] = {}
    for at, (part, names) in enumerate(known.items()):
        fits = [i for i, cell in enumerate(plain) if cell in names]
        if len(fits) > 1 or (not fits and at < needed):
            raise refused(where, f"a header with one column for `{part}`", quoted(", ".join(cells)))
        if fits:
            places[part] = fits[0]
    return places


def _given(
    columns: object, parts: tuple[str, ...], needed: int
) -> tuple[dict[str, int], dict[str, set[str]]]:
    """Of each part its column's number, or else its name in the header."""
    held = columns if isinstance(columns, Mapping) else {}
    numbers = all(type(value) is int and 0 <= value < 1000 for value in held.values())
    words = all(isinstance(value, str) for value in held.values())
    enough = set(parts[:needed]) <= set(held) <= set(parts)
    if not enough or not (numbers or words) or len(set(held.values())) != len(held):
        raise ValueError(
            f"read_pairs: expected `columns` to say of {', '.join(parts[:needed])} (and of fold) which"
            f" column it is, by number from 0 or by name in the header, got {shown(columns)}"
        )
    if numbers:
        return {part: int(held[part]) for part in parts if part in held}, {}
    return {}, {part: {_plain(held[part])} for part in parts if part in held}


def _layouts(make: Callable[[], Rows], columns: object, labels: Same | None) -> list[tuple[str, Layout]]:
    """The layouts to try, each with the name under which it is asked for."""
    parts = _PARTS if labels is None else ("first", "second", "fold")
    needed = 3 if labels is None else 2

    def with_header(known: Mapping[str, set[str]]) -> Columns:
        def header(where: str, cells: list[str]) -> Mapping[str, int]:
            return _header(where, cells, known, needed)

        return Columns(make(), "columns named in a header", {}, header=header, labels=labels)

    if columns is not None:
        places, known = _given(columns, parts, needed)
        if known:
            return [(LAYOUTS[0], with_header(known))]
        return [(LAYOUTS[0], Columns(make(), "columns as given", places, labels=labels, fixed=True))]
    name = "image image" if labels is not None else LAYOUTS[0]
    found: list[tuple[str, Layout]] = [
        (
            LAYOUTS[0],
            Columns(make(), name, {part: i for i, part in enumerate(parts[:needed])}, labels=labels),
        ),
        (LAYOUTS[0], with_header({part: _HEADER[part] for part in parts})),
    ]
    if labels is None and not isinstance(make(), NumberedRows):  # row numbers are read as "i j same" alone
        places = {"same": 0, "first": 1, "second": 2}
        found += [
            (LAYOUTS[1], Columns(make(), LAYOUTS[1], places)),
            (LAYOUTS[2], Lfw(make())),
            (LAYOUTS[2], LfwTable(make())),
            (LAYOUTS[3], TwoLines(make())),
        ]
    return found


def _labels(labels: object, encoding: str | None) -> Same | None:
    if labels is None or not isinstance(labels, (str, os.PathLike)):
        return None if labels is None else as_same("read_pairs", labels)
    answer, found = Answers(strict=False), []
    for at, (where, line) in enumerate(lines(labels, encoding)):
        if at or _plain(line) not in _HEADER["same"]:
            found.append(answer(where, line))
    return as_same("read_pairs", found)


def _why(dead: list[_Reading]) -> str:
    """The sentence of the readings that came farthest, which are those that end here."""
    kind = [reading for reading in dead if reading.of_kind] or dead
    likely = [reading for reading in kind if reading.likely] or [max(kind, key=lambda one: one.cells)]
    if any(len(reading.layout.table) for reading in dead):
        return likely[0].error
    ways = "`layout` names one, `columns` what a header has, `labels` same of two columns"
    return f"{likely[0].error}; no other layout fits: {ways}"


def _same_pairs(path: str | os.PathLike[str], one: _Reading, other: _Reading) -> None:
    """Raises where two readings that both fit the whole file say different things."""
    settles = "`separator`" if one.layout.name == other.layout.name else "`layout` or `columns`"
    got = f"two: {one.describe()} and {other.describe()}; {settles} settles it"
    a, b = one.layout, other.layout
    if len(a.table) != len(b.table):
        raise refused(f"{file_name(path)}:{min(one.at[0], other.at[0])}", "lines with one meaning", got)
    columns = ((a.table.first, b.table.first), (a.table.second, b.table.second), (a.table.same, b.table.same))
    parted = np.zeros(len(a.table), dtype=bool)
    for left, right in (*columns, *([(a.table.fold, b.table.fold)] if a.table.fold and b.table.fold else [])):
        parted |= np.asarray(left) != np.asarray(right)
    if bool(a.table.fold) != bool(b.table.fold):
        parted[:] = True
    if a.rows.names != b.rows.names:
        rows = [name == more for name, more in zip(a.rows.names, b.rows.names, strict=False)]
        wrong = rows.index(False) if False in rows else 0
        parted |= (np.asarray(a.table.first) >= wrong) | (np.asarray(a.table.second) >= wrong)
    if parted.any():
        raise refused(f"{file_name(path)}:{one.at[int(parted.argmax())]}", "lines with one meaning", got)


def _end(path: str | os.PathLike[str], left: list[_Reading], folds: int, encoding: str) -> PairList:
    """What the file says, if it says one thing."""
    whole: list[tuple[_Reading, Pairs]] = []
    error: ValueError | None = None
    for reading in left:
        try:
            whole.append((reading, reading.layout.end(path, folds)))
        except ValueError as found:  # pairs are missing: another reading may have them
            error = error or found
    if not whole:
        raise error or refused(file_name(path), "at least one pair", "none")
    reading, pairs = whole[0]
    for other, _ in whole[1:]:
        _same_pairs(path, reading, other)
    names, table = reading.layout.rows.names, reading.layout.table
    same, given = int(pairs.same.sum()), len(np.unique(pairs.fold))
    parts = [
        reading.describe(),
        encoding.removesuffix("-sig").upper(),
        f"{len(pairs)} pairs, {same} of them same",
        f"{given} folds" if table.fold else f"cut into {folds} folds",
        f"{len(names)} names" if names else "row numbers",
    ]
    return PairList(pairs, names, f"{file_name(path)}: {', '.join(parts)}")


def _kinds(names: object, rows: int | None, encoding: str | None) -> list[Callable[[], Rows]]:
    """What images may be; each reading has the names that it collects for itself."""
    if names is not None:
        if isinstance(names, (str, os.PathLike)):
            named = NamedRows(file_name(names), read_names(names, encoding=encoding))
        else:
            named = NamedRows("names", names)  # type: ignore[arg-type]
        return [lambda: named]
    return [lambda: NumberedRows(rows)] + [CollectedRows] * (rows is None)


def _signs_for(rows: Rows, signs: tuple[str, ...]) -> tuple[str, ...]:
    """Lines of numbers may be separated each in its own way; nothing in them can be taken for a sign."""
    return ("mixed", *signs) if isinstance(rows, NumberedRows) and signs == _SIGNS else signs


def read_pairs(
    path: str | os.PathLike[str],
    names: str | os.PathLike[str] | Sequence[str] | None = None,
    *,
    rows: int | None = None,
    labels: str | os.PathLike[str] | Sequence[object] | None = None,
    columns: Mapping[str, int | str] | None = None,
    layout: str | None = None,
    separator: str | None = None,
    encoding: str | None = None,
    folds: int = 10,
) -> PairList:
    """A list of pairs in whichever of the usual layouts it is, and what it was found to be.

    Lines are "image image same", "same image image", LFW's with or without the header, "image same" in two
    lines per pair (CALFW, CPLFW), or "image image" with ``labels``. The first two may end with a fold, where
    images are row numbers or of ``names``.
    Tabs, commas, semicolons or blanks separate; a name with blanks stands between tabs, commas, or double
    quotes. A header such as "image1,image2,label" is known by its words; ``columns`` names other ones. same
    is 1 and 0, 1 and -1, 1.0 and 0.0, or true and false. A line that starts with # is a comment.

    Images are names of feature rows. Without ``names``, whole numbers are row numbers, in lines "i j same",
    and other words are names that get rows in the order in which they occur (``PairList.names``).

    Args:
        names: the image of each feature row, or a file with a line for each; for LFW's layout folders and
            extensions do not count.
        rows: how many feature rows there are: images are row numbers below it.
        labels: same of each pair, for a list of two columns: a file with a line for each, perhaps below a
            header, or values.
        columns: where first, second, same and fold are: {"first": "left", "second": "right", "same": "y"}
            by names in the header, or {"same": 0, "first": 1, "second": 2} by number, without a header.
        layout: one of LAYOUTS, where the file would bear more than one.
        separator: tab, comma, semicolon or blank, likewise.
        encoding: such as "latin-1"; UTF-8 and UTF-16 with its mark are known.
        folds: where the file has none, same and different pairs are each cut into so many runs.

    Raises:
        OSError: as ``open`` has it.
        ValueError: a line that fits no layout, an image without a row, a file that bears two meanings,
            naming file, line, and what settles it.
    """
    op = "read_pairs"
    count, encoding = folds_of(op, folds), text_encoding(op, encoding)
    if names is not None and rows is not None:
        raise ValueError(f"{op}: expected `names` or `rows`, got both")
    rows = None if rows is None else integer(op, "rows", rows, 0)
    answers = _labels(labels, encoding)
    kinds = _kinds(names, rows, encoding)
    wanted = LAYOUTS if layout is None else (choice(op, "layout", layout, LAYOUTS),)
    signs = _SIGNS if separator is None else (choice(op, "separator", separator, _SIGNS),)
    alive = [
        _Reading(held, sign)
        for make in kinds
        for sign in _signs_for(make(), signs)
        for name, held in _layouts(make, columns, answers)
        if name in wanted
    ]
    if not alive:
        raise ValueError(f"{op}: expected `names` for layout {layout!r}, got row numbers")
    for where, line in lines(path, encoding):
        if line.startswith("#"):
            continue
        fits = [reading.take(where, line) for reading in alive]
        if not any(fits):
            raise ValueError(clip(_why(alive)))
        alive = [reading for reading, fit in zip(alive, fits, strict=True) if fit]
    return _end(path, alive, count, encoding or encoding_of(path))
