"""The class-parallel softmax head as an autograd Function; row sums are added over shards in the middle."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.distributed.tensor import DTensor
from torch.fx.experimental.symbolic_shapes import guard_scalar

from ..engine import native, row_state, sweep, updates
from ..engine.autograd import no_second_derivative, store_as
from ..softmax import ops
from ..softmax.arguments import Numbers, margin_arguments
from ..softmax.centers import as_rows, by_class
from ..softmax.loss_options import LossOptions, MarginTensors
from ..softmax.margins import Margin
from ..softmax.options import HeadOptions
from .collectives import (
    Batch,
    ScatteredRows,
    add_over_shards,
    gather_row_gradients,
    largest_of_all,
    largest_over_shards,
)
from .shard import ClassShard

OP = "distributed.normface_loss"


def _serves(bound: float, classes: int, wide: bool, lowest: float, highest: float) -> bool:
    """Whether a constant shift does for scales up to a bound."""
    return native.has_fixed_shift(bound, classes, wide, lowest, highest)


_serves._dynamo_marked_constant = True  # type: ignore[attr-defined]


def shared_shift(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: Tensor | None,
    options: LossOptions,
    term: row_state.TermInputs,
    largest_scale: float | None,
    shard: ClassShard,
) -> Tensor | None:
    """kappa for all shards where no constant serves, else None. On CUDA a scale tensor without a bound is
    read, and the host waits for it."""
    bound = options.scale_value if scale is None else largest_scale
    if bound is None and torch.compiler.is_compiling():
        torch._dynamo.graph_break(
            msg="a class-parallel head reads the largest scale: expected torch.compile without"
            " fullgraph=True, or a bound on it, max_scale of a head that normalises its features"
        )
    if bound is None:
        assert scale is not None
        # Of scales per row the largest; there may be no row.
        bound = float(scale.detach().abs().amax()) if scale.numel() else 0.0
    wide = x.dtype == torch.float64
    asked: tuple[Any, ...] = bound, shard.num_classes, wide, options.lowest, options.highest
    if torch.compiler.is_compiling():  # the answer is a constant of the graph: so is what it depends on
        asked = tuple(guard_scalar(value) for value in asked)
    if _serves(*asked):
        return None
    return largest_over_shards(sweep.head_shift(x, weight, labels, scale, options, term), shard.group)


def as_sharded(gradient: Tensor, weight: DTensor) -> DTensor:
    """The gradient of what is here of a weight, as that of the weight."""
    return DTensor.from_local(
        gradient,
        weight.device_mesh,
        weight.placements,
        run_check=False,
        shape=weight.shape,
        stride=weight.stride(),
    )


class RowsOfAll(Function):
    """Numbers of this rank's rows [N] -> those of all ranks' rows. Every rank has the whole gradient of its
    own rows' numbers; like the features' it is multiplied by the ranks that average it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, batch: Batch, replicas: int, shard: ClassShard) -> Tensor:
        ctx.batch, ctx.replicas = batch, replicas
        return gather_row_gradients(value, batch, shard.group, "numbers of the rows")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return ctx.batch.own(gradient) * ctx.replicas, None, None, None


def margin_of_all(
    margin: Margin | None,
    labels: Tensor,
    labels_of_all: Tensor,
    batch: Batch,
    options: HeadOptions,
    replicas: int,
    shard: ClassShard,
    *,
    parts: int = 1,
    of_all: bool = False,
) -> tuple[MarginTensors, Numbers]:
    """``margin_arguments`` of the rows of all ranks, which stand there `parts` times; numbers per row come
    from their ranks, unless they are those `of_all`."""
    straight = options.margin_gradient == "straight"
    if margin is None or not margin.per_row or of_all:
        return margin_arguments(OP, margin, labels_of_all, shard.num_classes, straight)
    mine, numbers = margin_arguments(OP, margin, labels, shard.num_classes, straight)

    def gathered(m: Tensor | None) -> Tensor | None:
        if m is None or m.dim() == 0:
            return m
        return torch.cat([RowsOfAll.apply(part, batch, replicas, shard) for part in m.chunk(parts)])

    m1, m2, m3 = (gathered(m) for m in mine)
    return (m1, m2, m3), numbers


