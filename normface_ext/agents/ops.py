"""The losses over agents on the engine's sweep: fakes, Function, wrapper. No checks, no defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..engine.autograd import asked, detach_without_grad, no_second_derivative
from ..engine.calls import accumulator, add_fakes, by_name
from ..engine.sweep import (
    ROW_WEIGHT,
    SECOND_SUM,
    SUM,
    TERMS,
    SweepOptions,
    Swept,
    TermInputs,
    head_backward,
    head_sweep_collecting,
    target_cosine,
)


@dataclass(eq=False)
class AgentSweepOptions(SweepOptions):
    """With what the losses over agents make of a row."""

    margin_value: float = 0.0  # where the margin is no tensor
    triplet: bool = False

    @property
    def exponential(self) -> bool:
        return self.term == TERMS["exponential_hinge"]


def _pairs_fake(
    *, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, is_shard: bool, **_: Any
) -> tuple[Tensor, Tensor]:
    dtype = accumulator(x.dtype) if is_shard and need_x else x.dtype
    return (
        x.new_empty(x.shape if need_x else [0], dtype=dtype),
        weight.new_empty(weight.shape if need_weight else [0]),
    )


add_fakes(by_name({"cosine_pairs_backward": _pairs_fake}))


def hinge_slope(rows: Tensor, options: AgentSweepOptions) -> Tensor:
    """The sum of the slopes of a row's hinges, [N] float64."""
    return rows[SUM] if options.exponential else rows[SECOND_SUM]


def slopes_of(rows: Tensor, slope: Tensor, grad_target: Tensor, grad_value: Tensor, triplet: bool) -> Tensor:
    """What ``head_backward`` is linear in, [SLOPE_FIELDS, N] float64."""
    # d = 2 - 2 c, so d(hinge)/dc = 2 slope; in a triplet the label's distance is in every threshold.
    own = grad_target + grad_value * slope if triplet else grad_target
    zero = torch.zeros_like(rows[0])
    return torch.stack([2.0 * grad_value.double(), -2.0 * own.double(), zero, zero]).where(
        rows[ROW_WEIGHT] != 0, 0.0
    )


class _AgentHinge(Function):
    """(target distance, hinges, state) of every row; the state has no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        margin: Tensor | None,
        options: AgentSweepOptions,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, agents, labels = x.contiguous(), weight.contiguous(), labels.contiguous()
        wide = accumulator(x.dtype)
        distance = 2.0 - 2.0 * target_cosine(rows, agents, labels, options)
        threshold = distance * options.triplet + (options.margin_value if margin is None else margin)
        term = TermInputs(threshold, None)
        store = options.keep and any(ctx.needs_input_grad[:2])
        swept, _, _ = head_sweep_collecting(
            rows, agents, labels, None, options, sink="none", capacity=0, store=store, term=term
        )
        ctx.save_for_backward(x, weight, labels, threshold, *swept)
        ctx.options = options
        state = swept.rows
        ctx.mark_non_differentiable(state)
        return torch.where(state[ROW_WEIGHT] != 0, distance, 0.0).to(wide), state[SUM].to(wide), state

    @staticmethod
    def backward(ctx: Any, grad_target: Tensor, grad_value: Tensor, _: Any) -> Any:
        x, weight, labels, threshold, *swept = ctx.saved_tensors
        options, needed = ctx.options, (*ctx.needs_input_grad[:2], False)
        rows = swept[0]
        with torch.no_grad():
            slope = hinge_slope(rows, options).to(grad_value.dtype)
            gradients = head_backward(
                grad_value.new_ones(()),
                slopes_of(rows, slope, grad_target, grad_value, options.triplet),
                x.contiguous(),
                weight.contiguous(),
                labels,
                None,
                None,
                Swept(*swept),
                options,
                needed,
                TermInputs(threshold, None),
            )
        # Both losses stand on this op; the sentence names the one that is the other's pattern.
        name = "c_triplet_loss" if options.triplet else "c_contrastive_loss"
        origins = grad_target, grad_value, x, weight
        given = asked(needed, gradients)[:2]
        return *no_second_derivative(name, given, *origins), None, None, None


def agent_hinge(
    x: Tensor, weight: Tensor, labels: Tensor, margin: Tensor | None, options: AgentSweepOptions
) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = detach_without_grad(x, weight)
    result: tuple[Tensor, Tensor, Tensor] = _AgentHinge.apply(x, weight, labels, margin, options)
    return result
