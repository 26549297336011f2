"""The specification: every op in plain PyTorch, slow, complete and differentiable to any order.

Tests hold the kernels against these functions in float64, and second derivatives of the fused ops
come from here. Nothing in this file is optimised. Arguments are those of ``normface_ext.functional``;
bad input is that module's business. What only says how a loss is computed (workspace, active_limit,
check_finite) is taken where the options are declared, and changes nothing here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .agents.options import (
    AgentOptions,
    ContrastiveKeywords,
    ContrastiveOptions,
    TripletKeywords,
    TripletOptions,
)
from .engine.options import takes
from .engine.statistics import LEFT_TO_LEARN, Statistics
from .sigmoid.options import SphereFace2Keywords, SphereFace2Options
from .softmax.batch_margins import BatchMargin, Psi, Rows, straightened
from .softmax.hard_negatives import HardNegatives, filtered
from .softmax.margins import NO_MARGIN, ArcFace, CombinedMargin, CosFace, Margin

if TYPE_CHECKING:
    from typing_extensions import Unpack

#: A loss, or with ``return_statistics`` (loss, Statistics).
Result = Tensor | Any

#: In slopes sin(theta) is held at this floor, which keeps them finite at cos theta = +-1.
SIN_FLOOR = 1e-4


def _wide(x: Tensor) -> Tensor:
    """16-bit values compute in float32, the others in themselves."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _norm(x: Tensor, dim: int, p: int, eps: float | Tensor) -> Tensor:
    if p == 1:
        return x.abs().sum(dim, keepdim=True) + eps
    return (x.square().sum(dim, keepdim=True) + eps).sqrt()


def _magnitude(x: Tensor, dim: int, p: int, eps: float) -> Tensor:
    """A power of two at the largest entry of each row (or at eps), a constant: the square of what is divided
    by it neither overflows nor vanishes, and no digit changes."""
    x = x.detach()
    if x.shape[dim] == 0:
        return x.new_ones(x.sum(dim, keepdim=True).shape)
    largest = x.abs().amax(dim, keepdim=True).clamp_min(eps if p == 1 else math.sqrt(eps))
    mantissa, _ = torch.frexp(largest)
    return torch.where(largest.isfinite() & (largest > 0), largest / (2 * mantissa), 1)


def _unit(x: Tensor, dim: int, p: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y = x / n, n / m, m) with n = sqrt(sum x^2 + eps) or sum |x| + eps and the rows' magnitudes m."""
    size = _magnitude(x, dim, p, eps)
    scaled = x / size
    if p == 1:  # |x| by x's own sign, which an entry that vanishes beside the largest still has
        norm = (scaled * x.detach().sign()).sum(dim, keepdim=True) + eps / size
    else:
        norm = _norm(scaled, dim, p, eps / size / size)
    return scaled / norm, norm, size


