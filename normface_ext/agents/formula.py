"""The hinges over the agents in plain torch, as sums: what their second derivatives are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..engine import row_state
from ..engine.curvature import Numbers, Tile

if TYPE_CHECKING:
    from .ops import AgentSweepOptions


@dataclass(eq=False)
class HingeFormula:
    """The target's distance and the sum of the hinges, [N] each, of what is active now. No numbers."""

    TERMS: ClassVar[tuple[str, ...]] = ("hinge", "exponential_hinge")
    labels: Tensor
    threshold: Tensor  # [N], of distances
    hardest: Tensor | None  # [N], the one class that is looked at
    rows: Tensor
    options: AgentSweepOptions

    def __post_init__(self) -> None:
        self.op: str = self.options.op
        self.eps: float = self.options.eps
        self.workspace: int = self.options.workspace
        self.centers: int = self.options.centers
        self.counts: Tensor = self.rows[row_state.ROW_WEIGHT] != 0

    def sums(self, cosine: Tensor, tile: Tile, numbers: Numbers) -> tuple[Tensor, ...]:
        threshold = self.threshold[tile.rows, None].to(cosine.dtype)
        distance = 2 - 2 * cosine
        active = ~(threshold - distance <= 0) & ~tile.left_out
        if self.hardest is not None:
            columns = torch.arange(tile.classes.start, tile.classes.stop, device=cosine.device)
            active = active & (self.hardest[tile.rows, None] == columns)
        hinge = (
            (-distance).exp()
            if self.options.term == row_state.TERMS["exponential_hinge"]
            else threshold - distance
        )
        return (torch.where(active, hinge, 0).sum(1),)

    def outputs(self, cosine: Tensor, sums: tuple[Tensor, ...], numbers: Numbers) -> tuple[Tensor, ...]:
        distance, (hinges,) = 2 - 2 * cosine, sums
        if self.options.triplet:  # every threshold moves with the target's distance
            hinges = hinges + self.rows[row_state.SECOND_SUM] * (distance - distance.detach())
        return distance, hinges
