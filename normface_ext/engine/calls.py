"""Calling ops: which library's, of which device, and the fake kernels that traces take in their place.

The kernels are looked up in ``library.namespace()``: the real library, or, in tests, the emulated
build of the CUDA kernels for CPU tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from . import library
from .dtypes import accumulator, autocast_dtype


def kernels(*tensors: Tensor | None) -> Any:
    """The op namespace for these tensors; CUDA tensors without CUDA kernels get a clear error."""
    for tensor in tensors:
        if tensor is not None and tensor.is_cuda:
            library.require_cuda("normface_ext")
    return library.namespace()


def plan_device(x: Tensor) -> torch.device:
    """Whose plan to follow: the device of x, or CUDA's when emulated CUDA kernels are in use."""
    return torch.device("cuda") if library.emulating() else x.device


def product_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """dtype of the operands of a head's products: the autocast dtype on CUDA inside autocast, else the
    narrower of the two inputs'. CPU kernels widen 16-bit operands to float32 whatever this says, or multiply
    those that are bfloat16 in storage as they are (csrc/cpu/tile_products.h)."""
    lowered = autocast_dtype(x, "cuda") if plan_device(x).type == "cuda" else None
    if lowered is not None:
        return lowered
    return x.dtype if x.dtype.itemsize <= weight.dtype.itemsize else weight.dtype


def stored_cells(
    x: Tensor, batch: int, classes: int, product_precision: torch.dtype
) -> tuple[int, torch.dtype]:
    """All of E, as the device of x lays it out: csrc/cuda/host/head_launch.h, csrc/cpu/row_terms.h."""
    wide = accumulator(x.dtype)
    if plan_device(x).type != "cuda":
        return batch * classes + 1, wide
    return batch * (-(-classes // 8) * 8), torch.bfloat16 if product_precision.itemsize == 2 else wide


def argument_names(op: str) -> tuple[str, ...]:
    """Of an op, in the order of its schema."""
    return tuple(argument.name for argument in getattr(torch.ops.normface_ext, op).default._schema.arguments)


def options_of(op: str, options: type) -> Callable[[Any], tuple[Any, ...]]:
    """A dataclass of options -> the values that end the op's list of arguments: those the schema names as the
    dataclass does."""
    known = {field.name for field in fields(options)}
    named = argument_names(op)
    picked = [name for name in named if name in known]
    if not picked or picked != list(named[-len(picked) :]):
        raise TypeError(f"{op}: expected its arguments to end in those of {options.__name__}, got {named}")
    # Made as text, since torch.compile follows a lambda and no operator.attrgetter, and both are as fast.
    pick: Callable[[Any], tuple[Any, ...]] = eval(
        f"lambda options: ({''.join(f'options.{name}, ' for name in picked)})"
    )
    return pick


def by_name(fakes: dict[str, Any]) -> dict[str, Any]:
    """Fake kernels that take an op's arguments by their names, as the dispatcher calls them."""

    def positional(op: str, fake: Any) -> Any:
        names = argument_names(op)
        return lambda *values, **named: fake(**dict(zip(names, values, strict=False)), **named)

    return {op: positional(op, fake) for op, fake in fakes.items()}


FAKES: dict[str, Any] = {}


def register_fakes(namespace: str, fakes: dict[str, Any] | None = None) -> None:
    """Attach the fake (meta) kernels to the ops of ``namespace``: ``fakes``, all by default."""
    for name, fake in (FAKES if fakes is None else fakes).items():
        torch.library.register_fake(f"{namespace}::{name}")(fake)


def add_fakes(fakes: dict[str, Any]) -> None:
    """A family's fake kernels join the table."""
    FAKES.update(fakes)
    register_fakes("normface_ext", fakes)
