"""Lists of pairs: the LFW pairs file, and plain "i j same" lines."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Pairs:
    """P pairs of feature rows: ``first`` and ``second`` [P] int64, ``same`` [P] bool, ``fold`` [P] int64."""

    first: npt.NDArray[np.int64]
    second: npt.NDArray[np.int64]
    same: npt.NDArray[np.bool_]
    fold: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        sizes = [len(part) for part in (self.first, self.second, self.same, self.fold)]
        if len(set(sizes)) != 1:
            raise ValueError(f"Pairs: expected four arrays of one length, got lengths {sizes}")

    def __len__(self) -> int:
        return len(self.same)

    @classmethod
    def in_folds(cls, first: object, second: object, same: object, folds: int = 10) -> Pairs:
        """Cuts same and different pairs, each in the order given, into ``folds`` runs of equal length."""
        is_same = np.asarray(same, dtype=bool)
        fold = np.zeros(len(is_same), dtype=np.int64)
        for kind in (is_same, ~is_same):
            count = int(kind.sum())
            fold[kind] = np.arange(count) * folds // max(count, 1)
        return cls(np.asarray(first, dtype=np.int64), np.asarray(second, dtype=np.int64), is_same, fold)


def _lines(path: Path) -> Iterator[tuple[str, list[str]]]:
    """("file:line", words) for every line that is neither empty nor a # comment."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield f"{path}:{number}", line.replace(",", " ").split()


def _whole(where: str, word: str, meaning: str) -> int:
    try:
        return int(word)
    except ValueError:
        raise ValueError(f"{where}: expected {meaning}, got {word!r}") from None


def read_names(path: str | Path) -> list[str]:
    """One image name for each feature row; folders and extensions are ignored when names are matched."""
    return [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]


def read_lfw_pairs(path: str | Path, names: Sequence[str]) -> Pairs:
    """The LFW "View 2" file (pairs.txt): a header "folds pairs", then per fold same and different pairs.

    Same pairs are lines "name i j", different ones "name i other j"; image i of a name is the feature row
    called ``name_000i``. Each fold has ``pairs`` same and ``pairs`` different lines, 10 and 300 in LFW.

    Args:
        names: the image of each feature row, such as ``Al_Gore/Al_Gore_0003.jpg`` or ``Al_Gore_0003``.

    Raises:
        ValueError: a malformed line or a missing image, naming file and line.
    """
    path = Path(path)
    rows: dict[str, int] = {}
    for row, name in enumerate(names):
        stem = re.sub(r"\.[A-Za-z]{2,5}$", "", name.replace("\\", "/").rpartition("/")[2])
        if rows.setdefault(stem, row) != row:
            raise ValueError(f"names: expected each image once, got {stem!r} at rows {rows[stem]} and {row}")
    lines = list(_lines(path))
    if not lines or len(lines[0][1]) not in (1, 2):
        raise ValueError(f"{path}: expected a header line 'folds pairs', such as '10 300'")
    where, header = lines[0]
    counts = [_whole(where, word, "a count in the header") for word in header]
    folds, per_kind = counts if len(counts) == 2 else (1, counts[0])
    if len(lines) - 1 != folds * per_kind * 2:
        raise ValueError(
            f"{path}: expected {folds} x 2 x {per_kind} = {folds * per_kind * 2} pairs after the header,"
            f" got {len(lines) - 1}"
        )

    def row_of(where: str, name: str, number: str) -> int:
        image = f"{name}_{_whole(where, number, 'an image number'):04d}"
        if image not in rows:
            raise ValueError(f"{where}: expected a feature row for image {image}, got none in the names")
        return rows[image]

    first, second, same, fold = [], [], [], []
    for index, (where, words) in enumerate(lines[1:]):
        if len(words) not in (3, 4):
            raise ValueError(f"{where}: expected 'name i j' or 'name i other j', got {len(words)} words")
        first.append(row_of(where, words[0], words[1]))
        second.append(row_of(where, words[0] if len(words) == 3 else words[2], words[-1]))
        same.append(len(words) == 3)
        fold.append(index // (2 * per_kind))
    return Pairs(np.array(first), np.array(second), np.array(same, dtype=bool), np.array(fold))


def read_index_pairs(path: str | Path, folds: int = 10) -> Pairs:
    """Lines "i j same" or "i j same fold": row numbers from 0, same is 0 or 1.

    Without a fold column, same and different pairs are each cut into ``folds`` runs in file order.

    Raises:
        ValueError: a malformed line, naming file and line.
    """
    path = Path(path)
    rows: list[list[int]] = []
    for where, words in _lines(path):
        if len(words) not in (3, 4):
            raise ValueError(f"{where}: expected 'i j same' or 'i j same fold', got {len(words)} words")
        row = [_whole(where, word, "a whole number") for word in words]
        if row[2] not in (0, 1):
            raise ValueError(f"{where}: expected same to be 0 or 1, got {row[2]}")
        if rows and len(row) != len(rows[0]):
            raise ValueError(f"{where}: expected {len(rows[0])} words as in the lines before, got {len(row)}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: expected at least one pair, got none")
    table = np.array(rows, dtype=np.int64)
    if table.shape[1] == 4:
        return Pairs(table[:, 0], table[:, 1], table[:, 2] == 1, table[:, 3])
    return Pairs.in_folds(table[:, 0], table[:, 1], table[:, 2] == 1, folds)
