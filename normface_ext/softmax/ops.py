"""Each op in one paragraph: fake kernel, autograd Function, typed wrapper. No checks, no defaults.

The kernels are looked up in ``_library.namespace()``: the real library, or, in tests, the emulated
build of the CUDA kernels for CPU tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from . import _library, _memory, reference
from .margins import Margin
from .plan import Plan

# csrc/row_state.h
ROW_FIELDS = 13
INVERSE_NORM = 5
ELSEWHERE = -1  # instead of a label: the target is a class of another shard


def _kernels(*tensors: Tensor | None) -> Any:
    """The op namespace for these tensors; CUDA tensors without CUDA kernels get a clear error."""
    for tensor in tensors:
        if tensor is not None and tensor.is_cuda:
            _library.require_cuda("normface_ext")
    return _library.namespace()


def plan_device(x: Tensor) -> torch.device:
    """Whose plan to follow: the device of x, or CUDA's when emulated CUDA kernels are in use."""
    return torch.device("cuda") if _library.emulating() else x.device


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Once(Function):
    """The first ``count`` of the tensors, as a function of all that raises when it is differentiated."""

    @staticmethod
    def forward(ctx: Any, message: str, count: int, *tensors: Tensor | None) -> Any:
        ctx.message = message
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        raise RuntimeError(ctx.message)


