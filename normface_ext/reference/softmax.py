"""The softmax head."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..softmax.batch_margins import BatchMargin, Psi, Rows, straightened
from ..softmax.hard_negatives import HardNegatives, filtered
from ..softmax.margins import NO_MARGIN, Margin
from .losses import (
    Result,
    reduce_weighted,
    rows_that_count,
    safe_rows,
    softplus,
    statistics,
    still_learns,
    with_both,
)
from .margins import hard_negatives, psi_of
from .rows import column_of, cosine, pooled_cosines, widened


class HeadParts(NamedTuple):
    """What ``head_parts`` returns; [N] each."""

    target_cosine: Tensor
    log_sum_others: Tensor
    counts: Tensor


def head_parts(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: float | Tensor,
    *,
    sub_centers: int = 1,
    ignore_index: int | None = -100,
    eps: float = 1e-12,
) -> HeadParts:
    """(c_y, ln sum_{j != y} exp(s c_j), which rows count), in float64; 0 where a row does not count."""
    kept = rows_that_count(labels, ignore_index, None)
    cos = pooled_cosines(cosine(safe_rows(x.double(), kept), weight.double(), eps), sub_centers)
    own = labels.clamp(0, cos.shape[1] - 1)[:, None]
    others = torch.arange(cos.shape[1], device=labels.device) != own  # [N, C]
    rest = cos[others].view(cos.shape[0], -1)
    logits = column_of(scale) * rest
    return HeadParts(
        torch.where(kept, cos.gather(1, own).squeeze(1), 0),
        torch.where(kept, torch.logsumexp(logits, 1), 0)
        if rest.shape[1]
        else torch.where(kept, -torch.inf, 0.0).double(),
        kept,
    )


def loss_of_parts(
    target_cosine: Tensor,
    log_sum_others: Tensor,
    psi: Tensor,
    scale: float | Tensor,
    row_weight: Tensor,
    target_weight: Tensor,
    *,
    classes: int,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    weight_sum: float | Tensor = 0.0,
    cosine_with_sum: Tensor | None = None,
) -> Tensor:
    """``normface_loss`` from [N] numbers of the rows (csrc/math/softmax.h), psi among them. A row of weight 0
    does not count. With class weights u target_weight is u_y, weight_sum is sum u, and cosine_with_sum, which
    smoothing needs, is <x_hat, sum_j u_j w_hat_j>."""
    counts = row_weight != 0
    psi = torch.where(counts, psi, 0)
    from_target = softplus(log_sum_others - scale * psi)  # -log p_y
    losses: Tensor
    if label_smoothing > 0:
        assert cosine_with_sum is not None
        each = label_smoothing / classes
        total = (1 - label_smoothing) * target_weight + each * weight_sum
        spread = psi * weight_sum - cosine_with_sum - target_weight * (psi - target_cosine)
        losses = total * from_target + scale * each * spread
    else:
        losses = target_weight * from_target
    losses = torch.where(counts, row_weight * losses, 0)
    return reduce_weighted(losses, (row_weight * target_weight).sum(), reduction)


def normface_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: float | Tensor,
    *,
    margin: Margin | None = None,
    margin_gradient: str = "exact",
    filter_threshold: float | None = None,
    sub_centers: int = 1,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    eps: float = 1e-12,
    sample_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    normalize_input: bool = True,
    labels_b: Tensor | None = None,
    lam: float | Tensor | None = None,
    return_statistics: bool = False,
) -> Result:
    """loss_i = -log softmax_j(s psi(c_ij))[y_i], psi on the target column only (paper section 3.2).

    Without ``normalize_input`` s is s |x_i|.

    With class weights u and smoothing a: (1 - a) u_y loss_iy + a/C sum_j u_j loss_ij. The mean divides by the
    sum of the weights, and is 0 where that is 0. A margin with a state moves it here as it does elsewhere.
    With labels_b it is lam_i loss(x_i, labels_i) + (1 - lam_i) loss(x_i, labels_b_i).
    Hard negatives, a margin's own or those past ``filter_threshold``, have f(c_ij) for c_ij.
    """
    given = with_both(x, labels, sample_weight, labels_b, lam, ignore_index)
    if given.share is not None:  # numbers of each row are those of both its labels
        of_rows = isinstance(scale, Tensor) and scale.numel() > 1
        scale = torch.cat([scale, scale]) if of_rows else scale  # type: ignore[list-item]
        if margin is not None and margin.per_row:
            tensors = {f.name: getattr(margin, f.name) for f in fields(margin)}  # type: ignore[arg-type]
            doubled = {n: t.repeat(2) for n, t in tensors.items() if isinstance(t, Tensor) and t.dim() == 1}
            margin = replace(margin, **doubled)  # type: ignore[type-var]
    x, labels, sample_weight, _ = given
    kept = rows_that_count(labels, ignore_index, sample_weight)
    counting = safe_rows(x, kept)
    cos = pooled_cosines(cosine(counting, weight, eps), sub_centers)
    if not normalize_input:
        scale = scale * (widened(counting).square().sum(1) + eps).sqrt()
    safe = labels.clamp(0, cos.shape[1] - 1)[:, None]
    own = cos.gather(1, safe).squeeze(1)
    chosen: Margin | Psi | HardNegatives = margin or NO_MARGIN
    more = None
    if isinstance(margin, BatchMargin):
        norms = widened(counting).double().square().sum(1).add(eps).sqrt() if margin.uses_norms else None
        told = margin.hard_negatives and margin.uses_cosines
        known = torch.where(kept, own.detach().double(), 0) if told else None
        rows = Rows(labels, kept, norms, margin_gradient == "straight", cosine=known, share=given.share)
        chosen, more = margin.of(rows), margin.regularizer(rows)
    others = cos
    if filter_threshold is not None:
        others = hard_negatives(cos, filtered(NO_MARGIN, filter_threshold, labels))
    if isinstance(chosen, HardNegatives):
        others, chosen = hard_negatives(cos, chosen), chosen.target
    if isinstance(chosen, Margin):
        target = psi_of(own, chosen, labels, margin_gradient)
    else:
        target = (straightened(chosen) if margin_gradient == "straight" else chosen)(own).to(cos.dtype)
    logits = column_of(scale) * others.scatter(1, safe, target[:, None])
    every = torch.logsumexp(logits, 1, keepdim=True) - logits  # -log p_j
    of_class = cos.new_ones(weight.shape[0]) if class_weight is None else class_weight.to(cos.dtype)
    of_row = cos.new_ones(x.shape[0]) if sample_weight is None else sample_weight.to(cos.dtype)
    of_target = of_class[safe.squeeze(1)]
    surprise = every.gather(1, safe).squeeze(1)
    each = (1 - label_smoothing) * of_target * surprise
    if label_smoothing > 0:
        each = each + label_smoothing / weight.shape[0] * (every * of_class).sum(1)
    losses = torch.where(kept, of_row * each, 0)
    loss = reduce_weighted(losses, torch.where(kept, of_row * of_target, 0).sum(), reduction)
    if more is not None:
        weights = torch.where(kept, of_row.double(), 0)
        loss = loss + reduce_weighted(weights * more, weights.sum(), reduction).to(loss.dtype)
        each = each + more
    if not return_statistics:
        return given.joined(loss, reduction)
    return loss, statistics(cos, labels, kept, each, still_learns(-torch.expm1(-surprise)))
