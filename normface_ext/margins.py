"""Margins: what a loss asks of the target cosine before the softmax.

A margin is three numbers, ``psi(cos theta) = cos(m1 * theta + m2) - m3`` (ArcFace, section 2.2), and
only the target column meets it. The formula itself is ``csrc/math/margin.h`` and, as the
specification, ``normface_ext.reference.margin``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ._arguments import below, number

LIMITS = {"m1": below(1.0, math.inf), "m2": below(0.0, math.pi), "m3": below(0.0, math.inf)}


@dataclass(frozen=True)
class CombinedMargin:
    """``psi = cos(m1 * theta + m2) - m3``, angles in radians.

    Past ``m1 * theta + m2 = pi`` the cosine would rise again; there ``psi`` goes on as a line of slope
    one in the cosine (monotone guard), so a harder sample never pays less.

    Args:
        m1: angular factor (SphereFace), at least 1.
        m2: additive angle in radians (ArcFace), in [0, pi).
        m3: additive cosine (CosFace), at least 0.

    Raises:
        ValueError: a number that is not finite or out of range.
    """

    m1: float = 1.0
    m2: float = 0.0
    m3: float = 0.0

    def __post_init__(self) -> None:
        for name, within in LIMITS.items():
            value = getattr(self, name)
            plain = number(type(self).__name__, name, value, within)
            if not isinstance(value, (int, float)):
                object.__setattr__(self, name, plain)

    def parameters(self) -> list[float]:
        return [float(self.m1), float(self.m2), float(self.m3)]


class CosFace(CombinedMargin):
    """``psi = cos theta - m`` (Wang et al. 2018; AM-Softmax). ``m`` is a cosine, 0.35 by custom."""

    def __init__(self, m: float = 0.35) -> None:
        super().__init__(m3=m)

    def __repr__(self) -> str:
        return f"CosFace(m={self.m3:g})"


class ArcFace(CombinedMargin):
    """``psi = cos(theta + m)`` (Deng et al. 2019). ``m`` is an angle in radians, 0.5 by custom.

    The gradient goes through theta exactly; past ``theta + m = pi``, ``psi = cos theta - m sin m``.
    """

    def __init__(self, m: float = 0.5) -> None:
        super().__init__(m2=m)

    def __repr__(self) -> str:
        return f"ArcFace(m={self.m2:g})"


NO_MARGIN = CombinedMargin()
