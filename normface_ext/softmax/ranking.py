"""Where a row's target stands among the classes, and which class is nearest: the engine's sweep with another
term or sink, so that no N x C matrix is needed. Nothing here has a gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..cosine.functions import plain_cosine
from ..engine import checks, graphs
from ..engine.arguments import integer
from ..engine.options import takes
from ..engine.sweep import (
    ELSEWHERE,
    ROW_WEIGHT,
    SECOND_SUM,
    TERMS,
    TermInputs,
    head_sweep_collecting,
    target_cosine,
)
from .arguments import loss_options
from .ops import LossOptions
from .options import HeadOptions, NearestKeywords, NearestOptions, PartsKeywords, PartsOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Unpack


@takes(NearestOptions)
@torch.no_grad()
def nearest_class(x: Tensor, weight: Tensor, **options: Unpack[NearestKeywords]) -> tuple[Tensor, Tensor]:
    """The class of the largest cosine, argmax_j cos(x_i, w_j), and that cosine; without an N x C matrix.

    Args:
        x: [N, D].
        weight: [C, D], on x's device; float64 only together with float64.
        eps, workspace: see ``normface_loss``.

    Returns:
        (int64 [N], the first of equal ones; cosines [N], float64 for float64 input, float32 otherwise). A
        cosine that is NaN counts as the largest.

    Raises:
        TypeError: dtypes, types.
        ValueError: shapes, devices, values.
    """
    op = "nearest_class"
    checks.features_and_weight(op, x, weight)
    given = NearestOptions.of(op, options)
    if graphs.leaving():
        cosine = plain_cosine(x, weight, True, given.eps)
        nearest = cosine.argmax(1)
        return nearest, cosine.gather(1, nearest[:, None])[:, 0]
    return hardest(x, weight, ranking_options(x, weight, given.eps, None, given.workspace))


@takes(PartsOptions)
@torch.no_grad()
def target_rank(x: Tensor, weight: Tensor, labels: Tensor, **options: Unpack[PartsKeywords]) -> Tensor:
    """The number of classes with a larger cosine than the label's, #{j : cos_ij > cos_iy}; without an N x C
    matrix. 0 is a hit at rank 1; ``(rank < 5)`` one among the five nearest.

    Args:
        x: [N, D].
        weight: [C, D], on x's device; float64 only together with float64.
        labels: [N] int64 or int32 in [0, C) or ``ignore_index``.
        ignore_index, eps, workspace: see ``normface_loss``.

    Returns:
        int64 [N], -1 where the row is ignored. Cosines that differ by less than their rounding stand in any
        order; one that is NaN counts as larger.

    Raises:
        TypeError: dtypes, types.
        ValueError: shapes, devices, values.
        IndexError: a label out of range.
    """
    op = "target_rank"
    checks.features_and_weight(op, x, weight)
    given = PartsOptions.of(op, options)
    labels = checks.labels(op, labels, x, weight.shape[0], given.ignore_index)
    told = ranking_options(x, weight, given.eps, given.ignore_index, given.workspace)
    x, weight, labels = x.contiguous(), weight.contiguous(), labels.contiguous()
    return nearer(x, weight, labels, target_cosine(x, weight, labels, told), told)


def accuracy_of(ranks: Tensor, topk: Sequence[int]) -> Tensor:
    """Shares of the rows that count (rank >= 0) with a rank below k, [len(topk)] float64; 0 without any."""
    counted = (ranks >= 0).sum().clamp_min(1)
    return torch.stack([((ranks >= 0) & (ranks < k)).sum() / counted.double() for k in topk])


def topk_argument(op: str, value: Sequence[int]) -> list[int]:
    try:
        given = [integer(op, "topk", k, 1) for k in value]
    except (TypeError, ValueError):
        given = []
    if not given:
        raise ValueError(f"{op}: expected `topk` to be ints of at least 1, such as (1, 5), got {value!r}")
    return given


def ranking_options(
    x: Tensor, weight: Tensor, eps: float, ignore_index: int | None, workspace: int | None
) -> LossOptions:
    """What the sweep is told. The plan's workspace holds no coefficients: none are kept."""
    options = HeadOptions(eps=eps, ignore_index=ignore_index, workspace=workspace)
    made = loss_options(1.0, options, x, weight, x.shape[0], max(1, weight.shape[0]))
    return replace(made, term=TERMS["hinge"])


def hardest(x: Tensor, weight: Tensor, options: LossOptions) -> tuple[Tensor, Tensor]:
    """(class [N], its cosine [N]) of these classes, C and -inf where there are none."""
    nobody = torch.full([x.shape[0]], ELSEWHERE, dtype=torch.int64, device=x.device)
    threshold = torch.zeros([x.shape[0]], dtype=torch.float64, device=x.device)
    _, found = head_sweep_collecting(
        x.contiguous(),
        weight.contiguous(),
        nobody,
        replace(options, is_shard=True),
        TermInputs(threshold, None),
        sink="hardest",
        capacity=1,
        store=False,
    )
    return found.classes[:, 0], found.values[:, 0]


def nearer(x: Tensor, weight: Tensor, labels: Tensor, cosine: Tensor, options: LossOptions) -> Tensor:
    """How many of these classes are nearer than the target, whose cosine [N] is known; int64 [N], -1 where
    the row does not count. A class is active under the hinge of the target's own distance if it is."""
    term = TermInputs(2.0 - 2.0 * cosine, None)
    swept, _ = head_sweep_collecting(x, weight, labels, options, term, sink="none", capacity=0, store=False)
    counts = swept.rows[ROW_WEIGHT] != 0
    return torch.where(counts, swept.rows[SECOND_SUM], -1.0).long()
