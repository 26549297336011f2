"""A margin for every class, from how many images it has: rare classes get the larger ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..engine import checks
from ..engine.arguments import ANGLE, POSITIVE, below, number


def ldam_margins(counts: Tensor | Sequence[int], max_m: float = 0.5) -> Tensor:
    """m_j = max_m (n_j / min n)^(-1/4), [C] (LDAM; Cao et al. 2019): for ``CosFace(ldam_margins(counts))``.

    Args:
        counts: [C] images of each class, all positive.
        max_m: margin of the rarest class, positive.

    Returns:
        [C] float64, on the device of `counts`.

    Raises:
        TypeError, ValueError: an argument out of range.
    """
    rarity = _rarity("ldam_margins", counts)
    return number("ldam_margins", "max_m", max_m, POSITIVE) * (rarity / rarity.max())


def class_margins(counts: Tensor | Sequence[int], low: float = 0.05, high: float = 0.5) -> Tensor:
    """m_j from ``low`` (most images) to ``high`` (fewest), affine in n_j^(-1/4), [C].

    For ``ArcFace(class_margins(counts))``: the third place of Google Landmark Recognition 2020. Classes that
    all have as many images get ``low``.

    Args:
        counts: [C] images of each class, all positive.
        low, high: in [0, pi), low <= high.

    Returns:
        [C] float64, on the device of `counts`.

    Raises:
        TypeError, ValueError: an argument out of range.
    """
    rarity = _rarity("class_margins", counts)
    low = number("class_margins", "low", low, ANGLE)
    high = number("class_margins", "high", high, below(low, math.pi))
    above = rarity - rarity.min()
    largest = above.max()
    return low + (high - low) * above / torch.where(largest > 0, largest, 1)


def _rarity(op: str, counts: object) -> Tensor:
    """n^(-1/4)"""
    return image_counts(op, counts).pow(-0.25)


def image_counts(op: str, counts: object) -> Tensor:
    """counts [C] as float64, all positive."""
    try:
        # A list's numbers are looked at here, whatever the default device is.
        images = counts if isinstance(counts, Tensor) else torch.as_tensor(counts, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{op}: expected `counts` to be [C] numbers, got {type(counts).__name__}") from None
    if images.dtype == torch.bool or images.is_complex():
        raise TypeError(f"{op}: expected `counts` to be [C] numbers, got {images.dtype}")
    if images.dim() != 1 or images.numel() == 0:
        raise ValueError(f"{op}: expected `counts` to be [C] with C >= 1, got shape {list(images.shape)}")
    if not checks.has_values(images):
        raise ValueError(f"{op}: expected `counts` to have values, got a {images.device.type} tensor without")
    images = images.double()
    bad = ~(images.isfinite() & (images > 0))
    if bad.any():
        first = int(bad.nonzero()[0])
        raise ValueError(
            f"{op}: expected `counts` to be finite and > 0, got {images[first].item():g} for class {first}"
        )
    return images
