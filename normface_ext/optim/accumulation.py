"""Several backward passes per step without a second gradient of the weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..engine import updates
from ..engine.checks import is_dtensor
from .weights import check_layout, has_hooks, heads_of, weight_of

OWNER = "accumulate_in_place"


class _InPlace(updates.Taker):
    def check(self, weight: Tensor) -> None:
        """Where it cannot be done the gradient is made as ever."""

    def begin(self, weight: Tensor) -> updates.Update | None:
        sum_so_far = weight.grad
        if (
            sum_so_far is None  # backward's own gradient becomes it, without a copy
            or torch.is_grad_enabled()  # create_graph
            or has_hooks(weight)
            or sum_so_far.layout != torch.strided
            or is_dtensor(sum_so_far) != is_dtensor(weight)
            or sum_so_far.dtype != weight.dtype
            or not sum_so_far.is_contiguous()
        ):
            return None
        return updates.Update("add", sum_so_far, None, updates.Numbers())

    def end(self, weight: Tensor, update: updates.Update) -> None:
        """The sum has the rows."""


class Accumulating:
    """What :func:`accumulate_in_place` has changed; ``remove()``, or the end of a ``with``, takes it back."""

    def __init__(self, taken: list[tuple[Tensor, updates.Taker]]) -> None:
        self._taken = taken

    def remove(self) -> None:
        for weight, taker in self._taken:
            updates.remove(weight, taker)
        self._taken = []

    def __enter__(self) -> Accumulating:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def accumulate_in_place(head: nn.Module) -> Accumulating:
    """From now on backward adds the weight's gradient to the ``weight.grad`` that is there, row by row.

    Autograd makes a second gradient, of the size of the weight, and adds that: 2 GB more at a million classes
    of 512 float32 numbers. The sum is the same to the bit in float32 and float64; in 16 bits a row is rounded
    once as a gradient and once as a sum, as autograd does. The first backward after ``zero_grad()`` makes the
    gradient; nothing else of autograd changes: ``torch.autograd.grad`` gives the gradient itself, and
    where a hook of the weight wants to see it, or a graph of it is made, it is made as ever.

    It has to be asked for, since what is taken away is a tensor that others may hold: ``weight.grad`` is
    written in place, and a backward that is interrupted leaves part of its rows in the sum.

    Args:
        head: a head, or a module that contains some.

    Returns:
        A handle whose ``remove()`` ends it; also a context manager.

    Raises:
        TypeError: no module.
        ValueError: no head in it; a weight that is parametrized, of ``fully_shard``, of a sampled head, not
            contiguous, or updated in backward by one of the fused optimizers.
    """
    taken: list[tuple[Tensor, updates.Taker]] = []
    for each in heads_of(OWNER, head):
        weight = weight_of(OWNER, each)
        check_layout(OWNER, weight)
        before = updates.taken_by(weight)
        if before is not None and not isinstance(before, _InPlace):
            raise ValueError(
                f"{OWNER}: expected a weight that has a gradient, got one that is updated in backward"
            )
        taken.append((weight, _InPlace()))
    for parameter, taker in taken:
        updates.put(parameter, taker)
    return Accumulating(taken)
