"""MATLAB files of version 5 to 7, as far as features need them: matrices of real numbers, by name.

A reader of our own, because SciPy's ends the process on some broken files. The format is "MAT-File Format"
of MathWorks, chapter 1: a header of 128 bytes, then elements, each a tag (type, bytes) and its data; a
matrix is an element of elements (flags, dimensions, name, numbers), deflated or not.
"""

from __future__ import annotations

import math
import struct
import zlib
from dataclasses import dataclass
from typing import IO

import numpy as np

from ..engine.files import quoted, reading
from ._checks import Array
from ._text import refused

#: Bytes in which one byte of deflated data may end.
RATIO = 1100
_MATRIX, _DEFLATED = 14, 15
#: How numbers are stored: types of elements.
_STORED = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
#: What numbers are: classes of matrices.
_REAL = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}
_OTHER = {1: "cell", 2: "struct", 3: "object", 4: "char", 5: "sparse", 16: "function", 17: "object"}
#: Bytes of an element that are looked at for its name and shape.
_HEAD = 1 << 16


@dataclass(frozen=True)
class Variable:
    """``start`` and ``size`` of its element in the file; ``data``: where in it its numbers stand."""

    start: int
    size: int
    deflated: bool
    shape: tuple[int, ...]
    kind: str
    stored: np.dtype[np.generic] | None
    data: int
    bytes: int

    @property
    def is_real(self) -> bool:
        return self.stored is not None and len(self.shape) == 2 and min(self.shape) >= 1


class _Head:
    """The start of a matrix, read from element to element."""

    def __init__(self, data: bytes, order: str) -> None:
        self.data, self.order, self.at = data, order, 0

    def tag(self) -> tuple[int, int, int]:
        """(type, bytes, where the data start); what follows stands at the next multiple of 8."""
        first, size = struct.unpack_from(f"{self.order}II", self.data, self.at)
        if first >> 16:  # up to four bytes stand in the tag itself
            kind, size, start = first & 0xFFFF, first >> 16, self.at + 4
            if size > 4:
                raise ValueError(f"a short element of {size} bytes")
            self.at += 8
        else:
            kind, start = first, self.at + 8
            self.at = start + -(-size // 8) * 8
        return kind, size, start

    def element(self, wanted: int) -> bytes:
        kind, size, start = self.tag()
        if kind != wanted or start + size > len(self.data):
            raise ValueError(f"an element of type {kind} and {size} bytes")
        return self.data[start : start + size]


def _variable(start: int, size: int, deflated: bool, head: bytes, order: str) -> tuple[str, Variable]:
    part = _Head(head, order)
    if deflated:
        kind, _, part.at = part.tag()
        if kind != _MATRIX:
            raise ValueError(f"a deflated element of type {kind}")
    flags = struct.unpack(f"{order}II", part.element(6))[0]
    sizes = part.element(5)
    shape = struct.unpack(f"{order}{len(sizes) // 4}i", sizes)
    name = part.element(1).decode("latin-1")
    number = flags & 0xFF
    if number not in _REAL or flags & 0x0800:
        kind_name = "complex" if number in _REAL else _OTHER.get(number, f"class {number}")
        return name, Variable(start, size, deflated, shape, kind_name, None, 0, 0)
    kind, count, data = part.tag()
    if kind not in _STORED:
        raise ValueError(f"numbers of type {kind}")
    stored = np.dtype(_STORED[kind]).newbyteorder(order)  # type: ignore[arg-type]
    if min(shape, default=0) < 0 or math.prod(shape) * stored.itemsize != count:
        raise ValueError(f"{count} bytes for numbers {list(shape[:4])} of {stored.itemsize} bytes")
    return name, Variable(start, size, deflated, shape, _REAL[number], stored, data, count)


def variables(where: str, file: IO[bytes], size: int) -> dict[str, Variable]:
    """Every variable of the file by name; none of their numbers is read.

    Raises:
        ValueError: a file of another version, one that is cut or has elements that are none.
    """
    with reading(where, "variables of a MATLAB file, version 5 to 7 (save -v7)"):
        header = file.read(128)
        if len(header) < 128 or header[126:] not in (b"IM", b"MI"):
            raise ValueError("another header")
        order = "<" if header[126:] == b"IM" else ">"
        if struct.unpack_from(f"{order}H", header, 124)[0] != 0x0100:
            raise ValueError("another version, such as 7.3, which is HDF5")
        found: dict[str, Variable] = {}
        at = 128
        while at < size:
            file.seek(at)
            tag = file.read(8)
            kind, count = struct.unpack(f"{order}II", tag)
            if kind not in (_MATRIX, _DEFLATED) or at + 8 + count > size:
                raise ValueError(f"an element of type {kind} and {count} bytes at byte {at}, of {size}")
            head = file.read(min(count, _HEAD))
            if kind == _DEFLATED:
                head = zlib.decompressobj().decompress(head, _HEAD)
            name, variable = _variable(at + 8, count, kind == _DEFLATED, head, order)
            if name in found:
                raise ValueError(f"variable {quoted(name)} twice")
            if name:  # what has none is not the user's
                found[name] = variable
            at += 8 + count
    return found


def _bytes(where: str, file: IO[bytes], held: Variable) -> bytes:
    """The numbers of a variable as they are stored."""
    if not held.deflated:
        if held.data + held.bytes > held.size:
            raise refused(where, f"{held.bytes} bytes of numbers", f"an element of {held.size} bytes")
        file.seek(held.start + held.data)
        return file.read(held.bytes)
    end = held.data + held.bytes
    if end > RATIO * held.size:
        raise refused(where, f"numbers that {held.size} deflated bytes can hold", f"{held.bytes} bytes")
    file.seek(held.start)
    stream = zlib.decompressobj()
    data = stream.decompress(file.read(held.size), end + 8)
    if not stream.eof or len(data) >= end + 8:  # its end has the checksum; up to seven bytes fill the element
        raise ValueError(f"{len(data)} bytes of a stream that does not end there")
    return data[held.data : end]


def read_variable(where: str, file: IO[bytes], held: Variable) -> Array:
    """The matrix of a variable that is real.

    Raises:
        ValueError: numbers that are missing, or that the variable's class does not hold.
    """
    assert held.stored is not None
    with reading(where, f"{held.bytes} bytes of numbers"):
        data = _bytes(where, file, held)
        if len(data) != held.bytes:
            raise ValueError(f"{len(data)} bytes")
        stored = np.frombuffer(data, held.stored)
        with np.errstate(all="ignore"):  # said below
            matrix: Array = stored.astype(held.kind)
        exact = np.array_equal(matrix, stored, equal_nan=True)
        if not exact:
            raise ValueError(f"numbers that {held.kind} does not hold")
        return matrix.reshape(held.shape, order="F")
