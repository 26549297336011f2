"""What the functions compute, written down once more: straight from the paper and the documentation.

Independent of ``normface_ext.reference``: nothing here calls the package. Tensors come in the dtype to
compute in, and PyTorch's autograd gives the gradients. Rows are divided by a power of two near their size
first, so that no square overflows: in float32 these formulas are as exact as plain torch can be at any
magnitude.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .rounding import EXACT, Rounding

SIN_FLOOR = 1e-4  # the documented floor of sin(theta) in slopes under an angular margin


def unit(
    x: Tensor, dim: int = 1, p: int = 2, eps: float = 1e-12, r: Rounding = EXACT
) -> tuple[Tensor, Tensor]:
    """(x / n, n) with n = sqrt(sum x^2 + eps) for p = 2, sum |x| + eps for p = 1 (section 3.1)."""
    if p == 1:
        n = x.abs().sum(dim, keepdim=True) + eps
        return x / r.norms(n), n
    largest = x.detach().abs().amax(dim, keepdim=True).clamp_min(math.sqrt(eps))
    usable = (largest > 0) & largest.isfinite()
    _, exponent = torch.frexp(torch.where(usable, largest, 1.0))
    m = torch.ldexp(
        torch.ones_like(largest), exponent.clamp(-1020 if x.dtype == torch.float64 else -125, None)
    )
    u = x / m
    n = (u.square().sum(dim, keepdim=True) + eps / m / m).sqrt()
    return u / r.norms(n), m * n


def scaled_cosines(x: Tensor, w: Tensor, s: Tensor, eps: float, normalize_input: bool, r: Rounding) -> Tensor:
    """s <x, w> / (|x| |w|), or s <x, w> / |w| (section 3.2)."""
    u, n = unit(x, eps=eps, r=r)
    c = u @ unit(w, eps=eps, r=r)[0].t()
    c = r.cosines(c, torch.zeros_like(c, dtype=torch.bool))
    return s * c if normalize_input else s * (c * n)


def psi(c: Tensor, m1: float, m2: float, m3: float, guard: str | None = None) -> Tensor:
    """cos(m1 theta + m2) - m3; past pi a line of slope one in the cosine, unless the guard is "none"."""
    if m1 == 1 and m2 == 0:
        return c - m3
    room = (1 - c) * (1 + c)
    held = torch.atan2(room.clamp_min(SIN_FLOOR**2).sqrt(), c)
    theta = held + (torch.atan2(room.detach().clamp_min(0).sqrt(), c.detach()) - held).detach()
    angle = m1 * theta + m2
    if guard == "none":
        return angle.cos() - m3
    shift = guard == "shift" or (guard is None and m1 == 1)
    drop = m2 * math.sin(m2) if shift else 1 + math.cos((math.pi - m2) / m1)
    return torch.where(angle > math.pi, c - drop, angle.cos()) - m3


def own_columns(labels: Tensor, classes: int) -> Tensor:
    """Where the label's column is, [N, C]."""
    return labels[:, None] == torch.arange(classes)


def reduce(losses: Tensor, kept: Tensor, reduction: str, weights: Tensor | None = None) -> Tensor:
    """Of the losses of the rows that are kept; "none" gives the others 0."""
    if reduction == "none":
        return losses.new_zeros(len(kept)).masked_scatter(kept, losses)
    if reduction == "sum":
        return losses.sum()
    count = losses.new_tensor(len(losses)) if weights is None else weights.sum()
    return losses.sum() / torch.where(count == 0, 1, count)


