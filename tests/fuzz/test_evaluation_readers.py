"""Mutated files for read_pairs, the .bin reader, features in archives, and the lists of IJB and CFP."""

from __future__ import annotations

import csv
import io
import pickle
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from fuzz.readers import run
from fuzz.test_evaluation_files import ROUNDS, rows_of

from normface_ext import evaluation as ev

NAMES = [f"Ann {i}/{j}.jpg" for i in range(4) for j in (1, 2)]
ROWS = {name: row for row, name in enumerate(NAMES)}
TRIPLES = [(0, 1, 1), (2, 3, 1), (0, 3, 0), (2, 5, 0), (4, 5, 1), (6, 7, 1), (4, 7, 0), (6, 1, 0)]
YES, NO = ("1", "1.0", "true"), ("0", "0.0", "-1", "false")


def splits_of(line: str) -> Iterator[list[str]]:
    """The cells of a line under every separator."""
    for sign in "\t,;":
        try:
            row = next(csv.reader([line], delimiter=sign, skipinitialspace=True, strict=True))
        except csv.Error:
            continue
        yield [cell.strip(" \t") for cell in (row if '"' in line else line.split(sign))]
    yield [word[1:-1].replace('""', '"') if word[:1] == '"' else word
           for word in re.findall(r'"(?:[^"]|"")*"|[^ \t"]+', line)]  # fmt: skip


def meaning(cells: list[str]) -> tuple[int, int, bool] | None:
    """What a line says, as image image same or same image image, if it says something."""
    for images, same in ((cells[:2], cells[2:3]), (cells[1:3], cells[:1])):
        rows = [ROWS.get(image.replace("\\", "/").removeprefix("./")) for image in images]
        if len(rows) == 2 and None not in rows and same and same[0].lower() in YES + NO:
            return rows[0], rows[1], same[0].lower() in YES
    return None


def pairs_are_right(found: ev.PairList, data: bytes) -> bool:
    lines = [line for line in rows_of(data) if line[0] != "#"]
    if len(lines) == len(found.pairs) + 1:  # a header
        lines = lines[1:]
    pairs = found.pairs
    said = list(zip(pairs.first.tolist(), pairs.second.tolist(), pairs.same.tolist(), strict=True))
    return len(lines) == len(said) and all(
        pair in [meaning(cells) for cells in splits_of(line)] for pair, line in zip(said, lines, strict=True)
    )


def listed(rows: list[list[object]], sign: str) -> str:
    out = io.StringIO()
    csv.writer(out, delimiter=sign, lineterminator="\n").writerows(rows)
    return out.getvalue()


def quoted(rows: list[list[object]]) -> str:
    return "".join(" ".join(f'"{c}"' if " " in str(c) else str(c) for c in row) + "\n" for row in rows)


FORWARD: list[list[object]] = [[NAMES[i], NAMES[j], same] for i, j, same in TRIPLES]
LISTS = {
    "tabs": listed(FORWARD, "\t"),
    "header": "image1,image2,label\n" + listed(FORWARD, ","),
    "backwards": listed([[same, one, other] for one, other, same in FORWARD], ";"),
    "quotes": quoted(FORWARD),
}


@pytest.mark.parametrize("seeds", ROUNDS)
@pytest.mark.parametrize("kind", LISTS)
def test_pairs(tmp_path: Path, kind: str, seeds: range) -> None:
    read, refused = run(
        lambda path: ev.read_pairs(path, NAMES, folds=2), "list.txt", LISTS[kind].encode(), seeds, tmp_path,
        right=pairs_are_right,
    )  # fmt: skip
    # Most changes hit a name, and make it one that has no row.
    assert refused > 0 and (read > 0 or len(seeds) < 100)


IMAGES = [bytes(np.random.default_rng(i).integers(0, 256, 30, dtype=np.uint8)) for i in range(8)]
SAME = [True, False, True, True]
BINS = {
    "protocol 2": pickle.dumps((IMAGES, SAME), 2),
    "protocol 5": pickle.dumps((IMAGES, SAME), 5),
    "arrays": pickle.dumps(([np.frombuffer(image, np.uint8) for image in IMAGES], np.array(SAME)), 4),
}


def bin_is_right(found: ev.VerificationSet, data: bytes) -> bool:
    """What pickle itself reads; the reader has let pass what builds lists and arrays alone."""
    images, same = pickle.loads(data, encoding="bytes")
    return [bytes(image) for image in images] == list(found.images) and list(same) == found.same.tolist()


@pytest.mark.parametrize("seeds", ROUNDS)
@pytest.mark.parametrize("kind", BINS)
def test_bins(tmp_path: Path, kind: str, seeds: range) -> None:
    read, refused = run(ev.read_bin, "lfw.bin", BINS[kind], seeds, tmp_path, right=bin_is_right)
    assert read > 0 and refused > 0


