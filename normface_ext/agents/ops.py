"""The losses over agents on the engine's sweep: fakes, Function, wrapper. No checks, no defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..engine import transforms, updates
from ..engine.autograd import asked, detach_without_grad
from ..engine.calls import add_fakes, by_name, kernels, options_of
from ..engine.curvature import twice_by_tiles
from ..engine.dtypes import accumulator
from ..engine.row_state import SECOND_SUM, SLOPE_FIELDS, SLOPES, SUM, TERMS, SweepOptions, Swept, TermInputs
from ..engine.sweep import Collected, head_backward, head_sweep_collecting, in_memory
from .formula import HingeFormula

OTHERS = SLOPES.index("others")


@dataclass(eq=False)
class AgentSweepOptions(SweepOptions):
    """With what the losses over agents make of a row."""

    margin_value: float = 0.0  # where the margin is no tensor
    triplet: bool = False
    hardest: bool = False  # only each row's hardest class
    capacity: int = 0  # of the lists of active classes; 0 where no gradient will follow them
    most_listed: int = 0  # up to so many active classes of all rows a list is the quicker way

    @property
    def op(self) -> str:
        """The loss that stands on this, for sentences: the one that is the others' pattern."""
        return "c_triplet_loss" if self.triplet else "c_contrastive_loss"


def _threshold_fake(*, x: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    batch = x.shape[0]
    return (
        x.new_empty([batch], dtype=accumulator(x.dtype)),
        x.new_empty([batch], dtype=torch.float64),
    )


def _slopes_fake(*, rows: Tensor, **_: Any) -> Tensor:
    return rows.new_empty([SLOPE_FIELDS, rows.shape[1]])


def _list_fake(*, rows: Tensor, found: Tensor, width: int, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch = rows.shape[1]
    return (
        found.new_empty([batch, 1 + width]),
        found.new_empty([batch, 1 + width], dtype=torch.int64),
        found.new_empty([batch]),
    )


def _pairs_fake(
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
            "hinge_threshold": _threshold_fake,
            "hinge_slopes": _slopes_fake,
            "hinge_pairs": _list_fake,
            "cosine_pairs_backward": _pairs_fake,
        }
    )
)

_threshold_options = options_of("hinge_threshold", AgentSweepOptions)
_slopes_options = options_of("hinge_slopes", AgentSweepOptions)
_list_options = options_of("hinge_pairs", AgentSweepOptions)
_pairs_options = options_of("cosine_pairs_backward", AgentSweepOptions)


def hinge_threshold(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    cosine: Tensor | None,
    margin: Tensor | None,
    options: AgentSweepOptions,
) -> tuple[Tensor, Tensor]:
    """(distance to the label's agent, the hinges' threshold), [N] each, the latter float64. `cosine` is what
    ``target_cosine`` of all shards add up to; None: the agents are all here."""
    result: tuple[Tensor, Tensor] = kernels(x, weight).hinge_threshold(
        x, weight, labels, cosine, margin, *_threshold_options(options)
    )
    return result


def hinge_slopes(
    rows: Tensor, grad_distance: Tensor, grad_hinges: Tensor, options: AgentSweepOptions
) -> Tensor:
    """What the gradients are linear in, [SLOPE_FIELDS, N] float64; `rows` has sums over all classes."""
    slopes: Tensor = kernels(rows, grad_hinges).hinge_slopes(
        rows, grad_distance.contiguous(), grad_hinges.contiguous(), *_slopes_options(options)
    )
    return slopes


def hinge_slope(rows: Tensor, options: SweepOptions) -> Tensor:
    """The sum of the slopes of a row's hinges, [N] float64."""
    return rows[SUM] if options.term == TERMS["exponential_hinge"] else rows[SECOND_SUM]


def sweep_hinges(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    threshold: Tensor,
    options: AgentSweepOptions,
    *,
    need_gradient: bool,
    need_class_sum: bool = False,
    need_largest: bool = False,
) -> tuple[Swept, Collected, AgentSweepOptions]:
    """The hinges of all rows, and what their backward has to be given: the options too."""
    sink = "hardest" if options.hardest else "active" if options.capacity > 0 else "none"
    capacity = 1 if options.hardest else options.capacity
    keep = need_gradient and not options.hardest

    def sweep(given: AgentSweepOptions) -> tuple[Swept, Collected]:
        return head_sweep_collecting(
            x,
            weight,
            labels,
            given,
            TermInputs(threshold, None),
            sink=sink,
            capacity=capacity,
            store=keep and given.keep,
            need_class_sum=need_class_sum,
            need_largest=need_largest,
        )

    (swept, collected), options = in_memory(options.op, x, weight, options, sweep, store=keep)
    return swept, collected, options


