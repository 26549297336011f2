"""Features from a .npy file."""

from __future__ import annotations

import os
import stat
from typing import IO

import numpy as np
from numpy.lib import format as npy

from ..engine.files import file_name, quoted, reading
from ._checks import Array, as_features
from ._text import refused


def _header(where: str, file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    start = file.read(6)
    if start != b"\x93NUMPY":
        raise refused(where, "an array as numpy.save writes it", f"a file that starts with {quoted(start)}")
    file.seek(0)
    with reading(where, "the header of a .npy file"):
        version = npy.read_magic(file)
        readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
        if version not in readers:  # 3.0 is for names of columns, which features have not
            raise ValueError(f"version {version}")
        shape, fortran, dtype = readers[version](file)
    return shape, fortran, dtype


def read_features(path: str | os.PathLike[str]) -> Array:
    """The features of a .npy file: [M, D] float32 or float64, every value finite.

    The header is believed only where the size of the file agrees with it, and nothing is unpickled. float16
    and integers are read as the float that holds them.

    Raises:
        OSError: as ``open`` has it.
        ValueError: another file, a cut one, one with bytes behind the array; complex numbers, objects; no
            row or no column; NaN or infinity, by its row; naming the file.
    """
    where = file_name(path)
    try:
        with open(path, "rb") as file:
            state = os.fstat(file.fileno())
            if not stat.S_ISREG(state.st_mode):
                raise refused(where, "a file on a disk", "a pipe or a device")
            shape, fortran, dtype = _header(where, file)
            if len(shape) != 2 or min(shape) < 1 or dtype.kind not in "iuf" or dtype.itemsize > 8:
                got = f"{dtype} {list(shape[:4])}"
                raise refused(where, "real numbers of at most 64 bits [M, D], M and D at least 1", got)
            rows, width = (int(size) for size in shape)
            count, left = rows * width, state.st_size - file.tell()
            if count * dtype.itemsize != left:
                expected = f"{rows} x {width} numbers, {count * dtype.itemsize} bytes, behind the header"
                raise refused(where, expected, f"{left} bytes")
            with reading(where, f"memory for {count} numbers"):
                matrix = np.fromfile(file, dtype, count).reshape(shape, order="F" if fortran else "C")
    except OSError as error:
        raise OSError(error.errno, error.strerror, where) from error
    return as_features(where, "features", matrix)
