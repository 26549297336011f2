"""Calling ops: which library's, of which device, and the fake kernels that traces take in their place.

The kernels are looked up in ``library.namespace()``: the real library, or, in tests, the emulated
build of the CUDA kernels for CPU tensors.

An op's schema is the list of its arguments (csrc/engine/op.h). What of them are options is picked by name
(:func:`options_of`), and a fake lists what it reads.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
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


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def argument_names(namespace: str, op: str) -> list[str]:
    schema = getattr(getattr(torch.ops, namespace), op).default._schema
    return [argument.name for argument in schema.arguments]


def options_of(op: str, options: type) -> Callable[[Any], tuple[Any, ...]]:
    """From a value of the class ``options``, the last arguments of an op, in the schema's order: all those
    that the class has by name. They are passed by position: keywords cost microseconds."""
    names = argument_names("normface_ext", op)
    first = next(i for i, name in enumerate(names) if _has(options, name))
    assert all(_has(options, name) for name in names[first:]), f"{op}: options come last"
    getter: Callable[[Any], tuple[Any, ...]] = operator.attrgetter(*names[first:])
    return getter


def _has(options: type, name: str) -> bool:
    return name in getattr(options, "__dataclass_fields__", {}) or hasattr(options, name)


FAKES: dict[str, Any] = {}


def register_fakes(namespace: str, fakes: dict[str, Any] | None = None) -> None:
    """Attach the fake (meta) kernels to the ops of ``namespace``: ``fakes``, all by default."""
    for name, fake in (FAKES if fakes is None else fakes).items():
        torch.library.register_fake(f"{namespace}::{name}")(_by_name(argument_names(namespace, name), fake))


def _by_name(names: list[str], fake: Callable[..., Any]) -> Callable[..., Any]:
    """``fake`` gets the arguments that it has parameters for."""
    wanted = list(inspect.signature(fake).parameters)

    def call(*given: Any, **named: Any) -> Any:
        values = {**dict(zip(names, given, strict=False)), **named}
        return fake(**{name: values[name] for name in wanted})

    return call


def add_fakes(fakes: dict[str, Any]) -> None:
    """A family's fake kernels join the table."""
    FAKES.update(fakes)
    register_fakes("normface_ext", fakes)
