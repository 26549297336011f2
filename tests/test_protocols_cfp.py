"""read_cfp: the protocol folder of CFP is read as it is released, or the file and line are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from normface_ext import evaluation as ev


def plain(pairs: ev.Pairs) -> list[list[object]]:
    return [column.tolist() for column in (pairs.first, pairs.second, pairs.same, pairs.fold)]


def cfp_folder(root: Path) -> tuple[list[str], list[list[tuple[int, int, bool]]]]:
    """Three people with two frontal and two profile images each; two folds."""
    frontal = [f"{p:03d}/frontal/{i:02d}.jpg" for p in (1, 2, 3) for i in (1, 2)]
    profile = [name.replace("frontal", "profile") for name in frontal]
    protocol = root / "Protocol"
    folds = [[(1, 2, True), (3, 4, True), (1, 3, False), (5, 2, False)], [(5, 6, True), (2, 6, False)]]
    for kind in ("FF", "FP"):
        for number, fold in enumerate(folds, 1):
            folder = protocol / "Split" / kind / f"{number:02d}"
            folder.mkdir(parents=True)
            for file, same in (("same.txt", True), ("diff.txt", False)):
                text = "".join(f"{i},{j}\n" for i, j, is_same in fold if is_same == same)
                (folder / file).write_text(text)
    for letter, images in (("F", frontal), ("P", profile)):
        text = "".join(f"{i} ../Data/Images/{name}\r\n" for i, name in enumerate(images, 1))
        (protocol / f"Pair_list_{letter}.txt").write_text(text)
    return [f"Data/Images/{name}" for name in frontal + profile], folds


@pytest.mark.parametrize("kind", ["FF", "FP"])
def test_cfp(tmp_path: Path, kind: str):
    names, folds = cfp_folder(tmp_path)
    second = 6 if kind == "FP" else 0  # profile images stand behind the frontal ones
    truth = [(i - 1, j - 1 + second, same, at + 1) for at, fold in enumerate(folds) for i, j, same in fold]
    for folder in (tmp_path, tmp_path / "Protocol"):
        found = ev.read_cfp(folder, kind)
        assert list(zip(*plain(found.pairs), strict=True)) == truth
        assert found.names == tuple(names[: 6 + second])
        assert f"CFP-{kind}, 6 pairs, 3 of them same" in found.found
    mine = [f"/data/{name.removeprefix('Data/Images/')}" for name in reversed(names)]
    own = ev.read_cfp(tmp_path, kind, mine)
    assert [mine[row].removeprefix("/data/") for row in own.pairs.second] == [
        names[row].removeprefix("Data/Images/") for row in found.pairs.second
    ]


@pytest.mark.parametrize(
    ("file", "text", "sentence"),
    [
        ("Pair_list_F.txt", "1 a\n3 b\n", "Pair_list_F.txt:2: expected '2 path of the image', got '3 b'"),
        ("Pair_list_F.txt", "1\n", "Pair_list_F.txt:1: expected '1 path of the image'"),
        ("Pair_list_P.txt", "", "Pair_list_P.txt: expected at least one image"),
        ("Pair_list_F.txt", "1 a/b/c\n2 ../x/a/b/c\n", "Pair_list_F.txt:2: expected each image once"),
        ("Pair_list_P.txt", "1 001/frontal/01.jpg\n", "Pair_list_P.txt:1: expected each image once"),
        ("Split/FP/02/diff.txt", "1,2\n1,7\n", r"diff.txt:2: expected .* image in \[1, 6\], got 7"),
        ("Split/FP/02/diff.txt", "0,2\n", r"diff.txt:1: expected the number of an image in \[1, 6\], got 0"),
        ("Split/FP/01/same.txt", "1 2\n", "same.txt:1: expected 'number,number'"),
    ],
)
def test_cfp_folders_that_are_wrong_are_named(tmp_path: Path, file: str, text: str, sentence: str):
    cfp_folder(tmp_path)
    (tmp_path / "Protocol" / file).write_text(text)
    with pytest.raises(ValueError, match=sentence):
        ev.read_cfp(tmp_path, "FP")
    (tmp_path / "Protocol" / file).unlink()
    with pytest.raises(FileNotFoundError, match=file.rpartition("/")[2]):
        ev.read_cfp(tmp_path, "FP")
    with pytest.raises(ValueError, match="a feature row for 'Data/Images/001/frontal/01"):
        cfp_folder(tmp_path / "again")
        ev.read_cfp(tmp_path / "again", "FP", ["x/y/z.jpg"])
