"""From features [M, D] to scores [P]: the cosine of each pair, block by block, in bounded memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .. import functional
from ..engine.arguments import integer, shown
from ._checks import Array, Features, as_features, as_rows


def unit_rows(features: Features) -> Array:
    """x / ||x|| for each row, [M, D] (paper section 3.1). A zero row stays zero: cosine 0 with all.

    float32, from float64 and integers that float32 may not hold float64.

    Raises:
        ValueError: complex numbers, words, another shape; a value that is not finite, by its row.
    """
    matrix = np.ascontiguousarray(as_features("unit_rows", "features", features))
    return functional.normalize(torch.from_numpy(matrix), dim=1).numpy()


def merge_mirror(front: Features, mirrored: Features, how: str = "sum") -> Array:
    """One feature from an image and its mirror image: elementwise "sum" (the paper) or "max", [M, D].

    Features go in as the network gives them, before normalisation (paper section 4.1; the released
    sample prototxt uses the maximum).

    Raises:
        ValueError: two shapes, another ``how``; a value, or a sum, that is not finite, by its row.
    """
    a = as_features("merge_mirror", "front", front)
    b = as_features("merge_mirror", "mirrored", mirrored)
    if a.shape != b.shape:
        raise ValueError(
            f"merge_mirror: expected `mirrored` to have shape {list(a.shape)}, got {list(b.shape)}"
        )
    if not isinstance(how, str) or how not in ("sum", "max"):
        raise ValueError(f"merge_mirror: expected `how` to be sum or max, got {shown(how)}")
    if how == "max":
        return np.maximum(a, b)
    with np.errstate(over="ignore"):  # said below
        merged = a + b
    return as_features("merge_mirror", "front + mirrored", merged)


def pair_scores(features: Features, first: Any, second: Any, *, block: int = 1 << 14) -> Array:
    """cos(x_first, x_second) for P pairs, [P].

    Beyond the unit features and the result it holds 2 * block * D numbers, whatever P is.

    Args:
        features: [M, D], array or tensor.
        first: [P] row numbers.
        second: [P] row numbers.
        block: pairs at a time.

    Raises:
        ValueError: shapes, a value that is not finite.
        IndexError: a row number, naming the pair.
    """
    op = "pair_scores"
    block = integer(op, "block", block, 1)
    unit = unit_rows(features)
    left, right = (as_rows(op, n, v, len(unit)) for n, v in (("first", first), ("second", second)))
    if len(left) != len(right):
        raise ValueError(f"{op}: expected `second` to have {len(left)} entries, got {len(right)}")
    scores = np.empty(len(left), dtype=unit.dtype)
    for start in range(0, len(left), block):
        part = slice(start, start + block)
        np.einsum("pd,pd->p", unit[left[part]], unit[right[part]], out=scores[part])
    return scores
