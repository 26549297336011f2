"""What a margin that looks at the batch is told of its rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..cosine.ops import normalize
from ..engine import checks, sweep
from ..engine.mixing import BothLabels
from .batch_margins import BatchMargin, Rows
from .centers import ignored_row
from .options import HeadOptions


def nearest_rows(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    centers: int,
    ignore_index: int | None,
    eps: float,
    *,
    is_shard: bool = False,
) -> Tensor:
    """Labels [N] as rows of the weight: themselves, where a class is one row."""
    if centers == 1:
        return labels
    return sweep.target_center(
        x.detach().contiguous(),
        weight.detach().contiguous(),
        labels.contiguous(),
        centers,
        checks.ignored(ignore_index),
        eps,
        is_shard=is_shard,
    )


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


def rows_of_both(
    op: str,
    x: Tensor,
    both: BothLabels,
    given: Tensor,
    options: HeadOptions,
    margin: BatchMargin,
    group: Any = None,
) -> Rows:
    """The same of N rows x with two labels each: they stand there twice, with the share of each."""
    margin.follow(op, x.device)
    norms = None
    if margin.uses_norms:
        once = norms_of(x, both.any_counts(), options.eps)
        norms = torch.where(both.counts, torch.cat([once, once]), 1)
    straight = options.margin_gradient == "straight"
    return Rows(both.labels, both.counts, norms, straight, group, given, share=both.share)


def counted(labels: Tensor, row_weight: Tensor | None, options: HeadOptions) -> Tensor:
    """Which rows count, [N] bool."""
    return checks.weighed(labels != checks.ignored(options.ignore_index), row_weight)


def norms_of(x: Tensor, counts: Tensor, eps: float) -> Tensor:
    """|x| [N] float64, with gradient; 1 where a row does not count, whatever it holds."""
    finite = torch.where(counts[:, None], x, 1)
    # A number: torch.compile with dynamic shapes holds a float open, and two Functions cannot share it then.
    eps = checks.eps("normalize", "eps", eps)
    norms = normalize(finite.contiguous(), 1, 2, eps)[1].squeeze(1).double()
    return torch.where(counts, norms, 1)


def with_cosines(rows: Rows, x: Tensor, weight: Tensor, places: Tensor, options: HeadOptions) -> Rows:
    """`places`: the labels as rows of the weight."""
    told = sweep.CosineOptions(ignored_row(options.sub_centers, options.ignore_index), options.eps)
    cosine = sweep.target_cosine(
        x.detach().contiguous(), weight.detach().contiguous(), places.contiguous(), told
    )
    return rows._replace(cosine=torch.where(rows.counts, cosine, 0))
