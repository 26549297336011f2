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


def _of_python(question: Function) -> Function:
    """Has Dynamo ask Python, while it traces. It answers itself else: that of torch 2.11 takes every
    torch.compile for an export."""
    question._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return question


@_of_python
def exporting() -> bool:
    """Whether torch.export is under way, or what stands on it, such as torch.onnx.export."""
    return torch.compiler.is_exporting()


@_of_python
def tracing() -> bool:
    """Whether torch.jit.trace is."""
    return torch._C._is_tracing()


@_of_python
def leaving() -> bool:
    """Whether a graph is being made that is read where this package may be missing."""
    return torch.compiler.is_exporting() or torch._C._is_tracing()


def recorded(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """The call of a function as one node of torch.fx's graph: one of its arguments is a Proxy."""
    proxy = next(value for value in arguments if isinstance(value, Proxy))
    return proxy.tracer.create_proxy("call_function", function, arguments, named)


def advice(value: object) -> str:
    """What to do about a Proxy that is given to what torch.fx cannot record, for the end of a sentence."""
    if not isinstance(value, Proxy):
        return ""
    return " of torch.fx; a Tracer whose is_leaf_module is true of the layer records it as a whole"


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
