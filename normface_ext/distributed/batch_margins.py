"""Margins that look at the batch, in a class-parallel head: every rank is told of its own rows."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup

from ..engine.reduce import weighted
from ..softmax.batch_margins import BatchMargin, Rows, margin_of, regularizer_of, rows_weight, weighed
from ..softmax.margins import Margin
from .collectives import add_over_shards


class _SumOverRanks(Function):
    """The sum over the ranks of a group, or this rank's values as they are. As the features' gradient, theirs
    is multiplied by the ranks that average it."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: ProcessGroup | None, replicas: int) -> Tensor:
        ctx.replicas = replicas
        return values.clone() if group is None else add_over_shards([values], group)[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient * ctx.replicas, None, None


def margin_of_rows(op: str, margin: BatchMargin, rows: Rows) -> Margin:
    """Of this rank's rows; every rank calls it."""
    found = margin_of(op, margin, rows)
    if not isinstance(found, Margin):
        raise ValueError(
            f"{op}: expected a `margin` that the kernels apply, got {margin!r}, a function of the target"
            " cosines, which no rank of a class-parallel head has before the loss"
        )
    return found


def with_regularizer(
    op: str,
    loss: Tensor,
    margin: BatchMargin,
    rows: Rows,
    sample_weight: Tensor | None,
    reduction: str,
    replicas: int,
    group: ProcessGroup,
) -> Tensor:
    """The loss, and what the rows of all ranks add to it; for "none" this rank's."""
    more = regularizer_of(op, margin, rows)
    if more is None:
        return loss
    weights = rows_weight(rows, sample_weight)
    (total,) = add_over_shards([weights.sum()], group)
    mine = weighted(weighed(more, weights), total, reduction)
    summed: Tensor = _SumOverRanks.apply(mine, None if reduction == "none" else group, replicas)
    return loss + summed.to(loss.dtype)
