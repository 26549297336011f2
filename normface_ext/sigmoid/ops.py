"""The sigmoid heads on the engine's sweep: Function, typed wrapper. No checks, no defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..engine import sweep, transforms
from ..engine.autograd import asked, detach_without_grad
from ..engine.calls import accumulator
from ..engine.curvature import twice_by_tiles
from .formula import SigmoidFormula

OP = "sphereface2_loss"


@dataclass(eq=False)
class SigmoidOptions(sweep.SweepOptions):
    """With the term's numbers that have no gradient: csrc/math/terms/sigmoid.h."""

    r: float = 1.0
    power: int = 1
    straight: bool = False


def term_of(offset: Tensor, options: SigmoidOptions) -> sweep.TermInputs:
    """The four numbers; `offset` 0-d float64. The device writes them: nothing is copied from the host."""
    scale, power, straight = (
        torch.full_like(offset, value) for value in (options.r, options.power, float(options.straight))
    )
    return sweep.TermInputs(None, torch.stack([scale, offset, power, straight]))


def slopes_of(rows: Tensor, g_cosine: Tensor, g_others: Tensor) -> Tensor:
    """What the gradients are linear in, [SLOPE_FIELDS, N] float64."""
    none = torch.zeros_like(g_cosine)
    slopes = {"others": g_others, "target": g_cosine}
    stacked = torch.stack([slopes.get(name, none) for name in sweep.SLOPES[: sweep.SLOPE_FIELDS]])
    return torch.where(rows[sweep.ROW_WEIGHT] != 0, stacked, 0.0)


def offset_gradient(rows: Tensor, g_others: Tensor) -> Tensor:
    """The second sum of a row is what the first is multiplied by as the offset moves."""
    return torch.where(rows[sweep.ROW_WEIGHT] != 0, g_others * rows[sweep.SECOND_SUM], 0.0).sum()


def known(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(target cosine, sum of the others, weight) of the rows, [N] float64; 0 where a row does not count."""
    counts = rows[sweep.ROW_WEIGHT] != 0
    return (
        torch.where(counts, rows[sweep.COSINE], 0.0),
        torch.where(counts, rows[sweep.SUM], 0.0),
        rows[sweep.ROW_WEIGHT].clone(),
    )


class _SigmoidRows(Function):
    """(target cosine, sum of the others, weight); the weight without gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        offset: Tensor,
        labels: Tensor,
        sample_weight: Tensor | None,
        options: SigmoidOptions,
    ) -> tuple[Tensor, ...]:
        labels, term = labels.contiguous(), term_of(offset, options)
        need_x, need_weight = ctx.needs_input_grad[:2]
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
            term=term,
        )
        ctx.save_for_backward(x, weight, offset, labels, term.numbers, *swept)
        ctx.options = options
        cosine, others, row_weight = known(swept.rows)
        ctx.mark_non_differentiable(row_weight)
        return cosine, others, row_weight

    @staticmethod
    def backward(ctx: Any, g_cosine: Tensor, g_others: Tensor, _: Tensor) -> Any:
        x, weight, offset, labels, numbers, *saved = ctx.saved_tensors
        swept, needed = sweep.Swept(*saved), ctx.needs_input_grad[:3]
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
                sweep.TermInputs(None, numbers),
            )
            given = asked(needed, (dx, dw, offset_gradient(swept.rows, g_others)))

        def formula() -> SigmoidFormula:
            return SigmoidFormula(OP, labels, swept.rows, ctx.options)

        return *twice_by_tiles(given, formula, (g_cosine, g_others), x, weight, offset), *[None] * 3


def sigmoid_rows(
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    labels: Tensor,
    sample_weight: Tensor | None,
    options: SigmoidOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """(target cosine, sum of softplus over the other classes, weight) of the rows, [N] float64."""
    result: tuple[Tensor, Tensor, Tensor]
    told = offset, labels, sample_weight
    if transforms.watched():
        result = transforms.through(OP, _SigmoidRows, (x, weight, *told), (options,), inputs=3, outputs=2)  # type: ignore[assignment]
    else:
        x, weight = detach_without_grad(x, weight)
        result = _SigmoidRows.apply(x, weight, *told, options)
    return result
