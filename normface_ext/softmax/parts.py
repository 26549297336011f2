"""The head opened at the target: what a loss is made of in torch, with the gradients by the same kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..engine import row_state, sweep, transforms, updates
from ..engine.autograd import asked, detach_without_grad
from ..engine.calls import kernels
from ..engine.curvature import twice_by_tiles
from ..engine.dtypes import accumulator
from .formula import PartsFormula
from .loss_options import LossOptions


class _HeadParts(Function):
    """(c_y, ln S_o, with smoothing <x_hat, sum_j u_j w_hat_j>; and, without gradient, the rows' state)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        labels: Tensor,
        sample_weight: Tensor | None,
        class_weight: Tensor | None,
        threshold: Tensor | None,
        numbers: Tensor | None,
        options: LossOptions,
        need_largest: bool,
    ) -> tuple[Tensor, ...]:
        labels = labels.contiguous()
        need_x, need_weight = ctx.needs_input_grad[:2]
        ctx.taker = updates.of(weight, need_weight)
        swept, options = sweep.head_sweep_in_memory(
            x.contiguous(),
            weight.contiguous(),
            labels,
            scale,
            sample_weight,
            class_weight,
            options,
            op="normface_loss",
            need_x=need_x,
            need_weight=need_weight,
            need_largest=need_largest,
            term=row_state.TermInputs(threshold, numbers),
        )
        rows = swept.rows
        counts = rows[row_state.ROW_WEIGHT] != 0
        log_sum = torch.where(counts, rows[row_state.SUM].log() + rows[row_state.SHIFT], 0.0)
        cosine = torch.where(counts, rows[row_state.COSINE], 0.0)
        with_sum = _with_class_sum(x, swept.class_sum, counts, options)
        ctx.save_for_backward(x, weight, scale, labels, class_weight, threshold, numbers, *swept)
        ctx.options = options
        state = rows.clone()
        ctx.mark_non_differentiable(state)
        return cosine, log_sum, with_sum, state

    @staticmethod
    def backward(ctx: Any, g_cosine: Tensor, g_log_sum: Tensor, g_with_sum: Tensor, _: Tensor) -> Any:
        need_weight, taking = updates.begin(ctx, 1)
        x, weight, scale, labels, class_weight, threshold, numbers, *swept = ctx.saved_tensors
        options, needed = ctx.options, (ctx.needs_input_grad[0], need_weight, ctx.needs_input_grad[2])
        term = row_state.TermInputs(threshold, numbers)
        rows = swept[0]
        with torch.no_grad():
            s = options.scale_value if scale is None else scale.double()
            none = torch.zeros_like(rows[0])
            # 0 where the row has no other class, whose logarithm is -inf whatever x and weight are.
            each = torch.where(rows[row_state.SUM] == 0, none, g_log_sum / rows[row_state.SUM])
            uniform = g_with_sum if options.smoothing > 0 else none
            slopes = torch.stack([each * s, g_cosine, uniform, each * rows[row_state.SECOND_SUM]])
            gradients = sweep.head_backward(
                x.new_ones((), dtype=accumulator(x.dtype)),
                torch.where(rows[row_state.ROW_WEIGHT] != 0, slopes, 0.0),
                x.contiguous(),
                weight.contiguous(),
                labels,
                scale,
                class_weight,
                row_state.Swept(*swept),
                options,
                needed,
                term,
                taking,
            )
        given = asked(needed, gradients)

        def formula() -> PartsFormula:
            return PartsFormula("head_parts", labels, class_weight, term, rows, options)

        upstream = g_cosine, g_log_sum, g_with_sum
        return *twice_by_tiles(given, formula, upstream, x, weight, scale), *[None] * 7


def _with_class_sum(x: Tensor, class_sum: Tensor, counts: Tensor, options: LossOptions) -> Tensor:
    """<x_hat, U> [N], which only label smoothing needs: [0] without."""
    if options.smoothing == 0:
        return x.new_empty([0], dtype=torch.float64)
    wide = torch.where(counts[:, None], x.to(class_sum.dtype), 0)
    x_hat, _ = kernels(x).normalize(wide.contiguous(), 1, 2, options.eps)
    with_sum: Tensor = (x_hat.double() * class_sum[:-1].double()).sum(1)
    return with_sum


def head_parts(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    labels: Tensor,
    sample_weight: Tensor | None,
    class_weight: Tensor | None,
    options: LossOptions,
    term: row_state.TermInputs = row_state.NO_INPUTS,
    *,
    need_largest: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(c_y [N], ln S_o [N], with smoothing <x_hat, U> [N], the rows' state [ROW_FIELDS, N]), float64."""
    result: tuple[Tensor, Tensor, Tensor, Tensor]
    told, rest = (labels, sample_weight, class_weight, *term), (options, need_largest)
    if transforms.watched():
        tensors = x, weight, scale, *told
        result = transforms.through("head_parts", _HeadParts, tensors, rest, inputs=3, outputs=3)  # type: ignore[assignment]
    else:
        x, weight = detach_without_grad(x, weight)
        result = updates.apply(_HeadParts, x, weight, scale, *told, *rest)
    return result
