"""The terms of the sweep (csrc/math/terms) in plain torch: what the tests of the ops compare with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from normface_ext.engine.row_state import TERMS

if TYPE_CHECKING:
    from lanes import Lane

IGNORED = -100


@dataclass(frozen=True)
class Case:
    """A term, and what it wants. ``slope`` is d value / d cosine as a multiple of the coefficient."""

    term: str
    numbers: tuple[float, ...] | None = None  # csrc/math/terms/hard_negatives.h, sigmoid.h
    ends: tuple[float, float] = (-1.0, 1.0)
    scale: float = 8.0

    @property
    def softmax(self) -> bool:
        return self.term in ("softmax", "hard_negatives")

    @property
    def has_threshold(self) -> bool:
        return self.term not in ("softmax", "sigmoid", "angular_sigmoid")

    @property
    def sparse(self) -> bool:
        """Most coefficients are 0."""
        return self.term in ("hinge", "exponential_hinge")

    @property
    def slope(self) -> float:
        return self.scale if self.softmax else 2.0 if self.sparse else 1.0

    def options(self, lane: Lane, threshold: Tensor | None) -> dict[str, object]:
        common = None if self.numbers is None else torch.tensor(self.numbers, dtype=torch.float64)
        return self.options_of(None if common is None else lane.tensor(common), threshold)

    def options_of(self, numbers: Tensor | None, threshold: Tensor | None) -> dict[str, object]:
        return {
            "term": TERMS[self.term], "numbers": numbers,
            "scale_value": self.scale, "lowest": self.ends[0], "highest": self.ends[1],
            "threshold": threshold if self.has_threshold else None,
        }  # fmt: skip


CASES = {
    "softmax": Case("softmax"),
    "curricular": Case("hard_negatives", (1, 0.3, 0, 2, 0.3, 1), (-1.0, 1.3)),
    "fixed": Case("hard_negatives", (0, 1.2, 0.2, 0, 1.2, 1), (-1.0, 1.4)),
    "adaptive": Case("hard_negatives", (0, 1, 0.2, 0, 1, 1), (-1.0, 1.2)),
    "filter": Case("hard_negatives", (0, 0, 0, 0, 0, 1)),
    "hinge": Case("hinge"),
    "exponential": Case("exponential_hinge"),
    "sigmoid": Case("sigmoid", (6.0, 0.5, 3, 0)),
    "sigmoid without a bend": Case("sigmoid", (40.0, -3.0, 1, 0)),
    "angular sigmoid": Case("angular_sigmoid", (6.0, 0.5, 3, 0, math.cos(0.4), math.sin(0.4))),
}


def unit(x: Tensor, eps: float = 1e-12) -> Tensor:
    """Rows of length 1; those whose squares have no number are tamed first."""
    tamer = x.detach().abs().amax(-1, keepdim=True)
    tamer = torch.where(tamer > 1e100, tamer, 1.0)
    tame = x / tamer
    return tame / (tame.square().sum(-1, keepdim=True) + eps / tamer.square()).sqrt()


def cells(case: Case, cosine: Tensor, threshold: Tensor, kappa: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(value, second, coefficient) of every cell, [N, C]; threshold and kappa [N]."""
    t, kappa = threshold[:, None].to(cosine.dtype), kappa[:, None].to(cosine.dtype)
    if case.softmax:
        f, slope = cosine, torch.ones_like(cosine)
        if case.numbers is not None:
            a2, a1, a0, g1, g0, below = case.numbers
            f = torch.where(cosine > t, (a2 * cosine + a1) * cosine + a0, below * cosine)
            slope = torch.where(cosine > t, g1 * cosine + g0, torch.full_like(cosine, below))
        e = torch.exp(case.scale * f - kappa)
        return e, e * f, e * slope
    if case.term in ("sigmoid", "angular_sigmoid"):
        assert case.numbers is not None
        r, offset, power, straight, *angle = case.numbers
        u, du = cosine, torch.ones_like(cosine)
        if angle:
            cos_m, sin_m = angle
            theta = cosine.clamp(-1, 1).acos()
            u = theta.cos() * cos_m + theta.sin() * sin_m
            sine = theta.sin()
            du = cos_m - sin_m * torch.where(sine > 1e-4, cosine / sine.clamp_min(1e-4), 0)
        z = r * (2 * ((u + 1) / 2) ** power - 1) + offset
        slope = r if straight else r * power * ((u + 1) / 2) ** (power - 1) * du
        return torch.logaddexp(z, torch.zeros_like(z)), z.sigmoid(), z.sigmoid() * slope
    distance = 2 - 2 * cosine
    active = (~(t - distance <= 0)).to(cosine.dtype)
    value = torch.exp(-distance) if case.term == "exponential_hinge" else t - distance
    value = torch.where(active == 0, 0, value)
    return value, active, value if case.term == "exponential_hinge" else active


class Plain(NamedTuple):
    sum: Tensor
    second: Tensor
    cosine: Tensor  # of the target
    x_sum: Tensor
    cosines: Tensor
    coefficients: Tensor


def sweep(
    case: Case,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    threshold: Tensor,
    kappa: Tensor,
    *,
    counts: Tensor,
    operand: torch.dtype | None = None,
    eps: float = 1e-12,
) -> Plain:
    """Over all classes, in the dtype of x. What does not count is zero; ``operand``: what the products'
    operands are rounded to."""

    def rounded(values: Tensor) -> Tensor:
        return values if operand is None else values.to(operand).to(values.dtype)

    x_hat, w_hat = unit(torch.where(counts[:, None], x, 0), eps), unit(weight, eps)
    place = torch.where(counts, labels, 0)
    own = torch.nn.functional.one_hot(place, len(weight)).bool() & counts[:, None]
    cosines = rounded(x_hat) @ rounded(w_hat).T
    value, second, coefficient = (
        torch.where(own, 0, part) for part in cells(case, cosines, threshold, kappa)
    )
    return Plain(
        value.sum(1),
        second.sum(1),
        torch.where(counts, (x_hat * w_hat[place]).sum(1), 0),
        rounded(coefficient) @ rounded(w_hat),
        cosines,
        coefficient,
    )


def objective(plain: Plain, slopes: Tensor, upstream: Tensor, class_weight: Tensor | None) -> Tensor:
    """Whose gradients ``head_backward`` computes, the coefficients held."""
    others, target, uniform, _ = (slopes * upstream.double()).to(plain.cosines.dtype)
    of_others = (plain.coefficients.detach() * plain.cosines).sum(1)
    factors = plain.cosines.new_ones(plain.cosines.shape[1]) if class_weight is None else class_weight
    of_all = plain.cosines @ factors.to(plain.cosines.dtype)
    return (others * of_others + target * plain.cosine + uniform * of_all).sum()
