"""Distances and metric losses: what ``functional`` offers beside the softmax head."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from . import _caffe_losses, _checks, _metric_ops, ops, reference
from ._metric_ops import HINGE_COSINE, HINGE_SLOPE, HINGE_SUM
from .plan import plan

MODES = ("math", "caffe")


def _number(op: str, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: expected `{name}` to be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{op}: expected `{name}` to be finite, got {value}")
    return float(value)


def _mode(op: str, mode: object, reduction: str) -> None:
    if mode not in MODES:
        raise ValueError(f"{op}: expected `mode` to be one of {', '.join(MODES)}, got {mode!r}")
    if mode == "caffe" and reduction != "mean":
        raise ValueError(f"{op}: expected `reduction` to be mean in mode 'caffe', got {reduction!r}")


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
    except where that would cancel: distances below an eighth of |x|^2 + |w|^2 are computed again from the
    differences, so equal rows have distance 0. (Caffe's L1 gradient is wrong for negative differences;
    this one is the derivative, with sign(0) = 0.)

    Args:
        x: [N, D]. weight: [C, D] agents, on x's device; float64 only together with float64.
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
        TypeError: dtypes. ValueError: shapes, devices, p, labels missing or without
        ``update_center_only``. IndexError: a label out of range (on CUDA the kernel aborts).
    """
    op = "inner_distance"
    _checks.features_and_weight(op, x, weight)
    if p not in (1, 2):
        raise ValueError(f"{op}: expected `p` to be 1 or 2, got {p!r}")
    eps = _checks.eps(op, eps)
    if update_center_only != (labels is not None):
        raise ValueError(
            f"{op}: expected `labels` together with `update_center_only`, got"
            f" update_center_only={update_center_only} and labels {'missing' if labels is None else 'given'}"
        )
    if labels is not None:
        _in_range(op, labels, x, weight.shape[0])
    if normalize:
        wide = weight.to(ops._accumulator(weight.dtype))
        weight = ops.normalize(wide.contiguous(), 1, 2, eps)[0]
    return _metric_ops.inner_distance(x, weight, labels, int(p))


def _in_range(op: str, labels: object, x: Tensor, classes: int) -> Tensor:
    """Labels without an ignored value among them."""
    checked = _checks.labels(op, labels, x, classes, 0)  # 0 is in range anyhow: it exempts nothing
    return checked


def _agents(op: str, x: object, weight: object, labels: object, ignore_index: int) -> tuple[Tensor, Tensor | None]:
    """x [N, D] and weight [C, D], or distances [N, C] and no weight; labels checked."""
    if weight is None:
        distances = _checks.matrix(op, "x", x, "[N, C] distances where `weight` is None")
        if distances.shape[1] == 0:
            raise ValueError(f"{op}: expected `x` to have at least one class, got shape {list(distances.shape)}")
        _checks.labels(op, labels, distances, distances.shape[1], ignore_index)
        return distances, None
    features, agents = _checks.features_and_weight(op, x, weight)
    _checks.labels(op, labels, features, agents.shape[0], ignore_index)
    return features, agents


