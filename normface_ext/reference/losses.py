"""What the losses have in common: which rows count, two labels, weights, statistics."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.statistics import LEFT_TO_LEARN, Statistics
from .rows import widened

#: A loss, or with ``return_statistics`` (loss, Statistics).
Result = Tensor | Any


@torch.no_grad()
def statistics(cos: Tensor, labels: Tensor, kept: Tensor, losses: Tensor, active: Tensor) -> Statistics:
    """Plain means over the rows that count, from all cosines [N, C] and the rows' own losses [N]."""
    number, safe = kept.sum(), labels.long().clamp(0, cos.shape[1] - 1)[:, None]
    own = cos.gather(1, safe)
    nearer = (~(cos <= own)).scatter(1, safe, False)

    def mean(values: Tensor) -> Tensor:
        return torch.where(kept, values.double(), 0).sum() / number.clamp_min(1)

    target = own[:, 0].double()
    angle = torch.rad2deg(target.clamp(-1, 1).acos())
    return Statistics(mean(losses), mean(target), mean(angle), mean(~nearer.any(1)), mean(active), number)


def still_learns(probability: Tensor) -> Tensor:
    """Whether what is not yet where it belongs is worth learning; NaN is."""
    return ~(probability <= LEFT_TO_LEARN)


class TwiceRows(NamedTuple):
    """The rows of a loss. With labels_b each stands there twice, first all with labels, then all with
    labels_b, and lam shares its weight out."""

    x: Tensor
    labels: Tensor
    sample_weight: Tensor | None
    share: Tensor | None  # how much of a row each is

    def joined(self, made: Tensor, reduction: str) -> Tensor:
        """What a loss makes of these rows, as what it makes of the rows that were given."""
        if self.share is None or reduction not in ("none", "batchmean"):
            return made
        return made.view(2, -1).sum(0) if reduction == "none" else 2 * made  # it was divided by 2 N


def with_both(
    x: Tensor,
    labels: Tensor,
    sample_weight: Tensor | None,
    labels_b: Tensor | None,
    lam: float | Tensor | None,
    ignore_index: int | None,
) -> TwiceRows:
    if labels_b is None:
        return TwiceRows(x, labels, sample_weight, None)
    of_first = torch.as_tensor(lam, dtype=widened(x).dtype, device=x.device).expand(len(x))
    share, both = torch.cat([of_first, 1 - of_first]), torch.cat([labels, labels_b])
    weight = share if sample_weight is None else share * sample_weight.repeat(2)
    alone = ~rows_that_count(both, ignore_index, weight).view(2, -1).all(0).repeat(2)
    return TwiceRows(torch.cat([x, x]), both, weight, torch.where(alone, 1, share))


def reduce_weighted(losses: Tensor, total_weight: Tensor, reduction: str) -> Tensor:
    """The mean divides by the sum of the weights, and is 0 where that is 0; "batchmean" by N."""
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if reduction == "batchmean":
        return losses.sum() / max(1, len(losses))
    empty = total_weight == 0
    return torch.where(empty, 0, losses.sum() / torch.where(empty, 1, total_weight))


def safe_rows(x: Tensor, kept: Tensor) -> Tensor:
    """x with ones instead of the rows that do not count: what those hold, NaN included, reaches nothing."""
    return torch.where(kept[:, None], x, 1)


def reduce_rows(losses: Tensor, kept: Tensor, reduction: str, sample_weight: Tensor | None = None) -> Tensor:
    """The rows' losses, weighted; the mean divides by the sum of the weights and is 0 where that is 0."""
    if sample_weight is not None:
        losses = sample_weight.to(losses.dtype) * losses
    losses = torch.where(kept, losses, torch.zeros_like(losses))
    if sample_weight is None and reduction == "mean":
        return losses.sum() / kept.sum().clamp_min(1)
    weights = kept if sample_weight is None else torch.where(kept, sample_weight.to(losses.dtype), 0)
    return reduce_weighted(losses, weights.sum(), reduction)


def rows_that_count(labels: Tensor, ignore_index: int | None, sample_weight: Tensor | None) -> Tensor:
    """Which rows [N] count: neither ignored nor of weight 0."""
    kept = torch.ones_like(labels, dtype=torch.bool) if ignore_index is None else labels != ignore_index
    return kept if sample_weight is None else kept & (sample_weight != 0)


def softplus(z: Tensor) -> Tensor:
    return -F.logsigmoid(-z)
