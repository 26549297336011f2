"""GeneralContrastiveLoss and GeneralTripletLoss over given distances [N, C], the form Caffe's graphs use.

Each comes twice. ``math`` is a loss whose gradient is autograd's. ``caffe`` is what the released layer
computed: its value and its gradient, which is not the derivative of that value (docs/caffe-compatibility).
Both return (loss, statistics), the statistics being the layer's second top, without a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Contrastive:
    """Options of GeneralContrastiveLoss, with Caffe's names and defaults."""

    positive_margin: float = 0.0
    negative_margin: float = 1.0
    positive_weight: float = 1.0
    negative_weight: float = 1.0
    normalize_negative: float | None = None
    positive_outlier_thresh: float = 4.0
    max_negative_only: bool = False
    max_positive_only: bool = False
    positive_first: bool = False
    positive_upper_bound: float = 1.0
    exp_negative_weight: bool = False
    add_intra_mae: bool = False
    max_negative_margin: float = 1.2


@dataclass(frozen=True)
class Triplet:
    """Options of GeneralTripletLoss, with Caffe's names and defaults."""

    margin: float = 0.2
    add_center_loss: bool = True
    hardest_only: bool = False
    positive_first: bool = False
    positive_upper_bound: float = 1.0
    positive_weight: float = 1.0
    negative_weight: float = 1.0


