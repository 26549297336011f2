"""The softmax on the engine's sweep: what becomes of the row sums, autograd Function, typed wrapper. No
checks, no defaults."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..engine import transforms, updates
from ..engine.autograd import asked, detach_without_grad
from ..engine.calls import add_fakes, by_name, kernels, options_of
from ..engine.curvature import twice_by_tiles
from ..engine.dtypes import accumulator
from ..engine.row_state import (
    ALL_SLOPES,
    COSINE,
    LARGEST,
    NO_INPUTS,
    ROW_WEIGHT,
    SLOPE_FIELDS,
    TARGET_WEIGHT,
    TermInputs,
)
from ..engine.statistics import LEFT_TO_LEARN, Means, Statistics, hits, means_of, statistics_of
from ..engine.sweep import Swept, head_backward, head_sweep_in_memory
from .formula import LossFormula
from .loss_options import NUMBERS, LossOptions, MarginTensors

#: -ln p of a row whose 1 - p is LEFT_TO_LEARN.
_LEARNED = -math.log1p(-LEFT_TO_LEARN)


def _softmax_finish_fake(*, x: Tensor, need_margin: bool, reduction: int, **_: Any) -> tuple[Tensor, Tensor]:
    batch = x.shape[0]
    return (
        x.new_empty([batch] if reduction == 0 else [], dtype=accumulator(x.dtype)),
        x.new_empty([ALL_SLOPES if need_margin else SLOPE_FIELDS, batch], dtype=torch.float64),
    )


add_fakes(by_name({"softmax_finish": _softmax_finish_fake}))


_finish_options = options_of("softmax_finish", LossOptions)


def softmax_finish(
    rows: Tensor,
    x: Tensor,
    class_sum: Tensor,
    scale: Tensor | None,
    margin: MarginTensors,
    options: LossOptions,
    *,
    need_margin: bool = False,
) -> tuple[Tensor, Tensor]:
    """Second stage, once the sums are over all classes: loss and slopes [SLOPE_FIELDS or ALL_SLOPES, N]."""
    result: tuple[Tensor, Tensor] = kernels(rows, x).softmax_finish(
        rows, x, class_sum, scale, *margin, need_margin, *_finish_options(options)
    )
    return result


def means_of_rows(
    rows: Tensor,
    x: Tensor,
    class_sum: Tensor,
    scale: Tensor | None,
    margin: MarginTensors,
    options: LossOptions,
    *,
    weighted: bool,
) -> Means:
    """What the statistics are made of, from sums over all classes; `weighted` by class."""
    told, counts, each = replace(options, reduction=0), rows[ROW_WEIGHT] != 0, rows.clone()
    each[ROW_WEIGHT] = counts.to(rows.dtype)
    losses, _ = softmax_finish(each, x, class_sum, scale, margin, told)
    surprise = losses  # -ln p_y
    if weighted or options.smoothing > 0:
        each[TARGET_WEIGHT] = 1.0
        told = replace(told, smoothing=0.0)
        surprise, _ = softmax_finish(each, x, class_sum.new_empty(0), scale, margin, told)
    return means_of_losses(counts, losses, surprise, rows, x.dtype)


def means_of_losses(
    counts: Tensor, losses: Tensor, surprise: Tensor, state: Tensor, dtype: torch.dtype
) -> Means:
    """From the rows' losses and their -ln p_y, [N] each, and what the sweep found of them, with their largest
    cosines; `dtype` is the features'."""
    hit = hits(state[COSINE], state[LARGEST], accumulator(dtype))
    return means_of(counts, losses, state[COSINE], hit, ~(surprise <= _LEARNED))


def margin_gradients(
    grad_loss: Tensor, slopes: Tensor, margin: MarginTensors, needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Those of m1, m2 and m3 from all slopes [ALL_SLOPES, N]: float64 sums, rounded once."""
    if not any(needed):
        return NUMBERS
    given: list[Tensor | None] = []
    for slope, m, need in zip(slopes[SLOPE_FIELDS:], margin, needed, strict=True):
        gradient = None
        if need and m is not None:
            gradient = grad_loss.double() * slope
            gradient = (gradient.sum() if m.dim() == 0 else gradient).to(m.dtype)
        given.append(gradient)
    return tuple(given)


class _NormFaceLoss(Function):
    """The loss, and without gradient what its statistics are made of, where they are wanted."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        m1: Tensor | None,
        m2: Tensor | None,
        m3: Tensor | None,
        labels: Tensor,
        sample_weight: Tensor | None,
        class_weight: Tensor | None,
        threshold: Tensor | None,
        numbers: Tensor | None,
        options: LossOptions,
        statistics: bool,
    ) -> Any:
        labels, margin = labels.contiguous(), (m1, m2, m3)
        need_x, need_weight = ctx.needs_input_grad[:2]
        ctx.taker = updates.of(weight, need_weight)
        swept, options = head_sweep_in_memory(
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
            need_largest=statistics,
            term=TermInputs(threshold, numbers),
        )
        loss, slopes = softmax_finish(
            swept.rows,
            x.contiguous(),
            swept.class_sum,
            scale,
            margin,
            options,
            need_margin=any(ctx.needs_input_grad[3:6]),
        )
        told = labels, class_weight, threshold, numbers
        ctx.save_for_backward(x, weight, scale, *margin, *told, slopes, *swept)
        ctx.options = options
        if not statistics:
            return loss
        weighted = class_weight is not None
        means = means_of_rows(
            swept.rows, x.contiguous(), swept.class_sum, scale, margin, options, weighted=weighted
        )
        ctx.mark_non_differentiable(*means)
        return loss, *means

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *rest: Any) -> Any:
        need_weight, taking = updates.begin(ctx, 1)
        x, weight, scale, m1, m2, m3, labels, class_weight, *saved = ctx.saved_tensors
        threshold, numbers, slopes, *swept = saved
        needed = ctx.needs_input_grad[0], need_weight, ctx.needs_input_grad[2]
        term = TermInputs(threshold, numbers)
        with torch.no_grad():
            gradients = head_backward(
                grad_loss,
                slopes,
                x.contiguous(),
                weight.contiguous(),
                labels,
                scale,
                class_weight,
                Swept(*swept),
                ctx.options,
                needed,
                term,
                taking,
            )
            of_margin = margin_gradients(grad_loss, slopes, (m1, m2, m3), ctx.needs_input_grad[3:6])

        def formula() -> LossFormula:
            return LossFormula("normface_loss", labels, class_weight, term, swept[0], ctx.options)

        given = (*asked(needed, gradients), *of_margin)
        return *twice_by_tiles(given, formula, (grad_loss,), x, weight, scale, m1, m2, m3), *[None] * 7


def normface_loss(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    margin: MarginTensors,
    labels: Tensor,
    sample_weight: Tensor | None,
    class_weight: Tensor | None,
    options: LossOptions,
    term: TermInputs = NO_INPUTS,
    *,
    statistics: bool = False,
) -> tuple[Tensor, Statistics | None]:
    told, rest = (labels, sample_weight, class_weight, *term), (options, statistics)
    if transforms.watched():
        tensors = x, weight, scale, *margin, *told
        found = transforms.through("normface_loss", _NormFaceLoss, tensors, rest, inputs=6)
    else:
        x, weight = detach_without_grad(x, weight)
        result = updates.apply(_NormFaceLoss, x, weight, scale, *margin, *told, *rest)
        found = result if statistics else (result,)
    return found[0], statistics_of((found[1], found[2])) if statistics else None
