"""The softmax on the engine's sweep: what becomes of the row sums, autograd Function, typed wrapper. No
checks, no defaults."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..engine import graphs, transforms, updates
from ..engine.autograd import asked
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
    Swept,
    TermInputs,
)
from ..engine.saved import Parts, saved_count, unpacked
from ..engine.statistics import LEFT_TO_LEARN, Means, Statistics, hits, means_of, statistics_of
from ..engine.sweep import head_backward, head_backward_fake, in_memory
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


def _softmax_loss_fake(
    *,
    x: Tensor,
    weight: Tensor,
    store: bool,
    keep_x: bool,
    need_class_sum: bool,
    need_margin: bool,
    product_precision: torch.dtype,
    reduction: int,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    parts = Parts(store, keep_x, need_class_sum, need_margin)
    return (
        x.new_empty([x.shape[0]] if reduction == 0 else [], dtype=accumulator(x.dtype)),
        x.new_empty([saved_count(parts, x, weight.shape[0], product_precision)], dtype=torch.float64),
    )


add_fakes(
    by_name(
        {
            "softmax_finish": _softmax_finish_fake,
            "softmax_loss": _softmax_loss_fake,
            "softmax_loss_backward": head_backward_fake,
        }
    )
)


_finish_options = options_of("softmax_finish", LossOptions)
_loss_options = options_of("softmax_loss", LossOptions)
_backward_options = options_of("softmax_loss_backward", LossOptions)


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


def softmax_loss(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    margin: MarginTensors,
    labels: Tensor,
    sample_weight: Tensor | None,
    class_weight: Tensor | None,
    term: TermInputs,
    options: LossOptions,
    needed: tuple[bool, ...],
    need_largest: bool,
) -> tuple[Tensor, Tensor, Parts, LossOptions]:
    """The loss in one op, what it saves for the gradients that are `needed` (of x, the weight, the scale and
    the margin's numbers), and how it was run."""
    need_x, need_weight, _, *of_margin = needed
    op, need_margin = kernels(x, weight).softmax_loss, any(of_margin)
    tensors = x, weight, labels, scale, *term, *margin, sample_weight, class_weight

    def run(given: LossOptions) -> tuple[Tensor, Tensor, Parts]:
        parts = Parts(given.keep and need_weight, need_x, given.smoothing > 0, need_margin)
        return *op(*tensors, *parts, need_largest, *_loss_options(given)), parts

    (loss, saved, parts), options = in_memory("normface_loss", x, weight, options, run, store=need_weight)
    return loss, saved, parts, options


def _means(
    saved: Tensor,
    parts: Parts,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    margin: MarginTensors,
    class_weight: Tensor | None,
    options: LossOptions,
) -> Means:
    swept, _ = unpacked(saved, parts, x, weight.shape[0], options.product_precision)
    weighted = class_weight is not None
    return means_of_rows(swept.rows, x, swept.class_sum, scale, margin, options, weighted=weighted)


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
        margin, term = (m1, m2, m3), TermInputs(threshold, numbers)
        features, classes, labels = x.contiguous(), weight.contiguous(), labels.contiguous()
        ctx.taker = updates.of(weight, ctx.needs_input_grad[1])
        loss, saved, parts, options = softmax_loss(
            features,
            classes,
            scale,
            margin,
            labels,
            sample_weight,
            class_weight,
            term,
            options,
            ctx.needs_input_grad[:6],
            statistics,
        )
        ctx.save_for_backward(x, weight, scale, *margin, labels, class_weight, *term, saved)
        ctx.options, ctx.parts = options, parts
        if not statistics:
            return loss
        means = _means(saved, parts, features, classes, scale, margin, class_weight, options)
        ctx.mark_non_differentiable(*means)
        return loss, *means

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *rest: Any) -> Any:
        need_weight, taking = updates.begin(ctx, 1)
        x, weight, scale, m1, m2, m3, labels, class_weight, threshold, numbers, saved = ctx.saved_tensors
        options, parts, term = ctx.options, ctx.parts, TermInputs(threshold, numbers)
        need_x, _, need_scale, *of_margin = ctx.needs_input_grad[:6]
        needed, margin = (need_x, need_weight, need_scale), (m1, m2, m3)

        def told_apart() -> tuple[Swept, Tensor]:
            return unpacked(saved, parts, x, weight.shape[0], options.product_precision)

        def gradients() -> tuple[Tensor | None, ...]:
            features, classes = x.contiguous(), weight.contiguous()
            if taking is None:
                tensors = grad_loss.contiguous(), saved, features, classes, labels, scale, *term, class_weight
                dx, dw, ds = kernels(x, weight).softmax_loss_backward(
                    *tensors, *parts, *needed, *_backward_options(options)
                )
                ds = ds if scale is None else ds.to(scale.dtype)
            else:
                swept, slopes = told_apart()
                told = features, classes, labels, scale, class_weight, swept, options, needed, term, taking
                dx, dw, ds = head_backward(grad_loss, slopes, *told)
            given = asked(needed, (dx, dw, ds))
            if not any(of_margin):
                return *given, *NUMBERS
            return *given, *margin_gradients(grad_loss, told_apart()[1], margin, tuple(of_margin))

        if not torch.is_grad_enabled():
            return *gradients(), *_NO_MORE
        with torch.no_grad():
            first = gradients()

        def formula() -> LossFormula:
            return LossFormula("normface_loss", labels, class_weight, term, told_apart()[0].rows, options)

        return *twice_by_tiles(first, formula, (grad_loss,), x, weight, scale, *margin), *_NO_MORE


#: The gradients of what has none, behind those of x, the weight, the scale and the margin.
_NO_MORE = (None,) * 7


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
    if transforms.watched():
        tensors = x, weight, scale, *margin, labels, sample_weight, class_weight, *term
        rest = options, statistics
        found = transforms.through("normface_loss", _NormFaceLoss, tensors, rest, inputs=6)
        return found[0], statistics_of((found[1], found[2])) if statistics else None
    if not torch.is_grad_enabled() and not graphs.tracing():  # which compares the graphs with and without
        # Straight to the op: a Function is told even here that a parameter needs a gradient.
        x, weight = x.contiguous(), weight.contiguous()
        loss, saved, parts, options = softmax_loss(
            x,
            weight,
            scale,
            margin,
            labels.contiguous(),
            sample_weight,
            class_weight,
            term,
            options,
            _NOTHING,
            statistics,
        )
        if not statistics:
            return loss, None
        means = _means(saved, parts, x, weight, scale, margin, class_weight, options)
        return loss, statistics_of(means)
    told = labels, sample_weight, class_weight, *term
    result = updates.apply(_NormFaceLoss, x, weight, scale, *margin, *told, options, statistics)
    return (result[0], statistics_of(result[1:])) if statistics else (result, None)


#: No gradient is wanted of x, the weight, the scale and the margin's numbers.
_NOTHING = (False,) * 6
