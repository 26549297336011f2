"""Distances to agents, and the losses of pairs and triplets of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..cosine.ops import normalize as unit_rows
from ..engine import checks
from ..engine.arguments import flag, number
from ..engine.calls import accumulator
from . import ops


def inner_distance(
    x: Tensor,
    weight: Tensor,
    *,
    p: int = 2,
    normalize: bool = False,
    labels: Tensor | None = None,
    update_center_only: bool = False,
    eps: float = 1e-12,
) -> Tensor:
    """d_ij = sum_k (x_ik - w_jk)^2 for p = 2 (squared), sum_k |x_ik - w_jk| for p = 1.

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
        labels: [N] int64 in [0, C), read with ``update_center_only``.
        update_center_only: the gradient of agent j counts only rows with label j, as in centre loss; that
            of x still counts all agents.
        eps: inside the norm.

    Returns:
        [N, C] in x's dtype, summed in at least float32. Second derivatives raise.

    Raises:
        TypeError: dtypes, types.
        ValueError: shapes, devices, p, labels missing or without ``update_center_only``.
        IndexError: a label out of range (on CUDA the kernel aborts).
    """
    op = "inner_distance"
    checks.features_and_weight(op, x, weight)
    p = checks.exponent(op, "p", p)
    eps = checks.eps(op, "eps", eps)
    normalize = flag(op, "normalize", normalize)
    update_center_only = flag(op, "update_center_only", update_center_only)
    if update_center_only != (labels is not None):
        raise ValueError(
            f"{op}: expected `labels` together with `update_center_only`, got"
            f" update_center_only={update_center_only} and labels {'missing' if labels is None else 'given'}"
        )
    if labels is not None:
        checks.labels(op, labels, x, weight.shape[0], 0)  # 0 is in range anyhow: it exempts nothing
    if normalize:
        wide = weight.to(accumulator(weight.dtype))
        weight = unit_rows(wide.contiguous(), 1, 2, eps)[0]
    return ops.inner_distance(x, weight, labels, p)


def _rows(op: str, name: str, value: object, like: Tensor) -> Tensor:
    rows = checks.matrix(op, name, value, "[N, D]")
    if rows.shape != like.shape:
        raise ValueError(f"{op}: expected `{name}` to have shape {list(like.shape)}, got {list(rows.shape)}")
    if (rows.dtype == torch.float64) != (like.dtype == torch.float64):
        raise TypeError(
            f"{op}: expected `{name}` to be float64 only together with the others, got {rows.dtype}"
        )
    checks.same_device(op, name, rows, "the first", like)
    return rows


def pair_contrastive_loss(
    a: Tensor, b: Tensor, same: Tensor, *, margin: float = 1.0, reduction: str = "mean"
) -> Tensor:
    """loss_i = 1/2 (d_i^2 where same, (margin - d_i)_+^2 elsewhere), d_i = |a_i - b_i|.

    The contrastive loss of Hadsell et al. (2006), with the factor 1/2 of Caffe's ContrastiveLoss. The
    rows are taken as they are: normalise them first if they should be. At d = 0, where the distance has
    no slope, the push apart is 0.

    Args:
        a: [N, D].
        b: [N, D], on a's device; float64 only together with float64.
        same: [N], bool or int64 of 0 and 1 (on CUDA any other number counts as 1).

    Returns:
        A 0-d tensor, or [N] for "none": float64 for float64 input, float32 otherwise.

    Raises:
        TypeError: dtypes, types.
        ValueError: shapes, devices, values.
    """
    op = "pair_contrastive_loss"
    a = checks.matrix(op, "a", a, "[N, D]")
    b = _rows(op, "b", b, a)
    checked = checks.tensor(op, "same", same)
    if checked.dtype not in (torch.bool, torch.int64):
        raise TypeError(f"{op}: expected `same` to be bool or int64, got {checked.dtype}")
    if checked.shape != a.shape[:1]:
        raise ValueError(f"{op}: expected `same` to have shape [{a.shape[0]}], got {list(checked.shape)}")
    checks.same_device(op, "same", checked, "a", a)
    if checked.dtype == torch.int64 and checks.readable(checked) and ((checked != 0) & (checked != 1)).any():
        raise ValueError(f"{op}: expected `same` to hold 0 and 1, got {checked.unique().tolist()}")
    margin = number(op, "margin", margin)
    checks.reduction(op, "reduction", reduction)
    squared = ops.pair_distance(a, b, 2)
    apart = squared != 0  # true of NaN, which shows
    distance = torch.where(apart, torch.where(apart, squared, 1).sqrt(), 0)
    losses = torch.where(checked.bool(), squared, (margin - distance).clamp_min(0).square()) / 2
    return reference._reduce(losses, torch.ones_like(checked, dtype=torch.bool), reduction)


def triplet_loss(
    anchor: Tensor, positive: Tensor, negative: Tensor, *, margin: float = 0.2, reduction: str = "mean"
) -> Tensor:
    """loss_i = (margin + |a_i - p_i|^2 - |a_i - n_i|^2)_+, the triplet loss of FaceNet (2015).

    Caffe's TripletLoss is half of this and has margin 1: multiply by 0.5 to compare. The rows are taken
    as they are.

    Args:
        anchor: [N, D].
        positive: [N, D], on anchor's device; float64 only together with float64.
        negative: likewise.

    Returns:
        A 0-d tensor, or [N] for "none": float64 for float64 input, float32 otherwise.

    Raises:
        TypeError: dtypes, types.
        ValueError: shapes, devices, values.
    """
    op = "triplet_loss"
    anchor = checks.matrix(op, "anchor", anchor, "[N, D]")
    positive = _rows(op, "positive", positive, anchor)
    negative = _rows(op, "negative", negative, anchor)
    margin = number(op, "margin", margin)
    checks.reduction(op, "reduction", reduction)
    anchor = anchor.to(accumulator(anchor.dtype))  # its two gradients meet before they are rounded
    near = ops.pair_distance(anchor, positive, 2)
    far = ops.pair_distance(anchor, negative, 2)
    losses = (margin + near - far).clamp_min(0)
    return reference._reduce(losses, torch.ones_like(losses, dtype=torch.bool), reduction)
