"""What ``softmax_loss`` leaves for its backward, in one tensor: csrc/engine/softmax_loss.h lays it out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .calls import stored_cells
from .dtypes import accumulator
from .row_state import ALL_SLOPES, ROW_FIELDS, SLOPE_FIELDS, Swept

#: Where a tensor begins, in bytes: csrc/engine/block.h.
_ALIGNMENT = 128


class Parts(NamedTuple):
    """What of a step lies there."""

    store: bool  # E
    keep_x: bool  # x_sum
    need_class_sum: bool
    need_margin: bool  # the slopes along the margin


def _tensors(
    parts: Parts, x: Tensor, classes: int, product_precision: torch.dtype
) -> Iterator[tuple[list[int], torch.dtype]]:
    (batch, dim), wide = x.shape, accumulator(x.dtype)
    cells, of_cells = stored_cells(x, batch, classes, product_precision)
    yield [len(ROW_FIELDS), batch], torch.float64
    yield [ALL_SLOPES if parts.need_margin else SLOPE_FIELDS, batch], torch.float64
    yield [classes], wide
    yield [batch, dim] if parts.keep_x else [0], wide
    yield [dim + 1 if parts.need_class_sum else 0], wide
    yield [cells if parts.store else 0], of_cells


def _bytes(shape: list[int], dtype: torch.dtype) -> int:
    return -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT


def saved_count(parts: Parts, x: Tensor, classes: int, product_precision: torch.dtype) -> int:
    """Of its float64 values."""
    return sum(_bytes(*each) for each in _tensors(parts, x, classes, product_precision)) // 8


def unpacked(
    saved: Tensor, parts: Parts, x: Tensor, classes: int, product_precision: torch.dtype
) -> tuple[Swept, Tensor]:
    """(what the sweep found, the slopes of the rows' losses), as views."""
    views, begin = [], 0
    for shape, dtype in _tensors(parts, x, classes, product_precision):
        count, held = math.prod(shape), _bytes(shape, dtype) // 8
        views.append(saved[begin : begin + held].view(dtype)[:count].view(shape))
        begin += held
    rows, slopes, *rest = views
    return Swept(rows, *rest), slopes