class ClassParallelLoss(Function):
    """As ``ops._NormFaceLoss``, with the row sums added over shards between the stages.

    ``weight`` is the shard [C_local, D], or [C_local, centers, D]; with ``rows`` [K] only those of its
    classes take part, and its gradient is a sparse tensor of them (``first`` says what its row 0 is called
    there).
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
        threshold: Tensor | None,
        numbers: Tensor | None,
        options: LossOptions,
        largest_scale: float | None,
        replicas: int,
        shard: ClassShard,
        statistics: bool,
    ) -> Any:
        need_weight = ctx.needs_input_grad[1]
        ctx.taker = updates.of(weight, need_weight) if rows is None else None
        local = weight.to_local() if isinstance(weight, DTensor) else weight
        classes = local.contiguous() if rows is None else local.index_select(0, rows)
        if options.centers > 1:
            classes = as_rows(classes)
        term = row_state.TermInputs(threshold, numbers)
        shift = shared_shift(batch.x, classes, places, scale, options, term, largest_scale, shard)
        swept, options = sweep.head_sweep_in_memory(
            batch.x,
            classes,
            places,
            scale,
            batch.sample_weight,
            class_weight,
            options,
            op="normface_loss",
            need_x=batch.need_x,
            need_weight=need_weight,
            need_largest=statistics,
            shift=shift,
            term=term,
        )
        # S, A and the target's cosine; its class weight too, if there are any.
        fields = 3 if class_weight is None else 4
        sums, class_sum = add_over_shards([swept.rows[:fields], swept.class_sum], shard.group)
        swept.rows[:fields] = sums
        margin, class_sum = (m1, m2, m3), class_sum.to(swept.class_sum.dtype)
        loss, slopes = ops.softmax_finish(
            swept.rows,
            batch.x,
            class_sum,
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
            *term,
            slopes,
            *swept,
        )
        ctx.batch, ctx.options, ctx.replicas, ctx.shard = batch, options, replicas, shard
        ctx.weight_shape, ctx.first = weight.shape, shard.first if isinstance(weight, DTensor) else 0
        mine = batch.own(loss).clone() if options.reduction == 0 else loss
        if not statistics:
            return mine
        rows = largest_of_all(swept.rows, shard.group)
        weighted = class_weight is not None
        means = ops.means_of_rows(rows, batch.x, class_sum, scale, margin, options, weighted=weighted)
        ctx.mark_non_differentiable(*means)
        return mine, *means

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *rest: Any) -> Any:
        need_weight, taking = updates.begin(ctx, 1)
        mine, weight, scale, m1, m2, m3, *saved = ctx.saved_tensors
        x, classes, places, class_weight, rows, threshold, numbers, slopes, *swept = saved
        own_x, _, need_scale = ctx.needs_input_grad[:3]
        batch, options, shard = ctx.batch, ctx.options, ctx.shard
        origins = grad_loss, mine, weight, scale, m1, m2, m3
        if options.reduction == 0:
            grad_loss = gather_row_gradients(grad_loss, batch, shard.group)

        def gradients(*needed: bool, taking: updates.Taking | None = None) -> tuple[Tensor, Tensor, Tensor]:
            with torch.no_grad():
                return sweep.head_backward(
                    grad_loss,
                    slopes,
                    x,
                    classes,
                    places,
                    scale,
                    class_weight,
                    row_state.Swept(*swept),
                    options,
                    needed,
                    row_state.TermInputs(threshold, numbers),
                    taking,
                )

        # The features' gradient travels while the weight's is computed.
        dx_all, _, ds = gradients(batch.need_x, False, need_scale)
        moving = ScatteredRows(dx_all, batch, shard.group) if batch.need_x else None
        dw: Tensor | None = None
        if need_weight or taking is not None:
            found = gradients(False, need_weight, False, taking=taking)[1]
            dw = found if need_weight else None
        dx = None
        if moving is not None:
            norms = batch.own(swept[0][row_state.INVERSE_NORM])
            dx = store_as(moving.wait() * ctx.replicas, x.dtype, norms, options.eps)
        with torch.no_grad():
            of_margin = ops.margin_gradients(grad_loss, slopes, (m1, m2, m3), ctx.needs_input_grad[3:6])
        given = (dx if own_x else None, dw, ds if need_scale else None, *of_margin)
        dx, dw, *others = no_second_derivative("normface_loss", given, *origins)
        if dw is not None and options.centers > 1:
            dw = by_class(dw, options.centers)
        if dw is not None and rows is not None:
            dw = torch.sparse_coo_tensor(
                (rows + ctx.first)[None], dw, ctx.weight_shape, is_coalesced=True, check_invariants=False
            )
        elif dw is not None and isinstance(weight, DTensor):
            dw = as_sharded(dw, weight)
        return dx, dw, *others, *[None] * 11
