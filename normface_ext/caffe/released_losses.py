"""The released backward of NormFace's metric losses, as it was: mode "caffe" of a net, and
``caffe.general_contrastive_loss`` and ``general_triplet_loss``.

Happynear's Caffe layers GeneralContrastiveLoss and GeneralTripletLoss work on an N x C matrix of
distances and are not everywhere the gradient of what they print. Old models were trained so; to repeat
them, or to compare, the differences are kept here, and nowhere else. Plain torch on the full matrix.

C-contrastive:
    the outlier threshold T clips the positive hinge d - m, but the gradient stops at d >= T;
    max_negative_only starts its search at class 0 without asking whether that is the label: a row of
    class 0 whose positive term exceeds every hinge loses its negative;
    max_positive_only keeps the smallest positive of the batch, not the largest;
    positive_first: past the bound the positive's gradient is w+, whatever margin, threshold and
    max_positive_only say, while the printed loss still clips;
    normalize_negative divides the gradient and leaves the loss as it is;
    negative weights count by their magnitude in the loss, with their sign in the gradient.
C-triplet:
    the positive's gradient is w+ once per row, not once per active negative;
    add_center_loss adds that gradient to inactive rows and nothing to the loss;
    hardest_only with a hardest distance of exactly 0 leaves the hinge itself as the gradient;
    positive_first as above.
Contrastive, of pairs of rows:
    the push apart divides by d + 1e-4 where its derivative divides by d.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..agents.options import ContrastiveTerms, TripletTerms


def _own(distances: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(the label's distance [N, 1], where the label's column is [N, C])."""
    columns = torch.arange(distances.shape[1], device=distances.device)
    return distances.gather(1, labels[:, None]), columns == labels[:, None]


def contrastive(
    distances: Tensor, labels: Tensor, options: ContrastiveTerms
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradient [N, C], [mean positive hinge, mean negative hinge])."""
    o, (batch, classes) = options, distances.shape
    target, own = _own(distances, labels)
    far = (target > o.positive_upper_bound) & o.positive_first
    positive = (target - o.pos_margin).clamp(0, o.positive_outlier_thresh)
    hinge = torch.where(own, 0, (o.neg_margin - distances).clamp_min(0))
    active = ~own & (distances < o.neg_margin)
    size = torch.where(active, (-distances).exp() if o.exp_negative_weight else hinge, 0) * o.neg_weight
    printed = torch.where(own, positive * o.pos_weight, torch.where(far, 0, size))
    chosen = ~own
    if o.hardest_only:
        # The largest active term wins over entry 0, even where that is the label's.
        entries = torch.where(own, positive * o.pos_weight, size)
        candidates = torch.where(active, entries, -torch.inf)
        best, index = candidates.max(1, keepdim=True)
        first = (candidates == best).to(torch.uint8).argmax(1, keepdim=True)
        index = torch.where(best > entries[:, :1], first, 0)
        chosen = ~own & (torch.arange(classes, device=index.device) == index)
        printed = torch.where(own | chosen, printed, 0)
    counted = torch.ones_like(target, dtype=torch.bool)
    if o.max_positive_only:
        weighted = (positive * o.pos_weight).squeeze(1)
        smallest = (weighted == weighted.min()).to(torch.uint8).argmax()
        counted = (torch.arange(batch, device=target.device) == smallest)[:, None]
        printed = torch.where(own & ~counted, 0, printed)
    pulled = (target > o.pos_margin) & (target < o.positive_outlier_thresh) & counted
    pull = (far | pulled).to(distances.dtype) * o.pos_weight
    pushed = (active & chosen & ~far).to(distances.dtype) * o.neg_weight
    push = pushed * (-distances).exp() if o.exp_negative_weight else pushed
    if o.normalize_negative is not None:
        total = push.sum().abs() / o.normalize_negative / batch
        push = push / torch.where((total > o.pos_weight) & (total > 0), total, 1)
    gradient = torch.where(own, pull, -push) / batch
    return printed.abs().sum() / batch, gradient, contrastive_stats(distances, labels, o)


def contrastive_stats(distances: Tensor, labels: Tensor, options: ContrastiveTerms) -> Tensor:
    """[mean positive hinge, mean negative hinge]"""
    batch, classes = distances.shape
    target, own = _own(distances, labels)
    positive = (target - options.pos_margin).clamp(0, options.positive_outlier_thresh)
    hinge = torch.where(own, 0, (options.neg_margin - distances).clamp_min(0))
    return torch.stack([positive.sum() / batch, hinge.sum() / batch / (classes - 1)])


def triplet(distances: Tensor, labels: Tensor, options: TripletTerms) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradient [N, C], [mean positive distance, mean negative distance])."""
    o, (batch, classes) = options, distances.shape
    target, own = _own(distances, labels)
    far = (target > o.positive_upper_bound) & o.positive_first
    printed = torch.where(own, 0, (target + o.margin - distances).clamp_min(0) * o.neg_weight)
    if o.hardest_only:
        best, _ = printed.max(1, keepdim=True)
        first = (printed == best).to(torch.uint8).argmax(1, keepdim=True)
        hardest = (torch.arange(classes, device=first.device) == first) & (best > 0) & ~own
        printed = torch.where((best > 0) & ~hardest, 0, printed)
        pushed = hardest & (distances != 0)
        push = torch.where(pushed, -o.neg_weight, torch.where(own, 0, printed))
    else:
        pushed = ~own & (target + o.margin > distances)
        push = pushed.to(distances.dtype) * -o.neg_weight
    pulled = pushed.any(1, keepdim=True) | o.add_center_loss
    pull = (far | pulled).to(distances.dtype) * o.pos_weight
    gradient = torch.where(own, pull, torch.where(far, 0, push)) / batch
    printed = torch.where(far, 0, printed)
    return printed.abs().sum() / batch, gradient, triplet_stats(distances, labels)


def triplet_stats(distances: Tensor, labels: Tensor) -> Tensor:
    """[mean positive distance, mean negative distance]"""
    batch, classes = distances.shape
    target, _ = _own(distances, labels)
    others = distances.sum() - target.sum()
    return torch.stack([target.sum() / batch, others / batch / (classes - 1)])


def pair_contrastive(squared: Tensor, same: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """(loss, gradient with respect to the squared distances [N])."""
    count = 2 * max(1, len(squared))
    distance = squared.sqrt()
    gap = (margin - distance).clamp_min(0)
    value = torch.where(same, squared, gap.square()).sum() / count
    return value, torch.where(same, 1, -gap / (distance + 1e-4)) / count
