"""What a margin makes of cosines, the target's and the others'."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..softmax.hard_negatives import HardNegatives
from ..softmax.margins import ArcFace, CombinedMargin, CosFace, Margin

#: In slopes sin(theta) is held at this floor, which keeps them finite at cos theta = +-1.
SIN_FLOOR = 1e-4


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
    # One that is not f's own is a constant for further derivatives, as what published code detaches.
    own = 1.0 * (g1 == 2 * a2) * (g0 == a1)
    of_slope = own * (g1 / 2 * c + g0) * c  # g1 c + g0 is its derivative
    of_slope = of_slope + (1 - own) * (g1 * c + g0).detach() * c
    return torch.where(past, of_slope + (f - of_slope).detach(), found.below * cos).to(cos.dtype)


def turned(cos: Tensor, angle: float) -> Tensor:
    """cos(theta + angle), past pi too. The slope of sin theta is 0 where that is below its floor."""
    room = (1 - cos) * (1 + cos)
    free = room > SIN_FLOOR**2
    sine = torch.where(free, torch.where(free, room, 1).sqrt(), room.detach().clamp_min(0).sqrt())
    return cos * math.cos(angle) - sine * math.sin(angle)


psi_of = margin  # `margin` is a keyword of normface_loss
#: Every margin the engine knows; tests, benchmarks and docs iterate over this table.
MARGINS: dict[str, Margin | None] = {
    "normface": None,
    "cosface": CosFace(0.35),
    "arcface": ArcFace(0.5),
    "combined": CombinedMargin(1.2, 0.3, 0.1),
}