def listed_width(active: Tensor, options: AgentSweepOptions) -> int | None:
    """The longest row of the lists where the gradient should follow them, None where it should not. From the
    numbers [N] of active classes, which are read: on CUDA the host waits for the sweep."""
    if options.hardest:
        return 1
    if options.capacity == 0 or len(active) == 0:
        return None
    longest, total = torch.stack([active.max(), active.sum()]).tolist()
    return int(longest) if longest <= options.capacity and total <= options.most_listed else None


def hinge_gradients(
    slopes: Tensor,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    threshold: Tensor,
    swept: Swept,
    collected: Collected,
    options: AgentSweepOptions,
    needed: tuple[bool, ...],
    taking: updates.Taking | None = None,
) -> tuple[Tensor, Tensor]:
    """Of x and weight; what is ``taking`` that of the weight gets it row by row. ``swept.rows`` are of the
    classes at hand.

    The gradient of the hinges is zero but for what is active: where that is little, and each row's was
    listed, it follows the lists; else it goes over all classes, as where it is taken. Both are exact.
    """
    rows = swept.rows
    width = None if taking is not None else listed_width(rows[SECOND_SUM], options)
    if width is None:
        one = slopes.new_ones((), dtype=accumulator(x.dtype))
        term = TermInputs(threshold, None)
        arguments = one, slopes, x, weight, labels, None, None, swept, options, (*needed, False)
        return head_backward(*arguments, term, taking)[:2]
    called = kernels(x, weight)
    pairs = called.hinge_pairs(
        rows, slopes, labels, *collected, width, weight.shape[0], *_list_options(options)
    )
    gradients: tuple[Tensor, Tensor] = called.cosine_pairs_backward(
        x, weight, *pairs, swept.inverse_norm, *needed, *_pairs_options(options)
    )
    return gradients


class _AgentHinge(Function):
    """(target distance, hinges, rows), and the class_sum if asked for; only the first two have a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        margin: Tensor | None,
        options: AgentSweepOptions,
        need_class_sum: bool,
        need_largest: bool,
    ) -> tuple[Tensor, ...]:
        features, agents, labels = x.contiguous(), weight.contiguous(), labels.contiguous()
        need_gradient = any(ctx.needs_input_grad[:2])
        distance, threshold = hinge_threshold(features, agents, labels, None, margin, options)
        swept, collected, options = sweep_hinges(
            features,
            agents,
            labels,
            threshold,
            options,
            need_gradient=need_gradient,
            need_class_sum=need_class_sum,
            need_largest=need_largest,
        )
        constant = (swept.rows, swept.class_sum) if need_class_sum else (swept.rows,)
        if need_gradient:
            ctx.save_for_backward(x, weight, labels, threshold, *collected, *swept)
            ctx.options = options
            # The gradient of the hardest follows its list.
            ctx.taker = None if options.hardest else updates.of(weight, ctx.needs_input_grad[1])
            ctx.mark_non_differentiable(*constant)
        # A copy in float64 too: a view of the rows would be one result inside another.
        return distance, swept.rows[SUM].to(distance.dtype, copy=True), *constant

    @staticmethod
    def backward(ctx: Any, grad_distance: Tensor, grad_hinges: Tensor, *_: Any) -> Any:
        need_weight, taking = updates.begin(ctx, 1)
        x, weight, labels, threshold, *saved = ctx.saved_tensors
        collected, swept = Collected(*saved[:2]), Swept(*saved[2:])
        options, needed = ctx.options, (ctx.needs_input_grad[0], need_weight)
        with torch.no_grad():
            slopes = hinge_slopes(swept.rows, grad_distance, grad_hinges, options)
            gradients = hinge_gradients(
                slopes,
                x.contiguous(),
                weight.contiguous(),
                labels,
                threshold,
                swept,
                collected,
                options,
                needed,
                taking,
            )
        given = asked(needed, gradients)

        def formula() -> HingeFormula:
            hardest = collected.classes[:, 0] if options.hardest else None
            return HingeFormula(labels, threshold, hardest, swept.rows, options)

        return *twice_by_tiles(given, formula, (grad_distance, grad_hinges), x, weight), *[None] * 5


def agent_hinge(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    margin: Tensor | None,
    options: AgentSweepOptions,
    *,
    need_class_sum: bool = False,
    need_largest: bool = False,
) -> tuple[Tensor, ...]:
    """(distance to the label's agent [N], sum of the hinges [N], rows [ROW_FIELDS, N]), and with
    `need_class_sum` that."""
    rest = options, need_class_sum, need_largest
    if transforms.watched():
        tensors = x, weight, labels, margin
        return transforms.through(options.op, _AgentHinge, tensors, rest, inputs=2, outputs=2)
    x, weight = detach_without_grad(x, weight)
    result: tuple[Tensor, ...] = updates.apply(_AgentHinge, x, weight, labels, margin, *rest)
    return result
