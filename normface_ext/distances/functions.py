"""Distances to agents, and the losses of pairs and triplets of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import reference
from ..cosine.ops import normalize as unit_rows
from ..engine import checks
from ..engine.dtypes import accumulator
from ..engine.options import takes
from . import ops
from .options import DistanceKeywords, DistanceOptions, PairOptions, RowLossKeywords, RowTripletOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


@takes(DistanceOptions)
def inner_distance(
    x: Tensor, weight: Tensor, *, labels: Tensor | None = None, **options: Unpack[DistanceKeywords]
) -> Tensor:
    """d_ij = sum_k (x_ik - w_jk)^2 for p = 2, sum_k |x_ik - w_jk| for p = 1.

    Distances are squared and without a factor 1/2, as in the papers: 2 - 2 cos for unit rows, in [0, 4].
    Caffe's ``InnerDistance`` layer. The squared distance is a matrix product, |x|^2 + |w|^2 - 2 <x, w>,
    except where that would cancel: distances below an eighth of |x|^2 + |w|^2, and what they give to the
    gradients, are computed from the differences, so equal rows have distance 0. (Caffe's L1 gradient is
    wrong for negative differences; this one is the derivative, with sign(0) = 0.)

    Args:
        x: [N, D].
        weight: [C, D] agents, on x's device; float64 only together with float64.
        p: 2 or 1.
        normalize: divide the agents by sqrt(sum w^2 + eps) first, with the gradient through the norm
            (Caffe overwrites the stored weight instead). x stays as it is: see :func:`normalize`.
        labels: [N] int64 or int32 in [0, C), read with ``update_center_only``.
        update_center_only: the gradient of agent j counts only rows with label j, as in centre loss; that
            of x still counts all agents.
        eps: inside the norm.

    Returns:
        [N, C] in x's dtype, summed in at least float32. For p = 1 third derivatives raise.

    Raises:
        TypeError: dtypes, types.
        ValueError: shapes, devices, p, labels missing or without ``update_center_only``.
        IndexError: a label out of range (on CUDA the kernel aborts).
    """
    return distances("inner_distance", x, weight, labels, DistanceOptions.of("inner_distance", options))


def distances(op: str, x: Tensor, weight: Tensor, labels: Tensor | None, options: DistanceOptions) -> Tensor:
    """``inner_distance`` with options that have been checked."""
    checks.features_and_weight(op, x, weight)
    own = options.update_center_only
    if own != (labels is not None):
        raise ValueError(
            f"{op}: expected `labels` together with `update_center_only`, got"
            f" update_center_only={own} and labels {'missing' if labels is None else 'given'}"
        )
    if labels is not None:
        labels = checks.labels(op, labels, x, weight.shape[0], None)
    if options.normalize:
        wide = weight.to(accumulator(weight.dtype))
        weight = unit_rows(wide.contiguous(), 1, 2, options.eps)[0]
    return ops.inner_distance(x, weight, labels, options.p)


def _rows(op: str, name: str, value: object, first: str, like: Tensor) -> Tensor:
    rows = checks.matrix(op, name, value, "[N, D]")
    if rows.shape != like.shape:
        raise ValueError(f"{op}: expected `{name}` to have shape {list(like.shape)}, got {list(rows.shape)}")
    if (rows.dtype == torch.float64) != (like.dtype == torch.float64):
        raise TypeError(
            f"{op}: expected `{name}` to be float64 only together with the others, got {rows.dtype}"
        )
    checks.same_device(op, name, rows, first, like)
    return rows


def _counted(
    op: str, sample_weight: object, *rows: Tensor
) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
    """(which rows count [N], their weights, the rows with zeros instead of those that do not)"""
    first = rows[0]
    factor = checks.weights(op, "sample_weight", sample_weight, first, first.shape[0])
    if factor is None:
        return torch.ones(first.shape[:1], dtype=torch.bool, device=first.device), None, rows
    kept = factor != 0
    return kept, factor, tuple([torch.where(kept[:, None], row, 0) for row in rows])


@takes(PairOptions)
def pair_contrastive_loss(
    a: Tensor,
    b: Tensor,
    same: Tensor,
    *,
    sample_weight: Tensor | None = None,
    **options: Unpack[RowLossKeywords],
) -> Tensor:
    """loss_i = 1/2 (d_i^2 where same, (margin - d_i)_+^2 elsewhere), d_i = |a_i - b_i|.

    The contrastive loss of Hadsell et al. (2006): the margin is one of the distance itself, not of its
    square, and the factor 1/2 is the paper's, and that of Caffe's ContrastiveLoss. The rows are taken as
    they are: normalise them first if they should be. At d = 0, where the distance has no slope, the push
    apart is 0.

    Args:
        a: [N, D].
        b: [N, D], on a's device; float64 only together with float64.
        same: [N], bool, or int64 or int32 of 0 and 1 (on CUDA any other number counts as 1).
        sample_weight: [N] factors of the rows' losses, without gradient; a row of weight 0 counts nowhere,
            whatever it holds.
        margin: at least how far apart others are to be.
        reduction: "mean", which divides by the sum of the weights, "batchmean" by N, "sum" or "none".

    Returns:
        A 0-d tensor, or [N] for "none": float64 for float64 input, float32 otherwise.

    Raises:
        TypeError: dtypes, types.
        ValueError: shapes, devices, values.
    """
    op = "pair_contrastive_loss"
    return contrastive(op, a, b, same, sample_weight, PairOptions.of(op, options))


def contrastive(
    op: str, a: Tensor, b: Tensor, same: Tensor, sample_weight: Tensor | None, options: PairOptions
) -> Tensor:
    """``pair_contrastive_loss`` with options that have been checked."""
    a = checks.matrix(op, "a", a, "[N, D]")
    b = _rows(op, "b", b, "a", a)
    checked = checks.tensor(op, "same", same)
    if checked.dtype not in (torch.bool, torch.int64, torch.int32):
        raise TypeError(f"{op}: expected `same` to be bool, int64 or int32, got {checked.dtype}")
    if checked.shape != a.shape[:1]:
        raise ValueError(f"{op}: expected `same` to have shape [{a.shape[0]}], got {list(checked.shape)}")
    checks.same_device(op, "same", checked, "a", a)
    if checked.dtype != torch.bool and checks.readable(checked) and ((checked != 0) & (checked != 1)).any():
        raise ValueError(f"{op}: expected `same` to hold 0 and 1, got {checked.unique().tolist()}")
    kept, factor, (a, b) = _counted(op, sample_weight, a, b)
    squared = ops.pair_distance(a, b, 2)
    apart = squared != 0  # true of NaN, which shows
    distance = torch.where(apart, torch.where(apart, squared, 1).sqrt(), 0)
    losses = torch.where(checked.bool(), squared, (options.margin - distance).clamp_min(0).square()) / 2
    return reference._reduce(losses, kept, options.reduction, factor)


@takes(RowTripletOptions)
def triplet_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    sample_weight: Tensor | None = None,
    **options: Unpack[RowLossKeywords],
) -> Tensor:
    """loss_i = (margin + |a_i - p_i|^2 - |a_i - n_i|^2)_+, the triplet loss of FaceNet (2015).

    Distances are squared and without a factor 1/2, as in the paper, and so is what the margin is one of.
    Caffe's TripletLoss is half of this and has margin 1: multiply by 0.5 to compare. The rows are taken as
    they are.

    Args:
        anchor: [N, D].
        positive: [N, D], on anchor's device; float64 only together with float64.
        negative: likewise.
        sample_weight, reduction: as in :func:`pair_contrastive_loss`.
        margin: how much farther the negative is to be.

    Returns:
        A 0-d tensor, or [N] for "none": float64 for float64 input, float32 otherwise.

    Raises:
        TypeError: dtypes, types.
        ValueError: shapes, devices, values.
    """
    op = "triplet_loss"
    return triplet(op, anchor, positive, negative, sample_weight, RowTripletOptions.of(op, options))


def triplet(
    op: str,
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    sample_weight: Tensor | None,
    options: RowTripletOptions,
) -> Tensor:
    """``triplet_loss`` with options that have been checked."""
    anchor = checks.matrix(op, "anchor", anchor, "[N, D]")
    positive = _rows(op, "positive", positive, "anchor", anchor)
    negative = _rows(op, "negative", negative, "anchor", anchor)
    kept, factor, (anchor, positive, negative) = _counted(op, sample_weight, anchor, positive, negative)
    anchor = anchor.to(accumulator(anchor.dtype))  # its two gradients meet before they are rounded
    near = ops.pair_distance(anchor, positive, 2)
    far = ops.pair_distance(anchor, negative, 2)
    losses = (options.margin + near - far).clamp_min(0)
    return reference._reduce(losses, kept, options.reduction, factor)
