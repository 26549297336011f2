"""read_features, and the command: a broken file ends in one sentence that names it."""

from __future__ import annotations

import io
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fuzz.readers import assert_contract
from test_evaluation_files import INDEX, LFW, NAMED, NAMES, text

from normface_ext import evaluation as ev
from normface_ext.evaluation.__main__ import main

#: Rows 2 i and 2 i + 1 are one person's.
FEATURES = np.repeat(np.eye(4, 6), 2, axis=0) + np.random.default_rng(0).normal(0, 0.02, (8, 6))


def saved(array: object, save: Callable[..., None] = np.save, **options: object) -> bytes:
    file = io.BytesIO()
    save(file, array, **options)
    return file.getvalue()


def with_header(header: str, data: bytes = bytes(8 * 6 * 4), version: bytes = b"\1\0") -> bytes:
    size = struct.pack("<H" if version[0] == 1 else "<I", len(header))
    return b"\x93NUMPY" + version + size + header.encode("latin1") + data


def header(shape: str, descr: str = "'<f4'") -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n"


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4", ">f8", "i1", "u2", "i8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_features_are_read_as_they_were_saved(tmp_path: Path, dtype: str, order: str):
    array = np.asarray(FEATURES * 50, dtype=dtype, order=order)
    path = tmp_path / "F.npy"
    np.save(path, array)
    found = ev.read_features(path)
    assert found.dtype == ("f8" if dtype in ("f8", ">f8", "i8") else "f4")
    np.testing.assert_array_equal(found, array)
    path.write_bytes(with_header(header("(8, 6)"), FEATURES.astype("<f4").tobytes(), b"\2\0"))
    np.testing.assert_array_equal(ev.read_features(path), FEATURES.astype("f4"))


DEEP = "(" * 5000 + "8" + ",)" * 5000
BROKEN = {
    "empty": (b"", "a file that starts with b''"),
    "png": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(500), "an array as numpy.save"),
    "pickle": (pickle.dumps({"F": [1.0]}), "an array as numpy.save"),
    "cut npz": (saved(FEATURES, np.savez)[:60], "an archive as numpy.savez writes it"),
    "cut": (saved(FEATURES)[:300], "8 x 6 numbers, 384 bytes, behind the header, got 172 bytes"),
    "cut in the header": (saved(FEATURES)[:50], "the header of a .npy file"),
    "cut in the magic": (saved(FEATURES)[:7], "the header of a .npy file"),
    "two arrays": (saved(FEATURES) * 2, "behind the header, got 896 bytes"),
    "complex": (saved(FEATURES + 0j), "real numbers .*got complex128"),
    "objects": (saved(FEATURES.astype(object), allow_pickle=True), "real numbers .*got object"),
    "words": (saved(FEATURES.astype(str)), "real numbers .*got <U"),
    "bools": (saved(FEATURES > 0), "real numbers .*got bool"),
    "columns": (saved(np.zeros(8, dtype="f4,f4")), "real numbers"),
    "one row": (saved(FEATURES[0]), r"\[M, D\], .*got float64 \[6\]"),
    "no row": (saved(FEATURES[:0]), r"\[M, D\], .*got float64 \[0, 6\]"),
    "no column": (saved(FEATURES[:, :0]), r"\[M, D\], .*got float64 \[8, 0\]"),
    "no axis": (saved(np.float64(3)), r"\[M, D\], .*got float64 \[\]"),
    "NaN": (saved(np.where(FEATURES[3, 2] == FEATURES, np.nan, FEATURES)), "NaN or infinity at row 3"),
    "infinity": (saved(np.where(FEATURES[5, 0] == FEATURES, -np.inf, FEATURES)), "NaN or infinity at row 5"),
    "terabytes": (with_header(header("(1099511627776, 2)")), "1099511627776 x 2 numbers"),
    "beyond int64": (with_header(header(f"({2**70}, {2**70})")), "1180591620717411303424 x "),
    "negative": (with_header(header("(-8, -6)")), r"\[M, D\], .*got float32 \[-8, -6\]"),
    "fractions": (with_header(header("(8.0, 6)")), "the header of a .npy file"),
    "many axes": (with_header(header("(1," * 1 + "1," * 3000 + ")")), r"got float32 \[1, 1, 1, 1\]"),
    "no bracket": (with_header(header("(8, 6)")[:-3] + "\n"), "the header of a .npy file"),
    "deep": (with_header(header(DEEP)), "the header of a .npy file"),
    "code": (with_header(header("(__import__('os').abort(), 6)")), "the header of a .npy file"),
    "no key": (with_header("{'descr': '<f4', 'shape': (8, 6)}\n"), "the header of a .npy file"),
    "no dtype": (with_header(header("(8, 6)", "'?!'")), "the header of a .npy file"),
    "version 3": (with_header(header("(8, 6)"), version=b"\3\0"), r"version \(3, 0\)"),
    "version 9": (with_header(header("(8, 6)"), version=b"\t\t"), "the header of a .npy file"),
    "a long header": (b"\x93NUMPY\2\0\xff\xff\xff\xff" + bytes(500), "the header of a .npy file"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_features_are_named(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]):
    data, sentence = BROKEN[kind]
    path = tmp_path / "broken.npy"
    path.write_bytes(data)
    error = assert_contract(ev.read_features, path)
    assert isinstance(error, ValueError), f"read: {error}"
    assert re.search(rf"broken\.npy: expected .*{sentence}", str(error)), error

    (tmp_path / "pairs.txt").write_text(text(INDEX))
    np.save(tmp_path / "good.npy", FEATURES)
    for features in (["--features", path], ["--features", tmp_path / "good.npy", "--mirror", path]):
        assert main([*map(str, features), "--pairs", str(tmp_path / "pairs.txt"), "--folds", "2"]) == 1
        printed = capsys.readouterr()
        assert "broken.npy: expected" in printed.err and not printed.out


