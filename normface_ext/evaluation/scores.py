"""From features [M, D] to scores [P]: the cosine of each pair, block by block, in bounded memory."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from .. import functional

Array: TypeAlias = npt.NDArray[Any]
Features: TypeAlias = "Array | torch.Tensor"


def as_features(op: str, name: str, features: Features) -> Array:
    """[M, D] float32 (float64 stays), every value finite; the error names the first bad row."""
    if isinstance(features, torch.Tensor):
        tensor = features.detach().cpu()
        features = (tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor).numpy()
    matrix = np.asarray(features)
    if matrix.ndim != 2:
        raise ValueError(f"{op}: expected `{name}` to be 2-D [rows, D], got shape {list(matrix.shape)}")
    if matrix.dtype != np.float64:
        matrix = matrix.astype(np.float32)
    bad = ~np.isfinite(matrix).all(axis=1)
    if bad.any():
        raise ValueError(f"{op}: expected `{name}` to be finite, got NaN or infinity at row {bad.argmax()}")
    return matrix


def unit_rows(features: Features) -> Array:
    """x / ||x|| for each row, [M, D] (paper section 3.1). A zero row stays zero: cosine 0 with all."""
    matrix = np.ascontiguousarray(as_features("unit_rows", "features", features))
    return functional.normalize(torch.from_numpy(matrix), dim=1).numpy()


def merge_mirror(front: Features, mirrored: Features, how: str = "sum") -> Array:
    """One feature from an image and its mirror image: elementwise "sum" (the paper) or "max", [M, D].

    Features go in as the network gives them, before normalisation (paper section 4.1; the released
    sample prototxt uses the maximum).
    """
    a = as_features("merge_mirror", "front", front)
    b = as_features("merge_mirror", "mirrored", mirrored)
    if a.shape != b.shape:
        raise ValueError(
            f"merge_mirror: expected `mirrored` to have shape {list(a.shape)}, got {list(b.shape)}"
        )
    if how not in ("sum", "max"):
        raise ValueError(f"merge_mirror: expected `how` to be sum or max, got {how!r}")
    merged: Array = a + b if how == "sum" else np.maximum(a, b)
    return merged


def as_indices(op: str, name: str, values: Any, rows: int) -> npt.NDArray[np.int64]:
    """Row numbers in [0, rows)."""
    indices = np.asarray(values)
    if indices.ndim != 1 or not np.issubdtype(indices.dtype, np.integer):
        raise ValueError(
            f"{op}: expected `{name}` to be a row of integers, got {indices.dtype} {list(indices.shape)}"
        )
    outside = (indices < 0) | (indices >= rows)
    if outside.any():
        at = int(outside.argmax())
        raise IndexError(f"{op}: expected `{name}` in [0, {rows}), got {indices[at]} at pair {at}")
    return indices.astype(np.int64)


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
    if block < 1:
        raise ValueError(f"{op}: expected `block` >= 1, got {block}")
    unit = unit_rows(features)
    left, right = (as_indices(op, n, v, len(unit)) for n, v in (("first", first), ("second", second)))
    if len(left) != len(right):
        raise ValueError(f"{op}: expected `second` to have {len(left)} entries, got {len(right)}")
    scores = np.empty(len(left), dtype=unit.dtype)
    for start in range(0, len(left), block):
        part = slice(start, start + block)
        np.einsum("pd,pd->p", unit[left[part]], unit[right[part]], out=scores[part])
    return scores