def normalize(
    x: Tensor, dim: int = 1, p: int = 2, eps: float = 1e-12, return_norm: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """y = x / n with n = sqrt(sum x^2 + eps) for p = 2, sum |x| + eps for p = 1 (paper section 3.1)."""
    unit, norm, size = _unit(_wide(x), dim, p, eps)
    y = unit.to(x.dtype)
    return (y, norm * size) if return_norm else y


def normalize_backward(
    grad_y: Tensor | None, grad_norm: Tensor | None, x: Tensor, dim: int, p: int, eps: float
) -> Tensor:
    """dx = (g - slope <y, g>) / n + g_n slope, slope = dn/dx: y for p = 2, sign(x) for p = 1."""
    wide = _wide(x)
    y, norm, size = _unit(wide, dim, p, eps)
    slope = y if p == 2 else wide.sign()
    dx = torch.zeros_like(wide)
    if grad_y is not None:
        g = _wide(grad_y)
        dx = dx + (g - slope * (y * g).sum(dim, keepdim=True)) / norm / size
    if grad_norm is not None:
        dx = dx + grad_norm * slope
    return dx.to(x.dtype)


def cosine(x: Tensor, weight: Tensor, eps: float = 1e-12, normalize_input: bool = True) -> Tensor:
    """c_ij = <x_i, w_j> / (||x_i|| ||w_j||), [N, C]."""
    x, weight = _wide(x), _wide(weight)
    if normalize_input:
        x = _unit(x, 1, 2, eps)[0]
    return x @ _unit(weight, 1, 2, eps)[0].t()


def _pooled(cosines: Tensor, sub_centers: int) -> Tensor:
    """Of a class the nearest of its centres, of equal ones the first: [N, C K] -> [N, C]."""
    return cosines.view(len(cosines), -1, sub_centers).max(2).values


def norm_linear(
    x: Tensor,
    weight: Tensor,
    scale: float | Tensor = 1.0,
    *,
    normalize_input: bool = True,
    eps: float = 1e-12,
) -> Tensor:
    """s * cos, [N, C], in x's dtype."""
    return (scale * cosine(x, weight, eps, normalize_input)).to(x.dtype)


def nearest_class(
    x: Tensor, weight: Tensor, *, sub_centers: int = 1, eps: float = 1e-12
) -> tuple[Tensor, Tensor]:
    """(argmax_j cos_ij, of equal ones the first, and that cosine), [N] each."""
    best = _pooled(cosine(x, weight, eps).detach(), sub_centers).max(1)
    return best.indices, best.values


def target_rank(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    sub_centers: int = 1,
    ignore_index: int | None = -100,
    eps: float = 1e-12,
) -> Tensor:
    """#{j : cos_ij > cos_iy}, int64 [N]; -1 where the row is ignored."""
    cosines = _pooled(cosine(x, weight, eps).detach(), sub_centers)
    kept = _kept(labels, ignore_index, None)
    own = cosines.gather(1, labels.long().clamp(0, cosines.shape[1] - 1)[:, None])
    return torch.where(kept, (cosines > own).sum(1), -1)


def norm_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, eps: float, normalize_input: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``norm_linear`` with respect to x, weight and scale, written out."""
    grad, wide_x, wide_w = _wide(grad), _wide(x), _wide(weight)
    one = torch.ones_like(wide_x[:, :1])
    x_hat, norm_x, size_x = _unit(wide_x, 1, 2, eps) if normalize_input else (wide_x, one, one)
    w_hat, norm_w, size_w = _unit(wide_w, 1, 2, eps)
    dx, dw_hat = scale * (grad @ w_hat), scale * (grad.t() @ x_hat)
    if normalize_input:
        dx = (dx - x_hat * (x_hat * dx).sum(1, keepdim=True)) / norm_x / size_x
    dw = (dw_hat - w_hat * (w_hat * dw_hat).sum(1, keepdim=True)) / norm_w / size_w
    dscale = (grad * (x_hat @ w_hat.t())).sum()
    return dx.to(x.dtype), dw.to(weight.dtype), dscale.to(scale.dtype)


def _angle(cos: Tensor) -> Tensor:
    """theta = arccos c, with the slopes of an angle whose sine is held at its floor."""
    room = (1 - cos) * (1 + cos)
    held = torch.atan2(room.clamp_min(SIN_FLOOR**2).sqrt(), cos)
    exact = torch.atan2(room.detach().clamp_min(0).sqrt(), cos.detach())
    return held + (exact - held).detach()


def _combined(cos: Tensor, m1: Tensor, m2: Tensor, m3: Tensor, guard: str | None) -> Tensor:
    """cos(m1 theta + m2) - m3, past m1 theta + m2 = pi as the guard says."""
    theta = _angle(cos)
    angle = m1 * theta + m2
    # Without an angular margin psi is the cosine, to the last digit; it still has slopes along m1 and m2.
    along = (m1 * theta.detach() + m2).cos()
    psi = torch.where((m1 == 1) & (m2 == 0), cos + along - along.detach(), angle.cos())
    if guard == "easy":
        psi = torch.where(cos <= 0, cos, psi)
    elif guard != "none":
        join = 1 + torch.where(m2 < math.pi, (math.pi - m2) / m1, 0).cos()
        shift = m2 * m2.sin()
        k = {"shift": shift, "join": join}.get(guard or "", torch.where(m1 == 1, shift, join))
        psi = torch.where(angle > math.pi, cos - k, psi)
    return psi - m3


def _held(cos: Tensor, m1: Tensor, m2: Tensor, m3: Tensor, guard: str | None) -> Tensor:
    """cos(theta + m2) - m3 with the cosine held in +-0.999 and the angle in [0.001, pi - 0.001] (AdaFace)."""
    edge = 1e-3
    return (_angle(cos.clamp(edge - 1, 1 - edge)) + m2).clamp(edge, math.pi - edge).cos() - m3


def _circle(cos: Tensor, m1: Tensor, m2: Tensor, m3: Tensor, guard: str | None) -> Tensor:
    """[1 + m3 - c]_+ (c - 1 + m3); of the bracket's slope, m2 (Circle loss at class level)."""
    bracket = (1 + m3 - cos).clamp_min(0)
    return (bracket.detach() + m2 * (bracket - bracket.detach())) * (cos - 1 + m3)


def phi(cos: Tensor, m: float | Tensor) -> Tensor:
    """(-1)^k cos(m theta) - 2 k, k = floor(m theta / pi), of cosines: SphereFace's, falling all the way."""
    angle = m * _angle(cos)
    k = (angle.detach() / math.pi).floor()
    return (1 - 2 * (k % 2)) * angle.cos() - 2 * k


def _sphere(cos: Tensor, m1: Tensor, m2: Tensor, m3: Tensor, guard: str | None) -> Tensor:
    """(m2 c + phi(theta)) / (1 + m2), m1 the margin (SphereFace)."""
    return (m2 * cos + phi(cos, m1)) / (1 + m2)


#: The formulas of margins, by their numbers in csrc/math/margins/margin.h.
FORMULAS: dict[int, Callable[[Tensor, Tensor, Tensor, Tensor, str | None], Tensor]] = {
    0: _combined,
    1: _held,
    2: _circle,
    3: _sphere,
}


def margin(cos: Tensor, m: Margin, labels: Tensor | None = None, gradient: str = "exact") -> Tensor:
    """psi of the target cosines [N].

    ``labels`` [N] choose among numbers per class. With the gradient "straight" d psi / d cos is 1, and the
    margin's numbers have none.
    """
    numbers = [torch.as_tensor(value, dtype=cos.dtype, device=cos.device) for value in m.numbers()]
    if not m.per_row:
        numbers = [v if v.dim() == 0 else v[labels.clamp(0, len(v) - 1)] for v in numbers]  # type: ignore[union-attr]
    m1, m2, m3 = numbers
    psi = FORMULAS[m.formula](cos, m1, m2, m3, m.guard)
    return psi if gradient == "exact" else cos + (psi - cos).detach()


def hard_negatives(cos: Tensor, found: HardNegatives) -> Tensor:
    """f of the cosines [N, C] of other classes: past the row's threshold a2 c^2 + a1 c + a0 with the slope
    g1 c + g0, else ``below * c``."""
    (a2, a1, a0), (g1, g0) = found.logit, found.slope
    past = cos > found.threshold[:, None]
    c = torch.where(past, cos, 0)
    f = (a2 * c + a1) * c + a0
    of_slope = (g1 / 2 * c + g0) * c  # g1 c + g0 is its derivative
    return torch.where(past, of_slope + (f - of_slope).detach(), found.below * cos).to(cos.dtype)


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
    kept = _kept(labels, ignore_index, None)
    cos = _pooled(cosine(_counting(x.double(), kept), weight.double(), eps), sub_centers)
    own = labels.clamp(0, cos.shape[1] - 1)[:, None]
    others = torch.arange(cos.shape[1], device=labels.device) != own  # [N, C]
    rest = cos[others].view(cos.shape[0], -1)
    logits = _column(scale) * rest
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
    from_target = _softplus(log_sum_others - scale * psi)  # -log p_y
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
    return _weighted(losses, (row_weight * target_weight).sum(), reduction)


@torch.no_grad()
def statistics(cos: Tensor, labels: Tensor, kept: Tensor, losses: Tensor, active: Tensor) -> Statistics:
    """Plain means over the rows that count, from all cosines [N, C] and the rows' own losses [N]."""
    number, safe = kept.sum(), labels.long().clamp(0, cos.shape[1] - 1)[:, None]
    own = cos.gather(1, safe)
    nearer = (~(cos <= own)).scatter(1, safe, False)

    def mean(values: Tensor) -> Tensor:
        return torch.where(kept, values.double(), 0).sum() / number.clamp_min(1)

    target = own[:, 0].double()
    angle = torch.rad2deg(target.clamp(-1, 1).acos())
    return Statistics(mean(losses), mean(target), mean(angle), mean(~nearer.any(1)), mean(active), number)


def _learns(probability: Tensor) -> Tensor:
    """Whether what is not yet where it belongs is worth learning; NaN is."""
    return ~(probability <= LEFT_TO_LEARN)


class _Rows(NamedTuple):
    """The rows of a loss. With labels_b each stands there twice, first all with labels, then all with
    labels_b, and lam shares its weight out."""

    x: Tensor
    labels: Tensor
    sample_weight: Tensor | None
    share: Tensor | None  # how much of a row each is

    def joined(self, made: Tensor, reduction: str) -> Tensor:
        """What a loss makes of these rows, as what it makes of the rows that were given."""
        if self.share is None or reduction not in ("none", "batchmean"):
            return made
        return made.view(2, -1).sum(0) if reduction == "none" else 2 * made  # it was divided by 2 N


def _rows(
    x: Tensor,
    labels: Tensor,
    sample_weight: Tensor | None,
    labels_b: Tensor | None,
    lam: float | Tensor | None,
    ignore_index: int | None,
) -> _Rows:
    if labels_b is None:
        return _Rows(x, labels, sample_weight, None)
    of_first = torch.as_tensor(lam, dtype=_wide(x).dtype, device=x.device).expand(len(x))
    share, both = torch.cat([of_first, 1 - of_first]), torch.cat([labels, labels_b])
    weight = share if sample_weight is None else share * sample_weight.repeat(2)
    alone = ~_kept(both, ignore_index, weight).view(2, -1).all(0).repeat(2)
    return _Rows(torch.cat([x, x]), both, weight, torch.where(alone, 1, share))


def _weighted(losses: Tensor, total_weight: Tensor, reduction: str) -> Tensor:
    """The mean divides by the sum of the weights, and is 0 where that is 0; "batchmean" by N."""
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if reduction == "batchmean":
        return losses.sum() / max(1, len(losses))
    empty = total_weight == 0
    return torch.where(empty, 0, losses.sum() / torch.where(empty, 1, total_weight))


def _column(scale: float | Tensor) -> float | Tensor:
    """A scale of every row, as a column."""
    return scale[:, None] if isinstance(scale, Tensor) and scale.dim() == 1 else scale


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
    given = _rows(x, labels, sample_weight, labels_b, lam, ignore_index)
    if given.share is not None:  # numbers of each row are those of both its labels
        scale = torch.cat([scale, scale]) if isinstance(scale, Tensor) and scale.dim() == 1 else scale
        if margin is not None and margin.per_row:
            tensors = {f.name: getattr(margin, f.name) for f in fields(margin)}  # type: ignore[arg-type]
            doubled = {n: t.repeat(2) for n, t in tensors.items() if isinstance(t, Tensor) and t.dim() == 1}
            margin = replace(margin, **doubled)  # type: ignore[type-var]
    x, labels, sample_weight, _ = given
    kept = _kept(labels, ignore_index, sample_weight)
    counting = _counting(x, kept)
    cos = _pooled(cosine(counting, weight, eps), sub_centers)
    if not normalize_input:
        scale = scale * (_wide(counting).square().sum(1) + eps).sqrt()
    safe = labels.clamp(0, cos.shape[1] - 1)[:, None]
    own = cos.gather(1, safe).squeeze(1)
    chosen: Margin | Psi | HardNegatives = margin or NO_MARGIN
    more = None
    if isinstance(margin, BatchMargin):
        norms = _wide(counting).double().square().sum(1).add(eps).sqrt() if margin.uses_norms else None
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
        target = _margin(own, chosen, labels, margin_gradient)
    else:
        target = (straightened(chosen) if margin_gradient == "straight" else chosen)(own).to(cos.dtype)
    logits = _column(scale) * others.scatter(1, safe, target[:, None])
    every = torch.logsumexp(logits, 1, keepdim=True) - logits  # -log p_j
    of_class = cos.new_ones(weight.shape[0]) if class_weight is None else class_weight.to(cos.dtype)
    of_row = cos.new_ones(x.shape[0]) if sample_weight is None else sample_weight.to(cos.dtype)
    of_target = of_class[safe.squeeze(1)]
    surprise = every.gather(1, safe).squeeze(1)
    each = (1 - label_smoothing) * of_target * surprise
    if label_smoothing > 0:
        each = each + label_smoothing / weight.shape[0] * (every * of_class).sum(1)
    losses = torch.where(kept, of_row * each, 0)
    loss = _weighted(losses, torch.where(kept, of_row * of_target, 0).sum(), reduction)
    if more is not None:
        weights = torch.where(kept, of_row.double(), 0)
        loss = loss + _weighted(weights * more, weights.sum(), reduction).to(loss.dtype)
        each = each + more
    if not return_statistics:
        return given.joined(loss, reduction)
    return loss, statistics(cos, labels, kept, each, _learns(-torch.expm1(-surprise)))


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
    """d_ij = sum (x_i - w_j)^2 for p = 2, sum |x_i - w_j| for p = 1, [N, C], in x's dtype."""
    features, agents = _wide(x), _wide(weight)
    if normalize:
        agents = _unit(agents, 1, 2, eps)[0]
    if update_center_only and labels is not None:
        own = labels[:, None] == torch.arange(weight.shape[0], device=labels.device)
        agents = torch.where(own[..., None], agents, agents.detach())
    difference = features[:, None] - agents
    return (difference.square() if p == 2 else difference.abs()).sum(2).to(x.dtype)


def _counting(x: Tensor, kept: Tensor) -> Tensor:
    """x with ones instead of the rows that do not count: what those hold, NaN included, reaches nothing."""
    return torch.where(kept[:, None], x, 1)


def _reduce(losses: Tensor, kept: Tensor, reduction: str, sample_weight: Tensor | None = None) -> Tensor:
    """The rows' losses, weighted; the mean divides by the sum of the weights and is 0 where that is 0."""
    if sample_weight is not None:
        losses = sample_weight.to(losses.dtype) * losses
    losses = torch.where(kept, losses, torch.zeros_like(losses))
    if sample_weight is None and reduction == "mean":
        return losses.sum() / kept.sum().clamp_min(1)
    weights = kept if sample_weight is None else torch.where(kept, sample_weight.to(losses.dtype), 0)
    return _weighted(losses, weights.sum(), reduction)


def _kept(labels: Tensor, ignore_index: int | None, sample_weight: Tensor | None) -> Tensor:
    """Which rows [N] count: neither ignored nor of weight 0."""
    kept = torch.ones_like(labels, dtype=torch.bool) if ignore_index is None else labels != ignore_index
    return kept if sample_weight is None else kept & (sample_weight != 0)


def _split(distances: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The label's distance [N], and the others' [N, C] with infinity in its place."""
    safe = labels.long().clamp(0, distances.shape[1] - 1)[:, None]
    return distances.gather(1, safe).squeeze(1), distances.scatter(1, safe, torch.inf)


def _agent_distances(
    x: Tensor, weight: Tensor, labels: Tensor, sample_weight: Tensor | None, options: AgentOptions
) -> Tensor:
    kept = _kept(labels, options.ignore_index, sample_weight)
    return 2 - 2 * cosine(_counting(x, kept), weight, options.eps)


@takes(ContrastiveOptions)
def c_contrastive_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    sample_weight: Tensor | None = None,
    labels_b: Tensor | None = None,
    lam: float | Tensor | None = None,
    return_statistics: bool = False,
    **options: Unpack[ContrastiveKeywords],
) -> Result:
    """loss_i = w+ min(T, (d_iy - m+)_+) + w- sum_{j != y} (m- - d_ij)_+ (paper section 4)."""
    o = ContrastiveOptions.of("c_contrastive_loss", options)
    given = _rows(x, labels, sample_weight, labels_b, lam, o.ignore_index)
    distances = _agent_distances(given.x, weight, given.labels, given.sample_weight, o)
    made = contrastive_of_distances(
        distances,
        given.labels,
        sample_weight=given.sample_weight,
        return_statistics=return_statistics,
        **options,
    )
    return made if return_statistics else given.joined(made, o.reduction)


@takes(ContrastiveOptions)
def contrastive_of_distances(
    distances: Tensor,
    labels: Tensor,
    *,
    sample_weight: Tensor | None = None,
    return_statistics: bool = False,
    **options: Unpack[ContrastiveKeywords],
) -> Result:
    """``c_contrastive_loss`` of given distances [N, C]."""
    o = ContrastiveOptions.of("contrastive_of_distances", options)
    kept = _kept(labels, o.ignore_index, sample_weight)
    every = _counting(_wide(distances), kept)
    target, others = _split(every, labels)
    excess = target - o.pos_margin
    positive = excess.clamp(0, o.positive_outlier_thresh)
    pulled = ~((excess <= 0) | (excess > o.positive_outlier_thresh))
    if o.max_positive_only and len(labels):
        best = torch.where(kept, positive, -torch.inf).argmax()
        pulled &= torch.arange(len(labels), device=labels.device) == best
        positive = torch.where(torch.arange(len(labels), device=labels.device) == best, positive, 0)
    if o.hardest_only:
        others = others.gather(1, others.argmin(1, keepdim=True))
    active = ~(o.neg_margin - others <= 0)
    terms = (-others).exp() if o.exp_negative_weight else o.neg_margin - others
    dropped = (target > o.positive_upper_bound) & o.positive_first
    terms = torch.where(active & kept[:, None] & ~dropped[:, None], terms, 0)
    learns = (pulled & (o.pos_weight != 0)) | ((terms != 0).any(1) & (o.neg_weight != 0))
    if o.normalize_negative is not None:
        slopes = terms if o.exp_negative_weight else (terms != 0).to(terms.dtype)
        mean = _reduce(slopes.sum(1).detach(), kept, "mean", sample_weight)
        size = abs(o.neg_weight) * mean.abs() / o.normalize_negative
        terms = terms / torch.where((size > o.pos_weight) & (size > 0), size, 1)
    losses = o.pos_weight * positive + o.neg_weight * terms.sum(1)
    loss = _reduce(losses, kept, o.reduction, sample_weight)
    return (loss, statistics(1 - every / 2, labels, kept, losses, learns)) if return_statistics else loss


@takes(ContrastiveOptions)
def c_contrastive_stats(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    sample_weight: Tensor | None = None,
    **options: Unpack[ContrastiveKeywords],
) -> Tensor:
    """[mean positive hinge, mean negative hinge], the latter over all other agents too."""
    o = ContrastiveOptions.of("c_contrastive_stats", options)
    target, others = _split(_agent_distances(x, weight, labels, sample_weight, o), labels)
    hinges = (o.neg_margin - others).clamp_min(0).sum(1) / max(1, others.shape[1] - 1)
    parts = (target - o.pos_margin).clamp(0, o.positive_outlier_thresh), hinges
    kept = _kept(labels, o.ignore_index, sample_weight)
    return torch.stack([_reduce(part, kept, "mean", sample_weight) for part in parts]).detach()


@takes(TripletOptions)
def c_triplet_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    sample_weight: Tensor | None = None,
    labels_b: Tensor | None = None,
    lam: float | Tensor | None = None,
    return_statistics: bool = False,
    **options: Unpack[TripletKeywords],
) -> Result:
    """loss_i = w- sum_{j != y} (m + d_iy - d_ij)_+ [+ w+ d_iy] (paper section 4)."""
    o = TripletOptions.of("c_triplet_loss", options)
    given = _rows(x, labels, sample_weight, labels_b, lam, o.ignore_index)
    distances = _agent_distances(given.x, weight, given.labels, given.sample_weight, o)
    made = triplet_of_distances(
        distances,
        given.labels,
        sample_weight=given.sample_weight,
        return_statistics=return_statistics,
        **options,
    )
    return made if return_statistics else given.joined(made, o.reduction)


@takes(TripletOptions)
def triplet_of_distances(
    distances: Tensor,
    labels: Tensor,
    *,
    sample_weight: Tensor | None = None,
    return_statistics: bool = False,
    **options: Unpack[TripletKeywords],
) -> Result:
    """``c_triplet_loss`` of given distances [N, C]."""
    o = TripletOptions.of("triplet_of_distances", options)
    kept = _kept(labels, o.ignore_index, sample_weight)
    every = _counting(_wide(distances), kept)
    target, others = _split(every, labels)
    if o.hardest_only:
        others = others.gather(1, others.argmin(1, keepdim=True))
    excess = o.margin + target[:, None] - others
    terms = torch.where(~(excess <= 0), excess, 0)
    dropped = (target > o.positive_upper_bound) & o.positive_first
    negatives = torch.where(dropped, 0, terms.sum(1))
    losses, learns = o.neg_weight * negatives, (negatives != 0) & (o.neg_weight != 0)
    if o.add_center_loss:
        losses = losses + o.pos_weight * target
        learns = learns | (~(target <= 0) & (o.pos_weight != 0))
    loss = _reduce(losses, kept, o.reduction, sample_weight)
    return (loss, statistics(1 - every / 2, labels, kept, losses, learns)) if return_statistics else loss


@takes(TripletOptions)
def c_triplet_stats(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    sample_weight: Tensor | None = None,
    **options: Unpack[TripletKeywords],
) -> Tensor:
    """[mean distance to the label's agent, mean distance to the others]."""
    o = TripletOptions.of("c_triplet_stats", options)
    distances = _agent_distances(x, weight, labels, sample_weight, o)
    target, _ = _split(distances, labels)
    parts = target, (distances.sum(1) - target) / max(1, distances.shape[1] - 1)
    kept = _kept(labels, o.ignore_index, sample_weight)
    return torch.stack([_reduce(part, kept, "mean", sample_weight) for part in parts]).detach()


def turned(cos: Tensor, angle: float) -> Tensor:
    """cos(theta + angle), past pi too. The slope of sin theta is 0 where that is below its floor."""
    room = (1 - cos) * (1 + cos)
    free = room > SIN_FLOOR**2
    sine = torch.where(free, torch.where(free, room, 1).sqrt(), room.detach().clamp_min(0).sqrt())
    return cos * math.cos(angle) - sine * math.sin(angle)


def sigmoid_logits(
    cos: Tensor, similar: Tensor, scale: float, offset: float | Tensor, t: int, straight: bool
) -> Tensor:
    """z = r g(u) + offset of every cell, g(u) = 2 ((u + 1) / 2)^t - 1, u what a margin makes of the cosine;
    of slope r in the cosine where it is straight."""
    g = 2 * ((similar + 1) / 2) ** t - 1
    return scale * (cos + (g - cos).detach() if straight else g) + offset


@takes(SphereFace2Options)
def sphereface2_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: float | Tensor,
    *,
    sample_weight: Tensor | None = None,
    labels_b: Tensor | None = None,
    lam: float | Tensor | None = None,
    return_statistics: bool = False,
    **options: Unpack[SphereFace2Keywords],
) -> Result:
    """loss_i = W [alpha softplus(-z_iy) + (1 - alpha) sum_{j != y} softplus(z_ij)] (SphereFace2, C and A)."""
    o = SphereFace2Options.of("sphereface2_loss", options)
    given = _rows(x, labels, sample_weight, labels_b, lam, o.ignore_index)
    x, labels, sample_weight, _ = given
    kept = _kept(labels, o.ignore_index, sample_weight)
    cos = cosine(_counting(x, kept), weight, o.eps)
    b = bias.reshape(()).to(cos.dtype) if isinstance(bias, Tensor) else bias
    straight = o.margin_gradient == "straight"
    safe = labels.clamp(0, weight.shape[0] - 1)[:, None]
    own = cos.gather(1, safe)[:, 0]
    u_target, u_others, offset = own, cos, o.r * o.m
    if o.form == "A":
        past = own < -math.cos(o.m)
        u_target = torch.where(past, own - 1 + math.cos(o.m), turned(own, o.m))
        u_others, offset = turned(cos, -o.m), 0.0
    target = sigmoid_logits(own, u_target, o.r, b - offset, o.t, straight)
    others = sigmoid_logits(cos, u_others, o.r, b + offset, o.t, straight).scatter(1, safe, -torch.inf)
    each = o.alpha * _softplus(-target) + (1 - o.alpha) * _softplus(others).sum(1)
    losses = (50 / o.r if o.loss_weight is None else o.loss_weight) * each
    loss = _reduce(losses, kept, o.reduction, sample_weight)
    if not return_statistics:
        return given.joined(loss, o.reduction)
    learns = _learns(torch.sigmoid(-target)) | _learns(others.sigmoid().sum(1))
    return loss, statistics(cos, labels, kept, losses, learns)


def _softplus(z: Tensor) -> Tensor:
    return -F.logsigmoid(-z)


def pair_contrastive_loss(
    a: Tensor,
    b: Tensor,
    same: Tensor,
    *,
    margin: float = 1.0,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
) -> Tensor:
    """loss_i = 1/2 (d^2 where same, (margin - d)_+^2 elsewhere), d = |a_i - b_i| (Hadsell et al. 2006)."""
    squared = (_wide(a) - _wide(b)).square().sum(1)
    # At d = 0 the distance has no slope; the push apart is taken as 0 there.
    apart = squared != 0
    distance = torch.where(apart, torch.where(apart, squared, 1).sqrt(), 0)
    losses = torch.where(same.bool(), squared, (margin - distance).clamp_min(0).square()) / 2
    kept = torch.ones_like(same, dtype=torch.bool) if sample_weight is None else sample_weight != 0
    return _reduce(losses, kept, reduction, sample_weight)


def triplet_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    margin: float = 0.2,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
) -> Tensor:
    """loss_i = (margin + |a_i - p_i|^2 - |a_i - n_i|^2)_+ (FaceNet, 2015)."""
    a, p, n = _wide(anchor), _wide(positive), _wide(negative)
    losses = (margin + (a - p).square().sum(1) - (a - n).square().sum(1)).clamp_min(0)
    kept = torch.ones_like(losses, dtype=torch.bool) if sample_weight is None else sample_weight != 0
    return _reduce(losses, kept, reduction, sample_weight)


_margin = margin  # `margin` is a keyword of normface_loss

#: Every margin the engine knows; tests, benchmarks and docs iterate over this table.
MARGINS: dict[str, Margin | None] = {
    "normface": None,
    "cosface": CosFace(0.35),
    "arcface": ArcFace(0.5),
    "combined": CombinedMargin(1.2, 0.3, 0.1),
}
