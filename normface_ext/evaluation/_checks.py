"""What features, scores, labels, row numbers, folds and rates have to be: one place for all protocols.

Every function returns the checked array or raises "op: expected `argument` ..., got ...". Nothing is parsed,
rounded or cut on the way: a label that is neither yes nor no, or a number that is none, is no answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from ..engine.arguments import INT64_MAX, INT64_MIN, Range, number

Array: TypeAlias = npt.NDArray[Any]
Features: TypeAlias = "Array | torch.Tensor"

RATE = Range("in [0, 1]", 0.0, 1.0)
_EXACT = 1 << 53  # beyond it a float64 does not hold every whole number


def as_array(op: str, name: str, values: Any) -> Array:
    """A tensor, an array or a list as an array; an entry that a mask hides is no value."""
    if isinstance(values, np.ma.MaskedArray) and np.ma.is_masked(values):
        raise ValueError(f"{op}: expected `{name}` without masked entries, got {np.ma.count_masked(values)}")
    try:
        if isinstance(values, torch.Tensor):
            held = values.detach().cpu()
            values = (held.float() if held.dtype == torch.bfloat16 else held).numpy()
        return np.asarray(values)
    except (ValueError, TypeError, RuntimeError) as error:  # rows of unequal length; a sparse tensor
        raise ValueError(
            f"{op}: expected `{name}` to be an array, got {type(values).__name__}: {str(error)[:100]}"
        ) from error


def as_reals(op: str, name: str, values: Any) -> Array:
    """Real numbers: float16, float32 and float64 as they are, integers as the float that holds them."""
    array = as_array(op, name, values)
    if array.dtype.kind == "f" and array.dtype.itemsize <= 8:
        return array
    if array.dtype.kind not in "iu":
        raise ValueError(f"{op}: expected `{name}` to be real numbers of at most 64 bits, got {array.dtype}")
    if array.dtype.itemsize <= 2:
        return array.astype(np.float32)
    if array.dtype.itemsize == 8 and array.size and max(int(array.max()), -int(array.min())) > _EXACT:
        raise ValueError(
            f"{op}: expected `{name}` to be exact as float64,"
            f" got integers from {array.min()} to {array.max()}"
        )
    return array.astype(np.float64)


def as_features(op: str, name: str, features: Any) -> Array:
    """[M, D] float32 or float64, D >= 1, every value finite; the error names the first bad row."""
    matrix = as_reals(op, name, features)
    if matrix.ndim != 2:
        raise ValueError(f"{op}: expected `{name}` to be 2-D [rows, D], got shape {list(matrix.shape)[:8]}")
    if matrix.shape[1] == 0:
        raise ValueError(f"{op}: expected `{name}` to have columns, got shape {list(matrix.shape)}")
    if matrix.dtype.itemsize < 4 or not matrix.dtype.isnative:
        matrix = matrix.astype(np.float64 if matrix.dtype.itemsize == 8 else np.float32)
    step = max(1, (1 << 20) // matrix.shape[1])  # rows: a mask of few numbers, not of all
    for start in range(0, len(matrix), step):
        bad = ~np.isfinite(matrix[start : start + step]).all(axis=1)
        if bad.any():
            row = start + int(bad.argmax())
            raise ValueError(f"{op}: expected `{name}` to be finite, got NaN or infinity at row {row}")
    return matrix


def as_scores(op: str, name: str, scores: Any) -> Array:
    """[P] real and finite; the error names the first pair that is not."""
    array = as_reals(op, name, scores)
    if array.ndim != 1:
        raise ValueError(f"{op}: expected `{name}` to be of one shape [P], got {list(array.shape)[:8]}")
    bad = ~np.isfinite(array)
    if bad.any():
        raise ValueError(
            f"{op}: expected `{name}` without NaN or infinity, got one at pair {bad.argmax()} of {len(bad)}"
        )
    return array


def _held(array: Array) -> str:
    """What a row of no numbers holds, for a sentence."""
    if array.dtype.kind == "O":
        return f"object of {', '.join(sorted({type(value).__name__ for value in array}))}"[:100]
    return f"{array.dtype}, {str(array[0])[:40]!r} first" if len(array) else str(array.dtype)


def as_same(op: str, same: Any) -> npt.NDArray[np.bool_]:
    """[P] bool out of bools or of numbers that are 0 and 1; -1, 2, 0.9, NaN and words are no answers."""
    array = as_array(op, "same", same)
    if array.ndim != 1:
        raise ValueError(f"{op}: expected `same` to be of one shape [P], got {list(array.shape)[:8]}")
    bools = array.dtype.kind == "O" and {type(value) for value in array} <= {bool, np.bool_}
    if array.dtype == np.bool_ or bools:
        return array.astype(np.bool_, copy=False)
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{op}: expected `same` to be bool or 0 and 1, got {_held(array)}")
    bad = (array != 0) & (array != 1)
    if bad.any():
        at = int(bad.argmax())
        raise ValueError(
            f"{op}: expected `same` to be bool or 0 and 1, got {array[at]} at pair {at}"
            f" and {int(bad.sum()) - 1} more such"
        )
    return array.astype(np.bool_)


def judged_pairs(
    op: str, scores: Any, same: Any, *, both: bool = True
) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Scores [P] and same [P]; ``both``: at least one pair of each kind."""
    values, is_same = as_scores(op, "scores", scores), as_same(op, same)
    if values.shape != is_same.shape:
        raise ValueError(
            f"{op}: expected `scores` and `same` to be of one shape [P],"
            f" got {list(values.shape)} and {list(is_same.shape)}"
        )
    if both and not (is_same.any() and not is_same.all()):
        raise ValueError(
            f"{op}: expected same and different pairs, got {is_same.sum()} same of {len(values)}"
        )
    return values, is_same


