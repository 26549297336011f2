"""The ops of normalize and norm_linear: fakes, autograd Functions, wrappers. No checks, no defaults."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .. import reference
from ..engine import transforms
from ..engine.autograd import asked, by_formula, first_by_kernel
from ..engine.calls import add_fakes, by_name, kernels
from ..engine.dtypes import accumulator


def as_rows(x: Tensor, dim: int) -> Tensor:
    """x itself where the kernels can read it as it lies (contiguous, or ``dim`` innermost and the other
    axes in order: channels_last), else a contiguous copy."""
    if x.is_contiguous() or x.movedim(dim, -1).is_contiguous():
        return x
    return x.contiguous()


# normalize ------------------------------------------------------------------------------------------


def _normalize_fake(*, x: Tensor, dim: int, **_: Any) -> tuple[Tensor, Tensor]:
    shape = [1 if axis == dim else size for axis, size in enumerate(x.shape)]
    return torch.empty_like(x), x.new_empty(shape, dtype=accumulator(x.dtype))


def _normalize_backward_fake(*, x: Tensor, **_: Any) -> Tensor:
    return torch.empty_like(x)


class _Normalize(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, p: int, eps: float) -> tuple[Tensor, Tensor]:
        y, norm = kernels(x).normalize(x, dim, p, eps)
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
                # As the gradient makes it, which may be a batch of them (is_grads_batched).
                grad_y = grad_y.new_empty_strided(x.shape, x.stride()).copy_(grad_y)
            if grad_norm is not None:
                grad_norm = grad_norm.contiguous()
            return (kernels(x).normalize_backward(grad_y, grad_norm, x, norm.detach(), *arguments),)

        def formula(grad_y: Tensor | None, grad_norm: Tensor | None, x: Tensor) -> tuple[Tensor]:
            return (reference.normalize_backward(grad_y, grad_norm, x, *arguments),)

        (dx,) = first_by_kernel(kernel, by_formula(formula), grad_y, grad_norm, x)
        return dx, None, None, None


def normalize(x: Tensor, dim: int, p: int, eps: float) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor]
    if transforms.watched():  # the formula is plain torch, which every transform follows to any order
        result = reference.normalize(x, dim, p, eps, return_norm=True)  # type: ignore[assignment]
    else:
        result = _Normalize.apply(x, dim, p, eps)
    return result


# norm_linear ----------------------------------------------------------------------------------------


def _norm_linear_fake(*, x: Tensor, weight: Tensor, **_: Any) -> Tensor:
    return x.new_empty([x.shape[0], weight.shape[0]])


def _norm_linear_backward_fake(
    *, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, need_scale: bool, **_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if need_x else [0]),
        weight.new_empty(weight.shape if need_weight else [0]),
        x.new_empty([] if need_scale else [0], dtype=torch.float64),
    )


def _asked_of_head(
    needed: tuple[bool, ...], gradients: tuple[Tensor, ...], scale: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients of (x, weight, scale) that were asked for, that of the scale in the scale's dtype."""
    dx, dw, ds = gradients
    if needed[2] and scale is not None:
        ds = ds.to(scale.dtype)
    return asked(needed, (dx, dw, ds))


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
        out: Tensor = kernels(x, weight).norm_linear(
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
            gradients = kernels(x, weight).norm_linear_backward(
                grad.contiguous(),
                x.contiguous(),
                weight.contiguous(),
                scale,
                *needed,
                *ctx.arguments,
            )
            return _asked_of_head(needed, gradients, scale)

        def formula(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None) -> tuple[Tensor, ...]:
            s = torch.tensor(scale_value, dtype=accumulator(x.dtype)) if scale is None else scale
            return reference.norm_linear_backward(grad, x, weight, s, eps, normalize_input)

        return *first_by_kernel(kernel, by_formula(formula), grad, *ctx.saved_tensors), None, None, None


def norm_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    scale_value: float,
    normalize_input: bool,
    eps: float,
) -> Tensor:
    if transforms.watched():
        s = scale_value if scale is None else scale
        return reference.norm_linear(x, weight, s, normalize_input=normalize_input, eps=eps)
    result: Tensor = _NormLinear.apply(x, weight, scale, scale_value, normalize_input, eps)
    return result


add_fakes(
    by_name(
        {
            "normalize": _normalize_fake,
            "normalize_backward": _normalize_backward_fake,
            "norm_linear": _norm_linear_fake,
            "norm_linear_backward": _norm_linear_backward_fake,
        }
    )
)
