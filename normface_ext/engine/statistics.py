"""What a step says of itself beside the loss, from [N] numbers of its rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: A row still learns where so much of its probability is not yet where it belongs.
LEFT_TO_LEARN = 0.01


class Statistics(NamedTuple):
    """What ``return_statistics=True`` gives beside a loss: of the rows that count, of all ranks' in a
    class-parallel head.

    Means and shares are plain ones, each row for one, whatever ``sample_weight`` and ``class_weight`` say; a
    row of weight 0 does not count. All are 0-d, without gradient and on x's device, where they are made: the
    host waits for nothing. float64 but for ``rows``; all 0 where no row counts.

    Attributes:
        loss: the mean of the rows' losses, whatever the reduction: their ``reduction="none"`` before
            sample_weight.
        target_cosine: the mean cosine to the label's class, without the margin.
        target_angle: the mean angle to it, in degrees.
        accuracy: the share of rows of which no other class has a larger cosine than the label's has, as
            ``NormFaceLoss.accuracy`` of k = 1 has it, among the classes that take part. Cosines that differ
            by less than their rounding stand in any order; one that is NaN counts as larger.
        active: the share of rows that still learn. Of a softmax: 1 - p_y > 0.01. Of the losses over agents:
            any term, the target's too, is above 0 and has a slope. Of SphereFace2: the label's no has a
            probability above 0.01, or more than 0.01 yeses of other classes are expected. NaN counts.
        rows: how many rows count, int64.
    """

    loss: Tensor
    target_cosine: Tensor
    target_angle: Tensor
    accuracy: Tensor
    active: Tensor
    rows: Tensor


#: The five means [5] float64, and the number of rows: plain tensors, as an autograd Function returns them.
Means = tuple[Tensor, Tensor]


def means_of(counts: Tensor, losses: Tensor, cosine: Tensor, hit: Tensor, active: Tensor) -> Means:
    """From [N] each; what stands in rows that do not count reaches nothing."""
    angle = torch.rad2deg(torch.acos(cosine.double().clamp(-1, 1)))
    each = torch.stack([value.detach().double() for value in (losses, cosine, angle, hit, active)])
    rows = counts.sum()
    return torch.where(counts, each, 0.0).sum(1) / rows.clamp_min(1), rows


def statistics_of(means: Means) -> Statistics:
    loss, cosine, angle, accuracy, active = means[0].unbind()
    return Statistics(loss, cosine, angle, accuracy, active, means[1])


def hits(cosine: Tensor, largest: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether none of the other classes, whose largest cosine is given, is nearer than the target; bool [N]
    from [N] float64. Compared as distances in the accumulator `dtype`, as ``target_rank`` does."""
    excess = (2.0 - 2.0 * cosine).to(dtype) - (2.0 - 2.0 * largest.to(dtype))
    return (excess <= 0) | (largest == -torch.inf)


def with_more(statistics: Statistics, more: Tensor) -> Statistics:
    """With the sum `more` of what the rows' losses have besides."""
    return statistics._replace(loss=statistics.loss + more / statistics.rows.clamp_min(1))


#: A loss, and its statistics where they were asked for.
Found = tuple[Tensor, Statistics | None]


def given_back(found: Found) -> Tensor | tuple[Tensor, Statistics]:
    """As functions and layers return it."""
    loss, statistics = found
    return loss if statistics is None else (loss, statistics)
