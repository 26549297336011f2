"""The softmax head in plain torch, as sums over the classes: what its second derivatives are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .. import reference
from ..engine import checks, row_state
from ..engine.curvature import Numbers, Tile
from .batch_margins import straightened
from .hard_negatives import HardNegatives
from .margins import GUARDS, NO_MARGIN

if TYPE_CHECKING:
    from .loss_options import LossOptions

_GUARD_NAMES = {code: name for name, code in GUARDS.items()}
_REDUCTION_NAMES = {checks.REDUCTIONS[name]: name for name in ("none", "mean", "sum")}


@dataclass(eq=False)
class PartsFormula:
    """c_y, ln S and, with smoothing, <x_hat, U>; the number is the scale.

    S is taken relative to what it is, as sum_{j != y} e^(s f(c_j) - ln S): it is 1, and no term is larger.
    """

    TERMS: ClassVar[tuple[str, ...]] = ("softmax", "hard_negatives")
    op: str
    labels: Tensor
    class_weight: Tensor | None
    term: row_state.TermInputs
    rows: Tensor  # the state of the rows, sums over all classes
    options: LossOptions

    def __post_init__(self) -> None:
        rows = self.rows
        self.eps: float = self.options.eps
        self.workspace: int = self.options.workspace
        self.centers: int = self.options.centers
        self.counts: Tensor = rows[row_state.ROW_WEIGHT] != 0
        self.others: Tensor = self.counts & (rows[row_state.SUM] != 0)  # else there is no other class
        log_sum = rows[row_state.SUM].log() + rows[row_state.SHIFT]
        self.log_sum: Tensor = torch.where(self.others, log_sum, 0.0)

    def _scale(self, numbers: Numbers) -> float | Tensor:
        return self.options.scale_value if numbers[0] is None else numbers[0]

    def sums(self, cosine: Tensor, tile: Tile, numbers: Numbers) -> tuple[Tensor, ...]:
        scale = self._scale(numbers)
        if isinstance(scale, Tensor):
            scale = (scale[tile.rows, None] if scale.dim() == 1 else scale).to(cosine.dtype)
        f, (threshold, of_term) = cosine, self.term
        if threshold is not None and of_term is not None:
            a2, a1, a0, g1, g0, below = of_term.to(cosine.dtype).unbind()
            found = HardNegatives(NO_MARGIN, threshold[tile.rows], (a2, a1, a0), (g1, g0), below)  # type: ignore[arg-type]
            f = reference.hard_negatives(cosine, found)
        exponent = scale * f - self.log_sum[tile.rows, None].to(cosine.dtype)
        # Left out before the power, not after it: the target's own may be infinite, and its slope NaN.
        total = exponent.masked_fill(tile.left_out, -torch.inf).exp().sum(1)
        if self.options.smoothing == 0:
            return (total,)
        weight = self.class_weight
        return total, (cosine if weight is None else cosine * weight[tile.classes].to(cosine.dtype)).sum(1)

    def _log_sum(self, sums: tuple[Tensor, ...]) -> Tensor:
        present = torch.where(self.others, sums[0], 1.0).log() + self.log_sum
        return torch.where(self.others | ~self.counts, present, -torch.inf)

    def outputs(self, cosine: Tensor, sums: tuple[Tensor, ...], numbers: Numbers) -> tuple[Tensor, ...]:
        with_sum = sums[1] if self.options.smoothing > 0 else cosine.new_zeros(0)
        return cosine, self._log_sum(sums), with_sum


class LossFormula(PartsFormula):
    """The loss; the numbers are the scale, m1, m2 and m3."""

    def outputs(self, cosine: Tensor, sums: tuple[Tensor, ...], numbers: Numbers) -> tuple[Tensor, ...]:
        options, rows, weight = self.options, self.rows, self.class_weight
        classes = options.total_classes
        loss = reference.loss_of_parts(
            cosine,
            self._log_sum(sums),
            self._psi(cosine, numbers),
            self._scale(numbers),
            rows[row_state.ROW_WEIGHT],
            rows[row_state.TARGET_WEIGHT],
            classes=classes,
            reduction=_REDUCTION_NAMES[options.reduction],
            label_smoothing=options.smoothing,
            weight_sum=float(classes) if weight is None else weight.double().sum(),
            cosine_with_sum=sums[1] if options.smoothing > 0 else None,
        )
        return (loss,)

    def _psi(self, cosine: Tensor, numbers: Numbers) -> Tensor:
        options = self.options
        values = options.m1_value, options.m2_value, options.m3_value
        m1, m2, m3 = (
            cosine.new_tensor(value) if m is None else m for m, value in zip(numbers[1:], values, strict=True)
        )
        guard = _GUARD_NAMES[options.guard]

        def psi(c: Tensor) -> Tensor:
            return reference.FORMULAS[options.formula](c, m1, m2, m3, guard)

        return (straightened(psi) if options.straight else psi)(cosine)
