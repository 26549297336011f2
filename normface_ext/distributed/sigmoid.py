"""The class-parallel sigmoid heads, as functions of one shard of the classes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.distributed.tensor import DTensor

from ..engine import checks, row_state, sweep, transforms, updates
from ..engine.arguments import flag
from ..engine.autograd import asked, detach_without_grad, no_second_derivative, store_as
from ..engine.dtypes import accumulator
from ..engine.mixing import joined, no_statistics, twice
from ..engine.options import takes
from ..engine.statistics import Found, Statistics, given_back
from ..sigmoid import losses, ops
from ..sigmoid.functions import bias_of, offset_of, rounded, sweep_options
from ..sigmoid.losses import SigmoidRows
from ..sigmoid.options import SphereFace2Keywords, SphereFace2Options
from .collectives import Batch, ScatteredRows, add_over_shards, gather_rows, largest_of_all
from .mixing import both_labels_of_all
from .shard import IGNORED, ClassShard
from .softmax import check_backbone_gradients
from .softmax_op import as_sharded

if TYPE_CHECKING:
    from typing_extensions import Unpack

OP = "distributed.sphereface2_loss"


class _ClassParallelRows(Function):
    """As ``ops._SigmoidRows`` for the rows of all ranks, the same on every rank.

    With ``separate`` the gradients that come back are each rank's own rows' and add up, and the offset's is
    that of them alone; otherwise they are those of one number that all ranks have in common.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        offset: Tensor,
        batch: Batch,
        places: Tensor,
        options: ops.SigmoidOptions,
        separate: bool,
        replicas: int,
        shard: ClassShard,
        need_largest: bool,
    ) -> tuple[Tensor, ...]:
        ctx.taker = updates.of(weight, ctx.needs_input_grad[1])
        local = weight.to_local() if isinstance(weight, DTensor) else weight
        classes, term = local.contiguous(), ops.term_of(offset, options)
        swept, options = sweep.head_sweep_in_memory(
            batch.x,
            classes,
            places,
            None,
            batch.sample_weight,
            None,
            options,
            op=OP,
            need_x=batch.need_x,
            need_weight=ctx.needs_input_grad[1],
            need_largest=need_largest,
            term=term,
        )
        added = [row_state.SUM, row_state.SECOND_SUM, row_state.COSINE]
        (swept.rows[added],) = add_over_shards([swept.rows[added]], shard.group)
        ctx.save_for_backward(x, weight, offset, batch.x, classes, places, term.numbers, *swept)
        ctx.batch, ctx.options, ctx.shard = batch, options, shard
        ctx.separate, ctx.replicas = separate, replicas
        cosine, others, row_weight = ops.known(swept.rows)
        constant = [row_weight]
        if need_largest:
            constant.append(largest_of_all(swept.rows, shard.group))
        ctx.mark_non_differentiable(*constant)
        return cosine, others, *constant

    @staticmethod
    def backward(ctx: Any, g_cosine: Tensor, g_others: Tensor, *rest: Any) -> Any:
        need_weight, taking = updates.begin(ctx, 1)
        own, weight, offset, x, classes, places, numbers, *saved = ctx.saved_tensors
        swept, batch, shard = row_state.Swept(*saved), ctx.batch, ctx.shard
        own_x, _, need_offset = ctx.needs_input_grad[:3]
        origins = g_cosine, g_others, own, weight, offset
        with torch.no_grad():
            of_offset = ops.offset_gradient(swept.rows, g_others)
            if ctx.separate:
                g_cosine, g_others = add_over_shards([g_cosine, g_others], shard.group)
            needed = batch.need_x, need_weight
            dx, dw, _ = sweep.head_backward(
                x.new_ones((), dtype=accumulator(x.dtype)),
                ops.slopes_of(swept.rows, g_cosine, g_others),
                x,
                classes,
                places,
                None,
                None,
                swept,
                ctx.options,
                (*needed, False),
                row_state.TermInputs(None, numbers),
                taking,
            )
            mine = None
            if batch.need_x:
                moved = ScatteredRows(dx, batch, shard.group).wait() * ctx.replicas
                norms = batch.own(swept.rows[row_state.INVERSE_NORM])
                mine = store_as(moved, own.dtype, norms, ctx.options.eps)
        of_others = asked((need_weight, need_offset), (dw, of_offset))
        given = mine if own_x else None, *of_others
        own_gradient, of_weight, of_bias = no_second_derivative(ops.OP, given, *origins)
        if of_weight is not None and isinstance(weight, DTensor):
            of_weight = as_sharded(of_weight, weight)
        return own_gradient, of_weight, of_bias, *[None] * 7


