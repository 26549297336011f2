"""The class-parallel softmax head as a function of one shard of the classes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.distributed.tensor import DTensor

from .. import _C
from ..engine import checks
from ..engine.arguments import choice, flag, number
from ..engine.autograd import detach_without_grad, no_second_derivative
from ..engine.options import takes
from ..softmax import ops
from ..softmax.arguments import Numbers, loss_options, margin_arguments
from ..softmax.batch_margins import BatchMargin
from ..softmax.functions import rows_of
from ..softmax.margins import Margin
from ..softmax.options import HeadKeywords, HeadOptions
from .batch_margins import margin_of_rows, with_regularizer
from .collectives import (
    Batch,
    ScatteredRows,
    add_over_shards,
    gather_row_gradients,
    gather_rows,
    largest_over_shards,
)
from .sampling import ClassSampler
from .shard import IGNORED, ClassShard

if TYPE_CHECKING:
    from typing_extensions import Unpack

OP = "distributed.normface_loss"


def _shared_shift(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: Tensor | None,
    options: ops.LossOptions,
    largest_scale: float | None,
    shard: ClassShard,
) -> Tensor | None:
    """kappa for all shards where no constant serves, else None. On CUDA a scale tensor without a bound is
    read, and the host waits for it."""
    bound = options.scale_value if scale is None else largest_scale
    if bound is None:
        assert scale is not None
        bound = float(scale.detach())
    if _C.has_fixed_shift(bound, shard.num_classes, x.dtype == torch.float64):
        return None
    return largest_over_shards(ops.normface_shift(x, weight, labels, scale, options), shard.group)


class _RowsOfAll(Function):
    """Numbers of this rank's rows [N] -> those of all ranks' rows. Every rank has the whole gradient of its
    own rows' numbers; like the features' it is multiplied by the ranks that average it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, batch: Batch, replicas: int, shard: ClassShard) -> Tensor:
        ctx.batch, ctx.replicas = batch, replicas
        return gather_row_gradients(value, batch, shard.group, "the rows' margins")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return ctx.batch.own(gradient) * ctx.replicas, None, None, None


def _margin_of_all(
    margin: Margin | None,
    labels: Tensor,
    batch: Batch,
    options: HeadOptions,
    replicas: int,
    shard: ClassShard,
) -> tuple[ops.MarginTensors, Numbers]:
    """``margin_arguments`` of the rows of all ranks; numbers per row come from their ranks."""
    straight = options.margin_gradient == "straight"
    if margin is None or not margin.per_row:
        return margin_arguments(OP, margin, batch.labels, shard.num_classes, straight)
    mine, numbers = margin_arguments(OP, margin, labels, shard.num_classes, straight)
    m1, m2, m3 = (
        m if m is None or m.dim() == 0 else _RowsOfAll.apply(m, batch, replicas, shard) for m in mine
    )
    return (m1, m2, m3), numbers


