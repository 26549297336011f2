"""The losses over agents."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..agents.options import (
    AgentOptions,
    ContrastiveKeywords,
    ContrastiveOptions,
    TripletKeywords,
    TripletOptions,
)
from ..engine.options import takes
from .losses import Result, TwiceRows, reduce_rows, rows_that_count, safe_rows, statistics, with_both
from .rows import cosine, widened

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _split(distances: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The label's distance [N], and the others' [N, C] with infinity in its place."""
    safe = labels.long().clamp(0, distances.shape[1] - 1)[:, None]
    return distances.gather(1, safe).squeeze(1), distances.scatter(1, safe, torch.inf)


def _agent_distances(
    x: Tensor, weight: Tensor, labels: Tensor, sample_weight: Tensor | None, options: AgentOptions
) -> Tensor:
    kept = rows_that_count(labels, options.ignore_index, sample_weight)
    return 2 - 2 * cosine(safe_rows(x, kept), weight, options.eps)


def _of_agents(
    of_distances: Callable[..., Result],
    given: TwiceRows,
    weight: Tensor,
    options: AgentOptions,
    return_statistics: bool,
    **named: Any,
) -> Result:
    """The loss of distances, of the distances to the agents."""
    distances = _agent_distances(given.x, weight, given.labels, given.sample_weight, options)
    rows = {"sample_weight": given.sample_weight, "return_statistics": return_statistics}
    made = of_distances(distances, given.labels, **rows, **named)
    return made if return_statistics else given.joined(made, options.reduction)


@takes(ContrastiveOptions)
def c_contrastive_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    sample_weight: Tensor | None = None,
    labels_b: Tensor | None = None,
    lam: float | Tensor | None = None,
    return_statistics: bool = False,
    **options: Unpack[ContrastiveKeywords],
) -> Result:
    """loss_i = w+ min(T, (d_iy - m+)_+) + w- sum_{j != y} (m- - d_ij)_+ (paper section 4)."""
    o = ContrastiveOptions.of("c_contrastive_loss", options)
    given = with_both(x, labels, sample_weight, labels_b, lam, o.ignore_index)
    return _of_agents(contrastive_of_distances, given, weight, o, return_statistics, **options)


@takes(ContrastiveOptions)
def contrastive_of_distances(
    distances: Tensor,
    labels: Tensor,
    *,
    sample_weight: Tensor | None = None,
    return_statistics: bool = False,
    **options: Unpack[ContrastiveKeywords],
) -> Result:
    """``c_contrastive_loss`` of given distances [N, C]."""
    o = ContrastiveOptions.of("contrastive_of_distances", options)
    kept = rows_that_count(labels, o.ignore_index, sample_weight)
    every = safe_rows(widened(distances), kept)
    target, others = _split(every, labels)
    excess = target - o.pos_margin
    positive = excess.clamp(0, o.positive_outlier_thresh)
    pulled = ~((excess <= 0) | (excess > o.positive_outlier_thresh))
    if o.max_positive_only and len(labels):
        best = torch.where(kept, positive, -torch.inf).argmax()
        pulled &= torch.arange(len(labels), device=labels.device) == best
        positive = torch.where(torch.arange(len(labels), device=labels.device) == best, positive, 0)
    if o.hardest_only:
        others = others.gather(1, others.argmin(1, keepdim=True))
    active = ~(o.neg_margin - others <= 0)
    terms = (-others).exp() if o.exp_negative_weight else o.neg_margin - others
    dropped = (target > o.positive_upper_bound) & o.positive_first
    terms = torch.where(active & kept[:, None] & ~dropped[:, None], terms, 0)
    learns = (pulled & (o.pos_weight != 0)) | ((terms != 0).any(1) & (o.neg_weight != 0))
    if o.normalize_negative is not None:
        slopes = terms if o.exp_negative_weight else (terms != 0).to(terms.dtype)
        mean = reduce_rows(slopes.sum(1).detach(), kept, "mean", sample_weight)
        size = abs(o.neg_weight) * mean.abs() / o.normalize_negative
        terms = terms / torch.where((size > o.pos_weight) & (size > 0), size, 1)
    losses = o.pos_weight * positive + o.neg_weight * terms.sum(1)
    loss = reduce_rows(losses, kept, o.reduction, sample_weight)
    return (loss, statistics(1 - every / 2, labels, kept, losses, learns)) if return_statistics else loss


