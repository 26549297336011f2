"""MagFace: an angular margin that grows with the norm of the features."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor

from ..engine.arguments import ANGLE, NOT_NEGATIVE, POSITIVE, Range, below, number
from ..engine.options import Check
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

    All are attributes, checked when they are set as here.

    Raises:
        TypeError, ValueError: an argument out of range.
    """

    uses_norms = True
    CHECKS: ClassVar[dict[str, Check]] = {
        "l_margin": lambda owner, name, value: number(owner, name, value, ANGLE),
        "u_margin": lambda owner, name, value: number(owner, name, value, ANGLE),
        "l_a": lambda owner, name, value: number(owner, name, value, POSITIVE),
        "u_a": lambda owner, name, value: number(owner, name, value, POSITIVE),
        "lambda_g": lambda owner, name, value: number(owner, name, value, NOT_NEGATIVE),
    }
    l_margin: float
    u_margin: float
    l_a: float
    u_a: float
    lambda_g: float

    def __init__(
        self,
        l_margin: float = 0.45,
        u_margin: float = 0.8,
        l_a: float = 10.0,
        u_a: float = 110.0,
        lambda_g: float = 35.0,
    ) -> None:
        super().__init__()
        self.l_margin, self.u_margin, self.l_a, self.u_a = l_margin, u_margin, l_a, u_a
        self.lambda_g = lambda_g

    def checked(self, name: str, value: object) -> Any:
        """Also against the other end of its range, once there is one."""
        own, has = super().checked(name, value), self.__dict__
        if name == "u_margin" and "l_margin" in has:
            within = below(self.l_margin, math.pi)
        elif name == "l_margin" and "u_margin" in has:
            within = Range(f"in [0, {self.u_margin:g}]", 0.0, self.u_margin)
        elif name == "u_a" and "l_a" in has:
            within = Range(f"> l_a ({self.l_a:g})", math.nextafter(self.l_a, math.inf), math.inf)
        elif name == "l_a" and "u_a" in has:
            within = Range(f"< u_a ({self.u_a:g})", 0.0, math.nextafter(self.u_a, 0.0))
        else:
            return own
        return number(type(self).__name__, name, value, within)

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
