"""Weights whose gradient is not kept: what takes its rows as backward makes them, and when it may."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

#: csrc/math/update.h
RULES = {"add": 0, "sgd": 1, "adam": 2}


class Numbers(NamedTuple):
    """Of ``head_backward_update``, in the order of its schema."""

    lr: float = 0.0
    weight_decay: float = 0.0
    momentum: float = 0.0
    dampening: float = 0.0
    beta1: float = 0.0
    beta2: float = 0.0
    adam_eps: float = 0.0
    correction1: float = 1.0
    correction2: float = 1.0
    maximize: bool = False
    nesterov: bool = False
    starts: bool = False
    decoupled: bool = False


class Update(NamedTuple):
    """What becomes of the rows of a gradient: ``rule`` is a name of RULES, the states are like the weight."""

    rule: str
    state1: Tensor | None
    state2: Tensor | None
    numbers: Numbers


class Taker(ABC):
    """What takes the rows of a weight's gradient in backward, so that the gradient never exists."""

    def serves(self) -> bool:
        """Whether it still takes anything."""
        return True

    @abstractmethod
    def check(self, weight: Tensor) -> None:
        """In a forward that a backward may follow: raises what can be known by then."""

    @abstractmethod
    def begin(self, weight: Tensor) -> Update | None:
        """In a backward that adds to ``weight.grad``, before anything changes. None: make a gradient."""

    @abstractmethod
    def end(self, weight: Tensor, update: Update) -> None:
        """After the rows were taken."""


_takers: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_count = 0  # how many there are, a plain number for torch.compile to guard on
_MARK = "_normface_taken"  # of a taken weight: torch.compile follows no table of weak references
_apply_eagerly: Any = None  # made with the first taker: torch.compiler.disable imports what torch.compile is


def _counted() -> None:
    global _count
    _count = len(_takers)


def put(weight: Tensor, taker: Taker) -> None:
    """From now on the gradient of ``weight`` goes to ``taker``."""
    global _apply_eagerly
    if _apply_eagerly is None:
        why = "normface_ext: a weight is updated in backward, which no compiled graph can do"
        _apply_eagerly = torch.compiler.disable(_apply, reason=why)
    _takers[weight] = taker
    setattr(weight, _MARK, True)
    _counted()


def taken_by(weight: Tensor) -> Taker | None:
    found: Taker | None = _takers.get(weight)
    return found if found is not None and found.serves() else None


def takes(weight: Tensor) -> bool:
    """Whether somebody takes the gradient of ``weight``."""
    if _count == 0 or not hasattr(weight, _MARK):
        return False
    return torch.compiler.is_compiling() or taken_by(weight) is not None


def remove(weight: Tensor, taker: Taker) -> None:
    """No longer to this one."""
    if _takers.get(weight) is taker:
        del _takers[weight]
        delattr(weight, _MARK)
    _counted()


def of(weight: Tensor, needed: bool) -> Taker | None:
    """In the forward of a Function: who takes the gradient, if somebody does."""
    if _count == 0 or not needed or torch.compiler.is_compiling():  # then nobody does: see `apply`
        return None
    taker = taken_by(weight)
    if taker is not None:
        taker.check(weight)
    return taker


def _apply(apply: Callable[..., Any], *arguments: Any) -> Any:
    return apply(*arguments)


def apply(function: Any, x: Tensor, weight: Tensor, *arguments: Any) -> Any:
    """``function.apply``; where the weight may be updated in backward, not as a part of a compiled graph."""
    if _count > 0 and torch.compiler.is_compiling() and hasattr(weight, _MARK):
        return _apply_eagerly(function.apply, x, weight, *arguments)
    return function.apply(x, weight, *arguments)


class Taking(NamedTuple):
    """One backward whose gradient of the weight is taken."""

    taker: Taker
    weight: Tensor
    update: Update

    @contextmanager
    def arguments(self) -> Iterator[tuple[Any, ...]]:
        """What ``head_backward_update`` is told to do. Afterwards autograd knows what was written."""
        rule, *states, numbers = self.update
        yield *map(_local, states), RULES[rule], *numbers
        written = [state for state in states if state is not None]
        if rule != "add":
            written.append(self.weight)
        for tensor in written:
            torch.autograd.graph.increment_version(tensor)
            if (local := _local(tensor)) is not tensor and local is not None:
                torch.autograd.graph.increment_version(local)
        self.taker.end(self.weight, self.update)


def _local(tensor: Tensor | None) -> Tensor | None:
    """What is here of a DTensor, as rows."""
    if tensor is None:
        return None
    tensor = tensor.detach()
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part.flatten(0, -2)


def begin(ctx: Any, place: int) -> tuple[bool, Taking | None]:
    """(whether this backward needs the gradient of the weight, what takes it), for a Function that keeps in
    ``ctx.taker`` what :func:`of` said; `place`: of the weight among its inputs that are tensors.

    It is taken where it would be added to ``weight.grad``. ``torch.autograd.grad`` gets what it asks for.
    """
    taker: Taker | None = ctx.taker
    if taker is None:
        return bool(ctx.needs_input_grad[place]), None
    node = ctx.next_functions[place][0]
    try:
        adds = torch._C._will_engine_execute_node(node)
    except RuntimeError:  # torch.autograd.grad asks for this very gradient
        return True, None
    if not adds:
        return False, None
    weight = node.variable
    update = taker.begin(weight)
    return (True, None) if update is None else (False, Taking(taker, weight, update))
