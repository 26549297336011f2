"""The ops of the distances and the metric losses, in the manner of ``ops``: fake, Function, wrapper."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import ops

# csrc/hinge_state.h
HINGE_FIELDS = 9
INVERSE_NORM, HINGE_SUM, HINGE_SLOPE, HINGE_ACTIVE, HINGE_COSINE = 1, 2, 4, 5, 6


def _pair_of_gradients_fake(a: Tensor, b: Tensor, need_a: bool, need_b: bool) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape if need_a else [0]), b.new_empty(b.shape if need_b else [0])


def _asked(needed: tuple[bool, ...], gradients: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    return tuple(g if need else None for need, g in zip(needed, gradients, strict=True))


# inner_distance -------------------------------------------------------------------------------------


def _inner_distance_fake(x: Tensor, weight: Tensor, p: int) -> Tensor:
    return x.new_empty([x.shape[0], weight.shape[0]])


def _inner_distance_backward_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    labels: Tensor | None,
    p: int,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    return _pair_of_gradients_fake(x, weight, need_x, need_weight)


class _InnerDistance(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor | None, p: int) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        ctx.save_for_backward(x, weight, None if labels is None else labels.contiguous())
        ctx.p = p
        out: Tensor = ops._kernels(x, weight).inner_distance(x, weight, p)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, labels = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]
        with torch.no_grad():
            gradients = ops._kernels(x, weight).inner_distance_backward(
                grad.contiguous(), x, weight, labels, ctx.p, *needed
            )
        return *ops._no_second_derivative("inner_distance", _asked(needed, gradients)), None, None


def inner_distance(x: Tensor, weight: Tensor, labels: Tensor | None, p: int) -> Tensor:
    """With ``labels`` the weight's gradient counts the cells (i, labels[i]) only."""
    result: Tensor = _InnerDistance.apply(x, weight, labels, p)
    return result


# pair_distance --------------------------------------------------------------------------------------


def _pair_distance_fake(a: Tensor, b: Tensor, p: int) -> Tensor:
    return a.new_empty([a.shape[0]], dtype=ops._accumulator(a.dtype))


def _pair_distance_backward_fake(
    grad: Tensor, a: Tensor, b: Tensor, p: int, need_a: bool, need_b: bool
) -> tuple[Tensor, Tensor]:
    return _pair_of_gradients_fake(a, b, need_a, need_b)


class _PairDistance(Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, p: int) -> Tensor:
        a, b = a.contiguous(), b.contiguous()
        ctx.save_for_backward(a, b)
        ctx.p = p
        out: Tensor = ops._kernels(a, b).pair_distance(a, b, p)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        a, b = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]
        with torch.no_grad():
            gradients = ops._kernels(a, b).pair_distance_backward(grad.contiguous(), a, b, ctx.p, *needed)
        return *ops._no_second_derivative("pair_distance", _asked(needed, gradients)), None


def pair_distance(a: Tensor, b: Tensor, p: int) -> Tensor:
    result: Tensor = _PairDistance.apply(a, b, p)
    return result


# agent_hinge ----------------------------------------------------------------------------------------


