"""Features in .npz and .mat files: the array asked for is read, and what is none is named."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from fuzz.readers import assert_contract

from normface_ext import evaluation as ev

FEATURES = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
OTHER = np.arange(48, dtype=np.int16).reshape(8, 6)


def npz(**arrays: object) -> bytes:
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def packed(**arrays: object) -> bytes:
    out = io.BytesIO()
    np.savez_compressed(out, **arrays)
    return out.getvalue()


def mat(compressed: bool = False, form: str = "5", **variables: object) -> bytes:
    out = io.BytesIO()
    scipy.io.savemat(out, variables, do_compression=compressed, format=form)
    return out.getvalue()


WRITERS = {
    "npz": npz, "packed npz": packed, "mat": mat, "packed mat": lambda **v: mat(True, **v),
}  # fmt: skip


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("dtype", ["f4", "f8", "i2", "u1", "i8"])
def test_the_array_that_is_asked_for(tmp_path: Path, writer: str, dtype: str):
    path = tmp_path / "F"
    truth = (FEATURES * 50).clip(0).astype(dtype)
    path.write_bytes(WRITERS[writer](features=truth))
    for name in (None, "features"):
        found = assert_contract(lambda path, name=name: ev.read_features(path, name), path)
        assert found.dtype in (np.float32, np.float64)
        np.testing.assert_array_equal(found, truth)
    np.testing.assert_array_equal(ev.read_features(path, transpose=True), truth.T)
    path.write_bytes(WRITERS[writer](features=truth, other=OTHER))
    np.testing.assert_array_equal(ev.read_features(path, "other"), OTHER)
    error = assert_contract(ev.read_features, path)
    assert "F: expected one " in str(error) and "or `name` to choose one, got features, other" in str(error)
    with pytest.raises(ValueError, match=r"F: expected a(n)? .* 'gone', got features, other"):
        ev.read_features(path, "gone")


def test_an_array_of_a_npz_in_column_order_and_with_a_folder_in_its_name(tmp_path: Path):
    path = tmp_path / "F.npz"
    path.write_bytes(npz(**{"Al_Gore/1": np.asfortranarray(FEATURES)}))
    np.testing.assert_array_equal(ev.read_features(path, "Al_Gore/1"), FEATURES)


def with_member(data: bytes, claimed: int | None = None, name: str = "a.npy") -> bytes:
    """An archive with these bytes, which says that they are ``claimed``."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)
    held = bytearray(out.getvalue())
    if claimed is not None:
        at = held.rindex(b"PK\x01\x02") + 24
        held[at : at + 4] = claimed.to_bytes(4, "little")
    return bytes(held)


def npy(array: object) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


