"""The sigmoid head in plain torch, as sums over the classes: what its second derivatives are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .. import reference
from ..engine import row_state
from ..engine.curvature import Numbers, Tile

if TYPE_CHECKING:
    from .ops import SigmoidOptions


def _softplus(z: Tensor) -> Tensor:
    """ln(1 + e^z), whose second derivative keeps its digits too: a million classes far away count."""
    above = z > 0
    return torch.where(above, z, 0) + torch.where(above, -z, z).exp().log1p()


@dataclass(eq=False)
class SigmoidFormula:
    """The target's cosine and the sum of softplus(z_j) over the other classes; the number is the offset."""

    TERMS: ClassVar[tuple[str, ...]] = ("sigmoid", "angular_sigmoid")
    op: str
    labels: Tensor
    rows: Tensor
    options: SigmoidOptions

    def __post_init__(self) -> None:
        self.eps: float = self.options.eps
        self.workspace: int = self.options.workspace
        self.centers: int = self.options.centers
        self.counts: Tensor = self.rows[row_state.ROW_WEIGHT] != 0

    def sums(self, cosine: Tensor, tile: Tile, numbers: Numbers) -> tuple[Tensor, ...]:
        offset, options = numbers[0], self.options
        assert offset is not None
        similar = cosine if options.angle is None else reference.turned(cosine, -options.angle)
        z = reference.sigmoid_logits(
            cosine, similar, options.r, offset.to(cosine.dtype), options.power, options.straight
        )
        return (torch.where(tile.left_out, 0, _softplus(z)).sum(1),)

    def outputs(self, cosine: Tensor, sums: tuple[Tensor, ...], numbers: Numbers) -> tuple[Tensor, ...]:
        return cosine, sums[0]
