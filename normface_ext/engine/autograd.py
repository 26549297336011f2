"""What the autograd Functions of all families share: first and second derivatives, and what is saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import graphs


class _Once(Function):
    """The first ``count`` of the tensors, as a function of all that raises when it is differentiated."""

    @staticmethod
    def forward(ctx: Any, message: str, count: int, *tensors: Tensor | None) -> Any:
        ctx.message = message
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        raise RuntimeError(ctx.message)


def _raising(
    message: str, gradients: tuple[Tensor | None, ...], origins: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients that raise a sentence when somebody differentiates them again, by one of the ``origins`` or
    by anything: autograd goes only where what is asked for can be reached."""
    if not torch.is_grad_enabled():
        return gradients
    present = [g.detach().requires_grad_() for g in gradients if g is not None]
    raising = iter(_Once.apply(message, len(present), *present, *origins))
    return tuple(None if g is None else next(raising) for g in gradients)


def no_second_derivative(
    op: str, gradients: tuple[Tensor | None, ...], *origins: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The first gradients of an op that has no others."""
    message = f"{op}: second derivatives are not available; differentiate normface_ext.reference.{op} instead"
    return _raising(message, gradients, origins)


def no_third_derivative(
    op: str, gradients: tuple[Tensor | None, ...], *origins: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The second gradients of an op that has no others."""
    message = f"{op}: third derivatives are not available; differentiate normface_ext.reference.{op} instead"
    return _raising(message, gradients, origins)


Given = tuple[Tensor | None, ...]
#: (inputs, upstream of the results, which inputs need a gradient) -> the gradients of the inputs.
Again = Callable[[Given, Given, tuple[bool, ...]], Given]


class _First(Function):
    """``kernel(*inputs)``, which are first gradients, with the gradients that ``again`` gives: so that the
    first ones are the kernel's whether or not they will be differentiated."""

    @staticmethod
    def forward(ctx: Any, kernel: Any, again: Again, *inputs: Tensor | None) -> Any:
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        ctx.again = again
        return kernel(*inputs)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        return None, None, *ctx.again(ctx.saved_tensors, upstream, ctx.needs_input_grad[2:])


def first_by_kernel(kernel: Any, again: Again, *inputs: Tensor | None) -> Given:
    """First gradients by ``kernel``; those of them, where a graph is made, by ``again``."""
    gradients: Given
    gradients = _First.apply(kernel, again, *inputs) if torch.is_grad_enabled() else kernel(*inputs)
    return gradients


def by_formula(formula: Any) -> Again:
    """The derivatives, of any order, of ``formula(*inputs)``, which are first gradients in plain torch."""

    def again(saved: Given, upstream: Given, needed: tuple[bool, ...]) -> Given:
        graphed = torch.is_grad_enabled()
        with torch.enable_grad():
            # Each input under a name of its own, since one may have been computed from another.
            inputs = [t if t is None else t.view_as(t) for t in saved]
            results = formula(*inputs)
            pairs = [
                (r, g) for r, g in zip(results, upstream, strict=True) if g is not None and r.requires_grad
            ]
            if not pairs:  # linear in what is asked for
                return tuple(None if t is None else torch.zeros_like(t) for t in inputs)
            wanted = [t for t, need in zip(inputs, needed, strict=True) if need and t is not None]
            found = iter(
                torch.autograd.grad(
                    [r for r, _ in pairs],
                    wanted,
                    [g for _, g in pairs],
                    create_graph=graphed,
                    allow_unused=True,
                )
            )
        return tuple(next(found) if need else None for need in needed)

    return again


def detach_without_grad(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors; detached where autograd does not record. A Function is told there, too, that parameters
    need a gradient, and would keep for a backward that cannot come what only that needs. torch.jit.trace
    compares the graphs that it gets with and without."""
    if torch.is_grad_enabled() or graphs.tracing():
        return tensors
    return tuple(t.detach() for t in tensors)


def asked(needed: tuple[bool, ...], gradients: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """The gradients that were asked for."""
    return tuple(g if need else None for need, g in zip(needed, gradients, strict=True))


def store_as(gradient: Tensor, dtype: torch.dtype, inverse_norm: Tensor, eps: float) -> Tensor:
    """To the features' dtype. In float16 the rows whose norm is mostly eps, zero rows above all, are held at
    the largest half (math::ruled_by_eps); an overflow elsewhere stays one, for a GradScaler to see."""
    if dtype == torch.float16:
        largest = torch.finfo(dtype).max
        ruled = inverse_norm.pow(-2) <= 2 * eps
        gradient = torch.where(ruled[:, None], gradient.clamp(-largest, largest), gradient)
    return gradient.to(dtype)
