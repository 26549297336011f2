"""What a margin that looks at the batch is told of its rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..cosine.functions import normalize
from ..engine import checks, sweep
from .batch_margins import BatchMargin, Rows
from .options import HeadOptions


def rows_of(
    op: str,
    x: Tensor,
    labels: Tensor,
    given: Tensor,
    row_weight: Tensor | None,
    options: HeadOptions,
    margin: BatchMargin,
    group: Any = None,
) -> Rows:
    """What the margin is told of these rows; `given`: the labels before they were checked."""
    margin.follow(op, x.device)
    counts = counted(labels, row_weight, options)
    norms = norms_of(x, counts, options.eps) if margin.uses_norms else None
    return Rows(labels, counts, norms, options.margin_gradient == "straight", group, given)


def counted(labels: Tensor, row_weight: Tensor | None, options: HeadOptions) -> Tensor:
    """Which rows count, [N] bool."""
    return checks.weighed(labels != checks.ignored(options.ignore_index), row_weight)


def norms_of(x: Tensor, counts: Tensor, eps: float) -> Tensor:
    """|x| [N] float64, with gradient; 1 where a row does not count, whatever it holds."""
    finite = torch.where(counts[:, None], x, 1)
    norms = normalize(finite, eps=eps, return_norm=True)[1].squeeze(1).double()
    return torch.where(counts, norms, 1)


def with_cosines(rows: Rows, x: Tensor, weight: Tensor, labels: Tensor, options: HeadOptions) -> Rows:
    told = sweep.CosineOptions(checks.ignored(options.ignore_index), options.eps)
    cosine = sweep.target_cosine(
        x.detach().contiguous(), weight.detach().contiguous(), labels.contiguous(), told
    )
    return rows._replace(cosine=torch.where(rows.counts, cosine, 0))
