"""Graphs of a model that others make and read: torch.export, torch.onnx, torch.jit.trace, torch.fx.

torch.compile runs our ops, as eager code does. A graph that is to be read elsewhere must not name them:
while one is made, what a deployed model ends with is done in torch's own operations (``cosine.plain``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.fx import Proxy

Function = TypeVar("Function", bound=Callable[..., Any])


def leaving() -> bool:
    """Whether a graph is being made that is read where this package may be missing."""
    return torch.compiler.is_exporting() or torch._C._is_tracing()


# Dynamo asks Python instead of answering itself: that of torch 2.11 takes every torch.compile for an export.
leaving._dynamo_marked_constant = True  # type: ignore[attr-defined]


def recorded(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """The call of a function as one node of torch.fx's graph: one of its arguments is a Proxy."""
    proxy = next(value for value in arguments if isinstance(value, Proxy))
    return proxy.tracer.create_proxy("call_function", function, arguments, named)


def not_scriptable(name: str) -> RuntimeError:
    """What torch.jit.script is told by those that it cannot read."""
    return RuntimeError(
        f"{name}: expected torch.export or torch.jit.trace, which take a module as it is, got"
        " torch.jit.script, which takes the module that normface_ext.export_ready(module) returns"
    )


def refuse_scripting(function: Function) -> Function:
    """Decorates a function so that torch.jit.script is told."""

    def refuse() -> Function:
        raise not_scriptable(function.__name__)

    function.__prepare_scriptable__ = refuse  # type: ignore[attr-defined]
    return function
