"""Every published head, once: how it is made, its formula in plain float64 torch, its section of the docs.

The formulas come from the papers and the released code, with arccos and over all N x C cells; nothing in them
is from the package. States are fixed (eval mode), so that a head has one formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normface_ext as nf


class Cells(NamedTuple):
    """Of the rows that count: cosines [n, C], the labels' [n], where the labels are [n, C], norms [n]."""

    cos: Tensor
    own: Tensor
    here: Tensor
    norms: Tensor

    @property
    def theta(self) -> Tensor:
        return self.own.clamp(-1, 1).acos()


#: -> losses of the rows [n]
Formula = Callable[[Cells, float], Tensor]


class Head(NamedTuple):
    section: str
    options: Callable[[], dict[str, object]]  # of the layer
    formula: Formula
    scale: float = 16.0
    kind: type[nn.Module] = nf.NormFaceLoss

    @property
    def softmax(self) -> bool:
        return self.kind is nf.NormFaceLoss

    def make(self, dim: int, classes: int, dtype: torch.dtype = torch.float64) -> nn.Module:
        # Without eps, so that short features have the cosines of the formula.
        given = (
            {"scale": self.scale, "min_scale": min(self.scale, 0.01), "eps": 0.0}
            if self.softmax
            else {"eps": 0.0}
        )
        return self.kind(dim, classes, dtype=dtype, **given, **self.options()).eval()

    def loss(self, x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """The mean of the rows that count, by the formula."""
        kept = labels != -100
        norms = x[kept].norm(dim=1)
        cos = F.normalize(x[kept]) @ F.normalize(weight).T
        here = F.one_hot(labels[kept], len(weight)).bool()
        return self.formula(Cells(cos, cos[here], here, norms), self.scale).mean()


def softmax(psi, others=None, scale=None, more=None):
    """psi(cells) of the targets and others(cells) of the rest stand for cosines; scale(cells, s) per row."""

    def losses(cells: Cells, s: float) -> Tensor:
        rest = cells.cos if others is None else others(cells)
        z = torch.where(cells.here, psi(cells)[:, None], rest) * (s if scale is None else scale(cells, s))
        each = -z.log_softmax(1)[cells.here]
        return each if more is None else each + more(cells)

    return losses


def shifted(cells: Cells, m: float) -> Tensor:
    return torch.where(cells.theta + m > math.pi, cells.own - m * math.sin(m), (cells.theta + m).cos())


def adaface(cells: Cells) -> Tensor:
    k = (0.333 * (cells.norms.detach().clamp(1e-3, 100) - 20) / (100 + 1e-3)).clamp(-1, 1)
    theta = cells.own.clamp(-0.999, 0.999).acos()
    return (theta - 0.4 * k).clamp(1e-3, math.pi - 1e-3).cos() - (0.4 + 0.4 * k)


def magface(cells: Cells) -> Tensor:
    m = 0.45 + 0.35 / 100 * (cells.norms.clamp(10, 110) - 10)
    return torch.where(cells.own > 0, (cells.theta + m).cos(), cells.own)


def of_length(cells: Cells, s: float) -> Tensor:
    return s * cells.norms[:, None]


def turned_back(c: Tensor, m: float) -> Tensor:
    """cos(theta - m), of whose slope at c = +-1 nothing is asked."""
    inside = c.abs() < 1
    return math.cos(m) * c + math.sin(m) * torch.where(inside, 1 - c.square(), 1).sqrt() * inside


def joined(cells: Cells, m: float) -> Tensor:
    return torch.where(
        cells.theta + m > math.pi, cells.own - 1 - math.cos(math.pi - m), (cells.theta + m).cos()
    )


def pulled(cells: Cells) -> Tensor:
    a = cells.norms.clamp(10, 110)
    return 35 * (a / 110**2 + 1 / a)


def past(cells: Cells, threshold: Tensor, hard: Tensor) -> Tensor:
    return torch.where(cells.cos > threshold.detach()[:, None], hard, cells.cos)


def falling(theta: Tensor, m: float) -> Tensor:
    """SphereFace's phi, piece by piece."""
    phi = torch.full_like(theta, math.nan)
    for k in range(math.ceil(m) + 1):
        piece = (theta >= k * math.pi / m) & (theta <= (k + 1) * math.pi / m + 1e-15)
        phi = torch.where(piece, (-1) ** k * (m * theta).cos() - 2 * k, phi)
    return phi


def bracket(values: Tensor) -> Tensor:
    return values.clamp_min(0).detach()


def plus(z: Tensor) -> Tensor:
    return torch.where(z > 0, z, 0) + torch.log1p(torch.exp(-z.abs()))


def binary(target, others, r: float, factor: float, b: float = -1.5) -> Formula:
    def losses(cells: Cells, _: float) -> Tensor:
        z = torch.where(cells.here, -(r * target(cells)[:, None] + b), r * others(cells) + b)
        return factor * torch.where(cells.here, 0.7 * plus(z), 0.3 * plus(z)).sum(1)

    return losses


def bent(c: Tensor) -> Tensor:
    h = (c + 1) / 2
    return 2 * h * h * h - 1


def curricular():
    margin = nf.CurricularFace(0.5)
    margin.t.fill_(0.3)
    return {"margin": margin}


def sphere(**given):
    """lambda = 2: a blend of which both parts are seen."""
    return nf.SphereFace(base=2.0, gamma=0.0, lambda_min=0.0, **given)


EVERY: dict[str, Head] = {
    "normface": Head("Heads and margins", dict, softmax(lambda c: c.own)),
    "cosface": Head(
        "Heads and margins", lambda: {"margin": nf.CosFace(0.35)}, softmax(lambda c: c.own - 0.35)
    ),
    "arcface": Head(
        "Heads and margins", lambda: {"margin": nf.ArcFace(0.5)}, softmax(lambda c: shifted(c, 0.5))
    ),
    "combined": Head(
        "Guards",
        lambda: {"margin": nf.CombinedMargin(1.0, 0.3, 0.1, guard="join")},
        softmax(lambda c: joined(c, 0.3) - 0.1),
    ),
    "adaface": Head("AdaFace", lambda: {"margin": nf.AdaFace()}, softmax(adaface)),
    "magface": Head("MagFace", lambda: {"margin": nf.MagFace()}, softmax(magface, more=pulled)),
    "elastic arc": Head(
        "ElasticFace", lambda: {"margin": nf.ElasticArcFace()}, softmax(lambda c: (c.theta + 0.5).cos())
    ),
    "elastic cos": Head(
        "ElasticFace", lambda: {"margin": nf.ElasticCosFace()}, softmax(lambda c: c.own - 0.35)
    ),
    "curricularface": Head(
        "CurricularFace",
        curricular,
        softmax(
            lambda c: shifted(c, 0.5),
            lambda c: past(c, (c.theta + 0.5).cos(), c.cos * (0.3 + c.cos)),
        ),
    ),
    "mv arc": Head(
        "MV-Softmax",
        lambda: {"margin": nf.MVSoftmax(0.35, 0.2)},
        softmax(
            lambda c: torch.where(c.own > 0, (c.theta + 0.35).cos(), c.own),
            lambda c: past(c, (c.theta + 0.35).cos(), 1.2 * c.cos + 0.2),
        ),
    ),
    "mv am": Head(
        "MV-Softmax",
        lambda: {"margin": nf.MVSoftmax(0.35, 0.2, "am", adaptive=False)},
        softmax(
            lambda c: torch.where(c.own > 0, c.own - 0.35, c.own),
            lambda c: past(c, c.own - 0.35, c.cos + 0.2),
        ),
    ),
    "filter": Head(
        "The inter-class filter",
        lambda: {"margin": nf.CosFace(0.4), "filter_threshold": 0.4},
        softmax(lambda c: c.own - 0.4, lambda c: torch.where(c.cos > 0.4, 0, c.cos)),
    ),
    "circle": Head(
        "Circle loss",
        lambda: {"margin": nf.CircleSoftmax()},
        softmax(
            lambda c: bracket(1.25 - c.own) * (c.own - 0.75),
            lambda c: bracket(c.cos + 0.25) * (c.cos - 0.25),
        ),
        scale=256.0,
    ),
    "sphereface": Head(
        "SphereFace",
        lambda: {"margin": sphere(), "normalize_input": False},
        softmax(lambda c: (2 * c.own + falling(c.theta, 4)) / 3, scale=of_length),
        scale=1.0,
    ),
    "sphereface, real m": Head(
        "SphereFace",
        lambda: {"margin": nf.SphereFace(1.7, base=0.0, lambda_min=0.0)},
        softmax(lambda c: falling(c.theta, 1.7)),
        scale=30.0,
    ),
    "long features": Head(
        "SphereFace",
        lambda: {"normalize_input": False},
        softmax(lambda c: c.own, scale=of_length),
        scale=0.5,
    ),
    "sphereface2": Head(
        "SphereFace2",
        lambda: {"first_bias": -1.5},
        binary(lambda c: bent(c.own) - 0.4, lambda c: bent(c.cos) + 0.4, 40.0, 50 / 40),
        kind=nf.SphereFace2Loss,
    ),
    "sphereface2, form A": Head(
        "SphereFace2",
        lambda: {"form": "A", "m": 0.15, "r": 32.0, "loss_weight": 1.0, "first_bias": -1.5},
        binary(lambda c: bent(joined(c, 0.15)), lambda c: bent(turned_back(c.cos, 0.15)), 32.0, 1.0),
        kind=nf.SphereFace2Loss,
    ),
}
