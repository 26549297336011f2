"""Features from files: .npy and .npz of NumPy, .mat of MATLAB."""

from __future__ import annotations

import os
import stat
import zipfile
from typing import IO

import numpy as np
from numpy.lib import format as npy

from ..engine.arguments import flag
from ..engine.files import file_name, quoted, reading
from . import mat
from ._checks import Array, as_features
from ._text import refused

_REAL = "real numbers of at most 64 bits [M, D], M and D at least 1"


def _header(where: str, file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    """Shape, order and type of an array of real numbers; the file stands behind its header."""
    versions = {b"\x01\x00": npy.read_array_header_1_0, b"\x02\x00": npy.read_array_header_2_0}
    with reading(where, "the header of a .npy file"):
        start = file.read(8)
        if start[:6] != npy.MAGIC_PREFIX or len(start) < 8:
            raise ValueError(f"a file that starts with {quoted(start)}")
        if start[6:] not in versions:  # 3.0 is for names of columns, which features have not
            raise ValueError(f"version {tuple(start[6:])}")
        shape, fortran, dtype = versions[start[6:]](file)
    if len(shape) != 2 or min(shape) < 1 or dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise refused(where, _REAL, f"{dtype} {list(shape[:4])}")
    return shape, fortran, dtype


def _array(where: str, file: IO[bytes], size: int) -> Array:
    """The array of a .npy file of ``size`` bytes, which has to hold it and nothing else."""
    shape, fortran, dtype = _header(where, file)
    rows, width = (int(part) for part in shape)
    count, left = rows * width, size - file.tell()
    if count * dtype.itemsize != left:
        expected = f"{rows} x {width} numbers, {count * dtype.itemsize} bytes, behind the header"
        raise refused(where, expected, f"{left} bytes")
    with reading(where, f"memory for {count} numbers"):
        matrix = np.empty(count, dtype)
        view = memoryview(matrix.view(np.uint8).data)
        got = 0
        while got < len(view) and (part := file.read(min(1 << 20, len(view) - got))):
            view[got : got + len(part)] = part
            got += len(part)
        if got < len(view) or file.read(1):
            raise ValueError(f"{got} bytes, or more, of {len(view)}")
        return matrix.reshape(shape, order="F" if fortran else "C")


def _one_of(where: str, name: str | None, names: list[str], kind: str) -> str:
    if name is not None:
        if name not in names:
            raise refused(where, f"a {kind} {quoted(name)}", ", ".join(names[:20]) or "none")
        return name
    if len(names) != 1:
        got = ", ".join(names[:20]) or "none"
        raise refused(where, f"one {kind} of features, or `name` to choose one", got)
    return names[0]


def _npz(where: str, file: IO[bytes], size: int, name: str | None) -> Array:
    with reading(where, "an archive as numpy.savez writes it"):
        archive = zipfile.ZipFile(file)
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
    info = members[_one_of(where, name, list(members), "array")]
    at = f"{where}, array {quoted(info.filename.removesuffix('.npy'))}"
    if info.file_size > mat.RATIO * size:
        raise refused(at, f"at most {mat.RATIO * size} bytes in an archive of {size}", str(info.file_size))
    with reading(at, "an array as numpy.savez writes it"):
        member = archive.open(info)
    with member:
        return _array(at, member, info.file_size)


def _mat(where: str, file: IO[bytes], size: int, name: str | None) -> Array:
    held = mat.variables(where, file, size)
    names = list(held) if name is not None else [v for v, variable in held.items() if variable.is_real]
    chosen = _one_of(where, name, names, "variable")
    variable = held[chosen]
    at = f"{where}, variable {quoted(chosen)}"
    if not variable.is_real:
        raise refused(at, _REAL, f"{variable.kind} {list(variable.shape[:4])}")
    return mat.read_variable(at, file, variable)


def read_features(path: str | os.PathLike[str], name: str | None = None, *, transpose: bool = False) -> Array:
    """The features of a file, [M, D] float32 or float64, every value finite.

    The file is a .npy, a .npz or a .mat (version 5 to 7), which its first bytes tell. Sizes
    that it states are believed only where the size of the file agrees, and nothing is unpickled. float16 and
    integers are read as the float that holds them.

    Args:
        name: of the array in a .npz or the variable in a .mat, where there are several.
        transpose: the file has [D, M], an image per column, as MATLAB's users often have it.

    Raises:
        OSError: as ``open`` has it.
        ValueError: another file, a cut one, one with bytes behind the array; several arrays and no ``name``;
            complex numbers, objects; no row or no column; NaN or infinity, by its row; naming the file.
    """
    where = file_name(path)
    try:
        with open(path, "rb") as file:
            state = os.fstat(file.fileno())
            if not stat.S_ISREG(state.st_mode):
                raise refused(where, "a file on a disk", "a pipe or a device")
            start = file.peek(8)
            if start[:4] == b"PK\x03\x04":
                matrix = _npz(where, file, state.st_size, name)
            elif start[:6] == b"MATLAB":
                matrix = _mat(where, file, state.st_size, name)
            elif start[:6] != npy.MAGIC_PREFIX:
                expected = "an array as numpy.save, numpy.savez or MATLAB writes it"
                raise refused(where, expected, f"a file that starts with {quoted(start[:6])}")
            elif name is not None:
                raise refused(where, f"an archive with {quoted(name)}", "a .npy file, which holds one array")
            else:
                matrix = _array(where, file, state.st_size)
    except OSError as error:
        raise OSError(error.errno, error.strerror, where) from error
    return as_features(where, "features", matrix.T if flag(where, "transpose", transpose) else matrix)
