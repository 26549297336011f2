"""What a sigmoid head makes of the rows: ``functions`` and ``distributed`` find them, each in its way."""

from __future__ import annotations

import math
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .. import reference
from ..engine.dtypes import accumulator
from ..engine.reduce import softplus, weighted
from ..engine.row_state import COSINE, LARGEST, SECOND_SUM
from ..engine.statistics import LEFT_TO_LEARN, Statistics, hits, means_of, statistics_of
from .options import SphereFace2Options

Similarity = TypeVar("Similarity", float, Tensor)


class SigmoidRows(NamedTuple):
    """What is known of the rows, [N] float64 each; cosine and others have a gradient."""

    weight: Tensor  # of the row's loss; 0 where it does not count
    cosine: Tensor  # of the target
    others: Tensor  # the sum of softplus(z_j) over the other classes


def balanced_bias(options: SphereFace2Options, classes: int) -> float:
    """b at which the loss of a row whose cosines are all 0 has no slope in b.

    With n = C - 1 others, k = alpha / ((1 - alpha) n), and p - d and p + d the logits of target and others
    without b (form C: p = r g(0), d = r m) there is k sigmoid(d - p - b) = sigmoid(d + p + b), a square
    equation in e^(p + b): b = ln(k) / 2 - p - arsinh(e^d (1 - k) / (2 sqrt k)). Without others 0.
    """
    if classes == 1:
        return 0.0
    k = options.alpha / ((1 - options.alpha) * (classes - 1))
    target, others = (options.r * similarity for similarity in _at_cosine_0(options))
    middle, half = (target + others) / 2, (others - target) / 2
    lean = 0.0
    if k != 1:
        log = half + math.log(abs(1 - k) / (2 * math.sqrt(k)))
        # Of a large argument arsinh is the logarithm of its double; e^d may have no number.
        lean = math.copysign(log + math.log(2) if log > 40 else math.asinh(math.exp(log)), 1 - k)
    return math.log(k) / 2 - middle - lean


def _at_cosine_0(options: SphereFace2Options) -> tuple[float, float]:
    """g of target and others with their margins."""
    m = options.m
    if options.form == "C":
        middle = _bent(0.0, options.t)
        return middle - m, middle + m
    return _bent(-math.sin(m) if m <= math.pi / 2 else math.cos(m) - 1, options.t), _bent(
        math.sin(m), options.t
    )


def loss(
    options: SphereFace2Options,
    rows: SigmoidRows,
    bias: float | Tensor,
    count: int | Tensor | None = None,
) -> Tensor:
    """float64; `bias` a number or a 0-d tensor, `count` the rows that "batchmean" divides by."""
    each = _losses(options, rows, _logit(options, rows, bias))
    counts = rows.weight != 0
    losses = torch.where(counts, rows.weight * torch.where(counts, each, 0.0), 0.0)
    return weighted(losses, rows.weight.sum(), options.reduction, count)


@torch.no_grad()
def statistics(
    options: SphereFace2Options, rows: SigmoidRows, bias: float | Tensor, state: Tensor, dtype: torch.dtype
) -> Statistics:
    """From what the sweep found of the rows, with their largest cosines; `dtype` is the features'."""
    logit = _logit(options, rows, bias)
    wrong = torch.maximum(torch.sigmoid(-logit), state[SECOND_SUM])  # the label's no, the others' yeses
    hit = hits(state[COSINE], state[LARGEST], accumulator(dtype))
    losses, learns = _losses(options, rows, logit), ~(wrong <= LEFT_TO_LEARN)
    return statistics_of(means_of(rows.weight != 0, losses, rows.cosine, hit, learns))


def _logit(options: SphereFace2Options, rows: SigmoidRows, bias: float | Tensor) -> Tensor:
    """z of the target."""
    return options.r * _target(options, rows.cosine) + bias


def _losses(options: SphereFace2Options, rows: SigmoidRows, logit: Tensor) -> Tensor:
    """[N], without the rows' weights."""
    weight = 50 / options.r if options.loss_weight is None else options.loss_weight
    return weight * (options.alpha * softplus(-logit) + (1 - options.alpha) * rows.others)


def _target(options: SphereFace2Options, cosine: Tensor) -> Tensor:
    """g of the target's cosines [N] with its margin, of slope 1 where the gradient is straight."""
    if options.form == "C":
        g = _bent(cosine, options.t) - options.m
    else:
        past = cosine < -math.cos(options.m)  # theta + m > pi
        turned = torch.where(past, cosine - 1 + math.cos(options.m), reference.turned(cosine, options.m))
        g = _bent(turned, options.t)
    return cosine + (g - cosine).detach() if options.margin_gradient == "straight" else g


def _bent(cosine: Similarity, t: int) -> Similarity:
    """g(c) = 2 ((c + 1) / 2)^t - 1."""
    return 2 * ((cosine + 1) / 2) ** t - 1
