"""The ops of the softmax head: fake kernel, autograd Function, typed wrapper. No checks, no defaults."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from ..cosine.ops import asked_of_head, gradients_fake
from ..engine import memory
from ..engine.autograd import detach_without_grad, no_second_derivative
from ..engine.calls import accumulator, add_fakes, kernels, plan_device
from ..engine.plan import Plan
from .margins import Margin

# csrc/row_state.h
ROW_FIELDS = 13
INVERSE_NORM = 5
ELSEWHERE = -1  # instead of a label: the target is a class of another shard


def _normface_sweep_fake(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: Tensor | None,
    scale_value: float,
    ignore_index: int,
    eps: float,
    class_chunk: int,
    store: bool,
    need_x: bool,
    need_class_sum: bool,
    kernels: int,
    product_precision: torch.dtype,
    sample_weight: Tensor | None,
    class_weight: Tensor | None,
    total_classes: int,
    is_shard: bool,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = accumulator(x.dtype)
    (batch, dim), classes = x.shape, weight.shape[0]
    cuda = plan_device(x).type == "cuda"
    row = -(-classes // 8) * 8 if cuda else classes  # E in memory: csrc/cuda/head.cuh
    stored = torch.bfloat16 if cuda and product_precision.itemsize == 2 else wide
    return (
        x.new_empty([ROW_FIELDS, batch], dtype=torch.float64),
        x.new_empty([classes], dtype=wide),
        x.new_empty([batch, dim] if need_x else [0], dtype=wide),
        x.new_empty([dim + 1 if need_class_sum else 0], dtype=wide),
        x.new_empty([batch * row if store else 0], dtype=stored),
    )


def _normface_shift_fake(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: Tensor | None,
    scale_value: float,
    ignore_index: int,
    eps: float,
    class_chunk: int,
    kernels: int,
    product_precision: torch.dtype,
    total_classes: int,
    is_shard: bool,
) -> Tensor:
    return x.new_empty([x.shape[0]], dtype=torch.float64)


def _normface_finish_fake(
    rows: Tensor,
    x: Tensor,
    class_sum: Tensor,
    scale: Tensor | None,
    scale_value: float,
    m1: float,
    m2: float,
    m3: float,
    reduction: int,
    smoothing: float,
    total_classes: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    shape = [x.shape[0]] if reduction == 0 else []
    return x.new_empty(shape, dtype=accumulator(x.dtype)), torch.empty_like(rows)


def _normface_backward_fake(
    grad_loss: Tensor,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: Tensor | None,
    scale_value: float,
    eps: float,
    class_chunk: int,
    rows: Tensor,
    inverse_norm: Tensor,
    x_sum: Tensor,
    class_sum: Tensor,
    stored: Tensor,
    need_x: bool,
    need_weight: bool,
    need_scale: bool,
    kernels: int,
    product_precision: torch.dtype,
    class_weight: Tensor | None,
    smoothing: float,
    total_classes: int,
    is_shard: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dw, ds = gradients_fake(x, weight, need_x, need_weight, need_scale)
    return dx.to(accumulator(x.dtype)) if is_shard else dx, dw, ds


@dataclass(frozen=True)
class LossOptions:
    """The arguments of the fused head that are neither tensors nor differentiable."""

    scale_value: float  # where the scale is no tensor
    margin: Margin
    reduction: int
    ignore_index: int
    eps: float
    smoothing: float
    plan: Plan
    product_precision: torch.dtype
    total_classes: int
    is_shard: bool = False  # one shard of the classes of several


class Swept(NamedTuple):
    """What ``normface_sweep`` found, in the order in which ``normface_backward`` takes it."""

    rows: Tensor
    inverse_norm: Tensor
    x_sum: Tensor
    class_sum: Tensor
    stored: Tensor


def normface_sweep(
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
    swept = kernels(x, weight).normface_sweep(
        x,
        weight,
        labels,
        scale,
        options.scale_value,
        options.ignore_index,
        options.eps,
        options.plan.class_chunk,
        options.plan.store and need_weight,
        need_x,
        options.smoothing > 0,
        options.plan.kernels,
        options.product_precision,
        sample_weight,
        class_weight,
        options.total_classes,
        options.is_shard,
        shift,
    )
    return Swept(*swept)


def normface_sweep_in_memory(
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
    """``normface_sweep``, and the options that its backward has to be given: of a smaller plan where the
    memory for E cannot be had. A traced step has one plan."""

    def sweep(given: LossOptions) -> tuple[Swept, LossOptions]:
        arguments = x, weight, labels, scale, sample_weight, class_weight, given
        return normface_sweep(*arguments, need_x=need_x, need_weight=need_weight, shift=shift), given

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
    return sweep(options if smaller is None else replace(options, plan=smaller))


def normface_shift(
    x: Tensor, weight: Tensor, labels: Tensor, scale: Tensor | None, options: LossOptions
) -> Tensor:
    """kappa as the classes at hand alone would have it, [N] float64; -inf where there is none."""
    shift: Tensor = kernels(x, weight).normface_shift(
        x,
        weight,
        labels,
        scale,
        options.scale_value,
        options.ignore_index,
        options.eps,
        options.plan.class_chunk,
        options.plan.kernels,
        options.product_precision,
        options.total_classes,
        options.is_shard,
    )
    return shift


def normface_finish(
    rows: Tensor, x: Tensor, class_sum: Tensor, scale: Tensor | None, options: LossOptions
) -> tuple[Tensor, Tensor]:
    """Second stage, once the sums are over all classes: (loss, the rows' full state)."""
    result: tuple[Tensor, Tensor] = kernels(rows, x).normface_finish(
        rows,
        x,
        class_sum,
        scale,
        options.scale_value,
        *options.margin.parameters(),
        options.reduction,
        options.smoothing,
        options.total_classes,
        options.eps,
    )
    return result


def normface_backward(
    grad_loss: Tensor,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: Tensor | None,
    class_weight: Tensor | None,
    swept: Swept,
    options: LossOptions,
    needed: tuple[bool, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and scale; ``swept`` with the rows' full state."""
    gradients: tuple[Tensor, Tensor, Tensor] = kernels(x, weight).normface_backward(
        grad_loss.contiguous(),
        x,
        weight,
        labels,
        scale,
        options.scale_value,
        options.eps,
        options.plan.class_chunk,
        *swept,
        *needed,
        options.plan.kernels,
        options.product_precision,
        class_weight,
        options.smoothing,
        options.total_classes,
        options.is_shard,
    )
    return gradients


class _NormFaceLoss(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        labels: Tensor,
        sample_weight: Tensor | None,
        class_weight: Tensor | None,
        options: LossOptions,
    ) -> Tensor:
        labels = labels.contiguous()
        need_x, need_weight = ctx.needs_input_grad[:2]
        swept, options = normface_sweep_in_memory(
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
        loss, rows = normface_finish(swept.rows, x.contiguous(), swept.class_sum, scale, options)
        ctx.save_for_backward(x, weight, scale, labels, class_weight, *swept._replace(rows=rows))
        ctx.options = options
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        x, weight, scale, labels, class_weight, *swept = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        with torch.no_grad():
            gradients = normface_backward(
                grad_loss,
                x.contiguous(),
                weight.contiguous(),
                labels,
                scale,
                class_weight,
                Swept(*swept),
                ctx.options,
                needed,
            )
        given = asked_of_head(needed, gradients, scale)
        asked = no_second_derivative("normface_loss", given, grad_loss, x, weight, scale)
        return *asked, None, None, None, None


def normface_loss(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    labels: Tensor,
    sample_weight: Tensor | None,
    class_weight: Tensor | None,
    options: LossOptions,
) -> Tensor:
    x, weight = detach_without_grad(x, weight)
    result: Tensor = _NormFaceLoss.apply(x, weight, scale, labels, sample_weight, class_weight, options)
    return result


add_fakes(
    {
        "normface_sweep": _normface_sweep_fake,
        "normface_shift": _normface_shift_fake,
        "normface_finish": _normface_finish_fake,
        "normface_backward": _normface_backward_fake,
    }
)
