"""Stand-in while the engine's comes."""

from dataclasses import dataclass

import torch

from .margins import Margin


@dataclass(frozen=True, eq=False)
class RowMargin(Margin):
    m1: object = 1.0
    m2: object = 0.0
    m3: object = 0.0
    guard: str = "shift"


def loss_of_psi(x, weight, labels, scale, psi, sample_weight, class_weight, options):
    from .. import reference as R

    kept = labels != (options.ignore_index if options.ignore_index is not None else -(1 << 63))
    if sample_weight is not None:
        kept = kept & (sample_weight != 0)
    cos = R.cosine(R._counting(x, kept), weight, options.eps).double()
    safe = labels.clamp(0, weight.shape[0] - 1)[:, None]
    target = psi(c := cos.gather(1, safe).squeeze(1))[:, None]
    if options.margin_gradient == "straight":
        target = psi(c.detach())[:, None] + (c - c.detach())[:, None]
    logits = scale * cos.scatter(1, safe, target)
    every = torch.logsumexp(logits, 1, keepdim=True) - logits
    of_class = cos.new_ones(weight.shape[0]) if class_weight is None else class_weight.to(cos.dtype)
    of_row = cos.new_ones(x.shape[0]) if sample_weight is None else sample_weight.to(cos.dtype)
    of_target = of_class[safe.squeeze(1)]
    losses = (1 - options.label_smoothing) * of_target * every.gather(1, safe).squeeze(1)
    if options.label_smoothing > 0:
        losses = losses + options.label_smoothing / weight.shape[0] * (every * of_class).sum(1)
    losses = torch.where(kept, of_row * losses, 0)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if options.reduction == "none":
        return losses.to(wide)
    if options.reduction == "sum":
        return losses.sum().to(wide)
    total_weight = torch.where(kept, of_row * of_target, 0).sum()
    empty = total_weight == 0
    return torch.where(empty, 0, losses.sum() / torch.where(empty, 1, total_weight)).to(wide)


def fused(cos, m):
    sine = ((1 - cos) * (1 + cos)).clamp_min(1e-8).sqrt()
    angle = m.m1 * torch.atan2(sine, cos) + m.m2
    psi = angle.cos() - m.m3
    if m.guard == "easy":
        psi = torch.where(cos > 0, psi, cos)
    return psi
