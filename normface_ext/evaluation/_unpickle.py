"""Unpickling for one kind of file: lists of byte strings and answers. Nothing that a file names is called.

A first pass over the opcodes (``pickletools``, which executes none) refuses by name all that such a file does
not need, so that the second one builds lists, tuples, byte strings, numbers, and arrays of bytes. The few
names that Python and NumPy put into such pickles are answered by functions of this module.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ..engine.arguments import shown
from ..engine.files import quoted
from ._text import refused

#: What lists of bytes and answers are made of. Not here: PERSID, INST, OBJ, NEWOBJ, EXT, DUP,
#: dictionaries and sets, out-of-band buffers.
_ALLOWED = {
    *("PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"),
    *("EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG1"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET"),
}
_NEEDLESS = "which such a file does not need"
_PUTS = ("PUT", "BINPUT", "LONG_BINPUT")


class _Type:
    """Stands for a NumPy dtype: bytes or bools, nothing else."""

    def __init__(self, kind: object, align: object = False, copy: object = False) -> None:
        word = kind.decode("latin-1") if isinstance(kind, bytes) else kind
        if word not in ("u1", "b1"):
            got = quoted(word, 20) if isinstance(word, str) else type(word).__name__
            raise ValueError(f"an array of {got}, not of bytes or bools")
        self.kind = np.dtype(word)

    def __setstate__(self, state: object) -> None:
        """Byte order and alignment as NumPy writes them of one byte: none."""
        if state not in [(3, sign, None, None, None, -1, -1, 0) for sign in ("|", b"|")]:
            raise ValueError("a type in an unknown form")


class _Array:
    """Stands for a NumPy array while it is built."""

    value: Any = None

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise ValueError("an array in an unknown form")
        version, shape, kind, fortran, data = state
        if version != 1 or fortran is not False:
            raise ValueError("an array in an unknown form")
        if not isinstance(kind, _Type) or not isinstance(data, bytes) or shape != (len(data),):
            raise ValueError("an array that is no row of bytes")
        self.value = np.frombuffer(data, kind.kind)


def _from_buffer(data: object, kind: object, shape: object, order: object) -> _Array:
    """How NumPy writes arrays for protocol 5."""
    held = _Array()
    if order not in ("C", "F", b"C", b"F"):
        raise ValueError("an array in an unknown order")
    held.__setstate__((1, shape, kind, False, bytes(data) if isinstance(data, bytearray) else data))
    return held


def _rebuilt(kind: object, shape: object, code: object) -> _Array:
    """The empty array that NumPy has a pickle begin with."""
    if kind is not _never or shape != (0,) or code not in ("b", b"b"):
        raise ValueError("an array in an unknown form")
    return _Array()


def _scalar(kind: object, data: object) -> bool:
    if not isinstance(kind, _Type) or data not in (b"\0", b"\1"):
        raise ValueError("a NumPy number that is no answer")
    return data == b"\1"


def _encode(text: object, encoding: object) -> bytes:
    """How Python 3 writes bytes for readers of Python 2."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise ValueError("text in an unknown encoding")
    return text.encode("latin-1")


def _empty(*arguments: object) -> bytes:
    if arguments:
        raise ValueError("bytes made of something")
    return b""


def _never(*arguments: object) -> None:
    raise ValueError("an array made by its type")


_NAMES: dict[tuple[str, str], Callable[..., Any]] = {
    ("_codecs", "encode"): _encode,
    ("builtins", "bytes"): _empty,
    ("__builtin__", "bytes"): _empty,
    ("numpy", "dtype"): _Type,
    ("numpy", "ndarray"): _never,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _rebuilt for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = _NAMES.get((module, name))
        if known is None:
            raise ValueError(f"the name {quoted(f'{module}.{name}', 80)}, {_NEEDLESS}")
        return known


def _opcodes(data: bytes) -> Iterator[tuple[pickletools.OpcodeInfo, Any, int | None]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of strings of Python 2 with a backslash
        yield from pickletools.genops(io.BytesIO(data))


def unpickle(where: str, data: bytes, expected: str) -> Any:
    """What the pickle holds; arrays as ``_Array``. Text of Python 2 becomes bytes.

    Raises:
        ValueError: bytes that are no pickle, a pickle that needs another opcode or name, which it states.
    """
    count, most = 0, 1000 + len(data) // 4  # no more lists and numbers than that file would have
    try:
        for opcode, argument, at in _opcodes(data):
            count += 1
            if count > most:
                raise ValueError(f"more than {most} opcodes in {len(data)} bytes")
            if opcode.name not in _ALLOWED:
                raise ValueError(f"the pickle opcode {opcode.name} at byte {at}, {_NEEDLESS}")
            if opcode.name == "GLOBAL" and tuple(str(argument).split(" ", 1)) not in _NAMES:
                got = quoted(str(argument).replace(" ", "."), 80)
                raise ValueError(f"the name {got} at byte {at}, {_NEEDLESS}")
            if opcode.name in _PUTS and not 0 <= int(argument or 0) <= most:
                # A table of so many places would be made.
                raise ValueError(f"place {shown(argument)} of a table at byte {at}, in {len(data)} bytes")
        return _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:
        # What find_class and the functions above raise; and what the parsers raise on bytes that are none.
        raise refused(where, expected, str(error) or type(error).__name__) from error
