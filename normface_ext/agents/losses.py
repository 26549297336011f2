"""What the losses over agents make of the distances of the rows: the formulas, and their sums over a batch.

``functional`` and ``distributed`` find the distances, each in its way; here they become losses.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..engine.reduce import over_rows, weighted
from .options import ContrastiveOptions, TripletOptions


class AgentRows(NamedTuple):
    """What is known of the rows, [N] each; target and hinges have a gradient."""

    kept: Tensor  # bool: neither ignored nor of weight 0; whatever else stands in other rows reaches nothing
    factor: Tensor | None  # sample_weight
    target: Tensor  # distance to the label's agent
    hinges: Tensor  # what the loss takes of the hinges of the other agents
    slope: Tensor  # sum of the slopes of those, perhaps in float64
    given: int | Tensor | None = None  # rows that were given, of all ranks: what "batchmean" divides by

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
    losses = _triplets(options, rows) if isinstance(options, TripletOptions) else _contrasts(options, rows)
    return rows.reduced(losses, options.reduction)


def stats(options: Losses, rows: AgentRows, negatives: Tensor) -> Tensor:
    """[mean positive, mean negative]; the negatives [N] are means over the other agents."""
    parts = positives(options, rows.target), negatives
    return torch.stack([rows.reduced(part, "mean").to(rows.target.dtype) for part in parts]).detach()


def positives(options: Losses, target: Tensor) -> Tensor:
    """What the statistics call the positive part of a row."""
    if isinstance(options, TripletOptions):
        return target
    return (target - options.pos_margin).clamp(0, options.positive_outlier_thresh)


def _contrasts(options: ContrastiveOptions, rows: AgentRows) -> Tensor:
    kept, hinges, slope = rows.kept, rows.hinges, rows.slope
    positive = positives(options, rows.target)
    if options.max_positive_only and len(kept):
        best = torch.where(kept, positive.detach(), -torch.inf).argmax()
        positive = torch.where(torch.arange(len(kept), device=kept.device) == best, positive, 0)
    if options.positive_first:
        dropped = rows.target.detach() > options.positive_upper_bound
        hinges, slope = torch.where(dropped, 0, hinges), torch.where(dropped, 0, slope)
    if options.normalize_negative is not None:
        size = abs(options.neg_weight) * rows.reduced(slope, "mean").abs() / options.normalize_negative
        # Chosen before the division: one by 0, where nothing is active, has no gradient but NaN.
        hinges = hinges / torch.where((size > options.pos_weight) & (size > 0), size, 1)
    return options.pos_weight * positive + options.neg_weight * hinges


def _triplets(options: TripletOptions, rows: AgentRows) -> Tensor:
    hinges = rows.hinges
    if options.positive_first:
        hinges = torch.where(rows.target.detach() > options.positive_upper_bound, 0, hinges)
    losses = options.neg_weight * hinges
    return losses + options.pos_weight * rows.target if options.add_center_loss else losses
