"""In which dtypes the ops compute."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_dtype(x: Tensor, kind: str) -> torch.dtype | None:
    """What autocast on a kind of device makes of the operands of a product with x, where it does; float64
    stays."""
    if x.dtype == torch.float64 or x.is_meta or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def autocast(x: Tensor) -> Tensor:
    """x as autocast hands it to a matrix product."""
    dtype = autocast_dtype(x, "cuda" if x.is_cuda else "cpu")
    return x if dtype is None else x.to(dtype)


def full_precision(x: Tensor) -> torch.autocast:
    """Products of these operands in their own dtype."""
    return torch.autocast("cuda" if x.is_cuda else "cpu", enabled=False)
