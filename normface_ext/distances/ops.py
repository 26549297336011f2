"""The ops of the distances: fake, Function, wrapper. No checks, no defaults."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..engine import transforms
from ..engine.autograd import asked, detach_without_grad, first_by_kernel, no_second_derivative
from ..engine.calls import add_fakes, by_name, kernels
from ..engine.dtypes import accumulator
from . import formula


def _gradients_fake(a: Tensor, b: Tensor, need_a: bool, need_b: bool) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape if need_a else [0]), b.new_empty(b.shape if need_b else [0])


# inner_distance -------------------------------------------------------------------------------------


def _inner_distance_fake(*, x: Tensor, weight: Tensor, need_near: bool, p: int) -> tuple[Tensor, Tensor]:
    batch, classes = x.shape[0], weight.shape[0]
    words = [batch, (classes + 31) // 32] if need_near and p == 2 else [0]
    return x.new_empty([batch, classes]), x.new_empty(words, dtype=torch.int32)


def _inner_distance_backward_fake(
    *, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, **_: Any
) -> tuple[Tensor, Tensor]:
    return _gradients_fake(x, weight, need_x, need_weight)


class _InnerDistance(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor | None, p: int) -> Tensor:
        need_near = any(ctx.needs_input_grad[:2])
        out: Tensor
        out, near = kernels(x, weight).inner_distance(x.contiguous(), weight.contiguous(), need_near, p)
        ctx.save_for_backward(near, x, weight, None if labels is None else labels.contiguous())
        ctx.p = p
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        near, x, weight, labels = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]

        def kernel(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor | None, ...]:
            gradients = kernels(x, weight).inner_distance_backward(
                grad.contiguous(), near, x.contiguous(), weight.contiguous(), labels, *needed, ctx.p
            )
            return asked(needed, gradients)

        return (
            *first_by_kernel(kernel, formula.inner_distance_again(labels, ctx.p), grad, x, weight),
            None,
            None,
        )


def inner_distance(x: Tensor, weight: Tensor, labels: Tensor | None, p: int) -> Tensor:
    """With ``labels`` the weight's gradient counts the cells (i, labels[i]) only."""
    if transforms.watched():
        return transforms.through("inner_distance", _InnerDistance, (x, weight, labels), (p,), inputs=2)[0]
    x, weight = detach_without_grad(x, weight)
    result: Tensor = _InnerDistance.apply(x, weight, labels, p)
    return result


# pair_distance --------------------------------------------------------------------------------------


def _pair_distance_fake(*, a: Tensor, **_: Any) -> Tensor:
    return a.new_empty([a.shape[0]], dtype=accumulator(a.dtype))


def _pair_distance_backward_fake(
    *, a: Tensor, b: Tensor, need_a: bool, need_b: bool, **_: Any
) -> tuple[Tensor, Tensor]:
    return _gradients_fake(a, b, need_a, need_b)


class _PairDistance(Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, p: int) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.p = p
        out: Tensor = kernels(a, b).pair_distance(a.contiguous(), b.contiguous(), p)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        a, b = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]

        def kernel(grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor | None, ...]:
            gradients = kernels(a, b).pair_distance_backward(
                grad.contiguous(), a.contiguous(), b.contiguous(), *needed, ctx.p
            )
            return asked(needed, gradients)

        return *first_by_kernel(kernel, formula.pair_distance_again(ctx.p), grad, a, b), None


def pair_distance(a: Tensor, b: Tensor, p: int) -> Tensor:
    if transforms.watched():  # plain torch, which every transform follows to any order
        return formula.pair_distance(a, b, p)
    result: Tensor = _PairDistance.apply(a, b, p)
    return result


# Caffe's own gradient -------------------------------------------------------------------------------


class _WithGradient(Function):
    """A value whose gradient with respect to `distances` is given rather than derived."""

    @staticmethod
    def forward(ctx: Any, op: str, distances: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(distances, gradient)
        ctx.op = op
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        distances, gradient = ctx.saved_tensors
        grad = upstream.detach() * gradient
        return None, *no_second_derivative(ctx.op, (grad,), upstream, distances), None, None


def with_gradient(op: str, distances: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    transforms.refuse(op)
    result: Tensor = _WithGradient.apply(op, distances, value, gradient)
    return result


add_fakes(
    by_name(
        {
            "inner_distance": _inner_distance_fake,
            "inner_distance_backward": _inner_distance_backward_fake,
            "pair_distance": _pair_distance_fake,
            "pair_distance_backward": _pair_distance_backward_fake,
        }
    )
)
