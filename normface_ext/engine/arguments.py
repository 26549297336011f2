"""Arguments that are plain values: the one place that says what an int, a number, a flag or a name is.

Every function returns the value as Python's own type or raises "op: expected `argument` to ..., got ...",
with the argument's name as the caller wrote it. NumPy's scalars and 0-d arrays count as what they hold, and
where an int is wanted so do 0-d integer tensors; a bool is no number, and nothing is rounded, cut or parsed
on the way.
"""

from __future__ import annotations

import math
import numbers
import operator
import sys
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch

INT64_MIN, INT64_MAX = -(1 << 63), (1 << 63) - 1
_MOST = sys.float_info.max
_LEAST = math.nextafter(0.0, 1.0)  # an open end is a closed one at the next number


class Range(NamedTuple):
    """Numbers from low to high, both included, and how a sentence says so."""

    text: str
    low: float
    high: float


FINITE = Range("to be finite", -_MOST, _MOST)
NOT_NEGATIVE = Range("to be finite and >= 0", 0.0, _MOST)
POSITIVE = Range("to be finite and > 0", _LEAST, _MOST)
AT_LEAST_ZERO = Range(">= 0", 0.0, math.inf)
ABOVE_ZERO = Range("> 0", _LEAST, math.inf)
FRACTION = Range("in [0, 1)", 0.0, math.nextafter(1.0, 0.0))
RATE = Range("in (0, 1]", _LEAST, 1.0)
BETWEEN_0_AND_1 = Range("in (0, 1)", _LEAST, math.nextafter(1.0, 0.0))


def below(low: float, high: float) -> Range:
    """[low, high)."""
    return Range(f"in [{low:g}, {high:g})", low, math.nextafter(high, low))


SHARE = Range("in [0, 1]", 0.0, 1.0)
ANGLE = below(0.0, math.pi)


def shown(value: object) -> str:
    """A value for a sentence: never pages long, and never an error of its own."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an int of {value.bit_length()} bits"
    if value is None or isinstance(value, (str, bool, int, float)):
        text = repr(value)
        return text if len(text) <= 80 else f"{text[:77]}..."
    return type(value).__name__


def integer(
    op: str,
    name: str,
    value: object,
    low: int | None = None,
    high: int | None = None,
    *,
    kind: str = "an int",
) -> int:
    """An int in [low, high]. Symbolic sizes of a trace stay symbolic, and guarded by `low` alone if alone."""
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        whole: int = value  # type: ignore[assignment]
    else:
        whole = _index(op, name, value, kind)
    if (low is not None and whole < low) or (high is not None and whole > high):
        wanted = f">= {low}" if high in (None, INT64_MAX) and low != INT64_MIN else f"in [{low}, {high}]"
        raise ValueError(f"{op}: expected `{name}` {wanted}, got {shown(whole)}")
    return whole


def size(op: str, name: str, value: object) -> int:
    """Of a layer: an int from 1 to what an int64 holds."""
    return integer(op, name, value, 1, INT64_MAX)


def _index(op: str, name: str, value: object, kind: str) -> int:
    truth = isinstance(value, (bool, np.bool_)) or getattr(value, "dtype", None) in (torch.bool, np.bool_)
    if not truth and getattr(value, "ndim", 0) == 0:
        try:
            return operator.index(value)  # type: ignore[arg-type]
        except (TypeError, RuntimeError):  # no integer
            pass
    raise TypeError(f"{op}: expected `{name}` to be {kind}, got {type(value).__name__}")


def number(op: str, name: str, value: object, within: Range = FINITE, *, kind: str = "a number") -> float:
    """A float in a range; an integer counts as one."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        real = value
    else:
        real = _real(op, name, value, kind)
    too_large = isinstance(real, int) and abs(real) > _MOST  # for a float, whatever the range
    if too_large or not within.low <= real <= within.high:
        raise ValueError(f"{op}: expected `{name}` {within.text}, got {shown(real)}")
    return float(real)


def _real(op: str, name: str, value: object, kind: str) -> float:
    held = value.item() if isinstance(value, np.ndarray) and value.ndim == 0 else value
    if isinstance(held, numbers.Real) and not isinstance(held, (bool, np.bool_)):
        try:
            return float(held)
        except OverflowError:  # a fraction
            raise ValueError(f"{op}: expected `{name}` {FINITE.text}, got {type(value).__name__}") from None
    raise TypeError(f"{op}: expected `{name}` to be {kind}, got {type(value).__name__}")


def flag(op: str, name: str, value: object) -> bool:
    if value is True or value is False:
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    raise TypeError(f"{op}: expected `{name}` to be True or False, got {shown(value)}")


def choice(op: str, name: str, value: object, choices: Iterable[str]) -> str:
    if isinstance(value, str) and value in choices:
        return value
    raise ValueError(f"{op}: expected `{name}` to be one of {', '.join(choices)}, got {shown(value)}")
