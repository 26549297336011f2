"""What becomes of a tensor with a row per class, and of what optimizers keep of it, where classes change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .centers import as_rows, by_class

#: What an optimizer starts a new row with, from its group and the row, where that is not 0.
_FIRST_STATE: Mapping[str, Callable[[dict[str, Any], Tensor], Any]] = {
    "step_size": lambda group, rows: group["lr"],  # Rprop
    "sum": lambda group, rows: group.get("initial_accumulator_value", 0.0),  # Adagrad
    "ax": lambda group, rows: rows,  # ASGD: the average begins with the weight itself
}
#: State of Adafactor with one number per feature, whatever its shape may look like.
_PER_FEATURE = frozenset({"col_var"})


class Carrier:
    """Carries rows within one process: ``source`` [n] is the old class of each new one, ``new`` those that
    have none."""

    def __init__(
        self, op: str, source: Tensor, new: Tensor, classes: int, optimizers: Sequence[Optimizer]
    ) -> None:
        self.op: str = op
        self.source: Tensor = source
        self.new: Tensor = new
        self.classes: int = classes
        self.optimizers = optimizers

    def of(self, old: Tensor, first: Tensor | float) -> Tensor:
        """[n k, ...] out of [C k, ...], k rows of a class together; new rows are `first`, one each or one for
        all."""
        source, new = self.source.to(old.device), self.new.to(old.device)
        rows = by_class(old.detach(), old.shape[0] // self.classes).index_select(0, source.clamp(min=0))
        self.begin(rows, new, first)
        return as_rows(rows)

    @staticmethod
    def begin(rows: Tensor, places: Tensor, first: Tensor | float) -> None:
        """The rows of new classes, at their places in [n, k, ...] or [n, ...]."""
        rows[places] = first.to(rows).view(-1, *rows.shape[1:]) if isinstance(first, Tensor) else first

    def new_rows(self, values: Tensor) -> Tensor:
        """Those of [n k, ...] that `of` takes as `first`."""
        return as_rows(by_class(values, values.shape[0] // len(self.source))[self.new.to(values.device)])

    def check(self, old: Tensor) -> None:
        """Raises where `change` could not be made."""
        if old.requires_grad and not old.is_leaf:
            raise ValueError(f"{self.op}: expected a margin of leaf tensors, got one that was computed")
        if old.grad is not None and old.grad.layout != torch.strided:
            raise ValueError(
                f"{self.op}: expected no sparse gradient, got one: call optimizer.zero_grad() first"
            )
        for optimizer in self.optimizers:
            for name, value in optimizer.state.get(old, {}).items():
                self.check_state(type(optimizer).__name__, name, value, old)

    def check_state(self, optimizer: str, name: str, value: object, old: Tensor) -> None:
        if isinstance(value, (list, tuple, dict)):
            raise TypeError(
                f"{self.op}: expected `optimizer` to keep tensors and numbers, got"
                f" {type(value).__name__} in {optimizer}'s `{name}`"
            )

    def change(self, old: Tensor, first: Tensor | float) -> Change:
        """What becomes of a tensor with a row per class, in the optimizers too; nothing is changed yet."""
        values = self.of(old, first)
        grad = None if old.grad is None else self.of(old.grad, 0.0)
        states = [(each, self._state(each, old, values)) for each in self.optimizers]
        return Change(old, values, grad, states)

    def _state(self, optimizer: Optimizer, old: Tensor, values: Tensor) -> dict[str, Any] | None:
        """An optimizer's state of a tensor; None where there is none yet."""
        if old not in optimizer.state:
            return None
        (group,) = (g for g in optimizer.param_groups if any(p is old for p in g["params"]))
        state: dict[str, Any] = {}
        for name, value in optimizer.state[old].items():
            state[name] = value
            if isinstance(value, Tensor) and self.has_rows(name, value, old):
                first = _FIRST_STATE.get(name, lambda group, rows: 0.0)
                state[name] = self.of(value, first(group, self.new_rows(values)))
        return state

    def has_rows(self, name: str, value: Tensor, old: Tensor) -> bool:
        if name in _PER_FEATURE:
            return False
        one_each = value.dim() in (1, 2) and value.shape[0] == old.shape[0] == value.numel()
        return value.shape == old.shape or one_each


class Change(NamedTuple):
    """A tensor with a row per class, and what becomes of it, its gradient, and its state by optimizer."""

    old: Tensor
    values: Tensor
    grad: Tensor | None
    states: Sequence[tuple[Optimizer, dict[str, Any] | None]]

    def make(self) -> Tensor:
        """The new tensor, put in the place of the old one everywhere: itself, where it is a parameter and its
        shape stays."""
        old, values = self.old, self.values
        if isinstance(old, nn.Parameter) and values.shape == old.shape:
            old.copy_(values)
            if self.grad is not None:
                old.grad.copy_(self.grad)  # type: ignore[union-attr]
            new: Tensor = old
        elif isinstance(old, nn.Parameter):
            new = nn.Parameter(values, requires_grad=old.requires_grad)
            new.__dict__.update(old.__dict__)
            new.grad = self.grad
        else:
            new = values.requires_grad_(old.requires_grad)
            new.grad = self.grad
        for optimizer, state in self.states:
            _follow(optimizer, old, new, state)
        return new


def _follow(optimizer: Optimizer, old: Tensor, new: Tensor, state: dict[str, Any] | None) -> None:
    for group in optimizer.param_groups:
        group["params"][:] = [new if each is old else each for each in group["params"]]
    if state is None:
        return
    before = optimizer.state.pop(old)
    if new is old:  # tensors too stay the same objects
        for name, value in before.items():
            if isinstance(value, Tensor):
                value.copy_(state[name])
        state = before
    optimizer.state[new] = state
