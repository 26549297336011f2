"""What the losses over agents make of the distances of the rows: the formulas, and their sums over a batch.

``functional`` and ``distributed`` find the distances, each in its way; here they become losses.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..engine.reduce import over_rows, weighted
from ..engine.statistics import Statistics, hits, means_of, statistics_of
from .options import ContrastiveOptions, TripletOptions


class AgentRows(NamedTuple):
    """What is known of the rows, [N] each; target and hinges have a gradient."""

    kept: Tensor  # bool: neither ignored nor of weight 0; whatever else stands in other rows reaches nothing
    factor: Tensor | None  # sample_weight
    target: Tensor  # distance to the label's agent
    hinges: Tensor  # what the loss takes of the hinges of the other agents
    slope: Tensor  # sum of the slopes of those, perhaps in float64
    given: int | Tensor | None = None  # rows that were given, of all ranks: what "batchmean" divides by
    cosine: Tensor | None = None  # to the label's agent, and the largest to another, where the statistics
    largest: Tensor | None = None  # are wanted: float64, without gradient

    def reduced(self, values: Tensor, reduction: str) -> Tensor:
        if self.factor is not None:
            values = self.factor * values
        values = torch.where(self.kept, values, torch.zeros_like(values))  # quicker than a 0
        if self.factor is not None and reduction == "mean":
            return weighted(values, torch.where(self.kept, self.factor, 0).sum(), reduction)
        if reduction == "none":
            return values
        total = values.sum()
        if reduction == "batchmean":
            assert self.given is not None
            return over_rows(total, self.given)
        return total if reduction == "sum" else total / self.kept.sum().clamp_min(1)


Losses = ContrastiveOptions | TripletOptions


def loss(options: Losses, rows: AgentRows) -> Tensor:
    return rows.reduced(_losses(options, rows), options.reduction)


def _losses(options: Losses, rows: AgentRows) -> Tensor:
    """[N], without the rows' factors."""
    return _triplets(options, rows) if isinstance(options, TripletOptions) else _contrasts(options, rows)


@torch.no_grad()
def statistics(options: Losses, rows: AgentRows) -> Statistics:
    """Of rows whose largest cosines are known."""
    assert rows.cosine is not None and rows.largest is not None
    others = _without_dropped(options, rows)[1]
    active = ~(others <= 0) & (options.neg_weight != 0)
    if isinstance(options, TripletOptions):
        pulled = ~(rows.target <= 0) & options.add_center_loss
    else:
        excess = rows.target - options.pos_margin
        pulled = ~((excess <= 0) | (excess > options.positive_outlier_thresh)) & _pulled(options, rows)
    active |= pulled & (options.pos_weight != 0)
    hit = hits(rows.cosine, rows.largest, rows.target.dtype)
    return statistics_of(means_of(rows.kept, _losses(options, rows), rows.cosine, hit, active))


def with_statistics(
    options: Losses, rows: AgentRows, loss: Tensor, wanted: bool
) -> Tensor | tuple[Tensor, Statistics]:
    """As functions and layers return it."""
    return (loss, statistics(options, rows)) if wanted else loss


def stats(options: Losses, rows: AgentRows, negatives: Tensor) -> Tensor:
    """[mean positive, mean negative]; the negatives [N] are means over the other agents."""
    parts = positives(options, rows.target), negatives
    return torch.stack([rows.reduced(part, "mean").to(rows.target.dtype) for part in parts]).detach()


def positives(options: Losses, target: Tensor) -> Tensor:
    """What the statistics call the positive part of a row."""
    if isinstance(options, TripletOptions):
        return target
    return (target - options.pos_margin).clamp(0, options.positive_outlier_thresh)


def _without_dropped(options: Losses, rows: AgentRows) -> tuple[Tensor, Tensor]:
    """The hinges and their slopes, without those of rows that are too far from their own agents."""
    if not options.positive_first:
        return rows.hinges, rows.slope
    dropped = rows.target.detach() > options.positive_upper_bound
    return torch.where(dropped, 0, rows.hinges), torch.where(dropped, 0, rows.slope)


def _pulled(options: ContrastiveOptions, rows: AgentRows) -> Tensor:
    """Which rows have a positive term, bool [N]."""
    kept = rows.kept
    if not options.max_positive_only or not len(kept):
        return torch.ones_like(kept)
    best = torch.where(kept, positives(options, rows.target.detach()), -torch.inf).argmax()
    return torch.arange(len(kept), device=kept.device) == best


def _contrasts(options: ContrastiveOptions, rows: AgentRows) -> Tensor:
    hinges, slope = _without_dropped(options, rows)
    positive = positives(options, rows.target)
    if options.max_positive_only:
        positive = torch.where(_pulled(options, rows), positive, 0)
    if options.normalize_negative is not None:
        size = abs(options.neg_weight) * rows.reduced(slope, "mean").abs() / options.normalize_negative
        # Chosen before the division: one by 0, where nothing is active, has no gradient but NaN.
        hinges = hinges / torch.where((size > options.pos_weight) & (size > 0), size, 1)
    return options.pos_weight * positive + options.neg_weight * hinges


def _triplets(options: TripletOptions, rows: AgentRows) -> Tensor:
    losses = options.neg_weight * _without_dropped(options, rows)[0]
    return losses + options.pos_weight * rows.target if options.add_center_loss else losses
