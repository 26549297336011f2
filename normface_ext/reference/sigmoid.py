"""The head of sigmoids."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..engine.options import takes
from ..sigmoid.options import SphereFace2Keywords, SphereFace2Options
from .losses import (
    Result,
    reduce_rows,
    rows_that_count,
    safe_rows,
    softplus,
    statistics,
    still_learns,
    with_both,
)
from .margins import turned
from .rows import cosine

if TYPE_CHECKING:
    from typing_extensions import Unpack


def sigmoid_logits(
    cos: Tensor, similar: Tensor, scale: float, offset: float | Tensor, t: int, straight: bool
) -> Tensor:
    """z = r g(u) + offset of every cell, g(u) = 2 ((u + 1) / 2)^t - 1, u what a margin makes of the cosine;
    of slope r in the cosine where it is straight."""
    g = 2 * ((similar + 1) / 2) ** t - 1
    return scale * (cos + (g - cos).detach() if straight else g) + offset


@takes(SphereFace2Options)
def sphereface2_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: float | Tensor,
    *,
    sample_weight: Tensor | None = None,
    labels_b: Tensor | None = None,
    lam: float | Tensor | None = None,
    return_statistics: bool = False,
    **options: Unpack[SphereFace2Keywords],
) -> Result:
    """loss_i = W [alpha softplus(-z_iy) + (1 - alpha) sum_{j != y} softplus(z_ij)] (SphereFace2, C and A)."""
    o = SphereFace2Options.of("sphereface2_loss", options)
    given = with_both(x, labels, sample_weight, labels_b, lam, o.ignore_index)
    x, labels, sample_weight, _ = given
    kept = rows_that_count(labels, o.ignore_index, sample_weight)
    cos = cosine(safe_rows(x, kept), weight, o.eps)
    b = bias.reshape(()).to(cos.dtype) if isinstance(bias, Tensor) else bias
    straight = o.margin_gradient == "straight"
    safe = labels.clamp(0, weight.shape[0] - 1)[:, None]
    own = cos.gather(1, safe)[:, 0]
    u_target, u_others, offset = own, cos, o.r * o.m
    if o.form == "A":
        past = own < -math.cos(o.m)
        u_target = torch.where(past, own - 1 + math.cos(o.m), turned(own, o.m))
        u_others, offset = turned(cos, -o.m), 0.0
    target = sigmoid_logits(own, u_target, o.r, b - offset, o.t, straight)
    others = sigmoid_logits(cos, u_others, o.r, b + offset, o.t, straight).scatter(1, safe, -torch.inf)
    each = o.alpha * softplus(-target) + (1 - o.alpha) * softplus(others).sum(1)
    losses = (50 / o.r if o.loss_weight is None else o.loss_weight) * each
    loss = reduce_rows(losses, kept, o.reduction, sample_weight)
    if not return_statistics:
        return given.joined(loss, o.reduction)
    learns = still_learns(torch.sigmoid(-target)) | still_learns(others.sigmoid().sum(1))
    return loss, statistics(cos, labels, kept, losses, learns)
