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
from ..engine.row_state import ELSEWHERE, ROW_WEIGHT, SECOND_SUM, TERMS, TermInputs
from ..engine.sweep import head_sweep_collecting, target_cosine
from .arguments import loss_options
from .centers import class_count, pooled
from .loss_options import LossOptions
from .options import HeadOptions, NearestKeywords, NearestOptions, PartsKeywords, PartsOptions
from .rows import nearest_rows

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
        sub_centers, eps, workspace: see ``normface_loss``.

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
    class_count(op, weight, given.sub_centers)
    if graphs.leaving():
        cosine = pooled(plain_cosine(x, weight, True, given.eps), given.sub_centers)
        nearest = cosine.argmax(1)
        return nearest, cosine.gather(1, nearest[:, None])[:, 0]
    rows, cosines = hardest(x, weight, ranking_options(x, weight, given.eps, None, given.workspace))
    return (rows if given.sub_centers == 1 else rows // given.sub_centers), cosines


@takes(PartsOptions)
@torch.no_grad()
def target_rank(x: Tensor, weight: Tensor, labels: Tensor, **options: Unpack[PartsKeywords]) -> Tensor:
    """The number of classes with a larger cosine than the label's, #{j : cos_ij > cos_iy}; without an N x C
    matrix. 0 is a hit at rank 1; ``(rank < 5)`` one among the five nearest.

    Args:
        x: [N, D].
        weight: [C, D], on x's device; float64 only together with float64.
        labels: [N] int64 or int32 in [0, C) or ``ignore_index``.
        sub_centers, ignore_index, eps, workspace: see ``normface_loss``.

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
    centers, ignored = given.sub_centers, given.ignore_index
    labels = checks.labels(op, labels, x, class_count(op, weight, centers), ignored)
    told = ranking_options(x, weight, given.eps, ignored, given.workspace, centers)
    x, weight = x.contiguous(), weight.contiguous()
    places = nearest_rows(x, weight, labels, centers, ignored, given.eps).contiguous()
    return nearer(x, weight, places, target_cosine(x, weight, places, told), told)


def nearest_center(
    op: str, x: Tensor, weight: Tensor, labels: Tensor, centers: int, ignore_index: int | None, eps: float
) -> Tensor:
    """Which of the `centers` of its class a row is nearest to, int64 [N]; -1 where it is ignored."""
    checks.features_and_weight(op, x, weight)
    labels = checks.labels(op, labels, x, class_count(op, weight, centers), ignore_index)
    if centers == 1:
        return torch.where(labels == checks.ignored(ignore_index), -1, 0)
    places = nearest_rows(x, weight, labels, centers, ignore_index, eps)
    return torch.where(places < 0, -1, places % centers)


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
    x: Tensor,
    weight: Tensor,
    eps: float,
    ignore_index: int | None,
    workspace: int | None,
    centers: int = 1,
) -> LossOptions:
    """What the sweep is told. The plan's workspace holds no coefficients: none are kept."""
    options = HeadOptions(eps=eps, ignore_index=ignore_index, workspace=workspace, sub_centers=centers)
    made = loss_options(1.0, options, x, weight, x.shape[0], max(1, weight.shape[0] // centers))
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