def softmax_loss(
    x: Tensor,
    w: Tensor,
    labels: Tensor,
    s: Tensor,
    *,
    margin: tuple[Any, ...],
    sub_centers: int,
    reduction: str,
    ignore_index: int,
    eps: float,
    sample_weight: Tensor | None,
    class_weight: Tensor | None,
    smoothing: float,
    r: Rounding,
) -> Tensor:
    """-log softmax_j(s psi(c_ij))[y_i] as softplus(lse of the others - the target's logit). Of a class's
    centres the nearest counts."""
    classes, kept = w.shape[0] // sub_centers, labels != ignore_index
    x, y = x[kept], labels[kept]
    own = own_columns(y, classes)
    c = unit(x, eps=eps, r=r)[0] @ unit(w, eps=eps, r=r)[0].t()
    c = r.cosines(c, own.repeat_interleave(sub_centers, 1)).unflatten(1, (classes, -1))
    every = c.flatten(1).sum(1, keepdim=True)
    c = c.max(2).values
    if sub_centers > 1:  # NaN of one centre reaches them all
        c = c + torch.where(every.isnan(), 0 * every, 0)
    c_y = c.gather(1, y[:, None])
    z_y = (s * psi(c_y, *margin)).squeeze(1)
    z = r.logits(s * c)
    if classes == 1:
        loss_y = 0 * z_y
    else:
        loss_y = torch.logaddexp(z.masked_fill(own, -math.inf).logsumexp(1) - z_y, torch.zeros_like(z_y))
    u = x.new_ones(classes) if class_weight is None else class_weight
    v = x.new_ones(len(x)) if sample_weight is None else sample_weight[kept]
    losses = (1 - smoothing) * u[y] * loss_y
    if smoothing:
        every = (loss_y + z_y)[:, None] - torch.where(own, z_y[:, None], z)
        losses = losses + smoothing / classes * (torch.where(own, loss_y[:, None], every) * u).sum(1)
    return reduce(v * losses, kept, reduction, v * u[y])


def agent_distances(x: Tensor, w: Tensor | None, own: Tensor, eps: float, r: Rounding) -> Tensor:
    """|x/|x| - w/|w||^2 = 2 - 2 c, or what is given."""
    if w is None:
        return r.distances(x)
    return 2 - 2 * r.cosines(unit(x, eps=eps, r=r)[0] @ unit(w, eps=eps, r=r)[0].t(), own)


def hardest_alone(terms: Tensor, d: Tensor, own: Tensor) -> Tensor:
    """Of each row the term of the nearest class that is not the label's, the first of equal ones."""
    first = d.detach().masked_fill(own, math.inf).argmin(1, keepdim=True)
    return torch.where(torch.arange(d.shape[1]) == first, terms, 0)


def contrastive_over_agents(
    x: Tensor,
    w: Tensor | None,
    labels: Tensor,
    sample_weight: Tensor | None,
    *,
    pos_margin: float,
    neg_margin: float,
    pos_weight: float,
    neg_weight: float,
    hardest_only: bool,
    max_positive_only: bool,
    positive_outlier_thresh: float,
    positive_first: bool,
    positive_upper_bound: float,
    exp_negative_weight: bool,
    normalize_negative: float | None,
    ignore_index: int,
    reduction: str,
    eps: float,
    r: Rounding,
) -> tuple[Tensor, Tensor]:
    """(loss, [mean positive hinge, mean negative hinge]) of section 4."""
    classes = x.shape[1] if w is None else w.shape[0]
    kept = labels != ignore_index
    x, y = x[kept], labels[kept]
    v = x.new_ones(len(x)) if sample_weight is None else sample_weight[kept]
    own = own_columns(y, classes)
    d = agent_distances(x, w, own, eps, r)
    d_y = d.gather(1, y[:, None]).squeeze(1)
    excess = d_y - pos_margin
    # Comparisons are such that NaN is in.
    hinge = torch.where(
        excess > positive_outlier_thresh, positive_outlier_thresh, torch.where(excess <= 0, 0, excess)
    )
    pull = hinge
    if max_positive_only and len(x):
        pull = torch.where(torch.arange(len(x)) == hinge.detach().argmax(), hinge, 0)
    gap = neg_margin - d
    active = ~(gap <= 0) & ~own
    push = torch.where(active, (-d).exp() if exp_negative_weight else gap, 0)
    slopes = torch.where(active, push if exp_negative_weight else torch.ones_like(push), 0).detach()
    if hardest_only:
        push, slopes = hardest_alone(push, d, own), hardest_alone(slopes, d, own)
    pushed = ~((d_y > positive_upper_bound) & positive_first)
    negative, slope = torch.where(pushed, push.sum(1), 0), torch.where(pushed, slopes.sum(1), 0)
    if normalize_negative is not None:
        mean = abs(neg_weight) * reduce(v * slope, kept, "mean", v) / normalize_negative
        negative = negative / torch.where(mean > pos_weight, mean, 1)
    gaps = torch.where(own, 0, gap.clamp_min(0)).sum(1) / max(1, classes - 1)
    stats = torch.stack([reduce(v * part, kept, "mean", v) for part in (hinge, gaps)]).detach()
    return reduce(v * (pos_weight * pull + neg_weight * negative), kept, reduction, v), stats


