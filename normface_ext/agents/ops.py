"""The ops of the metric losses over agents: fakes, Function, wrapper. No checks, no defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..engine.autograd import asked, detach_without_grad, no_second_derivative
from ..engine.calls import accumulator, add_fakes, by_name, kernels, options_of

# csrc/engine/hinge_state.h
HINGE_FIELDS = 10
INVERSE_NORM, EXCESS_SUM, LOSS_VALUE, HINGE_SLOPE, HINGE_ACTIVE, HINGE_COSINE, HINGE_BEST = range(1, 8)
HINGE_COUNTS = 9


@dataclass(frozen=True)
class HingeOptions:
    """The arguments of ``agent_hinge`` that are neither tensors nor differentiable."""

    margin_value: float  # where the margin is no tensor
    triplet: bool
    hardest: bool
    exponential: bool
    ignore_index: int
    eps: float
    class_chunk: int
    capacity: int  # of the lists of active classes; 0 where no gradient will follow them
    is_shard: bool = False  # one shard of the classes of several


def _target_cosine_fake(*, x: Tensor, **_: Any) -> Tensor:
    return x.new_empty([x.shape[0]], dtype=torch.float64)


def _agent_hinge_fake(
    *, x: Tensor, weight: Tensor, exponential: bool, capacity: int, **_: Any
) -> tuple[Tensor, ...]:
    wide, batch = accumulator(x.dtype), x.shape[0]
    listed = 1 + max(0, capacity)
    return (
        x.new_empty([batch], dtype=wide),
        x.new_empty([batch], dtype=wide),
        x.new_empty([HINGE_FIELDS, batch], dtype=torch.float64),
        x.new_empty([weight.shape[0]], dtype=wide),
        x.new_empty([batch, listed], dtype=torch.int64),
        x.new_empty([batch, listed] if exponential else [0], dtype=wide),
    )


def _gradients_fake(
    *, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, is_shard: bool, **_: Any
) -> tuple[Tensor, Tensor]:
    dtype = accumulator(x.dtype) if is_shard and need_x else x.dtype
    return (
        x.new_empty(x.shape if need_x else [0], dtype=dtype),
        weight.new_empty(weight.shape if need_weight else [0]),
    )


add_fakes(
    by_name(
        {
            "target_cosine": _target_cosine_fake,
            "agent_hinge": _agent_hinge_fake,
            "agent_hinge_backward": _gradients_fake,
            "cosine_pairs_backward": _gradients_fake,
        }
    )
)

_cosine_options = options_of("target_cosine", HingeOptions)
_sweep_options = options_of("agent_hinge", HingeOptions)
_dense_options = options_of("agent_hinge_backward", HingeOptions)
_pairs_options = options_of("cosine_pairs_backward", HingeOptions)


def target_cosine(x: Tensor, weight: Tensor, labels: Tensor, options: HingeOptions) -> Tensor:
    """cos(x_i, w_labels[i]), [N] float64, without a gradient of its own; 0 where the agent is not here."""
    cosine: Tensor = kernels(x, weight).target_cosine(x, weight, labels, *_cosine_options(options))
    return cosine


def sweep(
    x: Tensor, weight: Tensor, labels: Tensor, cosine: Tensor, margin: Tensor | None, options: HingeOptions
) -> list[Tensor]:
    """[target, value, rows, inverse_norm, classes, slopes] of csrc/engine/agent_arguments.h."""
    called = kernels(x, weight)
    return list(called.agent_hinge(x, weight, labels, cosine, margin, *_sweep_options(options)))


def cosine_factors(
    rows: Tensor, slope: Tensor, grad_target: Tensor, grad_value: Tensor, triplet: bool
) -> tuple[Tensor, Tensor]:
    """d loss / d cosine of the label's agent, and of every active class per unit of its slope, [N] each.
    ``slope`` is the sum of the slopes over the active classes, of all shards."""
    kept = rows[HINGE_COUNTS] != 0
    # d = 2 - 2 c, so d(hinge)/dc = 2 slope; in a triplet the label's distance is in every threshold.
    own = grad_target + grad_value * slope if triplet else grad_target
    return torch.where(kept, -2 * own, 0), torch.where(kept, 2 * grad_value, 0)


def sweep_gradients(
    target_factor: Tensor,
    hinge_factor: Tensor,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    state: list[Tensor],
    options: HingeOptions,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Of (x, weight), from the last four results of :func:`sweep`.

    The gradient of the hinges is zero but for what is active. If every row's active classes fitted in
    its list, it follows the lists (which takes reading one number back from the device); otherwise it
    sweeps all classes again. Both are exact.
    """
    rows, inverse_norm, classes, slopes = state
    called, wide = kernels(x, weight), accumulator(x.dtype)
    target_factor, hinge_factor = target_factor.to(wide), hinge_factor.to(wide)
    listed = 1
    if options.capacity > 0 and x.shape[0] > 0:
        listed = 2 if options.hardest else 1 + int(rows[HINGE_ACTIVE].max())
    sparse = options.capacity > 0 and listed <= 1 + options.capacity
    if not sparse:
        if options.hardest:
            raise RuntimeError("agent_hinge: the hardest class has no dense gradient; expected a list")
        factors = target_factor, hinge_factor
        gradients = called.agent_hinge_backward(
            x, weight, labels, *factors, rows, inverse_norm, *needed, *_dense_options(options)
        )
        return asked(needed, gradients)
    classes = classes[:, :listed].contiguous()
    scales = slopes[:, 1:listed] if options.exponential else (classes[:, 1:] < weight.shape[0]).to(wide)
    terms = torch.cat([target_factor[:, None], hinge_factor[:, None] * scales], 1)
    order = classes.flatten().argsort(stable=True) if needed[1] else classes.new_empty(0)
    norms = rows[INVERSE_NORM].to(wide), inverse_norm
    gradients = called.cosine_pairs_backward(
        x, weight, terms, classes, order, *norms, *needed, *_pairs_options(options)
    )
    return asked(needed, gradients)


class _AgentHinge(Function):
    """(target distance, hinges, state) of every row; the state has no gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, margin: Tensor | None, options: HingeOptions
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, agents, labels = x.contiguous(), weight.contiguous(), labels.contiguous()
        cosine = target_cosine(rows, agents, labels, options)
        target, value, *state = sweep(rows, agents, labels, cosine, margin, options)
        ctx.save_for_backward(x, weight, labels, *state)
        ctx.options = options
        ctx.mark_non_differentiable(state[0])
        return target, value, state[0]

    @staticmethod
    def backward(ctx: Any, grad_target: Tensor, grad_value: Tensor, _: Any) -> Any:
        x, weight, labels, *state = ctx.saved_tensors
        options = ctx.options
        with torch.no_grad():
            slope = state[0][HINGE_SLOPE].to(grad_value.dtype)
            factors = cosine_factors(state[0], slope, grad_target, grad_value, options.triplet)
            needed = ctx.needs_input_grad[:2]
            gradients = sweep_gradients(
                *factors, x.contiguous(), weight.contiguous(), labels, state, options, needed
            )
        # Both losses stand on this op; the sentence names the one that is the other's pattern.
        name = "c_triplet_loss" if options.triplet else "c_contrastive_loss"
        origins = grad_target, grad_value, x, weight
        return *no_second_derivative(name, gradients, *origins), None, None, None


def agent_hinge(
    x: Tensor, weight: Tensor, labels: Tensor, margin: Tensor | None, options: HingeOptions
) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = detach_without_grad(x, weight)
    result: tuple[Tensor, Tensor, Tensor] = _AgentHinge.apply(x, weight, labels, margin, options)
    return result
