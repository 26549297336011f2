"""What a margin makes of rows with two labels, which stand there twice (``engine.mixing``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..engine.mixing import BothLabels, joined
from ..engine.reduce import weighted
from .batch_margins import BatchMargin, Psi, margin_of, regularizer_of, weighed
from .hard_negatives import HardNegatives
from .margins import Margin, of_rows
from .options import HeadOptions
from .rows import rows_of_both, with_cosines
from .state import tensor_fields, with_tensors

if TYPE_CHECKING:
    from .arguments import HeadInputs

#: What a margin has said of the rows.
OfMargin = Margin | HardNegatives | Psi | None


def mixed_loss(
    op: str,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    given: HeadInputs,
    both: BothLabels,
    options: HeadOptions,
    loss_of: Callable[[OfMargin], Tensor],
) -> Tensor:
    """The loss of rows x [N, D]: ``loss_of`` what the margin is for each of their labels, [2N], and what the
    rows add to it. `labels` are the first ones as their caller has them."""
    margin = options.margin
    if not isinstance(margin, BatchMargin):
        return loss_of(None if margin is None else of_doubled(op, margin, both, given.classes))
    rows = rows_of_both(op, x, both, labels, options, margin)
    if margin.hard_negatives and margin.uses_cosines:
        rows = with_cosines(rows, torch.cat([x, x]), weight, given.places, options)
    loss = loss_of(margin_of(op, margin, rows))
    more = regularizer_of(op, margin, rows)
    if more is None:
        return loss
    weights = torch.where(both.counts, both.weight.double(), 0)
    added = weighted(weighed(more, weights), weights.sum(), options.reduction)
    return loss + joined(added, options.reduction).to(loss.dtype)


def of_doubled(op: str, margin: Margin, both: BothLabels, classes: int) -> Margin:
    """A margin for rows that stand there twice: numbers of each row are those of both its labels."""
    if not margin.per_row:
        return margin
    one = both.labels[: both.labels.shape[0] // 2]
    doubled = {}
    for name in tensor_fields(margin):
        value = of_rows(op, name, getattr(margin, name), True, one, classes)
        doubled[name] = value.repeat(2) if value.dim() == 1 else value
    return with_tensors(margin, doubled)
