"""Readers of lists in one known layout each: names of images, LFW's pairs, pairs of rows, pairs of names."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ._text import SEPARATORS, lines, refused, text_encoding
from .layout_lfw import Lfw
from .layouts import Columns, Layout, NamedRows, NumberedRows, Rows
from .pairs import Pairs, folds_of


def read_names(path: str | os.PathLike[str], *, encoding: str | None = None) -> list[str]:
    """One image name for each feature row, a line each.

    Args:
        encoding: of the file, where it is neither UTF-8 nor UTF-16 with its mark: such as "latin-1".

    Raises:
        OSError, ValueError: a file that cannot be read or is no text, naming file and line.
    """
    return [line for _, line in lines(path, text_encoding("read_names", encoding))]


def _read(path: str | os.PathLike[str], layout: Layout, folds: int) -> Pairs:
    split = SEPARATORS["mixed"]
    for where, line in lines(path):
        if not line.startswith("#"):
            layout.take(where, split(where, line))
    return layout.end(path, folds)


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
    rows = NamedRows("names", names)
    if len(rows.by_stem) == 0:  # names that are wrong are said before the file is read
        raise refused("names", "the image of each feature row", "none")
    return _read(path, Lfw(rows), 1)


def _three(rows: Rows) -> Columns:
    return Columns(rows, "image image same", {"first": 0, "second": 1, "same": 2}, strict=True)


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
    return _read(path, _three(NumberedRows(rows)), folds_of("read_index_pairs", folds))


def read_name_pairs(path: str | os.PathLike[str], names: Sequence[str], folds: int = 10) -> Pairs:
    """Lines "image image same" or "image image same fold", else as for ``read_index_pairs``.

    Args:
        names: the image of each feature row. A line has the same name, with its folders and extension.

    Raises:
        OSError: as ``open`` has it.
        ValueError: a malformed line or an image that has no row, naming file and line.
    """
    count = folds_of("read_name_pairs", folds)
    return _read(path, _three(NamedRows("names", names)), count)