BROKEN = {
    "objects": (npz(a=np.array([[{}]], dtype=object)), "real numbers"),
    "complex": (npz(a=np.ones((2, 2), complex)), "real numbers"),
    "one row of numbers": (npz(a=np.ones(5)), "real numbers of at most 64 bits .*got float64 \\[5\\]"),
    "empty archive": (npz(), "PK|one array"),
    "a text": (with_member(b"1 2 3", name="a.txt"), "header of a .npy file"),
    "cut inside": (with_member(npy(FEATURES)[:-8]), "8 x 6 numbers, 192 bytes, behind the header, got 184"),
    "more inside": (
        with_member(npy(FEATURES) + b"x"),
        "8 x 6 numbers, 192 bytes, behind .*, got 193",
    ),
    "a giant claim": (with_member(npy(FEATURES), 1 << 31), "at most [0-9]* bytes in an archive"),
    "a small claim": (with_member(npy(FEATURES), 100), "header|behind the header"),
    "a bad checksum": (npz(a=FEATURES).replace(FEATURES.tobytes()[:20], b"\1" * 20), "Bad CRC"),
    "NaN": (npz(a=np.full((2, 2), np.nan)), "finite"),
    "mat: words": (mat(a="words"), "real numbers|one variable"),
    "mat: complex": (mat(a=np.ones((2, 2)) * 1j), "one variable of features"),
    "mat: a struct": (mat(a={"b": 1}), "one variable of features"),
    "mat: cut": (mat(a=FEATURES)[:-40], "an element of type 14 and 240 bytes at byte 128, of 336"),
    "mat: of HDF5": (
        b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM" + bytes(400),
        "another version",
    ),
    "mat: three dimensions": (mat(a=np.ones((2, 3, 4))), "one variable of features"),
    "mat: NaN": (mat(a=np.full((2, 2), np.nan)), "finite"),
    "mat: empty": (mat(a=np.ones((0, 3))), "one variable of features"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_features_is_named(tmp_path: Path, kind: str):
    path = tmp_path / "F.dat"
    data, sentence = BROKEN[kind]
    path.write_bytes(data)
    error = assert_contract(ev.read_features, path)
    assert isinstance(error, ValueError), f"read: {error}"
    with pytest.raises(ValueError, match=rf"F\.dat.*expected .*(?:{sentence})"):
        ev.read_features(path)


def test_a_giant_shape_of_a_mat_is_not_believed(tmp_path: Path):
    data = bytearray(mat(features=FEATURES.astype(np.float64)))
    at = data.index((8).to_bytes(4, "little") + (6).to_bytes(4, "little"), 150)
    data[at : at + 8] = (1 << 30).to_bytes(4, "little") * 2
    path = tmp_path / "F.mat"
    path.write_bytes(data)
    assert "384 bytes for numbers [1073741824, 1073741824]" in str(assert_contract(ev.read_features, path))
    packed = mat(True, features=FEATURES)
    for at in range(140, len(packed)):  # a deflated byte that is another one is found by the checksum
        path.write_bytes(packed[:at] + bytes([packed[at] ^ 1]) + packed[at + 1 :])
        assert isinstance(assert_contract(ev.read_features, path), ValueError), at


def test_a_variable_that_is_no_matrix_is_named_by_what_it_is(tmp_path: Path):
    path = tmp_path / "F.mat"
    path.write_bytes(
        mat(words="words", number=1j * FEATURES, cells=np.array([[1, "a"]], object), f=FEATURES, s={"a": 1})
    )
    np.testing.assert_array_equal(ev.read_features(path), FEATURES)  # the only one that may be features
    for name, kind in (("words", "char"), ("number", "complex"), ("cells", "cell"), ("s", "struct")):
        with pytest.raises(ValueError, match=rf"F\.mat, variable '{name}': expected real .*got {kind} "):
            ev.read_features(path, name)


@pytest.mark.parametrize("compressed", [False, True])
def test_numbers_of_a_mat_are_those_that_scipy_reads(tmp_path: Path, compressed: bool):
    """MATLAB stores whole numbers of a double in fewer bytes; other systems swap bytes."""
    random = np.random.default_rng(0)
    path = tmp_path / "F.mat"
    for dtype in ("f8", "f4", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8"):
        values = (random.normal(size=(3, 5)) * 40).clip(-100, 100).clip(-100 if dtype[0] != "u" else 0)
        path.write_bytes(mat(compressed, value_in_full=values.astype(dtype), b=values.astype(dtype)))
        truth = scipy.io.loadmat(path)["value_in_full"]
        np.testing.assert_array_equal(ev.read_features(path, "value_in_full"), truth)
    for order, mark in (("<", b"IM"), (">", b"MI")):
        element = b"".join(
            np.array(part, order + "u4").tobytes() if not isinstance(part, bytes) else part
            for part in ([6, 8, 6, 0], [5, 8, 2, 3], [(1 << 16) + 1 if order == "<" else 65537], b"F\0\0\0",
                         [2, 6], bytes(range(6)), b"\0\0")
        )  # fmt: skip
        header = b"MATLAB 5.0".ljust(124) + np.array([0x0100], order + "u2").tobytes() + mark
        path.write_bytes(header + np.array([14, len(element)], order + "u4").tobytes() + element)
        np.testing.assert_array_equal(ev.read_features(path), [[0, 2, 4], [1, 3, 5]])
        np.testing.assert_array_equal(scipy.io.loadmat(path)["F"], [[0, 2, 4], [1, 3, 5]])


def test_a_name_for_a_file_of_one_array_is_refused(tmp_path: Path):
    path = tmp_path / "F.npy"
    np.save(path, FEATURES)
    with pytest.raises(ValueError, match=r"F\.npy: expected an archive with 'a', got a \.npy file"):
        ev.read_features(path, "a")
    with pytest.raises(TypeError, match="`transpose`"):
        ev.read_features(path, transpose=1)
