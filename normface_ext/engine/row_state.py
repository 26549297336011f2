"""What the ops of the engine are told and what they say of a row, by the names of csrc/engine: row_state.h,
terms.h and head_arguments.h."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import native

#: A row's fields by name, each with how shards combine: csrc/engine/row_state.h.
ROW_FIELDS: dict[str, str] = native.ROW_FIELDS
_PLACES = {name: place for place, name in enumerate(ROW_FIELDS)}
SUM, SECOND_SUM, COSINE = _PLACES["sum"], _PLACES["second_sum"], _PLACES["cosine"]
TARGET_WEIGHT, SHIFT = _PLACES["target_weight"], _PLACES["shift"]
INVERSE_NORM, ROW_WEIGHT = _PLACES["inverse_norm"], _PLACES["row_weight"]
LARGEST = _PLACES["largest"]
#: The slopes of a row's loss by name, those along the margin's numbers last.
SLOPES: list[str] = native.SLOPES
ALL_SLOPES, SLOPE_FIELDS = len(SLOPES), SLOPES.index("m1")
#: csrc/engine/terms.h
TERMS: dict[str, int] = {name: number for number, name in enumerate(native.TERMS)}
SINKS: dict[str, int] = {name: number for number, name in enumerate(native.SINKS)}
ELSEWHERE = -1  # instead of a label: the target is a class of another shard
IGNORED = -2  # the label of a row that does not count, where labels have become rows of the weight


class TermInputs(NamedTuple):
    """What a term wants of the rows, [N] float64, and its numbers common to all, both perhaps none."""

    threshold: Tensor | None
    numbers: Tensor | None


NO_INPUTS = TermInputs(None, None)


@dataclass(eq=False)
class SweepOptions:
    """The arguments of the engine's ops that are neither tensors nor differentiable, by their names in
    csrc/engine/head_arguments.h. A ``..._value`` counts where no tensor stands for it."""

    scale_value: float
    eps: float
    total_classes: int
    keep: bool  # E, where a gradient of the weight is wanted
    workspace: int
    product: str
    product_precision: torch.dtype
    ignore_index: int
    smoothing: float = 0.0
    term: int = TERMS["softmax"]
    lowest: float = -1.0
    highest: float = 1.0
    is_shard: bool = False  # one shard of the classes of several
    centers: int = 1  # of a class: rows of the weight, and labels are rows as well


class Swept(NamedTuple):
    """What ``head_sweep`` found of all rows, in the order in which ``head_backward`` takes it."""

    rows: Tensor
    inverse_norm: Tensor
    x_sum: Tensor
    class_sum: Tensor
    stored: Tensor