def run(
    folder: Path, capsys: pytest.CaptureFixture[str], *options: str, names: bool = False
) -> tuple[int, str]:
    """The command in a folder with F.npy, pairs.txt and, if asked for, names.txt."""
    command = ["--features", str(folder / "F.npy"), "--pairs", str(folder / "pairs.txt"), "--folds", "2"]
    code = main(command + ["--names", str(folder / "names.txt")] * names + list(options))
    printed = capsys.readouterr()
    assert (not printed.out) if code else (not printed.err)
    return code, printed.out + printed.err


@pytest.mark.parametrize(("lines", "names"), [(INDEX, False), (LFW, True), (NAMED, True)])
def test_command_reads_lists_of_three_formats(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: list[str], names: bool
):
    np.save(tmp_path / "F.npy", FEATURES)
    (tmp_path / "names.txt").write_text(text(NAMES))
    (tmp_path / "pairs.txt").write_text(text(lines))
    code, table = run(tmp_path, capsys, names=names)
    assert code == 0, table
    assert re.search(r"accuracy +1\.0000", table) and re.search(r"pairs +8\n", table)


ONE_FOLD = [f"{line} 3" for line in INDEX]
ONE_EACH = [f"{line} {i}" for i, line in enumerate(INDEX)]


@pytest.mark.parametrize(
    ("name", "content", "names", "sentence"),
    [
        ("pairs.txt", [INDEX[0], "7 8 1"], False, r"pairs\.txt:2: expected a row number in \[0, 8\), got 8"),
        ("pairs.txt", [*INDEX[:3], "-1 2 1"], False, r"pairs\.txt:4: expected a whole number, got '-1'"),
        ("pairs.txt", INDEX[:2], False, r"pairs\.txt: expected same and different pairs in every fold"),
        ("pairs.txt", ONE_EACH, False, r"pairs\.txt: .*1 same of 1 in fold 0"),
        ("pairs.txt", ONE_FOLD, False, r"pairs\.txt: expected pairs in at least 2 folds"),
        ("pairs.txt", [], True, r"pairs\.txt: expected at least one pair"),
        ("pairs.txt", [NAMED[0], "no.jpg P_0_0001.jpg 1"], True, r"pairs\.txt:2: expected a name"),
        ("names.txt", NAMES[:-1], True, r"names\.txt: expected 8 names, got 7"),
        ("names.txt", [*NAMES[:-1], NAMES[0]], True, r"names\.txt: expected each image once"),
        ("names.txt", [*NAMES[:-1], "\0"], True, r"names\.txt:8: expected text"),
    ],
)  # fmt: skip
def test_command_names_the_file(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: list[str],
    names: bool,
    sentence: str,
):
    np.save(tmp_path / "F.npy", FEATURES)
    (tmp_path / "names.txt").write_text(text(NAMES))
    (tmp_path / "pairs.txt").write_text(text(NAMED))
    (tmp_path / name).write_text(text(content))
    code, said = run(tmp_path, capsys, names=names)
    assert code == 1
    assert re.search(sentence, said) and len(said.splitlines()) == 1, said


def test_command_wants_a_mirror_of_the_same_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    np.save(tmp_path / "F.npy", FEATURES)
    np.save(tmp_path / "M.npy", FEATURES[:, 1:])
    (tmp_path / "pairs.txt").write_text(text(INDEX))
    code, said = run(tmp_path, capsys, "--mirror", str(tmp_path / "M.npy"))
    assert code == 1
    assert re.search(r"M\.npy: expected features of shape \[8, 6\] as in .*F\.npy, got \[8, 5\]", said)
