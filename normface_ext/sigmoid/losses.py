"""What a sigmoid head makes of the rows: ``functions`` and ``distributed`` find them, each in its way."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..engine.reduce import softplus, weighted
from .options import SphereFace2Options


class SigmoidRows(NamedTuple):
    """What is known of the rows, [N] float64 each; cosine and others have a gradient."""

    weight: Tensor  # of the row's loss; 0 where it does not count
    cosine: Tensor  # of the target
    others: Tensor  # the sum of softplus(z_j) over the other classes


def balanced_bias(options: SphereFace2Options, classes: int) -> float:
    """b at which the loss of a row whose cosines are all 0 has no slope in b.

    With n = C - 1 others, p = r g(0) and k = alpha / ((1 - alpha) n) there is
    k sigmoid(r m - p - b) = sigmoid(r m + p + b), a square equation in e^(p + b):
    b = ln(k) / 2 - p - arsinh(e^(r m) (1 - k) / (2 sqrt k)). Without others 0.
    """
    if classes == 1:
        return 0.0
    k = options.alpha / ((1 - options.alpha) * (classes - 1))
    middle = options.r * (2 * 0.5**options.t - 1)
    lean = 0.0
    if k != 1:
        log = options.r * options.m + math.log(abs(1 - k) / (2 * math.sqrt(k)))
        # Of a large argument arsinh is the logarithm of its double; e^(r m) may have no number.
        lean = math.copysign(log + math.log(2) if log > 40 else math.asinh(math.exp(log)), 1 - k)
    return math.log(k) / 2 - middle - lean


def loss(
    options: SphereFace2Options,
    rows: SigmoidRows,
    bias: float | Tensor,
    count: int | Tensor | None = None,
) -> Tensor:
    """float64; `bias` a number or a 0-d tensor, `count` the rows that "batchmean" divides by."""
    logit = options.r * (_similarity(options, rows.cosine) - options.m) + bias
    weight = 50 / options.r if options.loss_weight is None else options.loss_weight
    each = weight * (options.alpha * softplus(-logit) + (1 - options.alpha) * rows.others)
    counts = rows.weight != 0
    losses = torch.where(counts, rows.weight * torch.where(counts, each, 0.0), 0.0)
    return weighted(losses, rows.weight.sum(), options.reduction, count)


def _similarity(options: SphereFace2Options, cosine: Tensor) -> Tensor:
    """g(c) = 2 ((c + 1) / 2)^t - 1, of slope 1 where the gradient is straight."""
    g = 2 * ((cosine + 1) / 2) ** options.t - 1
    return cosine + (g - cosine).detach() if options.margin_gradient == "straight" else g