@takes(ContrastiveOptions)
def c_contrastive_stats(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    sample_weight: Tensor | None = None,
    **options: Unpack[ContrastiveKeywords],
) -> Tensor:
    """[mean positive hinge, mean negative hinge], the latter over all other agents too."""
    o = ContrastiveOptions.of("c_contrastive_stats", options)
    target, others = _split(_agent_distances(x, weight, labels, sample_weight, o), labels)
    hinges = (o.neg_margin - others).clamp_min(0).sum(1) / max(1, others.shape[1] - 1)
    parts = (target - o.pos_margin).clamp(0, o.positive_outlier_thresh), hinges
    kept = rows_that_count(labels, o.ignore_index, sample_weight)
    return torch.stack([reduce_rows(part, kept, "mean", sample_weight) for part in parts]).detach()


@takes(TripletOptions)
def c_triplet_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    sample_weight: Tensor | None = None,
    labels_b: Tensor | None = None,
    lam: float | Tensor | None = None,
    return_statistics: bool = False,
    **options: Unpack[TripletKeywords],
) -> Result:
    """loss_i = w- sum_{j != y} (m + d_iy - d_ij)_+ [+ w+ d_iy] (paper section 4)."""
    o = TripletOptions.of("c_triplet_loss", options)
    given = with_both(x, labels, sample_weight, labels_b, lam, o.ignore_index)
    return _of_agents(triplet_of_distances, given, weight, o, return_statistics, **options)


@takes(TripletOptions)
def triplet_of_distances(
    distances: Tensor,
    labels: Tensor,
    *,
    sample_weight: Tensor | None = None,
    return_statistics: bool = False,
    **options: Unpack[TripletKeywords],
) -> Result:
    """``c_triplet_loss`` of given distances [N, C]."""
    o = TripletOptions.of("triplet_of_distances", options)
    kept = rows_that_count(labels, o.ignore_index, sample_weight)
    every = safe_rows(widened(distances), kept)
    target, others = _split(every, labels)
    if o.hardest_only:
        others = others.gather(1, others.argmin(1, keepdim=True))
    excess = o.margin + target[:, None] - others
    terms = torch.where(~(excess <= 0), excess, 0)
    dropped = (target > o.positive_upper_bound) & o.positive_first
    negatives = torch.where(dropped, 0, terms.sum(1))
    losses, learns = o.neg_weight * negatives, (negatives != 0) & (o.neg_weight != 0)
    if o.add_center_loss:
        losses = losses + o.pos_weight * target
        learns = learns | (~(target <= 0) & (o.pos_weight != 0))
    loss = reduce_rows(losses, kept, o.reduction, sample_weight)
    return (loss, statistics(1 - every / 2, labels, kept, losses, learns)) if return_statistics else loss


@takes(TripletOptions)
def c_triplet_stats(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    sample_weight: Tensor | None = None,
    **options: Unpack[TripletKeywords],
) -> Tensor:
    """[mean distance to the label's agent, mean distance to the others]."""
    o = TripletOptions.of("c_triplet_stats", options)
    distances = _agent_distances(x, weight, labels, sample_weight, o)
    target, _ = _split(distances, labels)
    parts = target, (distances.sum(1) - target) / max(1, distances.shape[1] - 1)
    kept = rows_that_count(labels, o.ignore_index, sample_weight)
    return torch.stack([reduce_rows(part, kept, "mean", sample_weight) for part in parts]).detach()