class _WrittenOut(torch.autograd.Function):
    """value, with the gradient `slope` for the distances, whatever the value's derivative is."""

    @staticmethod
    def forward(ctx: Any, distances: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return grad * slope, None, None


def _split(distances: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(d_iy [N, 1], mask of the label's entries [N, C])."""
    columns = torch.arange(distances.shape[1], device=distances.device)
    return distances.gather(1, labels[:, None]), columns == labels[:, None]


def _mean_negative(values: Tensor, is_target: Tensor) -> Tensor:
    rows, classes = values.shape
    return values.masked_fill(is_target, 0).sum() / rows / (classes - 1)


def contrastive_math(
    d: Tensor, labels: Tensor, o: Contrastive, intra: float | Tensor
) -> tuple[Tensor, Tensor]:
    """(1/N) sum_i [ w+ min(T, (d_iy - m+)_+) + sum_j w- (m- - d_ij)_+ ], where options choose among terms:
    the hardest negative of each row, the largest positive of the batch, no negatives in rows whose
    positive is beyond the upper bound, w- exp(-d) in place of the active hinges, and a factor that
    holds the negatives' total slope at ``normalize_negative`` per row.
    """
    target, is_target = _split(d, labels)
    threshold = o.negative_margin + (intra if o.add_intra_mae else 0.0)
    positive = (target - o.positive_margin).clamp(0, o.positive_outlier_thresh)
    hinge = (threshold - d).clamp_min(0).masked_fill(is_target, 0)
    active = (d < threshold) & ~is_target
    statistics = _statistics(positive.mean(), _mean_negative(hinge, is_target), o, intra)
    if o.max_negative_only:
        hardest = d.masked_fill(~active, torch.inf).argmin(1, keepdim=True)
        active = active & (torch.arange(d.shape[1], device=d.device) == hardest)
    if o.positive_first:
        active = active & (target <= o.positive_upper_bound)
    terms = (-d).exp() if o.exp_negative_weight else threshold - d
    negative = o.negative_weight * torch.where(active, terms, torch.zeros_like(d)).sum()
    if o.normalize_negative is not None:
        slopes = terms if o.exp_negative_weight else torch.ones_like(d)
        total = abs(o.negative_weight) * torch.where(active, slopes, torch.zeros_like(d)).sum().detach()
        ratio = total / o.normalize_negative / d.shape[0]
        negative = torch.where(ratio > o.positive_weight, negative / ratio, negative)
    positives = positive.max() if o.max_positive_only else positive.sum()
    return (o.positive_weight * positives + negative) / d.shape[0], statistics


def contrastive_caffe(
    d: Tensor, labels: Tensor, o: Contrastive, intra: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Value (the sum of absolute values over N) and gradient of Caffe's layer, slips included."""
    given, d = d, d.detach()
    rows, columns = torch.arange(d.shape[0], device=d.device), torch.arange(d.shape[1], device=d.device)
    target, is_target = _split(d, labels)
    threshold = o.negative_margin + (intra if o.add_intra_mae else 0.0)
    positive = (target - o.positive_margin).clamp(0, o.positive_outlier_thresh)
    active = (d < threshold) & ~is_target
    excess = torch.where(active, threshold - d, torch.zeros_like(d))
    size = (-d).exp() if o.exp_negative_weight else torch.ones_like(d)
    negative = o.negative_weight * (
        torch.where(active, size, torch.zeros_like(d)) if o.exp_negative_weight else excess
    )
    buffer = torch.where(is_target, positive * o.positive_weight, negative)
    statistics = _statistics(positive.mean(), _mean_negative(excess, is_target), o, intra)
    kept = torch.ones_like(is_target)
    if o.max_negative_only:
        # The search starts at entry 0, even where that is the label: its positive then stands for a negative.
        candidates = torch.where(active, buffer, torch.full_like(buffer, -torch.inf))
        candidates[:, 0] = buffer[:, 0]
        kept = columns == candidates.argmax(1, keepdim=True)
    chosen = torch.ones_like(labels, dtype=torch.bool)
    if o.max_positive_only:  # the smallest positive, whatever the name says
        chosen = rows == buffer.gather(1, labels[:, None]).squeeze(1).argmin()
    far = (target > o.positive_upper_bound) & o.positive_first
    value = torch.where(is_target, buffer * chosen[:, None], buffer * (kept & ~far)).abs().sum() / d.shape[0]

    gate = (target > o.positive_margin) & (target < o.positive_outlier_thresh) & chosen[:, None]
    slope_negative = torch.where(active & kept & ~far, o.negative_weight * size, torch.zeros_like(d))
    if o.normalize_negative is not None:
        ratio = slope_negative.sum().abs() / o.normalize_negative / d.shape[0]
        slope_negative = torch.where(ratio > o.positive_weight, slope_negative / ratio, slope_negative)
    slope = torch.where(is_target, o.positive_weight * (gate | far).to(d.dtype), -slope_negative) / d.shape[0]
    return _WrittenOut.apply(given, value, slope), statistics


def _statistics(positive: Tensor, negative: Tensor, o: Contrastive, intra: float | Tensor) -> Tensor:
    values = [positive.detach(), negative.detach()]
    if o.add_intra_mae:
        values.append(next_intra(intra, positive.detach(), o))
    return torch.stack(values)


def next_intra(intra: float | Tensor, positive: Tensor, o: Contrastive) -> Tensor:
    """The running mean of the positive hinges, capped: what ``add_intra_mae`` adds to the margin."""
    return (0.99 * intra + 0.01 * positive).clamp_max(o.max_negative_margin)


def triplet_math(d: Tensor, labels: Tensor, o: Triplet) -> tuple[Tensor, Tensor]:
    """(1/N) sum_i [ sum_j w- (d_iy + m - d_ij)_+ + w+ d_iy where ``add_center_loss`` ]: the sum over all
    other classes or the hardest alone, and none in rows whose positive is beyond the upper bound.
    """
    target, is_target = _split(d, labels)
    statistics = torch.stack([target.mean(), _mean_negative(d, is_target)]).detach()
    hinge = (target + o.margin - d).clamp_min(0).masked_fill(is_target, 0)
    if o.hardest_only:
        hinge = hinge.amax(1, keepdim=True)
    if o.positive_first:
        hinge = hinge.masked_fill(target.detach() > o.positive_upper_bound, 0)
    total = o.negative_weight * hinge.sum()
    if o.add_center_loss:
        total = total + o.positive_weight * target.sum()
    return total / d.shape[0], statistics


def triplet_caffe(d: Tensor, labels: Tensor, o: Triplet) -> tuple[Tensor, Tensor]:
    """Value (of the hinges alone) and gradient of Caffe's layer: the positive gets w+ once per row, however
    many negatives are active, and with ``add_center_loss`` also where none is."""
    given, d = d, d.detach()
    columns = torch.arange(d.shape[1], device=d.device)
    target, is_target = _split(d, labels)
    statistics = torch.stack([target.mean(), _mean_negative(d, is_target)])
    buffer = (target + o.margin - d).clamp_min(0).masked_fill(is_target, 0) * o.negative_weight
    far = (target > o.positive_upper_bound) & o.positive_first
    active = (target + o.margin > d) & ~is_target
    slope = torch.where(active, torch.full_like(d, -o.negative_weight), torch.zeros_like(d))
    if o.hardest_only:
        positive = torch.where(buffer > 0, buffer, torch.full_like(buffer, -torch.inf))
        found = (buffer > 0).any(1, keepdim=True)
        hardest = columns == positive.argmax(1, keepdim=True)
        buffer = torch.where(hardest | ~found, buffer, torch.zeros_like(buffer))
        # A hardest distance of exactly zero keeps its forward value for a gradient.
        moved = hardest & found & (d != 0)
        slope = torch.where(moved, torch.full_like(d, -o.negative_weight), buffer)
        active = moved
    pulled = active.any(1, keepdim=True) | o.add_center_loss | far
    slope = torch.where(is_target, o.positive_weight * pulled.to(d.dtype), slope.masked_fill(far, 0))
    value = buffer.masked_fill(far, 0).abs().sum() / d.shape[0]
    return _WrittenOut.apply(given, value, slope / d.shape[0]), statistics
