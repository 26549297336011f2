"""What the ops of the softmax head are told of a loss."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..engine.row_state import SweepOptions

#: m1, m2 and m3, where they are tensors: [] or [N].
MarginTensors = tuple[Tensor | None, Tensor | None, Tensor | None]
NUMBERS: MarginTensors = (None, None, None)


@dataclass(eq=False)
class LossOptions(SweepOptions):
    """With those of ``softmax_finish``."""

    reduction: int = 1
    m1_value: float = 1.0
    m2_value: float = 0.0
    m3_value: float = 0.0
    formula: int = 0
    guard: int = 0
    straight: bool = False
