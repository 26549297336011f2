"""MagFace: an angular margin that grows with the norm of the features."""

from __future__ import annotations

import math

from torch import Tensor

from ..engine.arguments import NOT_NEGATIVE, POSITIVE, below, number
from .batch_margins import BatchMargin, Rows
from .margins import RowMargin


class MagFace(BatchMargin):
    """``psi = cos(theta + m(a))`` where cos theta > 0, else ``cos theta``; a = |x| (Meng et al. 2021).

    ``m(a) = l_margin + (u_margin - l_margin) (a - l_a) / (u_a - l_a)``, a held in [l_a, u_a], and every row
    adds ``lambda_g (a / u_a^2 + 1 / a)`` to its loss, which pulls norms up. Nothing is detached: the norm has
    a gradient through the margin and through that term, and none outside [l_a, u_a]. With
    ``margin_gradient="straight"`` it has the one through that term.

    Args:
        l_margin, u_margin: the margins of norms l_a and u_a, 0 <= l_margin <= u_margin < pi.
        l_a, u_a: the range of norms, 0 < l_a < u_a. Of features that are normalised already every norm is
            1, and the margin l_margin.
        lambda_g: factor of the norms' term, at least 0. The authors' run script has 35. A norm grows with the
            margin's pull if lambda_g >= s K u_a^2 l_a^2 / (u_a^2 - l_a^2), K = m'(a) (their appendix).

    Raises:
        TypeError, ValueError: an argument out of range.
    """

    uses_norms = True

    def __init__(
        self,
        l_margin: float = 0.45,
        u_margin: float = 0.8,
        l_a: float = 10.0,
        u_a: float = 110.0,
        lambda_g: float = 35.0,
    ) -> None:
        super().__init__()
        self.l_margin = number("MagFace", "l_margin", l_margin, below(0.0, math.pi))
        self.u_margin = number("MagFace", "u_margin", u_margin, below(self.l_margin, math.pi))
        self.l_a = number("MagFace", "l_a", l_a, POSITIVE)
        self.u_a = number("MagFace", "u_a", u_a, POSITIVE)
        if not self.l_a < self.u_a:
            raise ValueError(f"MagFace: expected `u_a` > l_a ({self.l_a:g}), got {self.u_a:g}")
        self.lambda_g = number("MagFace", "lambda_g", lambda_g, NOT_NEGATIVE)

    def _held(self, rows: Rows) -> Tensor:
        assert rows.norms is not None
        return rows.norms.clamp(self.l_a, self.u_a)

    def of(self, rows: Rows) -> RowMargin:
        growth = (self.u_margin - self.l_margin) / (self.u_a - self.l_a)
        return RowMargin(m2=self.l_margin + growth * (self._held(rows) - self.l_a), guard="easy")

    def regularizer(self, rows: Rows) -> Tensor:
        norms = self._held(rows)
        return self.lambda_g * (norms / self.u_a**2 + 1 / norms)

    def extra_repr(self) -> str:
        margins = f"l_margin={self.l_margin:g}, u_margin={self.u_margin:g}"
        return f"{margins}, l_a={self.l_a:g}, u_a={self.u_a:g}, lambda_g={self.lambda_g:g}"
