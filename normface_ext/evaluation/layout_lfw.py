"""The layout of LFW's pairs files."""

from __future__ import annotations

import os

from ..engine.files import file_name, quoted
from ._text import refused, whole
from .layouts import Layout, Rows
from .pairs import Pairs


class Lfw(Layout):
    """'name i j' for two images of one person, 'name i other j' for two people; a header "folds pairs".

    With it each fold has ``pairs`` same and ``pairs`` different lines; a header with one number is that of
    one fold.
    """

    name = "LFW, with its header"

    def __init__(self, rows: Rows) -> None:
        super().__init__(rows)
        self._folds = self._per_kind = self._same_in_fold = 0
        self.widths: tuple[int, ...] = ()  # of the header

    def _read_header(self, where: str, cells: list[str]) -> None:
        if len(cells) not in (1, 2):
            raise refused(where, "a header line 'folds pairs', such as '10 300'", f"{len(cells)} words")
        counts = [whole(where, word, "a count in the header") for word in cells]
        self._folds, self._per_kind = counts if len(counts) == 2 else (1, counts[0])
        if self._folds == 0 or self._per_kind == 0:
            raise refused(
                where, "counts above 0 in the header", f"{self._folds} folds of {self._per_kind} pairs"
            )
        self.widths = (3, 4)

    @property
    def _pairs(self) -> int:
        return 2 * self._folds * self._per_kind

    @property
    def _expected(self) -> str:
        return f"{self._folds} x 2 x {self._per_kind} = {self._pairs} pairs after the header"

    def _add(self, where: str, cells: list[str]) -> bool:
        if len(cells) not in (3, 4):
            raise refused(where, "'name i j' or 'name i other j'", f"{len(cells)} words")
        same = len(cells) == 3
        if not same and cells[0] == cells[2]:
            raise refused(where, "'name i j' for two images of one person", f"{quoted(cells[0])} twice")
        first = self.rows.numbered(where, cells[0], cells[1])
        self.table.add(first, self.rows.numbered(where, cells[0 if same else 2], cells[-1]), same)
        return same

    def take(self, where: str, cells: list[str]) -> None:
        if not self._folds:
            self._read_header(where, cells)
            return
        if len(self.table) == self._pairs:
            raise refused(where, self._expected, "more")
        self._same_in_fold += self._add(where, cells)
        fold, place = divmod(len(self.table) - 1, 2 * self._per_kind)
        self.table.fold.append(fold)
        if place == 2 * self._per_kind - 1:
            if self._same_in_fold != self._per_kind:
                raise refused(
                    where,
                    f"{self._per_kind} same and {self._per_kind} different pairs in each fold",
                    f"{self._same_in_fold} same pairs in fold {fold + 1}, which ends here",
                )
            self._same_in_fold = 0

    def end(self, path: str | os.PathLike[str], folds: int) -> Pairs:
        if not self._folds:
            raise refused(file_name(path), "a header line 'folds pairs', such as '10 300'", "0 words")
        if len(self.table) != self._pairs:
            raise refused(file_name(path), self._expected, str(len(self.table)))
        return super().end(path, folds)


class LfwTable(Lfw):
    """LFW's lines without its header, or below names of columns; a cell at the end may be empty."""

    name = "LFW, without its header"

    def __init__(self, rows: Rows) -> None:
        super().__init__(rows)
        self._begun = False
        self.widths: tuple[int, ...] = (3, 4)

    def take(self, where: str, cells: list[str]) -> None:
        if not cells[-1]:
            cells = cells[:-1]
        begun, self._begun = self._begun, True
        if not begun and [cell.lower() for cell in cells[:2]] == ["name", "imagenum1"]:
            return
        same = self._add(where, cells)
        if same and cells[1] == cells[2]:
            raise refused(where, "two images", f"image {quoted(cells[1])} twice")

    def end(self, path: str | os.PathLike[str], folds: int) -> Pairs:
        return Layout.end(self, path, folds)
