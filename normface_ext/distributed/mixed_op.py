"""The class-parallel softmax head for rows with two labels as an autograd Function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.distributed.tensor import DTensor

from ..engine import row_state, sweep
from ..engine.autograd import no_second_derivative, store_as
from ..engine.dtypes import accumulator
from ..engine.mixing import BothLabels
from ..softmax import ops
from ..softmax.loss_options import LossOptions
from ..softmax.mixed_op import add_by_class, cosine_gradients, paired, rows_of_both, slopes_of_pair
from .collectives import Batch, ScatteredRows, add_over_shards, gather_row_gradients
from .shard import IGNORED, ClassShard
from .softmax_op import shared_shift


class ClassParallelMixedLoss(Function):
    """As ``softmax.mixed_op``, with cosines and row sums added over shards between the stages, and with the
    weight, its `rows` and gradients of ``softmax_op.ClassParallelLoss``. `of_all` and `places` have both
    labels of the rows of all ranks."""

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
        of_all: BothLabels,
        places: Tensor,
        class_weight: Tensor | None,
        rows: Tensor | None,
        options: LossOptions,
        largest_scale: float | None,
        replicas: int,
        shard: ClassShard,
    ) -> Tensor:
        need_weight = ctx.needs_input_grad[1]
        local = weight.to_local() if isinstance(weight, DTensor) else weight
        classes = local.contiguous() if rows is None else local.index_select(0, rows)
        wide, s = batch.x.to(accumulator(x.dtype)), options.scale_value if scale is None else scale.double()
        asked_of = torch.where(of_all.counts, places, IGNORED)
        parts = [sweep.target_cosine(wide, classes, one.contiguous(), options) for one in asked_of.chunk(2)]
        of_target = wide.new_zeros(0)
        if class_weight is not None:
            of_target = _of_places(class_weight, asked_of)
        cosine, of_target = add_over_shards([torch.cat(parts), of_target], shard.group)
        pair = paired(of_all.labels, places, of_all.counts, cosine, s, IGNORED)
        shift = shared_shift(wide, classes, pair.p, scale, options, row_state.NO_INPUTS, largest_scale, shard)
        swept, options = sweep.head_sweep_in_memory(
            wide,
            classes,
            pair.p,
            scale,
            None,
            class_weight,
            options,
            op="normface_loss",
            need_x=batch.need_x,
            need_weight=need_weight,
            shift=shift,
        )
        added = [row_state.SUM, row_state.SECOND_SUM]
        sums, class_sum = add_over_shards([swept.rows[added], swept.class_sum], shard.group)
        swept.rows[added] = sums
        table, between = rows_of_both(
            swept.rows,
            pair,
            torch.where(of_all.counts, of_all.weight.double(), 0),
            None if class_weight is None else of_target,
            s,
        )
        margin = m1, m2, m3
        loss, slopes = ops.softmax_finish(
            table,
            torch.cat([wide, wide]),
            class_sum.to(swept.class_sum.dtype),
            scale,
            margin,
            options,
            need_margin=any(ctx.needs_input_grad[3:6]),
        )
        joined, at_q = slopes_of_pair(slopes, pair, between)
        here = torch.where(pair.both, pair.q, -1)  # ELSEWHERE and IGNORED are negative, too
        ctx.save_for_backward(
            x,
            weight,
            scale,
            *margin,
            wide,
            classes,
            pair.p,
            class_weight,
            rows,
            slopes,
            joined,
            at_q,
            here,
            *swept,
        )
        ctx.batch, ctx.options, ctx.replicas, ctx.shard = batch, options, replicas, shard
        ctx.weight_shape, ctx.first = weight.shape, shard.first if isinstance(weight, DTensor) else 0
        return batch.own(loss.view(2, -1).sum(0)).clone() if options.reduction == 0 else loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        mine, weight, scale, m1, m2, m3, *saved = ctx.saved_tensors
        x, classes, p, class_weight, rows, slopes, joined, at_q, here, *saved = saved
        own_x, need_weight, need_scale = ctx.needs_input_grad[:3]
        batch, options, shard, swept = ctx.batch, ctx.options, ctx.shard, row_state.Swept(*saved)
        x_inverse = swept.rows[row_state.INVERSE_NORM]
        origins = grad_loss, mine, weight, scale, m1, m2, m3
        if options.reduction == 0:
            grad_loss = gather_row_gradients(grad_loss, batch, shard.group)

        def gradients(*needed: bool) -> tuple[Tensor, Tensor, Tensor]:
            """With what q adds, where this rank has it."""
            dx, dw, ds = sweep.head_backward(
                grad_loss, joined, x, classes, p, scale, class_weight, swept, options, needed
            )
            if (needed[0] or needed[1]) and classes.shape[0] > 0:
                norms = x_inverse, swept.inverse_norm, options.eps
                dx_q, dw_q = cosine_gradients(grad_loss * at_q, x, classes, here, *norms, needed[:2])
                if needed[0]:
                    dx = dx + dx_q
                if needed[1]:
                    add_by_class(dw, here, dw_q)
            return dx, dw, ds

        with torch.no_grad():
            # The features' gradient travels while the weight's is computed.
            dx_all, _, ds = gradients(batch.need_x, False, need_scale)
            moving = ScatteredRows(dx_all, batch, shard.group) if batch.need_x else None
            dw: Tensor | None = gradients(False, True, False)[1] if need_weight else None
            dx = None
            if moving is not None:
                dx = store_as(moving.wait() * ctx.replicas, mine.dtype, batch.own(x_inverse), options.eps)
            of_both = grad_loss.repeat(2) if options.reduction == 0 else grad_loss
            of_margin = ops.margin_gradients(of_both, slopes, (m1, m2, m3), ctx.needs_input_grad[3:6])
        given = (dx if own_x else None, dw, ds if need_scale else None, *of_margin)
        dx, dw, *others = no_second_derivative("normface_loss", given, *origins)
        if dw is not None and rows is not None:
            dw = torch.sparse_coo_tensor(
                (rows + ctx.first)[None], dw, ctx.weight_shape, is_coalesced=True, check_invariants=False
            )
        return dx, dw, *others, *[None] * 9


def _of_places(class_weight: Tensor, places: Tensor) -> Tensor:
    """The weights of labels that are here, 0 of those that are elsewhere."""
    here = places >= 0
    if class_weight.shape[0] == 0:
        return torch.zeros_like(places, dtype=class_weight.dtype)
    return torch.where(here, class_weight[places.clamp_min(0)], 0)
