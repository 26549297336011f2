"""The class-parallel metric losses over agents, as functions of one shard of the classes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.distributed.tensor import DTensor

from ..agents import losses, ops
from ..agents.functions import needs_class_sum, negatives, plain, sweep_options
from ..agents.losses import AgentRows, Losses
from ..agents.ops import AgentSweepOptions
from ..agents.options import ContrastiveKeywords, ContrastiveOptions, TripletKeywords, TripletOptions
from ..engine import checks, transforms
from ..engine.arguments import flag
from ..engine.autograd import asked, detach_without_grad, no_second_derivative, store_as
from ..engine.mixing import joined, no_statistics, twice
from ..engine.options import takes
from ..engine.row_state import COSINE, INVERSE_NORM, LARGEST, SECOND_SUM, SUM, Swept
from ..engine.statistics import Statistics
from ..engine.sweep import Collected, target_cosine
from .collectives import (
    Batch,
    ScatteredRows,
    add_over_shards,
    gather_rows,
    key_of_largest,
    largest_of_all,
)
from .mixing import both_labels_of_all
from .shard import IGNORED, ClassShard
from .softmax import check_backbone_gradients

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _holds_hardest(best: Tensor, shard: ClassShard) -> Tensor:
    """Where this rank has the largest cosine of all ranks; of equal ones the first rank has it."""
    rank = dist.get_rank(shard.group)
    return key_of_largest(best, torch.full_like(best, rank), shard.group) == rank


class _ClassParallelHinge(Function):
    """As ``ops._AgentHinge`` for the rows of all ranks: (target distance, hinges, slopes), [W * each]
    each, and the class_sum and the rows' state if asked for, the same on every rank.

    With ``separate`` the gradients that come back are each rank's own rows' and add up; otherwise they are
    those of one number that all ranks have in common.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        batch: Batch,
        places: Tensor,
        margin: Tensor | None,
        options: AgentSweepOptions,
        separate: bool,
        replicas: int,
        shard: ClassShard,
        need_class_sum: bool,
        need_largest: bool,
    ) -> tuple[Tensor, ...]:
        agents = weight.contiguous()
        part = target_cosine(batch.x, agents, places, options)
        (cosine,) = add_over_shards([part], shard.group)
        distance, threshold = ops.hinge_threshold(batch.x, agents, places, cosine, margin, options)
        need_gradient = batch.need_x or ctx.needs_input_grad[1]
        swept, collected, options = ops.sweep_hinges(
            batch.x,
            agents,
            places,
            threshold,
            options,
            need_gradient=need_gradient,
            need_class_sum=need_class_sum,
            need_largest=need_largest,
        )
        sums, mine = swept.rows[: SECOND_SUM + 1], None
        if options.hardest:
            mine = _holds_hardest(collected.values[:, 0], shard)
            sums = torch.where(mine, sums, 0)
        rows = swept.rows.clone()
        rows[: SECOND_SUM + 1], class_sum = add_over_shards([sums, swept.class_sum], shard.group)
        slope = ops.hinge_slope(rows, options)
        ctx.save_for_backward(x, weight, batch.x, agents, places, threshold, rows, mine, *collected, *swept)
        ctx.batch, ctx.options, ctx.shard = batch, options, shard
        ctx.separate, ctx.replicas = separate, replicas
        constant = [slope, class_sum]
        if need_largest:
            known = largest_of_all(rows, shard.group)
            known[COSINE] = cosine
            constant.append(known)
        ctx.mark_non_differentiable(*constant)
        return distance, rows[SUM].to(distance.dtype), *constant

    @staticmethod
    def backward(ctx: Any, grad_distance: Tensor, grad_hinges: Tensor, *_: Any) -> Any:
        own, weight, x, agents, places, threshold, rows, mine, *saved = ctx.saved_tensors
        collected, swept = Collected(*saved[:2]), Swept(*saved[2:])
        batch, options, shard = ctx.batch, ctx.options, ctx.shard
        own_x, need_weight = ctx.needs_input_grad[:2]
        origins = grad_distance, grad_hinges, own, weight
        with torch.no_grad():
            if ctx.separate:
                parts, wide = [grad_distance, grad_hinges], grad_hinges.dtype
                grad_distance, grad_hinges = (g.to(wide) for g in add_over_shards(parts, shard.group))
            slopes = ops.hinge_slopes(rows, grad_distance, grad_hinges, options)
            if mine is not None:
                slopes[ops.OTHERS] = torch.where(mine, slopes[ops.OTHERS], 0)
            needed = batch.need_x, need_weight
            dx, dw = asked(
                needed,
                ops.hinge_gradients(slopes, x, agents, places, threshold, swept, collected, options, needed),
            )
            if dx is not None:
                moved = ScatteredRows(dx, batch, shard.group).wait() * ctx.replicas
                dx = store_as(moved, own.dtype, batch.own(rows[INVERSE_NORM]), options.eps)
        given = dx if own_x else None, dw
        return *no_second_derivative(options.op, given, *origins), *[None] * 9


