"""Margins: what a loss asks of the target cosine before the softmax.

A margin is three numbers, ``psi(cos theta) = cos(m1 * theta + m2) - m3`` (ArcFace, section 2.2), and
only the target column meets it. The formula itself is ``csrc/math/margin.h`` and, as the
specification, ``normface_ext.reference.margin``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..engine.arguments import below, number

LIMITS = {"m1": below(1.0, math.inf), "m2": below(0.0, math.pi), "m3": below(0.0, math.inf)}


class Margin:
    """What ``margin=`` takes: a value with the three numbers ``m1``, ``m2``, ``m3``.

    Two margins are equal if their numbers are: ``CosFace(0.3) == CombinedMargin(m3=0.3)``. They are frozen
    dataclasses, so ``dataclasses.replace`` makes a changed copy.
    """

    m1: float
    m2: float
    m3: float

    def parameters(self) -> list[float]:
        return [float(self.m1), float(self.m2), float(self.m3)]

    def __eq__(self, other: object) -> bool:
        return self.parameters() == other.parameters() if isinstance(other, Margin) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self.parameters()))

    def _keep_number(self, name: str, limits: str) -> None:
        """Checks a field, and stores what is no Python number (NumPy's) as one."""
        value = getattr(self, name)
        plain = number(type(self).__name__, name, value, LIMITS[limits])
        if not isinstance(value, (int, float)):
            object.__setattr__(self, name, plain)


@dataclass(frozen=True, eq=False)
class CombinedMargin(Margin):
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
        for name in LIMITS:
            self._keep_number(name, name)


# CosFace and ArcFace have one field of their own and inherit none: torch.compile builds a dataclass from its
# fields, and the Dynamo of torch 2.11 cannot follow an __init__ that takes others.


@dataclass(frozen=True, eq=False)
class CosFace(Margin):
    """``psi = cos theta - m`` (Wang et al. 2018; AM-Softmax). ``m`` is a cosine, 0.35 by custom."""

    m: float = 0.35

    def __post_init__(self) -> None:
        self._keep_number("m", "m3")

    m1 = 1.0
    m2 = 0.0

    @property
    def m3(self) -> float:  # type: ignore[override]
        return self.m


@dataclass(frozen=True, eq=False)
class ArcFace(Margin):
    """``psi = cos(theta + m)`` (Deng et al. 2019). ``m`` is an angle in radians, 0.5 by custom.

    The gradient goes through theta exactly; past ``theta + m = pi``, ``psi = cos theta - m sin m``.
    """

    m: float = 0.5

    def __post_init__(self) -> None:
        self._keep_number("m", "m2")

    m1 = 1.0
    m3 = 0.0

    @property
    def m2(self) -> float:  # type: ignore[override]
        return self.m


NO_MARGIN = CombinedMargin()


def margin_argument(op: str, name: str, value: object) -> Margin | None:
    if value is not None and (not isinstance(value, Margin) or type(value) is Margin):
        raise TypeError(
            f"{op}: expected `{name}` to be CosFace, ArcFace, CombinedMargin or None,"
            f" got {type(value).__name__}"
        )
    return value
