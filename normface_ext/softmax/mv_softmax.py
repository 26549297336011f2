"""MV-Softmax: classes that a row is mistaken for weigh more."""

from __future__ import annotations

from typing import ClassVar

from ..engine.arguments import ANGLE, NOT_NEGATIVE, choice, flag, number
from ..engine.options import Check
from .batch_margins import BatchMargin, Rows
from .hard_negatives import HardNegatives, added_angle
from .margins import Margin, RowMargin


class MVSoftmax(BatchMargin):
    """``psi = cos(theta + m)`` or ``c - m``, and another class past it has the logit ``s ((1 + t) c_j + t)``
    (Wang et al. 2020, "Mis-classified Vector Guided Softmax Loss").

    As in the authors' code psi is easy: it is ``c`` where ``c <= 0``; the threshold is not. The threshold has
    no gradient: a hard class has the slope s (1 + t), or s with fixed weights.
    ``margin_gradient="straight"`` is about psi alone.

    Args:
        m: size of the margin: an angle in [0, pi), or a cosine with "am".
        t: how much more, at least 0.
        kind: "arc", threshold cos(theta + m) (MV-Arc-Softmax), or "am", c - m (MV-AM-Softmax).
        adaptive: weights exp(s t (c_j + 1)), the more the harder a class is. Without it they are
            exp(s t), the same for all that are hard: the logit is ``s (c_j + t)``.

    All are attributes, checked when they are set as here.

    Raises:
        TypeError, ValueError: an argument out of range.
    """

    hard_negatives = True
    CHECKS: ClassVar[dict[str, Check]] = {
        "m": lambda owner, name, value: number(owner, name, value, ANGLE),
        "t": lambda owner, name, value: number(owner, name, value, NOT_NEGATIVE),
        "kind": lambda owner, name, value: choice(owner, name, value, ("arc", "am")),
        "adaptive": flag,
    }
    m: float
    t: float
    kind: str
    adaptive: bool

    def __init__(self, m: float = 0.35, t: float = 0.2, kind: str = "arc", adaptive: bool = True) -> None:
        super().__init__()
        self.kind = kind
        self.m, self.t, self.adaptive = m, t, adaptive

    def of(self, rows: Rows) -> HardNegatives:
        assert rows.cosine is not None
        target: Margin
        if self.kind == "arc":
            target, threshold = RowMargin(m2=self.m, guard="easy"), added_angle(rows.cosine, self.m)
        else:
            # Not the guard, which leaves m3 where it is: here nothing is taken off.
            target, threshold = RowMargin(m3=self.m * (rows.cosine > 0).double()), rows.cosine - self.m
        # f >= c, and for c in [-1, 1] f is largest at 1.
        if self.adaptive:
            logit, slope, highest = (0.0, 1 + self.t, self.t), (0.0, 1 + self.t), 1 + 2 * self.t
        else:
            logit, slope, highest = (0.0, 1.0, self.t), (0.0, 1.0), 1 + self.t
        return HardNegatives(target, threshold, logit, slope, highest=highest)

    def extra_repr(self) -> str:
        return f"m={self.m:g}, t={self.t:g}, kind={self.kind!r}, adaptive={self.adaptive!r}"
