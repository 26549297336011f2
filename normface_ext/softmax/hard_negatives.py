"""Hard negatives: other classes that come too near to a row, and what becomes of their logits.

The formula is in ``csrc/math/terms/hard_negatives.h`` and, as the specification, in
``normface_ext.reference.hard_negatives``. What is said here is said by tensors on the device, so that no
step waits for the host.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..engine import checks
from ..engine.arguments import number, shown
from .margins import Margin

#: A number, or a tensor of one on the rows' device, without gradient.
Coefficient = float | Tensor


class HardNegatives(NamedTuple):
    """What ``BatchMargin.of`` returns that acts on both sides: on the label's cosine, and on those of the
    other classes that are past a row's threshold.

        f(c) = a2 c^2 + a1 c + a0 where c > threshold, else below * c
        df/dc is taken as g1 c + g0 there, else below

    Threshold and coefficients have no gradient.

    Attributes:
        target: psi of the label's cosine, a margin of numbers.
        threshold: [N], a cosine.
        logit: (a2, a1, a0).
        slope: (g1, g0), f's own or one that a paper takes instead, which second derivatives take for a
            constant.
        below: factor of the cosines that are not past the threshold.
        lowest, highest: what f can be for a cosine in [-1, 1]. The narrower, the larger a scale may be
            before the kernels have to look for every row's largest logit first (one more sweep).
    """

    target: Margin
    threshold: Tensor
    logit: tuple[Coefficient, Coefficient, Coefficient]
    slope: tuple[Coefficient, Coefficient]
    below: float = 1.0
    lowest: float = -1.0
    highest: float = 1.0


def added_angle(cosine: Tensor, m: float) -> Tensor:
    """cos(theta + m), past pi too."""
    sine = ((1 - cosine) * (1 + cosine)).clamp_min(0).sqrt()
    return cosine * math.cos(m) - sine * math.sin(m)


def filtered(target: Margin, threshold: float, labels: Tensor) -> HardNegatives:
    """The logits of other classes past the threshold are 0, and push nothing (arcface_torch's filter against
    images of one person under two labels)."""
    rows = torch.full(labels.shape, threshold, dtype=torch.float64, device=labels.device)
    return HardNegatives(target, rows, (0.0, 0.0, 0.0), (0.0, 0.0), highest=max(0.0, threshold))


def check_numbers(op: str, source: str, found: HardNegatives, device: torch.device) -> None:
    """Raises where the numbers that `source` returned are none, or not as many as there are places."""
    for name, count in (("logit", 3), ("slope", 2)):
        values: object = getattr(found, name)
        if not isinstance(values, (tuple, list)) or len(values) != count:
            got = len(values) if isinstance(values, (tuple, list)) else shown(values)
            raise ValueError(f"{op}: expected `{name} of {source}` to be {count} numbers, got {got}")
        for value in values:
            _check_coefficient(op, f"{name} of {source}", value, device)
    for name in ("below", "lowest", "highest"):
        number(op, f"{name} of {source}", getattr(found, name))
    if not found.lowest < found.highest:
        raise ValueError(
            f"{op}: expected `lowest` < `highest` of {source}, got {found.lowest:g} and {found.highest:g}"
        )


def _check_coefficient(op: str, name: str, value: object, device: torch.device) -> None:
    if not isinstance(value, Tensor):
        number(op, name, value, kind="numbers or tensors of one")
    elif value.numel() != 1 or value.dtype not in checks.FLOATING:
        raise ValueError(
            f"{op}: expected `{name}` to be numbers or floating tensors of one element,"
            f" got {value.dtype} of shape {list(value.shape)}"
        )
    elif value.device != device:
        raise ValueError(f"{op}: expected `{name}` on the device of `x` ({device}), got {value.device}")
