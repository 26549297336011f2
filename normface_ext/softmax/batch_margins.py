"""Margins that look at the batch: what they are told, and what they give back.

A margin whose formula knows no more than the target cosine is a value (``margins``). AdaFace, MagFace and
ElasticFace give each row of a batch a margin of its own, from the norm of its features or by chance. Such a
margin is a :class:`BatchMargin`, and needs one method: ``of(rows)`` is told what is known of the rows and
returns either a margin with a number per row, which the kernels apply, or a function of the target cosines
[N] in plain torch. No kernel knows of it; N numbers cost nothing beside the head's N x C.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .margins import Margin

#: Target cosines [N] float64 -> psi [N] float64, differentiable.
Psi = Callable[[Tensor], Tensor]


class Rows(NamedTuple):
    """The rows of one call.

    Attributes:
        labels: [N] int64.
        counts: [N] bool: rows that are not ignored and whose sample_weight is not 0.
        norms: |x| of the features [N] float64, with gradient, and 1 where a row does not count; None unless
            the margin ``uses_norms``.
        straight: ``margin_gradient="straight"``: psi is a constant shift of the cosine, whatever ``of``
            returns. Told because published code may have another formula then.
        group: the ranks of a class-parallel head, of whose rows these are a part; None elsewhere.
    """

    labels: Tensor
    counts: Tensor
    norms: Tensor | None
    straight: bool = False
    group: Any = None


class BatchMargin(nn.Module, Margin):
    """A margin of its own for every row of a batch.

    It is a module: one with a state has it as buffers, and a layer makes it its submodule ``margin``, so that
    it is trained, moved, saved and loaded with the layer. ``eval()`` freezes the state. As an argument of
    ``functional.normface_loss`` the object itself carries the state from call to call.
    """

    #: Whether ``of`` wants the norms of the features.
    uses_norms = False
    formula = -1  # it has none: what ``of`` returns has

    def of(self, rows: Rows) -> Margin | Psi:
        """The margins of these rows. Called once per forward; here a state moves, if there is one."""
        raise NotImplementedError

    def regularizer(self, rows: Rows) -> Tensor | None:
        """What a row adds to its loss, [N], or None. It is weighted by sample_weight as the losses are, not
        by class_weight, and "mean" divides it by the sum of sample_weight over the rows that count."""
        return None

    def follow(self, op: str, device: torch.device) -> None:
        """A state goes where the features are: a margin is often made before its head is moved. Not while
        compiling, when it has to be there."""
        if torch.compiler.is_compiling():
            return
        for state in self.buffers():
            if state.is_meta and device.type != "meta":
                raise ValueError(
                    f"{op}: expected `margin` to have a state, got {self!r} on the meta device;"
                    " to_empty(device=...) and its reset_parameters() give it one"
                )
            if state.device != device and device.type != "meta":
                self.to(device)

    # Two modules are never the same margin: their states go their own ways.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """A state stays float32 or wider, also in a module that is made half() or bfloat16()."""

        def wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrowed = tensor.is_floating_point() and moved.dtype.itemsize < 4
            return tensor.to(moved.device) if narrowed else moved

        return super()._apply(wide, recurse)


def straightened(psi: Psi) -> Psi:
    """The values of psi, and slope 1 in the cosine."""

    def straight(cosine: Tensor) -> Tensor:
        return cosine + (psi(cosine.detach()) - cosine).detach()

    return straight


def rows_weight(rows: Rows, sample_weight: Tensor | None) -> Tensor:
    """The weights [N] of what rows add to their losses, float64."""
    if sample_weight is None:
        return rows.counts.double()
    return torch.where(rows.counts, sample_weight.double(), 0)


def reduced(values: Tensor, weights: Tensor, total: Tensor, reduction: str) -> Tensor:
    """Values [N] as a loss is reduced; `total` is the sum of the weights of all rows there are."""
    weighted = torch.where(weights != 0, values * weights, 0)
    if reduction == "none":
        return weighted
    if reduction == "sum":
        return weighted.sum()
    empty = total == 0
    return torch.where(empty, 0, weighted.sum() / torch.where(empty, 1, total))


def recomputing() -> bool:
    """Whether this forward runs inside a backward: activation checkpointing does it again there. A state
    must not move twice. Not seen in a compiled step, whose compiler recomputes no mutation."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
