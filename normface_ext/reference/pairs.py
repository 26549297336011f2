"""Distances, and the losses of pairs and triplets."""

from __future__ import annotations

import torch
from torch import Tensor

from .losses import reduce_rows
from .rows import unit_of, widened


def inner_distance(
    x: Tensor,
    weight: Tensor,
    *,
    p: int = 2,
    normalize: bool = False,
    labels: Tensor | None = None,
    update_center_only: bool = False,
    eps: float = 1e-12,
) -> Tensor:
    """d_ij = sum (x_i - w_j)^2 for p = 2, sum |x_i - w_j| for p = 1, [N, C], in x's dtype."""
    features, agents = widened(x), widened(weight)
    if normalize:
        agents = unit_of(agents, 1, 2, eps)[0]
    if update_center_only and labels is not None:
        own = labels[:, None] == torch.arange(weight.shape[0], device=labels.device)
        agents = torch.where(own[..., None], agents, agents.detach())
    difference = features[:, None] - agents
    return (difference.square() if p == 2 else difference.abs()).sum(2).to(x.dtype)


def pair_contrastive_loss(
    a: Tensor,
    b: Tensor,
    same: Tensor,
    *,
    margin: float = 1.0,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
) -> Tensor:
    """loss_i = 1/2 (d^2 where same, (margin - d)_+^2 elsewhere), d = |a_i - b_i| (Hadsell et al. 2006)."""
    squared = (widened(a) - widened(b)).square().sum(1)
    # At d = 0 the distance has no slope; the push apart is taken as 0 there.
    apart = squared != 0
    distance = torch.where(apart, torch.where(apart, squared, 1).sqrt(), 0)
    losses = torch.where(same.bool(), squared, (margin - distance).clamp_min(0).square()) / 2
    kept = torch.ones_like(same, dtype=torch.bool) if sample_weight is None else sample_weight != 0
    return reduce_rows(losses, kept, reduction, sample_weight)


def triplet_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    margin: float = 0.2,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
) -> Tensor:
    """loss_i = (margin + |a_i - p_i|^2 - |a_i - n_i|^2)_+ (FaceNet, 2015)."""
    a, p, n = widened(anchor), widened(positive), widened(negative)
    losses = (margin + (a - p).square().sum(1) - (a - n).square().sum(1)).clamp_min(0)
    kept = torch.ones_like(losses, dtype=torch.bool) if sample_weight is None else sample_weight != 0
    return reduce_rows(losses, kept, reduction, sample_weight)