def triplet_over_agents(
    x: Tensor,
    w: Tensor | None,
    labels: Tensor,
    sample_weight: Tensor | None,
    *,
    margin: float,
    pos_weight: float,
    neg_weight: float,
    hardest_only: bool,
    add_center_loss: bool,
    positive_first: bool,
    positive_upper_bound: float,
    ignore_index: int,
    reduction: str,
    eps: float,
    r: Rounding,
) -> tuple[Tensor, Tensor]:
    """(loss, [mean distance to the label's agent, mean distance to the others]) of section 4."""
    classes = x.shape[1] if w is None else w.shape[0]
    kept = labels != ignore_index
    x, y = x[kept], labels[kept]
    v = x.new_ones(len(x)) if sample_weight is None else sample_weight[kept]
    own = own_columns(y, classes)
    d = agent_distances(x, w, own, eps, r)
    d_y = d.gather(1, y[:, None]).squeeze(1)
    gap = margin + d_y[:, None] - d
    terms = torch.where(~(gap <= 0) & ~own, gap, 0)
    if hardest_only:
        terms = hardest_alone(terms, d, own)
    losses = neg_weight * torch.where((d_y > positive_upper_bound) & positive_first, 0, terms.sum(1))
    if add_center_loss:
        losses = losses + pos_weight * d_y
    others = torch.where(own, 0, d).sum(1) / max(1, classes - 1)
    stats = torch.stack([reduce(v * part, kept, "mean", v) for part in (d_y, others)]).detach()
    return reduce(v * losses, kept, reduction, v), stats


def distances_to_agents(
    x: Tensor, w: Tensor, *, p: int, normalize: bool, labels: Tensor | None, eps: float, r: Rounding
) -> Tensor:
    """sum |x_i - w_j|^p; with labels only the label's agent learns from a row."""
    if normalize:
        w = unit(w, eps=eps, r=r)[0]
    agents = w[None]
    if labels is not None:
        own = labels[:, None] == torch.arange(w.shape[0])
        agents = torch.where(own[:, :, None], agents, agents.detach())
    difference = x[:, None] - agents
    return (difference.square() if p == 2 else difference.abs()).sum(2)


def contrastive_of_pairs(
    a: Tensor, b: Tensor, same: Tensor, *, margin: float, reduction: str, r: Rounding
) -> Tensor:
    """1/2 (d^2 where same, (margin - d)_+^2 elsewhere); at d = 0 the push apart has no slope."""
    square = r.distances((a - b).square().sum(1))
    apart = square != 0
    d = torch.where(apart, torch.where(apart, square, 1).sqrt(), 0)
    losses = torch.where(same.bool(), square, (margin - d).clamp_min(0).square()) / 2
    return reduce(losses, torch.ones_like(apart), reduction)


def triplets_of_rows(
    a: Tensor, b: Tensor, c: Tensor, *, margin: float, reduction: str, r: Rounding
) -> Tensor:
    """(margin + |a - p|^2 - |a - n|^2)_+."""
    near, far = (r.distances((a - other).square().sum(1), way) for other, way in ((b, 1), (c, -1)))
    losses = (margin + near - far).clamp_min(0)
    return reduce(losses, torch.ones_like(losses, dtype=torch.bool), reduction)