def _no_second_derivative(
    op: str, gradients: tuple[Tensor | None, ...], *origins: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients that raise a sentence when somebody differentiates them again, by one of the ``origins`` or
    by anything: autograd goes only where what is asked for can be reached."""
    if not torch.is_grad_enabled():
        return gradients
    message = f"{op}: second derivatives are not available; differentiate normface_ext.reference.{op} instead"
    present = [g.detach().requires_grad_() for g in gradients if g is not None]
    raising = iter(_Once.apply(message, len(present), *present, *origins))
    return tuple(None if g is None else next(raising) for g in gradients)


class _Formula(Function):
    """``kernel(*inputs)``, with the derivatives, of any order, of ``formula(*inputs)``: so that a first
    gradient is the kernel's whether or not it will be differentiated again."""

    @staticmethod
    def forward(ctx: Any, kernel: Any, formula: Any, *inputs: Tensor | None) -> Any:
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        ctx.formula = formula
        return kernel(*inputs)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        again, needed = torch.is_grad_enabled(), ctx.needs_input_grad[2:]
        with torch.enable_grad():
            # Each input under a name of its own, since one may have been computed from another.
            inputs = [t if t is None else t.view_as(t) for t in ctx.saved_tensors]
            results = ctx.formula(*inputs)
            pairs = [
                (r, g) for r, g in zip(results, upstream, strict=True) if g is not None and r.requires_grad
            ]
            if not pairs:  # linear in what is asked for
                return None, None, *(None if t is None else torch.zeros_like(t) for t in inputs)
            wanted = [t for t, need in zip(inputs, needed, strict=True) if need and t is not None]
            found = iter(
                torch.autograd.grad(
                    [r for r, _ in pairs],
                    wanted,
                    [g for _, g in pairs],
                    create_graph=again,
                    allow_unused=True,
                )
            )
        return None, None, *(next(found) if need else None for need in needed)


def _first(kernel: Any, formula: Any, *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
    """First gradients by ``kernel``; those of them, where a graph is made, by ``formula``."""
    gradients: tuple[Tensor | None, ...]
    gradients = _Formula.apply(kernel, formula, *inputs) if torch.is_grad_enabled() else kernel(*inputs)
    return gradients


def as_recorded(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors; detached where autograd does not record. A Function is told there, too, that parameters
    need a gradient, and would keep for a backward that cannot come what only that needs."""
    return tensors if torch.is_grad_enabled() else tuple(t.detach() for t in tensors)


def as_rows(x: Tensor, dim: int) -> Tensor:
    """x itself where the kernels can read it as it lies (contiguous, or ``dim`` innermost and the other
    axes in order: channels_last), else a contiguous copy."""
    if x.is_contiguous() or x.movedim(dim, -1).is_contiguous():
        return x
    return x.contiguous()


# normalize ------------------------------------------------------------------------------------------


def _normalize_fake(x: Tensor, dim: int, p: int, eps: float) -> tuple[Tensor, Tensor]:
    shape = [1 if axis == dim else size for axis, size in enumerate(x.shape)]
    return torch.empty_like(x), x.new_empty(shape, dtype=_accumulator(x.dtype))


def _normalize_backward_fake(
    grad_y: Tensor | None, grad_norm: Tensor | None, x: Tensor, norm: Tensor, dim: int, p: int, eps: float
) -> Tensor:
    return torch.empty_like(x)


class _Normalize(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, p: int, eps: float) -> tuple[Tensor, Tensor]:
        y, norm = _kernels(x).normalize(x, dim, p, eps)
        ctx.save_for_backward(x, norm)
        ctx.set_materialize_grads(False)
        ctx.arguments = dim, p, eps
        return y, norm

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_norm: Tensor | None) -> Any:
        x, norm = ctx.saved_tensors
        if grad_y is None and grad_norm is None:
            return None, None, None, None
        arguments = ctx.arguments

        def kernel(grad_y: Tensor | None, grad_norm: Tensor | None, x: Tensor) -> tuple[Tensor]:
            if grad_y is not None and grad_y.stride() != x.stride():
                grad_y = torch.empty_like(x).copy_(grad_y)
            if grad_norm is not None:
                grad_norm = grad_norm.contiguous()
            return (_kernels(x).normalize_backward(grad_y, grad_norm, x, norm.detach(), *arguments),)

        def formula(grad_y: Tensor | None, grad_norm: Tensor | None, x: Tensor) -> tuple[Tensor]:
            return (reference.normalize_backward(grad_y, grad_norm, x, *arguments),)

        (dx,) = _first(kernel, formula, grad_y, grad_norm, x)
        return dx, None, None, None


def normalize(x: Tensor, dim: int, p: int, eps: float) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = _Normalize.apply(x, dim, p, eps)
    return result


# norm_linear ----------------------------------------------------------------------------------------


def _norm_linear_fake(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    scale_value: float,
    normalize_input: bool,
    eps: float,
) -> Tensor:
    return x.new_empty([x.shape[0], weight.shape[0]])


def _gradients_fake(
    x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, need_scale: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if need_x else [0]),
        weight.new_empty(weight.shape if need_weight else [0]),
        x.new_empty([] if need_scale else [0], dtype=torch.float64),
    )


def _norm_linear_backward_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    scale_value: float,
    normalize_input: bool,
    eps: float,
    need_x: bool,
    need_weight: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients_fake(x, weight, need_x, need_weight, need_scale)


def _asked(
    needed: tuple[bool, ...], gradients: tuple[Tensor, ...], scale: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients that were asked for, that of the scale in the scale's dtype."""
    dx, dw, ds = gradients
    return (
        dx if needed[0] else None,
        dw if needed[1] else None,
        ds.to(scale.dtype) if needed[2] and scale is not None else None,
    )


class _NormLinear(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        scale_value: float,
        normalize_input: bool,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, scale)  # as given: a copy would be unknown to autograd
        ctx.arguments = scale_value, normalize_input, eps
        out: Tensor = _kernels(x, weight).norm_linear(
            x.contiguous(), weight.contiguous(), scale, *ctx.arguments
        )
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        scale_value, normalize_input, eps = ctx.arguments
        needed = ctx.needs_input_grad[:3]

        def kernel(
            grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None
        ) -> tuple[Tensor | None, ...]:
            gradients = _kernels(x, weight).norm_linear_backward(
                grad.contiguous(),
                x.contiguous(),
                weight.contiguous(),
                scale,
                scale_value,
                normalize_input,
                eps,
                *needed,
            )
            return _asked(needed, gradients, scale)

        def formula(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None) -> tuple[Tensor, ...]:
            s = torch.tensor(scale_value, dtype=_accumulator(x.dtype)) if scale is None else scale
            return reference.norm_linear_backward(grad, x, weight, s, eps, normalize_input)

        return *_first(kernel, formula, grad, *ctx.saved_tensors), None, None, None


def norm_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    scale_value: float,
    normalize_input: bool,
    eps: float,
) -> Tensor:
    result: Tensor = _NormLinear.apply(x, weight, scale, scale_value, normalize_input, eps)
    return result


# normface_loss --------------------------------------------------------------------------------------


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
    operand: torch.dtype,
    sample_weight: Tensor | None,
    class_weight: Tensor | None,
    classes_in_all: int,
    partial: bool,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = _accumulator(x.dtype)
    (batch, dim), classes = x.shape, weight.shape[0]
    cuda = plan_device(x).type == "cuda"
    row = -(-classes // 8) * 8 if cuda else classes  # E in memory: csrc/cuda/head.cuh
    stored = torch.bfloat16 if cuda and operand.itemsize == 2 else wide
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
    operand: torch.dtype,
    classes_in_all: int,
    partial: bool,
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
    classes_in_all: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    shape = [x.shape[0]] if reduction == 0 else []
    return x.new_empty(shape, dtype=_accumulator(x.dtype)), torch.empty_like(rows)


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
    operand: torch.dtype,
    class_weight: Tensor | None,
    smoothing: float,
    classes_in_all: int,
    partial: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dw, ds = _gradients_fake(x, weight, need_x, need_weight, need_scale)
    return dx.to(_accumulator(x.dtype)) if partial else dx, dw, ds


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
    operand: torch.dtype
    classes_in_all: int
    partial: bool = False  # one shard of the classes of several


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
    swept = _kernels(x, weight).normface_sweep(
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
        options.operand,
        sample_weight,
        class_weight,
        options.classes_in_all,
        options.partial,
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
    if not _memory.is_refused(options.plan, device):
        try:
            return sweep(options)
        except (RuntimeError, MemoryError) as error:
            if not _memory.is_refusal(error):
                raise
        _memory.refuse(options.plan, device)
    (batch, dim), classes = x.shape, max(1, weight.shape[0])
    smaller = _memory.smaller_plan(options.plan, batch, dim, classes, options.operand, device)
    return sweep(options if smaller is None else replace(options, plan=smaller))


def normface_shift(
    x: Tensor, weight: Tensor, labels: Tensor, scale: Tensor | None, options: LossOptions
) -> Tensor:
    """kappa as the classes at hand alone would have it, [N] float64; -inf where there is none."""
    shift: Tensor = _kernels(x, weight).normface_shift(
        x,
        weight,
        labels,
        scale,
        options.scale_value,
        options.ignore_index,
        options.eps,
        options.plan.class_chunk,
        options.plan.kernels,
        options.operand,
        options.classes_in_all,
        options.partial,
    )
    return shift


def normface_finish(
    rows: Tensor, x: Tensor, class_sum: Tensor, scale: Tensor | None, options: LossOptions
) -> tuple[Tensor, Tensor]:
    """Second stage, once the sums are over all classes: (loss, the rows' full state)."""
    result: tuple[Tensor, Tensor] = _kernels(rows, x).normface_finish(
        rows,
        x,
        class_sum,
        scale,
        options.scale_value,
        *options.margin.parameters(),
        options.reduction,
        options.smoothing,
        options.classes_in_all,
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
    gradients: tuple[Tensor, Tensor, Tensor] = _kernels(x, weight).normface_backward(
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
        options.operand,
        class_weight,
        options.smoothing,
        options.classes_in_all,
        options.partial,
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
        given = _asked(needed, gradients, scale)
        asked = _no_second_derivative("normface_loss", given, grad_loss, x, weight, scale)
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
    x, weight = as_recorded(x, weight)
    result: Tensor = _NormFaceLoss.apply(x, weight, scale, labels, sample_weight, class_weight, options)
    return result


FAKES: dict[str, Any] = {
    "normalize": _normalize_fake,
    "normalize_backward": _normalize_backward_fake,
    "norm_linear": _norm_linear_fake,
    "norm_linear_backward": _norm_linear_backward_fake,
    "normface_sweep": _normface_sweep_fake,
    "normface_shift": _normface_shift_fake,
    "normface_finish": _normface_finish_fake,
    "normface_backward": _normface_backward_fake,
}


def register_fakes(namespace: str, fakes: dict[str, Any] | None = None) -> None:
    """Attach the fake (meta) kernels to the ops of ``namespace``: ``fakes``, all by default."""
    for name, fake in (FAKES if fakes is None else fakes).items():
        torch.library.register_fake(f"{namespace}::{name}")(fake)


def add_fakes(fakes: dict[str, Any]) -> None:
    """For modules with ops of their own: their fake kernels join the table."""
    FAKES.update(fakes)
    register_fakes("normface_ext", fakes)


register_fakes("normface_ext")