class _Rows(NamedTuple):
    """The rows of all ranks, checked."""

    x: Tensor  # this rank's
    weight: Tensor
    batch: Batch
    places: Tensor


def _gathered(
    op: str,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    shard: ClassShard,
    sample_weight: Tensor | None,
    options: Losses,
    equal_batches: bool,
) -> _Rows:
    if isinstance(weight, DTensor):
        weight = weight.to_local()  # differentiable
    checks.features_and_shard(op, x, weight, shard.count)
    ignored = checks.ignored(options.ignore_index)
    labels = checks.labels(op, labels, x, shard.num_classes, options.ignore_index)
    factor = checks.weights(op, "sample_weight", sample_weight, x, x.shape[0])
    batch = gather_rows(
        x,
        labels,
        shard.group,
        ignore_index=ignored,
        sample_weight=factor,
        equal_batches=equal_batches,
        counted=options.reduction == "batchmean",
    )
    if options.check_finite:
        batch.check_finite(op, weight, shard, ignored)
    places = shard.places(batch.labels, ignored)
    if batch.sample_weight is not None:
        places = torch.where(batch.sample_weight == 0, IGNORED, places)
    return _Rows(x, weight, batch, places)


def _swept(
    op: str,
    given: _Rows,
    shard: ClassShard,
    options: Losses,
    margin: Tensor | None,
    *,
    replicas: int = 1,
    need_class_sum: bool = False,
    need_largest: bool = False,
) -> tuple[AgentRows, Tensor | None]:
    """(the rows of all ranks, the sum of the unit agents of all ranks if it is needed)"""
    x, weight, batch, places = given
    needed = torch.is_grad_enabled() and (batch.need_x or weight.requires_grad)
    tensor, sweep = sweep_options(
        op, batch.x, weight, len(places), shard.count, IGNORED, options, needed, margin, is_shard=True
    )
    x, weight = detach_without_grad(x, weight)
    separate = options.reduction == "none"
    target, hinges, slope, class_sum, *state = _ClassParallelHinge.apply(
        x, weight, batch, places, tensor, sweep, separate, replicas, shard, need_class_sum, need_largest
    )
    rows = AgentRows(places != IGNORED, batch.sample_weight, target, hinges, slope, batch.count)
    if need_largest:
        rows = rows._replace(cosine=state[0][COSINE], largest=state[0][LARGEST])
    return rows, class_sum if need_class_sum else None


def rows_and_loss(
    op: str,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    shard: ClassShard,
    sample_weight: Tensor | None,
    options: Losses,
    margin: Tensor | None = None,
    labels_b: Tensor | None = None,
    lam: float | Tensor | None = None,
    *,
    backbone_gradients: str,
    equal_batches: bool,
    need_largest: bool,
) -> tuple[AgentRows, Tensor]:
    """(the rows of all ranks, the loss) with options that have been checked; a ``margin`` stands in for
    theirs. With two labels the rows stand there twice."""
    transforms.refuse(op)
    check_backbone_gradients(op, backbone_gradients)
    flag(op, "equal_batches", equal_batches)
    if labels_b is not None or lam is not None:
        no_statistics(op, need_largest)
        told = options.ignore_index, options.check_finite, equal_batches
        both = both_labels_of_all(op, x, weight, labels, labels_b, lam, sample_weight, shard, *told)
        rows, loss = rows_and_loss(
            op,
            twice(x, options.eps),
            weight,
            both.labels,
            shard,
            both.weight,
            replace(options, check_finite=False),
            margin,
            backbone_gradients=backbone_gradients,
            equal_batches=equal_batches,
            need_largest=False,
        )
        return rows, joined(loss, options.reduction)
    given = _gathered(op, x, weight, labels, shard, sample_weight, options, equal_batches)
    replicas = dist.get_world_size(shard.group) if backbone_gradients == "mean" else 1
    rows, _ = _swept(op, given, shard, options, margin, replicas=replicas, need_largest=need_largest)
    loss = losses.loss(options, rows)
    return rows, given.batch.own(loss) if options.reduction == "none" else loss


@torch.no_grad()
def stats(
    op: str,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    shard: ClassShard,
    sample_weight: Tensor | None,
    options: Losses,
    margin: Tensor | None = None,
    *,
    equal_batches: bool,
) -> Tensor:
    """``functional.c_contrastive_stats`` or ``c_triplet_stats`` of the rows of all ranks."""
    given = _gathered(op, x, weight, labels, shard, sample_weight, options, equal_batches)
    options = plain(options)
    rows, class_sum = _swept(op, given, shard, options, margin, need_class_sum=needs_class_sum(options))
    return losses.stats(options, rows, negatives(options, given.batch.x, shard.num_classes, rows, class_sum))