class _ClassParallelLoss(Function):
    """As ``ops._NormFaceLoss``, with the row sums added over shards between the stages.

    ``weight`` is the shard [C_local, D]; with ``rows`` [K] only those of its classes take part, and its
    gradient is a sparse tensor of them (``first`` says what its row 0 is called there).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        m1: Tensor | None,
        m2: Tensor | None,
        m3: Tensor | None,
        batch: Batch,
        places: Tensor,
        class_weight: Tensor | None,
        rows: Tensor | None,
        options: ops.LossOptions,
        largest_scale: float | None,
        replicas: int,
        shard: ClassShard,
    ) -> Tensor:
        need_weight = ctx.needs_input_grad[1]
        local = weight.to_local() if isinstance(weight, DTensor) else weight
        classes = local.contiguous() if rows is None else local.index_select(0, rows)
        shift = _shared_shift(batch.x, classes, places, scale, options, largest_scale, shard)
        swept, options = ops.normface_sweep_in_memory(
            batch.x,
            classes,
            places,
            scale,
            batch.sample_weight,
            class_weight,
            options,
            need_x=batch.need_x,
            need_weight=need_weight,
            shift=shift,
        )
        # S, A and the target's cosine; its class weight too, if there are any.
        fields = 3 if class_weight is None else 4
        sums, class_sum = add_over_shards([swept.rows[:fields], swept.class_sum], shard.group)
        swept.rows[:fields] = sums
        margin = m1, m2, m3
        loss, slopes = ops.normface_finish(
            swept.rows,
            batch.x,
            class_sum.to(swept.class_sum.dtype),
            scale,
            margin,
            options,
            need_margin=any(ctx.needs_input_grad[3:6]),
        )
        ctx.save_for_backward(
            x,
            weight,
            scale,
            *margin,
            batch.x,
            classes,
            places,
            class_weight,
            rows,
            slopes,
            *swept,
        )
        ctx.batch, ctx.options, ctx.replicas, ctx.shard = batch, options, replicas, shard
        ctx.weight_shape, ctx.first = weight.shape, shard.first if isinstance(weight, DTensor) else 0
        return batch.own(loss).clone() if options.reduction == 0 else loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        mine, weight, scale, m1, m2, m3, *saved = ctx.saved_tensors
        x, classes, places, class_weight, rows, slopes, *swept = saved
        own_x, need_weight, need_scale = ctx.needs_input_grad[:3]
        batch, options, shard = ctx.batch, ctx.options, ctx.shard
        origins = grad_loss, mine, weight, scale, m1, m2, m3
        if options.reduction == 0:
            grad_loss = gather_row_gradients(grad_loss, batch, shard.group)

        def gradients(*needed: bool) -> tuple[Tensor, Tensor, Tensor]:
            with torch.no_grad():
                return ops.normface_backward(
                    grad_loss,
                    slopes,
                    x,
                    classes,
                    places,
                    scale,
                    class_weight,
                    ops.Swept(*swept),
                    options,
                    needed,
                )

        # The features' gradient travels while the weight's is computed.
        dx_all, _, ds = gradients(batch.need_x, False, need_scale)
        moving = ScatteredRows(dx_all, batch, shard.group) if batch.need_x else None
        dw: Tensor | None = gradients(False, True, False)[1] if need_weight else None
        dx = None
        if moving is not None:
            norms = batch.own(swept[0][ops.INVERSE_NORM])
            dx = store_as(moving.wait() * ctx.replicas, x.dtype, norms, options.eps)
        with torch.no_grad():
            of_margin = ops.margin_gradients(grad_loss, slopes, (m1, m2, m3), ctx.needs_input_grad[3:6])
        given = (dx if own_x else None, dw, ds if need_scale else None, *of_margin)
        dx, dw, *others = no_second_derivative("normface_loss", given, *origins)
        if dw is not None and rows is not None:
            dw = torch.sparse_coo_tensor(
                (rows + ctx.first)[None], dw, ctx.weight_shape, is_coalesced=True, check_invariants=False
            )
        return dx, dw, *others, *[None] * 8


def store_as(gradient: Tensor, dtype: torch.dtype, inverse_norm: Tensor, eps: float) -> Tensor:
    """To the features' dtype. In float16 the rows whose norm is mostly eps, zero rows above all, are held at
    the largest half (math::ruled_by_eps); an overflow elsewhere stays one, for a GradScaler to see."""
    if dtype == torch.float16:
        largest = torch.finfo(dtype).max
        ruled = inverse_norm.pow(-2) <= 2 * eps
        gradient = torch.where(ruled[:, None], gradient.clamp(-largest, largest), gradient)
    return gradient.to(dtype)


def check_backbone_gradients(op: str, value: str) -> None:
    choice(op, "backbone_gradients", value, ("mean", "sum"))


@takes(HeadOptions)
def normface_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: float | Tensor,
    shard: ClassShard,
    *,
    sample_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    largest_scale: float | None = None,
    sample: ClassSampler | None = None,
    backbone_gradients: str = "mean",
    equal_batches: bool = False,
    **options: Unpack[HeadKeywords],
) -> Tensor:
    """``functional.normface_loss`` of the rows of all ranks over the classes of all ranks.

    Every rank of ``shard.group`` calls it with its own rows and its own classes, and the same options.
    Per step the features travel once to every rank (all-gather), three float64 sums per row are added
    (one all-reduce), and the features' gradient travels back (reduce-scatter).

    Args:
        x: [N, D] this rank's features, N as it likes.
        weight: [shard.count, D] its classes, or a DTensor ``Shard(0)`` of [num_classes, D].
        labels: [N] int64, global, in [0, num_classes) or ``ignore_index``.
        class_weight: [num_classes], the same on all ranks.
        check_finite: look for NaN and infinity first, in the rows of all ranks that count, in sample_weight,
            in the weight and in the scale; raised on all ranks. One more collective, of 8 bytes.
        largest_scale: a bound on a scale tensor: with it the host need not read the tensor to see whether
            the fixed shift serves.
        sample: a ``ClassSampler``, to train on the rows' own classes and a random part of the others. The
            weight's gradient is then sparse.
        backbone_gradients: "mean" if the backbone's gradients are averaged over the ranks afterwards, as
            DistributedDataParallel and FSDP do: the features' gradient is multiplied by the number of ranks,
            so that the average is the gradient of the loss. "sum" if they are added, or if the gradient of
            the features themselves is wanted.
        equal_batches: every rank has the same N, and x needs a gradient on all of them or on none; saves a
            collective of 16 bytes and its wait.

    The others are those of ``functional.normface_loss``.

    Returns:
        For "mean" and "sum" the loss over the rows of all ranks, the same bits on every rank; backward has
        to be called on all of them, with the same upstream gradient. For "none" [N], of this rank's rows.

    Raises:
        TypeError, ValueError, IndexError: as ``functional.normface_loss``.
        RuntimeError: a rank died or came too late.
    """
    check_backbone_gradients(OP, backbone_gradients)
    flag(OP, "equal_batches", equal_batches)
    return sharded_loss(
        x,
        weight,
        labels,
        scale,
        shard,
        sample_weight,
        class_weight,
        HeadOptions.of(OP, options),
        largest_scale=largest_scale,
        sample=sample,
        backbone_gradients=backbone_gradients,
        equal_batches=equal_batches,
    )


def sharded_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: float | Tensor,
    shard: ClassShard,
    sample_weight: Tensor | None,
    class_weight: Tensor | None,
    options: HeadOptions,
    *,
    largest_scale: float | None,
    sample: ClassSampler | None,
    backbone_gradients: str,
    equal_batches: bool,
) -> Tensor:
    """``normface_loss`` with options that have been checked."""
    local = weight.to_local() if isinstance(weight, DTensor) else weight
    checks.features_and_shard(OP, x, local, shard.count)
    ignored = checks.ignored(options.ignore_index)
    labels = checks.labels(OP, labels, x, shard.num_classes, options.ignore_index)
    scale_tensor, scale_value = checks.scale(OP, scale, x)
    if largest_scale is not None:
        largest_scale = number(OP, "largest_scale", largest_scale, kind="a number or None")
    if sample is not None and options.label_smoothing > 0:
        raise ValueError(
            f"{OP}: expected `label_smoothing` 0 with sampled classes, got {options.label_smoothing}"
        )
    row_weight = checks.weights(OP, "sample_weight", sample_weight, x, x.shape[0])
    factors = checks.weights(OP, "class_weight", class_weight, x, shard.num_classes)
    if factors is not None:
        factors = factors[shard.first : shard.first + shard.count]

    batch = gather_rows(
        x,
        labels,
        shard.group,
        ignore_index=ignored,
        sample_weight=row_weight,
        equal_batches=equal_batches,
    )
    if options.check_finite:
        batch.check_finite(OP, local, shard, ignored, scale_tensor)
    places = shard.places(batch.labels, ignored)
    rows = None
    if sample is not None:
        rows, places = sample.draw(places, shard)
        factors = None if factors is None else factors[rows]
    elif isinstance(weight, DTensor):
        weight = weight.to_local()  # differentiable; a sparse gradient goes past it
    classes = shard.count if rows is None else rows.shape[0]
    replicas = dist.get_world_size(shard.group) if backbone_gradients == "mean" else 1
    of_batch = options.margin if isinstance(options.margin, BatchMargin) else None
    told = None if of_batch is None else rows_of(OP, x, labels, row_weight, options, of_batch, shard.group)
    found = options.margin if of_batch is None or told is None else margin_of_rows(OP, of_batch, told)
    margin, numbers = _margin_of_all(found, labels, batch, options, replicas, shard)
    given = loss_options(scale_value, options, x, local, batch.x.shape[0], max(1, classes), numbers)
    given = replace(given, ignore_index=IGNORED, total_classes=shard.num_classes, is_shard=True)
    x, weight = detach_without_grad(x, weight)
    loss: Tensor = _ClassParallelLoss.apply(
        x,
        weight,
        scale_tensor,
        *margin,
        batch,
        places,
        None if factors is None else factors.contiguous(),
        rows,
        given,
        largest_scale,
        replicas,
        shard,
    )
    if of_batch is None or told is None:
        return loss
    return with_regularizer(loss, of_batch, told, row_weight, options.reduction, replicas, shard.group)