def _hinges(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    margin: float | Tensor,
    *,
    triplet: bool,
    hardest: bool,
    exponential: bool,
    ignore_index: int,
    eps: float,
    workspace: int | None,
    active_limit: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(distance to the label's agent [N], hinges [N], state [fields, N]), fused."""
    classes, dim = weight.shape
    wide = ops._accumulator(x.dtype)
    chosen = plan(x.shape[0], max(1, dim), classes, wide, ops.plan_device(x), workspace=workspace)
    if hardest:
        capacity = 1
    elif active_limit is not None:
        capacity = min(active_limit, classes - 1)
    else:
        # Following a list needs its length on the host, which neither a traced nor a captured step has.
        traced = torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())
        capacity = 0 if traced else min(classes // 16, 512)
    tensor, value = (margin, 0.0) if isinstance(margin, Tensor) else (None, margin)
    return _metric_ops.agent_hinge(
        x, weight, labels, tensor, value, triplet, hardest, exponential, ignore_index, eps,
        chosen.class_chunk, capacity,
    )


def _active_limit(op: str, value: int | None) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise ValueError(f"{op}: expected `active_limit` to be an int >= 0 or None, got {value!r}")
    return value


def _caffe_distances(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """What the released nets put in front of the loss: Normalize, then InnerDistance with normalize."""
    if weight is None:
        return x.to(ops._accumulator(x.dtype))
    unit = ops.normalize(x.to(ops._accumulator(x.dtype)).contiguous(), 1, 2, eps)[0]
    return inner_distance(unit, weight, normalize=True, eps=eps)


@overload
def c_contrastive_loss(
    x: Tensor,
    weight: Tensor | None,
    labels: Tensor,
    *,
    pos_margin: float = ...,
    neg_margin: float | Tensor = ...,
    pos_weight: float = ...,
    neg_weight: float = ...,
    hardest_only: bool = ...,
    max_positive_only: bool = ...,
    positive_outlier_thresh: float = ...,
    positive_first: bool = ...,
    positive_upper_bound: float = ...,
    exp_negative_weight: bool = ...,
    normalize_negative: float | None = ...,
    ignore_index: int = ...,
    reduction: str = ...,
    mode: str = ...,
    return_stats: Literal[False] = ...,
    eps: float = ...,
    workspace: int | None = ...,
    active_limit: int | None = ...,
) -> Tensor: ...
@overload
def c_contrastive_loss(
    x: Tensor,
    weight: Tensor | None,
    labels: Tensor,
    *,
    pos_margin: float = ...,
    neg_margin: float | Tensor = ...,
    pos_weight: float = ...,
    neg_weight: float = ...,
    hardest_only: bool = ...,
    max_positive_only: bool = ...,
    positive_outlier_thresh: float = ...,
    positive_first: bool = ...,
    positive_upper_bound: float = ...,
    exp_negative_weight: bool = ...,
    normalize_negative: float | None = ...,
    ignore_index: int = ...,
    reduction: str = ...,
    mode: str = ...,
    return_stats: bool,
    eps: float = ...,
    workspace: int | None = ...,
    active_limit: int | None = ...,
) -> tuple[Tensor, Tensor]: ...
def c_contrastive_loss(
    x: Tensor,
    weight: Tensor | None,
    labels: Tensor,
    *,
    pos_margin: float = 0.0,
    neg_margin: float | Tensor = 1.0,
    pos_weight: float = 1.0,
    neg_weight: float = 1.0,
    hardest_only: bool = False,
    max_positive_only: bool = False,
    positive_outlier_thresh: float = 4.0,
    positive_first: bool = False,
    positive_upper_bound: float = 1.0,
    exp_negative_weight: bool = False,
    normalize_negative: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    mode: str = "math",
    return_stats: bool = False,
    eps: float = 1e-12,
    workspace: int | None = None,
    active_limit: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """loss_i = w+ min(T, (d_iy - m+)_+) + w- sum_{j != y} (m- - d_ij)_+, d_ij = |x_i/|x_i| - w_j/|w_j||^2.

    The contrastive loss against class agents (paper section 4; Caffe GeneralContrastiveLoss on top of
    Normalize and InnerDistance). d = 2 - 2 cos is never stored as a matrix: one sweep over the classes,
    in chunks within the workspace, finds every row's hinges and lists what is active. The gradient of
    the rest is exactly zero, so backward follows the lists; where a row has more active classes than its
    list holds, it sweeps again, with the same result. Runs are bit-identical from one to the next.

    Args:
        x: [N, D] features. weight: [C, D] agents, on x's device; float64 only together with float64. Both
            are normalised inside. With ``weight=None`` x is the [N, C] matrix of distances itself, plain
            torch takes over, and nothing below needs ``eps`` or ``workspace``.
        labels: [N] int64 in [0, C) or ``ignore_index``.
        pos_margin, neg_margin: m+ and m-. neg_margin may be a 0-d tensor (without gradient).
        pos_weight, neg_weight: w+ and w-.
        hardest_only: of each row only the largest negative term, the first of equal ones (Caffe:
            max_negative_only).
        max_positive_only: of the batch only the largest positive term.
        positive_outlier_thresh: T.
        positive_first: rows with d_iy > positive_upper_bound have no negative terms.
        exp_negative_weight: active negatives cost exp(-d_ij) instead of their hinge.
        normalize_negative: r; where the mean of a row's negative gradient magnitudes, divided by r,
            exceeds w+, the negative terms are divided by it (it counts as a constant).
        reduction: "mean" over the rows that are not ignored, "sum" or "none".
        mode: "math", the gradient of this loss; "caffe", value and gradient of the released layer with
            its deviations, listed in ``_caffe_losses``: a plain path on the full N x C matrix, which
            knows only reduction "mean" and no ignored rows.
        return_stats: also return [mean positive hinge, mean negative hinge], detached: Caffe's second
            output, which never belongs to the loss.
        active_limit: active classes listed per row, chosen from C by default, 0 for always dense. A list
            costs one number read back from the device per step; it is off in traced and captured steps.

    Returns:
        A 0-d tensor, or [N] for "none": float64 for float64 input, float32 otherwise. Second derivatives
        raise (where ``weight`` is given).

    Raises:
        TypeError: dtypes. ValueError: shapes, devices, values. IndexError: a label out of range.
    """
    op = "c_contrastive_loss"
    given = {
        "pos_margin": pos_margin, "pos_weight": pos_weight, "neg_weight": neg_weight,
        "positive_outlier_thresh": positive_outlier_thresh, "positive_upper_bound": positive_upper_bound,
    }  # fmt: skip
    if normalize_negative is not None:
        given["normalize_negative"] = normalize_negative
    if isinstance(neg_margin, Tensor):
        if neg_margin.dim() != 0 or neg_margin.dtype not in _checks.FLOATING or neg_margin.requires_grad:
            raise ValueError(f"{op}: expected `neg_margin` to be a number or a 0-d floating tensor without gradient")
    else:
        _number(op, "neg_margin", neg_margin)
    numbers = {name: _number(op, name, value) for name, value in given.items()}
    _checks.reduction(op, reduction)
    _mode(op, mode, reduction)
    eps = _checks.eps(op, eps)
    active_limit = _active_limit(op, active_limit)
    if mode == "math" and normalize_negative is not None and normalize_negative <= 0:
        raise ValueError(f"{op}: expected `normalize_negative` > 0, got {normalize_negative}")
    numbers.pop("normalize_negative", None)
    x, weight = _agents(op, x, weight, labels, 0 if mode == "caffe" else ignore_index)
    options = {
        **numbers, "neg_margin": neg_margin, "hardest_only": bool(hardest_only),
        "max_positive_only": bool(max_positive_only), "positive_first": bool(positive_first),
        "exp_negative_weight": bool(exp_negative_weight), "normalize_negative": normalize_negative,
    }  # fmt: skip
    if mode == "caffe":
        distances = _caffe_distances(x, weight, eps)
        value, gradient, stats = _caffe_losses.contrastive(distances.detach(), labels, **options)  # type: ignore[arg-type]
        loss = _metric_ops.with_gradient(distances, value, gradient)
        return (loss, stats) if return_stats else loss
    if weight is None:
        loss = reference.c_contrastive_loss(
            x, None, labels, ignore_index=ignore_index, reduction=reduction, **options  # type: ignore[arg-type]
        )
        return (loss, _contrastive_stats(x, labels, options, ignore_index)) if return_stats else loss

    target, hinges, rows = _hinges(
        x, weight, labels, neg_margin, triplet=False, hardest=bool(hardest_only),
        exponential=bool(exp_negative_weight), ignore_index=ignore_index, eps=eps, workspace=workspace,
        active_limit=active_limit,
    )  # fmt: skip
    kept = labels != ignore_index
    count = kept.sum().clamp_min(1)
    positive = (target - pos_margin).clamp(0, positive_outlier_thresh)
    hinge_sum = torch.where(kept, positive.detach(), 0).sum()
    slope = rows[HINGE_SLOPE].to(target.dtype)
    if max_positive_only and len(labels):
        best = torch.where(kept, positive.detach(), -torch.inf).argmax()
        positive = torch.where(torch.arange(len(labels), device=labels.device) == best, positive, 0)
    if positive_first:
        dropped = target.detach() > positive_upper_bound
        hinges, slope = torch.where(dropped, 0, hinges), torch.where(dropped, 0, slope)
    if normalize_negative is not None:
        size = abs(neg_weight) * slope.sum() / normalize_negative / count
        hinges = torch.where(size > pos_weight, hinges / size, hinges)
    loss = reference._reduce(pos_weight * positive + neg_weight * hinges, kept, reduction)
    if not return_stats:
        return loss
    others = rows[HINGE_SUM].sum().to(target.dtype) / max(1, weight.shape[0] - 1)
    return loss, torch.stack([hinge_sum / count, others / count])


def _contrastive_stats(distances: Tensor, labels: Tensor, options: dict[str, object], ignore_index: int) -> Tensor:
    wide = distances.detach().to(ops._accumulator(distances.dtype))
    target, others = reference._split(wide, labels)
    kept = labels != ignore_index
    positive = (target - options["pos_margin"]).clamp(0, options["positive_outlier_thresh"])  # type: ignore
    negative = (options["neg_margin"] - others).clamp_min(0).sum(1) / max(1, wide.shape[1] - 1)  # type: ignore
    return torch.stack([reference._reduce(part, kept, "mean") for part in (positive, negative)])


@overload
def c_triplet_loss(
    x: Tensor,
    weight: Tensor | None,
    labels: Tensor,
    *,
    margin: float = ...,
    pos_weight: float = ...,
    neg_weight: float = ...,
    hardest_only: bool = ...,
    add_center_loss: bool = ...,
    positive_first: bool = ...,
    positive_upper_bound: float = ...,
    ignore_index: int = ...,
    reduction: str = ...,
    mode: str = ...,
    return_stats: Literal[False] = ...,
    eps: float = ...,
    workspace: int | None = ...,
    active_limit: int | None = ...,
) -> Tensor: ...
@overload
def c_triplet_loss(
    x: Tensor,
    weight: Tensor | None,
    labels: Tensor,
    *,
    margin: float = ...,
    pos_weight: float = ...,
    neg_weight: float = ...,
    hardest_only: bool = ...,
    add_center_loss: bool = ...,
    positive_first: bool = ...,
    positive_upper_bound: float = ...,
    ignore_index: int = ...,
    reduction: str = ...,
    mode: str = ...,
    return_stats: bool,
    eps: float = ...,
    workspace: int | None = ...,
    active_limit: int | None = ...,
) -> tuple[Tensor, Tensor]: ...
def c_triplet_loss(
    x: Tensor,
    weight: Tensor | None,
    labels: Tensor,
    *,
    margin: float = 0.8,
    pos_weight: float = 1.0,
    neg_weight: float = 1.0,
    hardest_only: bool = False,
    add_center_loss: bool = False,
    positive_first: bool = False,
    positive_upper_bound: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    mode: str = "math",
    return_stats: bool = False,
    eps: float = 1e-12,
    workspace: int | None = None,
    active_limit: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """loss_i = w- sum_{j != y} (m + d_iy - d_ij)_+, d_ij = |x_i/|x_i| - w_j/|w_j||^2.

    The triplet loss against class agents (paper section 4; Caffe GeneralTripletLoss), fused as
    :func:`c_contrastive_loss` is, whose arguments these are, but for:

    Args:
        margin: m, 0.8 as in the paper (the Caffe layer's own default is 0.2).
        pos_weight: w+, of the centre term alone.
        hardest_only: of each row only the largest term, the first of equal ones.
        add_center_loss: adds w+ d_iy to the loss. (Caffe, where it is the default, adds its gradient and
            not its value.)
        positive_first: rows with d_iy > positive_upper_bound keep only the centre term.
        mode: "caffe" is the released layer, whose gradient is not that of its loss: the positive is
            pulled once per row, not once per active negative. See ``_caffe_losses``.
        return_stats: also return [mean distance to the label's agent, mean distance to the others].

    Returns, raises: as :func:`c_contrastive_loss`.
    """
    op = "c_triplet_loss"
    options = {
        name: _number(op, name, value)
        for name, value in {
            "margin": margin, "pos_weight": pos_weight, "neg_weight": neg_weight,
            "positive_upper_bound": positive_upper_bound,
        }.items()
    }  # fmt: skip
    options |= {
        "hardest_only": bool(hardest_only), "add_center_loss": bool(add_center_loss),
        "positive_first": bool(positive_first),
    }  # fmt: skip
    _checks.reduction(op, reduction)
    _mode(op, mode, reduction)
    eps = _checks.eps(op, eps)
    active_limit = _active_limit(op, active_limit)
    x, weight = _agents(op, x, weight, labels, 0 if mode == "caffe" else ignore_index)
    if mode == "caffe":
        distances = _caffe_distances(x, weight, eps)
        value, gradient, stats = _caffe_losses.triplet(distances.detach(), labels, **options)  # type: ignore[arg-type]
        loss = _metric_ops.with_gradient(distances, value, gradient)
        return (loss, stats) if return_stats else loss
    kept = labels != ignore_index
    if weight is None:
        loss = reference.c_triplet_loss(
            x, None, labels, ignore_index=ignore_index, reduction=reduction, **options  # type: ignore[arg-type]
        )
        wide = x.detach().to(ops._accumulator(x.dtype))
        target, _ = reference._split(wide, labels)
        others = (wide.sum(1) - target) / max(1, x.shape[1] - 1)
        stats = torch.stack([reference._reduce(part, kept, "mean") for part in (target, others)])
        return (loss, stats) if return_stats else loss

    target, hinges, rows = _hinges(
        x, weight, labels, float(margin), triplet=True, hardest=bool(hardest_only), exponential=False,
        ignore_index=ignore_index, eps=eps, workspace=workspace, active_limit=active_limit,
    )  # fmt: skip
    if positive_first:
        hinges = torch.where(target.detach() > positive_upper_bound, 0, hinges)
    losses = neg_weight * hinges
    if add_center_loss:
        losses = losses + pos_weight * target
    loss = reference._reduce(losses, kept, reduction)
    if not return_stats:
        return loss
    count, negatives = kept.sum().clamp_min(1), max(1, weight.shape[0] - 1)
    others = (2.0 * negatives * kept.sum() - 2.0 * rows[HINGE_COSINE].sum()) / negatives
    return loss, torch.stack([target.detach().sum() / count, (others / count).to(target.dtype)])


def _rows(op: str, name: str, value: object, like: Tensor) -> Tensor:
    rows = _checks.matrix(op, name, value, "[N, D]")
    if rows.shape != like.shape:
        raise ValueError(f"{op}: expected `{name}` to have shape {list(like.shape)}, got {list(rows.shape)}")
    if (rows.dtype == torch.float64) != (like.dtype == torch.float64):
        raise TypeError(f"{op}: expected `{name}` to be float64 only together with the others, got {rows.dtype}")
    _checks.same_device(op, name, rows, "the first", like)
    return rows


def pair_contrastive_loss(
    a: Tensor, b: Tensor, same: Tensor, *, margin: float = 1.0, reduction: str = "mean"
) -> Tensor:
    """loss_i = 1/2 (d_i^2 where same, (margin - d_i)_+^2 elsewhere), d_i = |a_i - b_i|.

    The contrastive loss of Hadsell et al. (2006), with the factor 1/2 of Caffe's ContrastiveLoss. The
    rows are taken as they are: normalise them first if they should be. At d = 0, where the distance has
    no slope, the push apart is 0.

    Args:
        a, b: [N, D] of one device; float64 only together. same: [N], bool or int64 of 0 and 1 (on CUDA
            any other number counts as 1).

    Returns:
        A 0-d tensor, or [N] for "none": float64 for float64 input, float32 otherwise.

    Raises:
        TypeError: dtypes. ValueError: shapes, devices, values.
    """
    op = "pair_contrastive_loss"
    a = _checks.matrix(op, "a", a, "[N, D]")
    b = _rows(op, "b", b, a)
    checked = _checks.tensor(op, "same", same)
    if checked.dtype not in (torch.bool, torch.int64):
        raise TypeError(f"{op}: expected `same` to be bool or int64, got {checked.dtype}")
    if checked.shape != a.shape[:1]:
        raise ValueError(f"{op}: expected `same` to have shape [{a.shape[0]}], got {list(checked.shape)}")
    _checks.same_device(op, "same", checked, "a", a)
    if checked.dtype == torch.int64 and checked.device.type == "cpu" and not torch.compiler.is_compiling():
        if ((checked != 0) & (checked != 1)).any():
            raise ValueError(f"{op}: expected `same` to hold 0 and 1, got {checked.unique().tolist()}")
    margin = _number(op, "margin", margin)
    _checks.reduction(op, reduction)
    squared = _metric_ops.pair_distance(a, b, 2)
    apart = squared > 0
    distance = torch.where(apart, squared, 1).sqrt() * apart
    losses = torch.where(checked.bool(), squared, (margin - distance).clamp_min(0).square()) / 2
    return reference._reduce(losses, torch.ones_like(checked, dtype=torch.bool), reduction)


def triplet_loss(
    anchor: Tensor, positive: Tensor, negative: Tensor, *, margin: float = 0.2, reduction: str = "mean"
) -> Tensor:
    """loss_i = (margin + |a_i - p_i|^2 - |a_i - n_i|^2)_+, the triplet loss of FaceNet (2015).

    Caffe's TripletLoss is half of this and has margin 1: multiply by 0.5 to compare. The rows are taken
    as they are.

    Args:
        anchor, positive, negative: [N, D] of one device; float64 only together.

    Returns:
        A 0-d tensor, or [N] for "none": float64 for float64 input, float32 otherwise.

    Raises:
        TypeError: dtypes. ValueError: shapes, devices, values.
    """
    op = "triplet_loss"
    anchor = _checks.matrix(op, "anchor", anchor, "[N, D]")
    positive = _rows(op, "positive", positive, anchor)
    negative = _rows(op, "negative", negative, anchor)
    margin = _number(op, "margin", margin)
    _checks.reduction(op, reduction)
    near = _metric_ops.pair_distance(anchor, positive, 2)
    far = _metric_ops.pair_distance(anchor, negative, 2)
    losses = (margin + near - far).clamp_min(0)
    return reference._reduce(losses, torch.ones_like(losses, dtype=torch.bool), reduction)