def _agent_hinge_fake(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    margin: Tensor | None,
    margin_value: float,
    triplet: bool,
    hardest: bool,
    exponential: bool,
    ignore_index: int,
    eps: float,
    class_chunk: int,
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide, batch = ops._accumulator(x.dtype), x.shape[0]
    listed = 1 + max(0, capacity)
    return (
        x.new_empty([batch], dtype=wide),
        x.new_empty([batch], dtype=wide),
        x.new_empty([HINGE_FIELDS, batch], dtype=torch.float64),
        x.new_empty([weight.shape[0]], dtype=wide),
        x.new_empty([batch, listed], dtype=torch.int64),
        x.new_empty([batch, listed] if exponential else [0], dtype=wide),
    )


def _agent_hinge_backward_fake(
    target_factor: Tensor,
    hinge_factor: Tensor,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    rows: Tensor,
    inverse_norm: Tensor,
    exponential: bool,
    eps: float,
    class_chunk: int,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    return _pair_of_gradients_fake(x, weight, need_x, need_weight)


def _cosine_pairs_backward_fake(
    factors: Tensor,
    classes: Tensor,
    order: Tensor,
    x: Tensor,
    weight: Tensor,
    x_inverse: Tensor,
    weight_inverse: Tensor,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    return _pair_of_gradients_fake(x, weight, need_x, need_weight)


class _AgentHinge(Function):
    """(target distance, hinges, state) of every row; the state has no gradient.

    The gradient of the hinges is zero but for what is active. If every row's active classes fitted in
    its list, backward follows the lists (which takes reading one number back from the device);
    otherwise it sweeps all classes again. Both are exact.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        margin: Tensor | None,
        margin_value: float,
        triplet: bool,
        hardest: bool,
        exponential: bool,
        ignore_index: int,
        eps: float,
        class_chunk: int,
        capacity: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, labels = x.contiguous(), weight.contiguous(), labels.contiguous()
        if not any(ctx.needs_input_grad[:2]):
            capacity = 0
        target, value, *state = ops._kernels(x, weight).agent_hinge(
            x, weight, labels, margin, margin_value, triplet, hardest, exponential, ignore_index, eps,
            class_chunk, capacity,
        )
        ctx.save_for_backward(x, weight, labels, *state)
        ctx.arguments = triplet, hardest, exponential, eps, class_chunk, capacity
        ctx.mark_non_differentiable(state[0])
        return target, value, state[0]

    @staticmethod
    def backward(ctx: Any, grad_target: Tensor, grad_value: Tensor, _: Any) -> Any:
        with torch.no_grad():
            gradients = _agent_hinge_backward(ctx, grad_target, grad_value)
        # Both losses stand on this op; the sentence names the one that is the other's pattern.
        name = "c_triplet_loss" if ctx.arguments[0] else "c_contrastive_loss"
        dx, dw = ops._no_second_derivative(name, gradients)
        return dx, dw, *[None] * 10


def _agent_hinge_backward(ctx: Any, grad_target: Tensor, grad_value: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, labels, rows, inverse_norm, classes, slopes = ctx.saved_tensors
    triplet, hardest, exponential, eps, class_chunk, capacity = ctx.arguments
    needed = ctx.needs_input_grad[:2]
    kernels, wide = ops._kernels(x, weight), ops._accumulator(x.dtype)
    kept = rows[INVERSE_NORM] != 0
    slope = rows[HINGE_SLOPE].to(wide)
    # d = 2 - 2 c, so d(hinge)/dc = 2 slope; in a triplet the label's distance is in every threshold.
    hinge_factor = torch.where(kept, 2 * grad_value, 0).to(wide)
    own = grad_target + grad_value * slope if triplet else grad_target
    target_factor = torch.where(kept, -2 * own, 0).to(wide)
    listed = 1
    if capacity > 0 and x.shape[0] > 0:
        listed = 2 if hardest else 1 + int(rows[HINGE_ACTIVE].max())
    sparse = capacity > 0 and listed <= 1 + capacity
    if not sparse:
        if hardest:
            raise RuntimeError("agent_hinge: the hardest class has no dense gradient; expected a list")
        gradients = kernels.agent_hinge_backward(
            target_factor, hinge_factor, x, weight, labels, rows, inverse_norm, exponential, eps,
            class_chunk, *needed,
        )
        return _asked(needed, gradients)
    classes = classes[:, :listed].contiguous()
    scales = slopes[:, 1:listed] if exponential else (classes[:, 1:] < weight.shape[0]).to(wide)
    factors = torch.cat([target_factor[:, None], hinge_factor[:, None] * scales], 1)
    order = classes.flatten().argsort(stable=True) if needed[1] else classes.new_empty(0)
    gradients = kernels.cosine_pairs_backward(
        factors, classes, order, x, weight, rows[INVERSE_NORM].to(wide), inverse_norm, *needed
    )
    return _asked(needed, gradients)


def agent_hinge(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    margin: Tensor | None,
    margin_value: float,
    triplet: bool,
    hardest: bool,
    exponential: bool,
    ignore_index: int,
    eps: float,
    class_chunk: int,
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor]:
    result: tuple[Tensor, Tensor, Tensor] = _AgentHinge.apply(
        x, weight, labels, margin, margin_value, triplet, hardest, exponential, ignore_index, eps,
        class_chunk, capacity,
    )
    return result


# Caffe's own gradient -------------------------------------------------------------------------------


class _WithGradient(Function):
    """A value whose gradient with respect to `distances` is given rather than derived."""

    @staticmethod
    def forward(ctx: Any, distances: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return upstream * gradient, None, None


def with_gradient(distances: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    result: Tensor = _WithGradient.apply(distances, value, gradient)
    return result


ops.add_fakes(
    {
        "inner_distance": _inner_distance_fake,
        "inner_distance_backward": _inner_distance_backward_fake,
        "pair_distance": _pair_distance_fake,
        "pair_distance_backward": _pair_distance_backward_fake,
        "agent_hinge": _agent_hinge_fake,
        "agent_hinge_backward": _agent_hinge_backward_fake,
        "cosine_pairs_backward": _cosine_pairs_backward_fake,
    }
)
