"""Circle loss at class level: every similarity weighs by how far it is from where it should be."""

from __future__ import annotations

from typing import ClassVar

import torch

from ..engine.arguments import SHARE, flag, number
from ..engine.options import Check
from .batch_margins import BatchMargin, Rows
from .hard_negatives import HardNegatives
from .margins import RowMargin


class CircleMargin(RowMargin):
    """``psi = [1 + m3 - c]_+ (c - 1 + m3)``, with m2 (0 or 1) times the slope of the bracket."""

    formula = 2


class CircleSoftmax(BatchMargin):
    """``psi = [1 + m - c]_+ (c - 1 + m)``, and another class has the logit ``s [c_j + m]_+ (c_j - m)``
    (Sun et al. 2020, "Circle Loss", with class labels).

    The scale is the paper's gamma: 256 for faces, 128 for re-identification; ``scale="auto"`` gives at least
    256. The pairwise form of the paper, which has no class weights, is another loss.

    Args:
        m: the margin, in [0, 1]: the label's cosine should come above 1 - m, those of others below m.
        detached: the brackets are weights, not functions: the gradient takes them as constants, as the paper
            and the released codes do. False differentiates them.

    Both are attributes, checked when they are set as here. ``margin_gradient="straight"`` is about psi alone.

    Raises:
        TypeError, ValueError: an argument out of range.
    """

    hard_negatives = True
    uses_cosines = False
    least_scale: ClassVar[float] = 256.0
    CHECKS: ClassVar[dict[str, Check]] = {
        "m": lambda owner, name, value: number(owner, name, value, SHARE),
        "detached": flag,
    }
    m: float
    detached: bool

    def __init__(self, m: float = 0.25, detached: bool = True) -> None:
        super().__init__()
        self.m, self.detached = m, detached

    def of(self, rows: Rows) -> HardNegatives:
        square = self.m * self.m
        # f = c^2 - m^2 past -m, and 0 before: least at 0, largest at 1.
        return HardNegatives(
            CircleMargin(m2=0.0 if self.detached else 1.0, m3=self.m),
            torch.full(rows.labels.shape, -self.m, dtype=torch.float64, device=rows.labels.device),
            logit=(1.0, 0.0, -square),
            slope=(1.0, self.m) if self.detached else (2.0, 0.0),
            below=0.0,
            lowest=-square,
            highest=1 - square,
        )

    def extra_repr(self) -> str:
        return f"m={self.m:g}" + ("" if self.detached else ", detached=False")
