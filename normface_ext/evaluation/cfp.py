"""Celebrities in Frontal-Profile: the protocol folder as it is released."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from ..engine.arguments import choice
from ..engine.files import file_name, quoted
from ._text import lines, refused, whole
from .layouts import same_path
from .pair_list import PairList
from .pairs import Table


def _images(path: Path, seen: set[str]) -> list[str]:
    """Lines "number path", the numbers 1, 2, ... in order, and no image that was ``seen``."""
    images: list[str] = []
    for where, line in lines(path):
        words = re.split(r"[ \t]+", line, maxsplit=1)
        if len(words) != 2 or whole(where, words[0], "a number from 1 on") != len(images) + 1:
            raise refused(where, f"'{len(images) + 1} path of the image'", quoted(line))
        images.append(re.sub(r"\A(?:\.\./)+", "", same_path(words[1])))
        if _end(images[-1]) in seen:
            raise refused(where, "each image once in the lists", f"{quoted(images[-1])} again")
        seen.add(_end(images[-1]))
    if not images:
        raise refused(file_name(path), "at least one image", "none")
    return images


def _end(name: str) -> str:
    """Person, pose and number: what a path is known by, wherever the data lie."""
    return "/".join(same_path(name).split("/")[-3:])


def read_cfp(
    folder: str | os.PathLike[str], protocol: str = "FP", names: Sequence[str] | None = None
) -> PairList:
    """The pairs of CFP-FF or CFP-FP, in their ten folds of 350 same and 350 different pairs.

    Reads ``Pair_list_F.txt`` and ``Pair_list_P.txt`` (lines "number path") and ``Split/FP/01/same.txt``,
    ``diff.txt`` to ``10`` (lines "number,number"). In FF both numbers are of the frontal list, in FP the
    second is of the profile list.

    Args:
        folder: ``Protocol`` of the data set, or the folder that holds it.
        protocol: "FF" or "FP".
        names: the image of each feature row; the last three parts of a path count (``001/frontal/01.jpg``).
            Without it rows are the frontal list, and for FP the profile list behind it (``PairList.names``).

    Raises:
        OSError: a file that is missing.
        ValueError: a malformed line, a number without an image, an image without a row, a folder without
            folds, naming file and line.
    """
    op = "read_cfp"
    kind = choice(op, "protocol", protocol, ("FF", "FP"))
    root = Path(folder)
    root = root / "Protocol" if (root / "Protocol").is_dir() else root
    seen: set[str] = set()
    frontal = _images(root / "Pair_list_F.txt", seen)
    profile = _images(root / "Pair_list_P.txt", seen) if kind == "FP" else frontal
    listed = frontal + profile if kind == "FP" else frontal
    held = tuple(listed) if names is None else tuple(names)
    rows = {_end(name): row for row, name in enumerate(held)}
    if len(rows) != len(held):
        raise ValueError(f"{op}: expected `names` that differ in their last three parts, got some twice")
    table = Table()

    def row_of(where: str, word: str, images: list[str]) -> int:
        number = whole(where, word, "the number of an image")
        if not 1 <= number <= len(images):
            raise refused(where, f"the number of an image in [1, {len(images)}]", str(number))
        row = rows.get(_end(images[number - 1]))
        if row is None:
            raise refused(where, f"a feature row for {quoted(images[number - 1])}", "none in the names")
        return row

    splits = root / "Split" / kind
    try:
        folds = sorted(f for f in os.listdir(splits) if re.fullmatch(r"[0-9]{1,3}", f))
    except OSError as error:
        raise OSError(error.errno, error.strerror, file_name(splits)) from error
    if not folds:
        raise refused(file_name(splits), "folders 01, 02, ... of the folds", "none")
    for fold in folds:
        for file, same in (("same.txt", True), ("diff.txt", False)):
            for where, line in lines(splits / fold / file):
                cells = [cell.strip() for cell in line.split(",")]
                if len(cells) != 2:
                    raise refused(where, "'number,number'", quoted(line))
                table.add(row_of(where, cells[0], frontal), row_of(where, cells[1], profile), same)
                table.fold.append(int(fold))
    pairs = table.pairs()
    found = f"{file_name(root)}: CFP-{kind}, {len(pairs)} pairs, {int(pairs.same.sum())} of them same"
    return PairList(pairs, held, f"{found}, {len(folds)} folds, {len(held)} names")
