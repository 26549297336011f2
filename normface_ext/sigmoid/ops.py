"""The sigmoid heads on the engine's sweep: Function, typed wrapper. No checks, no defaults."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..engine import row_state, sweep, transforms, updates
from ..engine.autograd import asked, detach_without_grad
from ..engine.curvature import twice_by_tiles
from ..engine.dtypes import accumulator
from .formula import SigmoidFormula

OP = "sphereface2_loss"


@dataclass(eq=False)
class SigmoidOptions(row_state.SweepOptions):
    """With the term's numbers that have no gradient: csrc/math/terms/sigmoid.h. `angle`: form A's margin."""

    r: float = 1.0
    power: int = 1
    straight: bool = False
    angle: float | None = None


def term_of(offset: Tensor, options: SigmoidOptions) -> row_state.TermInputs:
    """The numbers; `offset` 0-d float64. The device writes them: nothing is copied from the host."""
    after = [options.power, float(options.straight)]
    if options.angle is not None:
        after += [math.cos(options.angle), math.sin(options.angle)]
    scale, *rest = (torch.full_like(offset, value) for value in (options.r, *after))
    return row_state.TermInputs(None, torch.stack([scale, offset, *rest]))


def slopes_of(rows: Tensor, g_cosine: Tensor, g_others: Tensor) -> Tensor:
    """What the gradients are linear in, [SLOPE_FIELDS, N] float64."""
    none = torch.zeros_like(g_cosine)
    slopes = {"others": g_others, "target": g_cosine}
    stacked = torch.stack([slopes.get(name, none) for name in row_state.SLOPES[: row_state.SLOPE_FIELDS]])
    return torch.where(rows[row_state.ROW_WEIGHT] != 0, stacked, 0.0)


def offset_gradient(rows: Tensor, g_others: Tensor) -> Tensor:
    """The second sum of a row is what the first is multiplied by as the offset moves."""
    return torch.where(rows[row_state.ROW_WEIGHT] != 0, g_others * rows[row_state.SECOND_SUM], 0.0).sum()


def known(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(target cosine, sum of the others, weight) of the rows, [N] float64; 0 where a row does not count."""
    counts = rows[row_state.ROW_WEIGHT] != 0
    return (
        torch.where(counts, rows[row_state.COSINE], 0.0),
        torch.where(counts, rows[row_state.SUM], 0.0),
        rows[row_state.ROW_WEIGHT].clone(),
    )


class _SigmoidRows(Function):
    """(target cosine, sum of the others, weight), and with `need_largest` the rows' state; these without
    gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        offset: Tensor,
        labels: Tensor,
        sample_weight: Tensor | None,
        options: SigmoidOptions,
        need_largest: bool,
    ) -> tuple[Tensor, ...]:
        labels, term = labels.contiguous(), term_of(offset, options)
        need_x, need_weight = ctx.needs_input_grad[:2]
        ctx.taker = updates.of(weight, need_weight)
        swept, options = sweep.head_sweep_in_memory(
            x.contiguous(),
            weight.contiguous(),
            labels,
            None,
            sample_weight,
            None,
            options,
            op=OP,
            need_x=need_x,
            need_weight=need_weight,
            need_largest=need_largest,
            term=term,
        )
        ctx.save_for_backward(x, weight, offset, labels, term.numbers, *swept)
        ctx.options = options
        cosine, others, row_weight = known(swept.rows)
        constant = (row_weight, swept.rows.clone()) if need_largest else (row_weight,)
        ctx.mark_non_differentiable(*constant)
        return cosine, others, *constant

    @staticmethod
    def backward(ctx: Any, g_cosine: Tensor, g_others: Tensor, *rest: Any) -> Any:
        need_weight, taking = updates.begin(ctx, 1)
        x, weight, offset, labels, numbers, *saved = ctx.saved_tensors
        needed = ctx.needs_input_grad[0], need_weight, ctx.needs_input_grad[2]
        swept = row_state.Swept(*saved)
        with torch.no_grad():
            dx, dw, _ = sweep.head_backward(
                x.new_ones((), dtype=accumulator(x.dtype)),
                slopes_of(swept.rows, g_cosine, g_others),
                x.contiguous(),
                weight.contiguous(),
                labels,
                None,
                None,
                swept,
                ctx.options,
                (*needed[:2], False),
                row_state.TermInputs(None, numbers),
                taking,
            )
            given = asked(needed, (dx, dw, offset_gradient(swept.rows, g_others)))

        def formula() -> SigmoidFormula:
            return SigmoidFormula(OP, labels, swept.rows, ctx.options)

        return *twice_by_tiles(given, formula, (g_cosine, g_others), x, weight, offset), *[None] * 4


def sigmoid_rows(
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    labels: Tensor,
    sample_weight: Tensor | None,
    options: SigmoidOptions,
    *,
    need_largest: bool = False,
) -> tuple[Tensor, ...]:
    """(target cosine, sum of softplus over the other classes, weight) of the rows, [N] float64; with
    `need_largest` their state [ROW_FIELDS, N], too."""
    told, rest = (offset, labels, sample_weight), (options, need_largest)
    if transforms.watched():
        return transforms.through(OP, _SigmoidRows, (x, weight, *told), rest, inputs=3, outputs=2)
    x, weight = detach_without_grad(x, weight)
    result: tuple[Tensor, ...] = updates.apply(_SigmoidRows, x, weight, *told, *rest)
    return result