def as_whole(op: str, name: str, values: Any) -> npt.NDArray[np.int64]:
    """[P] whole numbers that int64 holds, whatever type they are stored in."""
    array = as_array(op, name, values)
    if array.ndim != 1 or array.dtype.kind not in "iuf":
        raise ValueError(
            f"{op}: expected `{name}` to be a row of whole numbers, got {array.dtype} {list(array.shape)[:8]}"
        )
    if array.dtype.kind == "f":
        bad = (array != np.floor(array)) | ~(np.abs(array) <= _EXACT)
    else:
        bad = array > INT64_MAX if array.dtype.kind == "u" else np.zeros(len(array), dtype=bool)
    if bad.any():
        at = int(bad.argmax())
        raise ValueError(
            f"{op}: expected `{name}` to be a row of whole numbers, got {array[at]} at position {at}"
        )
    return array.astype(np.int64, copy=False)


def as_rows(
    op: str, name: str, values: Any, rows: int | None = None, *, what: str = "pair"
) -> npt.NDArray[np.int64]:
    """Row numbers, in [0, rows) if ``rows`` is known. Integers only: 1.0 is the wrong column of a table."""
    array = as_array(op, name, values)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(
            f"{op}: expected `{name}` to be a row of integers, got {array.dtype} {list(array.shape)[:8]}"
        )
    low, high = (0, rows - 1) if rows is not None else (INT64_MIN, INT64_MAX)
    outside = (array < low) | (array > high)
    if outside.any():
        at = int(outside.argmax())
        raise IndexError(f"{op}: expected `{name}` in [{low}, {high + 1}), got {array[at]} at {what} {at}")
    return array.astype(np.int64, copy=False)


def numbered(op: str, **labels: tuple[Any, int]) -> list[npt.NDArray[np.int64]]:
    """Identities as numbers from 0, in sorted order, the same over all arguments: equal if and only if equal.

    Args:
        labels: of each argument its value and length: whole numbers, other finite numbers or words.
    """
    known: dict[Any, int] = {}
    result = []
    for name, (values, rows) in labels.items():
        array = as_array(op, name, values)
        if array.shape != (rows,):
            raise ValueError(f"{op}: expected `{name}` to have shape [{rows}], got {list(array.shape)[:8]}")
        words = array.dtype.kind in "US" or (
            array.dtype.kind == "O" and all(isinstance(value, str) for value in array)
        )
        if not words and array.dtype.kind not in "biuf":
            raise ValueError(
                f"{op}: expected `{name}` to be numbers or words that name people, got {_held(array)}"
            )
        missing = array.astype(str) == "" if words else ~np.isfinite(array)
        if missing.any():
            at = int(missing.argmax())
            raise ValueError(f"{op}: expected `{name}` without missing entries, got {array[at]!r} at {at}")
        people, at_person = np.unique(array, return_inverse=True)
        numbers = [known.setdefault(person, len(known)) for person in people.tolist()]
        result.append(np.array(numbers, dtype=np.int64)[at_person])
    return result


def folds_of_both_kinds(
    op: str, same: npt.NDArray[np.bool_], fold: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """The folds that occur: two or more, each with same and different pairs, or its accuracy says nothing."""
    numbers, at = np.unique(fold, return_inverse=True)
    if len(numbers) < 2:
        raise ValueError(f"{op}: expected pairs in at least 2 folds, got {len(numbers)}")
    pairs, of_same = np.bincount(at), np.bincount(at, weights=same).astype(np.int64)
    one_kind = np.flatnonzero((of_same == 0) | (of_same == pairs))
    if len(one_kind):
        found = ", ".join(f"{of_same[k]} same of {pairs[k]} in fold {numbers[k]}" for k in one_kind[:3])
        more = f" and {len(one_kind) - 3} more folds of one kind" if len(one_kind) > 3 else ""
        raise ValueError(f"{op}: expected same and different pairs in every fold, got {found}{more}")
    return numbers


def false_accept_rates(op: str, far: Any, name: str = "far") -> list[float]:
    """One rate or a row of them, each in [0, 1]."""
    rates = np.atleast_1d(as_array(op, name, far))
    if rates.ndim != 1 or len(rates) == 0:
        raise ValueError(
            f"{op}: expected `{name}` to be a rate or a row of rates, got {list(rates.shape)[:8]}"
        )
    return [number(op, name, rate, RATE) for rate in rates]


def columns(op: str, parts: Mapping[str, Any], what: str) -> None:
    """Raises unless all have one length."""
    sizes = [len(part) for part in parts.values()]
    if len(set(sizes)) != 1:
        raise ValueError(f"{op}: expected four {what} of one length, got lengths {sizes}")