FEATURES = np.random.default_rng(0).normal(0, 50, (8, 6)).astype(np.float32)


def saved(save: Callable[..., object], *arguments: object, **options: object) -> bytes:
    out = io.BytesIO()
    save(out, *arguments, **options)
    return out.getvalue()


STORED = ("i1", "u1", "i2", "u2", "i4", "u4", "f4", "f8", "i8", "u8")
ARCHIVES = {
    "npz": saved(np.savez, features=FEATURES),
    "packed npz": saved(np.savez_compressed, features=FEATURES),
    "mat": saved(scipy.io.savemat, {"features": FEATURES}),
    "packed mat": saved(scipy.io.savemat, {"features": FEATURES}, do_compression=True),
}


@pytest.mark.parametrize("seeds", ROUNDS)
@pytest.mark.parametrize("kind", ARCHIVES)
def test_archives(tmp_path: Path, kind: str, seeds: range) -> None:
    def right(value: np.ndarray, data: bytes) -> bool:
        if "npz" in kind:
            held = np.load(io.BytesIO(data))
            return any(np.array_equal(held[name], value) for name in held)
        # SciPy would end the process on some of these files: the numbers have to stand in the file.
        data = zlib.decompress(data[136:]) if "packed" in kind else data
        with np.errstate(all="ignore"):
            stored = [value.astype(order + kind) for order in "<>" for kind in STORED]
        return any(np.array_equal(a, value) and a.tobytes(order="F") in data for a in stored)

    _, refused = run(ev.read_features, "F.dat", ARCHIVES[kind], seeds, tmp_path, right=right)
    assert refused > 0


def ijb_is_right(columns: tuple[str, ...], words: Callable[[str], list[str]]) -> Callable[[Any, bytes], bool]:
    def right(found: Any, data: bytes) -> bool:
        table = [words(line) for line in rows_of(data)]
        said = zip(*(list(getattr(found, name)) for name in columns), strict=True)
        return [tuple(map(str, map(int, row))) for row in said] == [
            tuple(str(int(word)) for word in line) for line in table
        ]

    return right


@pytest.mark.parametrize("seeds", ROUNDS)
@pytest.mark.parametrize("kind", ["templates", "pairs"])
def test_ijb(tmp_path: Path, kind: str, seeds: range) -> None:
    start = 1 if kind == "templates" else 0
    columns = ("template", "media") if start else ("first", "second", "same")
    good = "".join(f"{i}.jpg " * start + f"{i // 2} {i * 7}" + " 1" * (not start) + "\n" for i in range(9))
    read, refused = run(
        getattr(ev, f"read_ijb_{kind}"), "list.txt", good.encode(), seeds, tmp_path,
        right=ijb_is_right(columns, lambda line: re.split("[ \t,]+", line)[start:]),
    )  # fmt: skip
    assert read > 0 and refused > 0


@pytest.mark.parametrize("seeds", ROUNDS)
def test_detection_scores(tmp_path: Path, seeds: range) -> None:
    good = "".join(f"{i}.jpg 30.5 41.25 0.99{i}\n" for i in range(9))

    def right(found: np.ndarray, data: bytes) -> bool:
        return found.tolist() == [float(line.split(" ")[-1]) for line in rows_of(data)]

    read, refused = run(ev.read_ijb_scores, "list.txt", good.encode(), seeds, tmp_path, right=right)
    assert read > 0 and refused > 0


@pytest.mark.parametrize("seeds", ROUNDS)
def test_cfp(tmp_path: Path, seeds: range) -> None:
    """One file of the folder mutated: the list of images, whose name the error has."""
    folder = tmp_path / "Split" / "FF" / "01"
    folder.mkdir(parents=True)
    for file in ("same.txt", "diff.txt"):
        (folder / file).write_text("1,1\n")
    good = "".join(f"{i} ../Data/Images/{i:03d}/frontal/01.jpg\n" for i in range(1, 9))

    def right(found: ev.PairList, data: bytes) -> bool:
        names = [re.split("[ \t]+", line, maxsplit=1)[1] for line in rows_of(data)]
        held = [re.sub(r"\A(\.\./)+", "", name.replace("\\", "/").removeprefix("./")) for name in names]
        return list(found.names) == held and found.pairs.second.tolist() == [0, 0]

    read, refused = run(
        lambda path: ev.read_cfp(path.parent, "FF"),
        "Pair_list_F.txt",
        good.encode(),
        seeds,
        tmp_path,
        right=right,
    )
    assert read > 0 and refused > 0
