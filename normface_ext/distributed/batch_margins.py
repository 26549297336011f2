"""Margins that look at the batch, in a class-parallel head: every rank is told of its own rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup

from ..engine import checks, sweep
from ..engine.reduce import weighted
from ..engine.statistics import Found, with_more
from ..softmax.batch_margins import BatchMargin, Rows, margin_of, regularizer_of, rows_weight, weighed
from ..softmax.hard_negatives import HardNegatives
from ..softmax.margins import Margin
from ..softmax.options import HeadOptions
from .collectives import Batch, add_over_shards
from .shard import IGNORED, ClassShard


class _SumOverRanks(Function):
    """The sum over the ranks of a group, or this rank's values as they are. As the features' gradient, theirs
    is multiplied by the ranks that average it."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: ProcessGroup | None, replicas: int) -> Tensor:
        ctx.replicas = replicas
        return values.clone() if group is None else add_over_shards([values], group)[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient * ctx.replicas, None, None


def rows_of_all(
    op: str,
    margin: BatchMargin,
    batch: Batch,
    weight: Tensor,
    places: Tensor,
    shard: ClassShard,
    given: Tensor,
    options: HeadOptions,
) -> Rows:
    """What a margin with hard negatives is told: the rows of all ranks, since every rank needs all thresholds
    and has all rows. Their target cosines are added over the shards, of which one has each. `weight` is this
    rank's shard, `places` the labels there, `given` this rank's labels as its caller has them."""
    if margin.uses_norms:
        raise ValueError(
            f"{op}: expected a `margin` that uses norms or has hard negatives, and not both, got {margin!r}"
        )
    margin.follow(op, batch.x.device)
    kept = batch.labels != checks.ignored(options.ignore_index)
    counts = checks.weighed(kept, batch.sample_weight)
    straight = options.margin_gradient == "straight"
    cosine = None
    if margin.uses_cosines:
        told = sweep.CosineOptions(IGNORED, options.eps, is_shard=True)
        mine = sweep.target_cosine(batch.x, weight.detach().contiguous(), places, told)
        (cosine,) = add_over_shards([mine], shard.group)
        cosine = torch.where(counts, cosine, 0)
    return Rows(batch.labels, counts, None, straight, None, given, cosine, of_all=True)


def margin_of_rows(op: str, margin: BatchMargin, rows: Rows) -> Margin | HardNegatives:
    """Of this rank's rows, or of those of all; every rank calls it."""
    found = margin_of(op, margin, rows)
    if not isinstance(found, (Margin, HardNegatives)):
        raise ValueError(
            f"{op}: expected a `margin` that the kernels apply, got {margin!r}, a function of the target"
            " cosines, which no rank of a class-parallel head has before the loss"
        )
    return found


def with_regularizer(
    op: str,
    found: Found,
    margin: BatchMargin,
    rows: Rows,
    sample_weight: Tensor | None,
    reduction: str,
    replicas: int,
    batch: Batch,
    group: ProcessGroup,
) -> Found:
    """The loss, and what the rows of all ranks add to it; for "none" this rank's."""
    loss, statistics = found
    more = regularizer_of(op, margin, rows)
    if more is None:
        return found
    plain = torch.where(rows.counts, more.detach(), 0).double().sum()
    if rows.of_all:
        weights = rows_weight(rows, batch.sample_weight)
        every = weighted(weighed(more, weights), weights.sum(), reduction, batch.count)
        loss = loss + (batch.own(every) if reduction == "none" else every).to(loss.dtype)
        return loss, statistics and with_more(statistics, plain)
    weights = rows_weight(rows, sample_weight)
    total, plain = add_over_shards([weights.sum(), plain], group)
    mine = weighted(weighed(more, weights), total, reduction, batch.count)
    if reduction == "none" and mine.shape != loss.shape:  # of two labels, whose losses are one already
        mine = mine.view(2, -1).sum(0)
    summed: Tensor = _SumOverRanks.apply(mine, None if reduction == "none" else group, replicas)
    return loss + summed.to(loss.dtype), statistics and with_more(statistics, plain)
