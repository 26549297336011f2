"""Calling ops: which library's, of which device, and the fake kernels that traces take in their place.

The kernels are looked up in ``library.namespace()``: the real library, or, in tests, the emulated
build of the CUDA kernels for CPU tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import library


def kernels(*tensors: Tensor | None) -> Any:
    """The op namespace for these tensors; CUDA tensors without CUDA kernels get a clear error."""
    for tensor in tensors:
        if tensor is not None and tensor.is_cuda:
            library.require_cuda("normface_ext")
    return library.namespace()


def plan_device(x: Tensor) -> torch.device:
    """Whose plan to follow: the device of x, or CUDA's when emulated CUDA kernels are in use."""
    return torch.device("cuda") if library.emulating() else x.device


def autocast(x: Tensor) -> Tensor:
    """x as autocast hands it to a matrix product: float64 stays."""
    kind = x.device.type
    if x.dtype == torch.float64 or kind == "meta" or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


FAKES: dict[str, Any] = {}


def register_fakes(namespace: str, fakes: dict[str, Any] | None = None) -> None:
    """Attach the fake (meta) kernels to the ops of ``namespace``: ``fakes``, all by default."""
    for name, fake in (FAKES if fakes is None else fakes).items():
        torch.library.register_fake(f"{namespace}::{name}")(fake)


def add_fakes(fakes: dict[str, Any]) -> None:
    """A family's fake kernels join the table."""
    FAKES.update(fakes)
    register_fakes("normface_ext", fakes)