@overload
def c_contrastive_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    shard: ClassShard,
    *,
    sample_weight: Tensor | None = None,
    backbone_gradients: str = "mean",
    equal_batches: bool = False,
    return_statistics: Literal[False] = False,
    labels_b: Tensor | None = None,
    lam: float | Tensor | None = None,
    **options: Unpack[ContrastiveKeywords],
) -> Tensor: ...
@overload
def c_contrastive_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    shard: ClassShard,
    *,
    sample_weight: Tensor | None = None,
    backbone_gradients: str = "mean",
    equal_batches: bool = False,
    return_statistics: Literal[True],
    labels_b: Tensor | None = None,
    lam: float | Tensor | None = None,
    **options: Unpack[ContrastiveKeywords],
) -> tuple[Tensor, Statistics]: ...
@takes(ContrastiveOptions)
def c_contrastive_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    shard: ClassShard,
    *,
    sample_weight: Tensor | None = None,
    backbone_gradients: str = "mean",
    equal_batches: bool = False,
    return_statistics: bool = False,
    labels_b: Tensor | None = None,
    lam: float | Tensor | None = None,
    **options: Unpack[ContrastiveKeywords],
) -> Tensor | tuple[Tensor, Statistics]:
    """``functional.c_contrastive_loss`` of the rows of all ranks over the classes of all ranks.

    Every rank of ``shard.group`` calls it with its own rows and its own agents, and the same options. It is
    the loss of one process that has them all. Per step the features travel once to every rank (all-gather),
    the target's cosine and two sums per row are added (two all-reduces; two more with ``hardest_only``), and
    the features' gradient travels back (reduce-scatter).

    Args:
        x: [N, D] this rank's features, N as it likes.
        weight: [shard.count, D] its agents, or a DTensor ``Shard(0)`` of [num_classes, D].
        labels: [N] int64 or int32, global, in [0, num_classes) or ``ignore_index``.
        sample_weight: [N] of this rank's rows; on all ranks or on none.
        hardest_only: of equally hard negatives the first rank's counts.
        check_finite: see ``distributed.normface_loss``.
        backbone_gradients: see ``distributed.normface_loss``.
        equal_batches, return_statistics: likewise.

    The others are those of ``functional.c_contrastive_loss``. They mean the rows of all ranks; ``workspace``
    and ``active_limit`` are those of each rank.

    Returns:
        For "mean" and "sum" the loss over the rows of all ranks, the same bits on every rank; backward has
        to be called on all of them, with the same upstream gradient. For "none" [N], of this rank's rows.
        Second derivatives raise. With ``return_statistics`` (loss, Statistics).

    Raises:
        TypeError, ValueError, IndexError: as ``functional.c_contrastive_loss``.
        RuntimeError: a rank died or came too late.
    """
    op = "distributed.c_contrastive_loss"
    chosen = ContrastiveOptions.of(op, options)
    statistics = flag(op, "return_statistics", return_statistics)
    found = rows_and_loss(
        op,
        x,
        weight,
        labels,
        shard,
        sample_weight,
        chosen,
        None,
        labels_b,
        lam,
        backbone_gradients=backbone_gradients,
        equal_batches=equal_batches,
        need_largest=statistics,
    )
    return losses.with_statistics(chosen, *found, statistics)


@overload
def c_triplet_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    shard: ClassShard,
    *,
    sample_weight: Tensor | None = None,
    backbone_gradients: str = "mean",
    equal_batches: bool = False,
    return_statistics: Literal[False] = False,
    labels_b: Tensor | None = None,
    lam: float | Tensor | None = None,
    **options: Unpack[TripletKeywords],
) -> Tensor: ...
@overload
def c_triplet_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    shard: ClassShard,
    *,
    sample_weight: Tensor | None = None,
    backbone_gradients: str = "mean",
    equal_batches: bool = False,
    return_statistics: Literal[True],
    labels_b: Tensor | None = None,
    lam: float | Tensor | None = None,
    **options: Unpack[TripletKeywords],
) -> tuple[Tensor, Statistics]: ...
@takes(TripletOptions)
def c_triplet_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    shard: ClassShard,
    *,
    sample_weight: Tensor | None = None,
    backbone_gradients: str = "mean",
    equal_batches: bool = False,
    return_statistics: bool = False,
    labels_b: Tensor | None = None,
    lam: float | Tensor | None = None,
    **options: Unpack[TripletKeywords],
) -> Tensor | tuple[Tensor, Statistics]:
    """``functional.c_triplet_loss`` of the rows of all ranks over the classes of all ranks.

    As :func:`c_contrastive_loss` here, with the options of ``functional.c_triplet_loss``.
    """
    op = "distributed.c_triplet_loss"
    chosen = TripletOptions.of(op, options)
    statistics = flag(op, "return_statistics", return_statistics)
    found = rows_and_loss(
        op,
        x,
        weight,
        labels,
        shard,
        sample_weight,
        chosen,
        None,
        labels_b,
        lam,
        backbone_gradients=backbone_gradients,
        equal_batches=equal_batches,
        need_largest=statistics,
    )
    return losses.with_statistics(chosen, *found, statistics)