class _OfAllRanks(Function):
    """A number that all ranks have, of which each has its own rows' gradient: they add up."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, shard: ClassShard) -> Tensor:
        ctx.shard = shard
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return add_over_shards([gradient], ctx.shard.group)[0], None


@overload
def sphereface2_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: float | Tensor,
    shard: ClassShard,
    *,
    sample_weight: Tensor | None = None,
    backbone_gradients: str = "mean",
    equal_batches: bool = False,
    return_statistics: Literal[False] = False,
    labels_b: Tensor | None = None,
    lam: float | Tensor | None = None,
    **options: Unpack[SphereFace2Keywords],
) -> Tensor: ...
@overload
def sphereface2_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: float | Tensor,
    shard: ClassShard,
    *,
    sample_weight: Tensor | None = None,
    backbone_gradients: str = "mean",
    equal_batches: bool = False,
    return_statistics: Literal[True],
    labels_b: Tensor | None = None,
    lam: float | Tensor | None = None,
    **options: Unpack[SphereFace2Keywords],
) -> tuple[Tensor, Statistics]: ...
@takes(SphereFace2Options)
def sphereface2_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: float | Tensor,
    shard: ClassShard,
    *,
    sample_weight: Tensor | None = None,
    backbone_gradients: str = "mean",
    equal_batches: bool = False,
    return_statistics: bool = False,
    labels_b: Tensor | None = None,
    lam: float | Tensor | None = None,
    **options: Unpack[SphereFace2Keywords],
) -> Tensor | tuple[Tensor, Statistics]:
    """``functional.sphereface2_loss`` of the rows of all ranks over the classes of all ranks.

    Every rank of ``shard.group`` calls it with its own rows and its own classes, the same b and the same
    options. Per step the features travel once to every rank (all-gather), three float64 sums per row are
    added (one all-reduce), and the features' gradient travels back (reduce-scatter). b's gradient is the same
    on all ranks. With ``reduction="none"`` the rows' and b's gradients are added too.

    Args:
        x: [N, D] this rank's features, N as it likes.
        weight: [shard.count, D] its classes, or a DTensor ``Shard(0)`` of [num_classes, D].
        labels: [N] int64 or int32, global, in [0, num_classes) or ``ignore_index``.
        sample_weight: [N] of this rank's rows; on all ranks or on none.
        check_finite, backbone_gradients, equal_batches, return_statistics: see
            ``distributed.normface_loss``.

    The others are those of ``functional.sphereface2_loss``.

    Returns:
        For "mean" and "sum" the loss over the rows of all ranks, the same bits on every rank; backward has
        to be called on all of them, with the same upstream gradient. For "none" [N], of this rank's rows.
        Second derivatives raise. With ``return_statistics`` (loss, Statistics).

    Raises:
        TypeError, ValueError, IndexError: as ``functional.sphereface2_loss``.
        RuntimeError: a rank died or came too late.
    """
    found = sharded_loss(
        x,
        weight,
        labels,
        bias,
        shard,
        sample_weight,
        SphereFace2Options.of(OP, options),
        labels_b,
        lam,
        backbone_gradients=backbone_gradients,
        equal_batches=equal_batches,
        statistics=flag(OP, "return_statistics", return_statistics),
    )
    return given_back(found)


def sharded_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: float | Tensor,
    shard: ClassShard,
    sample_weight: Tensor | None,
    options: SphereFace2Options,
    labels_b: Tensor | None = None,
    lam: float | Tensor | None = None,
    *,
    backbone_gradients: str,
    equal_batches: bool,
    statistics: bool,
) -> Found:
    """The loss with options that have been checked. With two labels the rows stand there twice."""
    transforms.refuse(OP)
    check_backbone_gradients(OP, backbone_gradients)
    flag(OP, "equal_batches", equal_batches)
    if labels_b is not None or lam is not None:
        no_statistics(OP, statistics)
        told = options.ignore_index, options.check_finite, equal_batches
        both = both_labels_of_all(OP, x, weight, labels, labels_b, lam, sample_weight, shard, *told)
        if options.check_finite:
            checks.finite_rows(OP, "bias", bias_of(OP, bias, x))
        made, _ = sharded_loss(
            twice(x, options.eps),
            weight,
            both.labels,
            bias,
            shard,
            both.weight,
            replace(options, check_finite=False),
            backbone_gradients=backbone_gradients,
            equal_batches=equal_batches,
            statistics=False,
        )
        return joined(made, options.reduction), None
    if isinstance(weight, DTensor) and not updates.takes(weight):
        weight = weight.to_local()  # differentiable
    local = weight.to_local() if isinstance(weight, DTensor) else weight
    checks.features_and_shard(OP, x, local, shard.count)
    ignored = checks.ignored(options.ignore_index)
    labels = checks.labels(OP, labels, x, shard.num_classes, options.ignore_index)
    factor = checks.weights(OP, "sample_weight", sample_weight, x, x.shape[0])
    b = bias_of(OP, bias, x)
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
        batch.check_finite(OP, local, shard, ignored)
        checks.finite_rows(OP, "bias", b)  # the same on all ranks
    places = shard.places(batch.labels, ignored)
    given = replace(
        sweep_options(batch.x, local, len(places), shard.count, options),
        ignore_index=IGNORED,
        total_classes=shard.num_classes,
        is_shard=True,
    )
    replicas = dist.get_world_size(shard.group) if backbone_gradients == "mean" else 1
    separate = options.reduction == "none"
    if separate:
        b = _OfAllRanks.apply(b, shard)
    own, weight = detach_without_grad(x, weight)
    cosine, others, row_weight, *state = updates.apply(
        _ClassParallelRows,
        own,
        weight,
        offset_of(b, options),
        batch,
        places,
        given,
        separate,
        replicas,
        shard,
        statistics,
    )
    rows = SigmoidRows(row_weight, cosine, others)
    loss = rounded(losses.loss(options, rows, b, batch.count), x)
    return (
        batch.own(loss) if separate else loss,
        losses.statistics(options, rows, b, state[0], x.dtype) if statistics else None,
    )
