"""The ops of the softmax head: fake kernels, autograd Functions, typed wrappers. No checks, no defaults."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from ..engine import memory
from ..engine.autograd import asked, detach_without_grad, no_second_derivative
from ..engine.calls import accumulator, add_fakes, by_name, kernels, options_of, plan_device
from ..engine.plan import Plan

# csrc/engine/row_state.h
ROW_FIELDS, SLOPE_FIELDS, ALL_SLOPES = 7, 4, 7
SUM, SUM_COSINE, COSINE, TARGET_WEIGHT, SHIFT, INVERSE_NORM, ROW_WEIGHT = range(ROW_FIELDS)
ELSEWHERE = -1  # instead of a label: the target is a class of another shard

#: m1, m2 and m3, where they are tensors: [] or [N].
MarginTensors = tuple[Tensor | None, Tensor | None, Tensor | None]
NUMBERS: MarginTensors = (None, None, None)


def _head_sweep_fake(
    *,
    x: Tensor,
    weight: Tensor,
    store: bool,
    need_x: bool,
    need_class_sum: bool,
    product_precision: torch.dtype,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = accumulator(x.dtype)
    (batch, dim), classes = x.shape, weight.shape[0]
    cuda = plan_device(x).type == "cuda"
    row = -(-classes // 8) * 8 if cuda else classes  # E in memory: csrc/cuda/host/head.cuh
    stored = torch.bfloat16 if cuda and product_precision.itemsize == 2 else wide
    return (
        x.new_empty([ROW_FIELDS, batch], dtype=torch.float64),
        x.new_empty([classes], dtype=wide),
        x.new_empty([batch, dim] if need_x else [0], dtype=wide),
        x.new_empty([dim + 1 if need_class_sum else 0], dtype=wide),
        x.new_empty([batch * row if store else 0], dtype=stored),
    )


def _head_shift_fake(*, x: Tensor, **_: Any) -> Tensor:
    return x.new_empty([x.shape[0]], dtype=torch.float64)


def _softmax_finish_fake(*, x: Tensor, need_margin: bool, reduction: int, **_: Any) -> tuple[Tensor, Tensor]:
    batch = x.shape[0]
    return (
        x.new_empty([batch] if reduction == 0 else [], dtype=accumulator(x.dtype)),
        x.new_empty([ALL_SLOPES if need_margin else SLOPE_FIELDS, batch], dtype=torch.float64),
    )


def _head_backward_fake(
    *,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    need_x: bool,
    need_weight: bool,
    need_scale: bool,
    is_shard: bool,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    of_scale = [] if scale is None else list(scale.shape)
    return (
        x.new_empty(x.shape if need_x else [0], dtype=accumulator(x.dtype) if is_shard else x.dtype),
        weight.new_empty(weight.shape if need_weight else [0]),
        x.new_empty(of_scale if need_scale else [0], dtype=torch.float64),
    )


add_fakes(
    by_name(
        {
            "head_sweep": _head_sweep_fake,
            "head_shift": _head_shift_fake,
            "softmax_finish": _softmax_finish_fake,
            "head_backward": _head_backward_fake,
        }
    )
)


@dataclass(eq=False)
class LossOptions:
    """The arguments of the fused head that are neither tensors nor differentiable, by their names in
    csrc/engine/head_arguments.h. A ``..._value`` counts where no tensor stands for it."""

    scale_value: float
    eps: float
    total_classes: int
    plan: Plan
    class_chunk: int  # the plan's, as are the kernels
    kernels: int
    product_precision: torch.dtype
    ignore_index: int
    reduction: int = 1
    smoothing: float = 0.0
    m1_value: float = 1.0
    m2_value: float = 0.0
    m3_value: float = 0.0
    formula: int = 0
    guard: int = 0
    straight: bool = False
    is_shard: bool = False  # one shard of the classes of several

    def planned(self, plan: Plan) -> LossOptions:
        return replace(self, plan=plan, class_chunk=plan.class_chunk, kernels=plan.kernels)


_sweep_options = options_of("head_sweep", LossOptions)
_shift_options = options_of("head_shift", LossOptions)
_finish_options = options_of("softmax_finish", LossOptions)
_backward_options = options_of("head_backward", LossOptions)


class Swept(NamedTuple):
    """What ``head_sweep`` found, in the order in which ``head_backward`` takes it."""

    rows: Tensor
    inverse_norm: Tensor
    x_sum: Tensor
    class_sum: Tensor
    stored: Tensor


def head_sweep(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: Tensor | None,
    sample_weight: Tensor | None,
    class_weight: Tensor | None,
    options: LossOptions,
    *,
    need_x: bool,
    need_weight: bool,
    shift: Tensor | None = None,
) -> Swept:
    """First stage: the sums over the classes at hand."""
    swept = kernels(x, weight).head_sweep(
        x,
        weight,
        labels,
        scale,
        sample_weight,
        class_weight,
        shift,
        options.plan.store and need_weight,
        need_x,
        options.smoothing > 0,
        *_sweep_options(options),
    )
    return Swept(*swept)


def head_sweep_in_memory(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: Tensor | None,
    sample_weight: Tensor | None,
    class_weight: Tensor | None,
    options: LossOptions,
    *,
    need_x: bool,
    need_weight: bool,
    shift: Tensor | None = None,
) -> tuple[Swept, LossOptions]:
    """``head_sweep``, and the options that its backward has to be given: of a smaller plan where the
    memory for E cannot be had. A traced step has one plan."""

    def sweep(given: LossOptions) -> tuple[Swept, LossOptions]:
        arguments = x, weight, labels, scale, sample_weight, class_weight, given
        return head_sweep(*arguments, need_x=need_x, need_weight=need_weight, shift=shift), given

    if torch.compiler.is_compiling() or not (options.plan.store and need_weight):
        return sweep(options)
    device = plan_device(x)
    if not memory.is_refused(options.plan, device):
        try:
            return sweep(options)
        except (RuntimeError, MemoryError) as error:
            if not memory.is_refusal(error):
                raise
        memory.refuse(options.plan, device)
    (batch, dim), classes = x.shape, max(1, weight.shape[0])
    smaller = memory.smaller_plan(options.plan, batch, dim, classes, options.product_precision, device)
    return sweep(options if smaller is None else options.planned(smaller))


def head_shift(
    x: Tensor, weight: Tensor, labels: Tensor, scale: Tensor | None, options: LossOptions
) -> Tensor:
    """kappa as the classes at hand alone would have it, [N] float64; -inf where there is none."""
    shift: Tensor = kernels(x, weight).head_shift(x, weight, labels, scale, *_shift_options(options))
    return shift


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


def head_backward(
    grad_loss: Tensor,
    slopes: Tensor,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: Tensor | None,
    class_weight: Tensor | None,
    swept: Swept,
    options: LossOptions,
    needed: tuple[bool, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and scale, in the scale's dtype, from the slopes of the rows' losses."""
    dx, dw, ds = kernels(x, weight).head_backward(
        grad_loss.contiguous(),
        slopes,
        x,
        weight,
        labels,
        scale,
        class_weight,
        *swept,
        *needed,
        *_backward_options(options),
    )
    return dx, dw, ds if scale is None else ds.to(scale.dtype)


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
        options: LossOptions,
    ) -> Tensor:
        labels, margin = labels.contiguous(), (m1, m2, m3)
        need_x, need_weight = ctx.needs_input_grad[:2]
        swept, options = head_sweep_in_memory(
            x.contiguous(),
            weight.contiguous(),
            labels,
            scale,
            sample_weight,
            class_weight,
            options,
            need_x=need_x,
            need_weight=need_weight,
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
        ctx.save_for_backward(x, weight, scale, *margin, labels, class_weight, slopes, *swept)
        ctx.options = options
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        x, weight, scale, m1, m2, m3, labels, class_weight, slopes, *swept = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
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
            )
            of_margin = margin_gradients(grad_loss, slopes, (m1, m2, m3), ctx.needs_input_grad[3:6])
        given = (*asked(needed, gradients), *of_margin)
        raising = no_second_derivative("normface_loss", given, grad_loss, x, weight, scale, m1, m2, m3)
        return *raising, None, None, None, None


def normface_loss(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    margin: MarginTensors,
    labels: Tensor,
    sample_weight: Tensor | None,
    class_weight: Tensor | None,
    options: LossOptions,
) -> Tensor:
    x, weight = detach_without_grad(x, weight)
    result: Tensor = _NormFaceLoss.apply(
        x, weight, scale, *margin, labels, sample_weight, class_weight, options
    )
    return result
