"""Margins that look at the batch: what they are told, and what they give back.

A margin whose formula knows no more than the target cosine is a value (``margins``). AdaFace, MagFace and
ElasticFace give each row of a batch a margin of its own, from the norm of its features or by chance. Such a
margin is a :class:`BatchMargin`, and needs one method: ``of(rows)`` is told what is known of the rows and
returns either a margin with a number per row, which the kernels apply, or a function of the target cosines
[N] in plain torch, or, where other classes are meant too, ``HardNegatives``. No kernel knows of it; N numbers
cost nothing beside the head's N x C.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

from ..engine import checks, transforms
from ..engine.arguments import shown
from ..engine.options import Check
from ..engine.state import Passes, WideState, recomputing
from .hard_negatives import HardNegatives, check_numbers
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
        given: the labels as the caller gave them: by their memory a pass that runs again is known.
        cosine: the target cosines [N] float64, without gradient, and 0 where a row does not count; None
            unless the margin has ``hard_negatives`` and ``uses_cosines``.
        of_all: these are the rows of all ranks of a class-parallel head, in the order of the ranks and with
            padding that does not count. So it is with ``hard_negatives``.
        share: None, or where every row has two labels, so that it stands here twice, first all rows with one
            and then all with the other: how much of a row each is, [N]. What is summed over the batch weighs
            by it, and what is drawn for a row is drawn once (``once_per_row``).
    """

    labels: Tensor
    counts: Tensor
    norms: Tensor | None
    straight: bool = False
    group: Any = None
    given: Tensor | None = None
    cosine: Tensor | None = None
    of_all: bool = False
    share: Tensor | None = None

    def once_per_row(self, draw: Callable[[int], Tensor]) -> Tensor:
        """``draw(number of rows)`` for every row, the same one where a row stands here twice."""
        if self.share is None:
            return draw(self.labels.shape[0])
        return draw(self.labels.shape[0] // 2).repeat(2)


class BatchMargin(WideState, Margin):
    """A margin of its own for every row of a batch.

    It is a module: one with a state has it as buffers, and a layer makes it its submodule ``margin``, so that
    it is trained, moved, saved and loaded with the layer. ``eval()`` freezes the state. As an argument of
    ``functional.normface_loss`` the object itself carries the state from call to call.
    """

    #: Whether ``of`` wants the norms of the features.
    uses_norms = False
    #: Whether ``of`` returns ``HardNegatives``; it is told the target cosines then.
    hard_negatives = False
    #: Whether with ``hard_negatives`` it wants the target cosines, ``rows.cosine``; they cost N dot products.
    uses_cosines = True
    formula = -1  # it has none: what ``of`` returns has
    #: What attributes may be, by name: (class, name, value) -> the value as it is kept. They are checked
    #: whenever they are set, in a constructor as later.
    CHECKS: ClassVar[Mapping[str, Check]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.__module__.partition(".")[0] == __name__.partition(".")[0]:
            # One among the hyper-parameters of a checkpoint loads with weights_only=True.
            torch.serialization.add_safe_globals([cls, Passes])

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, or of a file, of which nobody knows who wrote it."""
        super().__setstate__(state)
        for name in self.CHECKS:
            self.checked(name, getattr(self, name, None))

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, self.checked(name, value) if name in self.CHECKS else value)

    def checked(self, name: str, value: object) -> Any:
        """The value of an attribute in ``CHECKS`` as it is kept; raises what is none."""
        return self.CHECKS[name](type(self).__name__, name, value)

    def of(self, rows: Rows) -> Margin | Psi | HardNegatives:
        """The margins of these rows. Called once per forward; here a state moves, if there is one."""
        raise NotImplementedError

    def regularizer(self, rows: Rows) -> Tensor | None:
        """What a row adds to its loss, [N], or None. It is weighted by sample_weight as the losses are, not
        by class_weight, and "mean" divides it by the sum of sample_weight over the rows that count."""
        return None

    def recomputing(self) -> bool:
        """Whether this forward runs inside a backward, as activation checkpointing does it again there: a
        state must not move twice. Not seen in a compiled step, whose compiler recomputes no mutation."""
        return recomputing()

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
    def __eq__(self, other: object) -> bool:
        return object.__eq__(self, other)

    def __hash__(self) -> int:
        return object.__hash__(self)

    def wide_state(self) -> list[Tensor]:
        """All it has: a number that is learned, and its gradient, too."""
        learned = list(self.parameters())
        return [*super().wide_state(), *learned, *(p.grad for p in learned if p.grad is not None)]


class FollowingMargin(BatchMargin):
    """A margin whose buffers, [1] each, follow the batches: they are moved before they are used, once per
    forward pass in training mode. One that asks for ``totals`` has an attribute ``sync``."""

    #: The buffers' names.
    STATE: ClassVar[tuple[str, ...]]
    sync: str

    def __init__(self) -> None:
        super().__init__()
        self._passes = Passes()

    def follow_rows(self, rows: Rows) -> None:
        """Moves the buffers by these rows, without gradient."""
        raise NotImplementedError

    def present(self, rows: Rows) -> tuple[Tensor, ...]:
        """The buffers for these rows, moved by them first; those it had, for a pass that is run again."""
        if rows.labels.is_meta:  # shapes only: nothing to follow
            return tuple([getattr(self, name).to("meta") for name in self.STATE])
        if self.training and transforms.watched():
            raise RuntimeError(
                f"{type(self).__name__}: expected eval() under transforms of torch.func and forward-mode"
                " derivatives, which let no state move, got training mode"
            )
        again = self.recomputing()
        if self.training and not again:
            with torch.no_grad():
                self.follow_rows(rows)
        state = tuple([getattr(self, name) for name in self.STATE])
        labels = rows.labels if rows.given is None else rows.given
        if self.training and checks.has_values(labels):
            if again:
                before: tuple[Tensor, ...] = self._passes.state(type(self).__name__, labels).split(1)
                return before
            self._passes.add(labels, torch.cat(state))
        return state

    def totals(self, rows: Rows, follows: Tensor, *values: Tensor) -> Tensor:
        """The sums of values [N] over the rows that `follows` [N] has, each once, of all ranks where so it is
        to be."""
        if rows.share is not None:
            values = tuple([rows.share * value for value in values])
        sums = torch.stack([torch.where(follows, value, 0).sum() for value in values])
        asked = self.sync == "global" and dist.is_available() and dist.is_initialized()
        if rows.group is not None or (asked and not rows.of_all):
            dist.all_reduce(sums, group=rows.group)
        return sums


def margin_of(op: str, margin: BatchMargin, rows: Rows) -> Margin | Psi | HardNegatives:
    """What ``margin.of`` says of the rows, checked."""
    found: object = margin.of(rows)
    source = f"{type(margin).__name__}.of"
    if margin.hard_negatives:
        return _checked_negatives(op, source, found, rows)
    if _is_numbers(found):
        return found
    if isinstance(found, (Margin, HardNegatives)) or not callable(found):
        raise TypeError(
            f"{op}: expected `{source}` to return a margin of numbers, such as a RowMargin, or a function of"
            f" the target cosines, got {shown(found)}"
        )
    psi: Psi = found
    return lambda cosine: _of_rows(op, f"the function of {source}", psi(cosine), rows)


def _is_numbers(found: object) -> TypeGuard[Margin]:
    """Whether it is a margin that the kernels apply."""
    return isinstance(found, Margin) and type(found) is not Margin and not isinstance(found, BatchMargin)


def _checked_negatives(op: str, source: str, found: object, rows: Rows) -> HardNegatives:
    if not isinstance(found, HardNegatives):
        raise TypeError(f"{op}: expected `{source}` to return HardNegatives, got {shown(found)}")
    if not _is_numbers(found.target):
        raise TypeError(
            f"{op}: expected the `target` of {source} to be a margin of numbers, such as a RowMargin, got"
            f" {shown(found.target)}"
        )
    check_numbers(op, source, found, rows.labels.device)
    _of_rows(op, f"the threshold of {source}", found.threshold, rows)
    return found


def regularizer_of(op: str, margin: BatchMargin, rows: Rows) -> Tensor | None:
    """What ``margin.regularizer`` says of the rows, checked."""
    more = margin.regularizer(rows)
    return None if more is None else _of_rows(op, f"{type(margin).__name__}.regularizer", more, rows)


def _of_rows(op: str, source: str, value: object, rows: Rows) -> Tensor:
    """A number per row."""
    labels = rows.labels

    def wanted() -> (
        str
    ):  # made where it is said: a trace whose batch is in a sentence is for that batch alone
        return f"{op}: expected `{source}` to return a floating tensor of shape [{len(labels)}]"

    if not isinstance(value, Tensor):
        raise TypeError(f"{wanted()}, got {shown(value)}")
    if value.dtype not in checks.FLOATING:
        raise TypeError(f"{wanted()}, got {value.dtype}")
    if value.shape != labels.shape:
        raise ValueError(f"{wanted()}, got shape {list(value.shape)}")
    if value.device != labels.device:
        raise ValueError(f"{wanted()} on {labels.device}, got {value.device}")
    return value


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


def weighed(values: Tensor, weights: Tensor) -> Tensor:
    """Values [N] times their weights; what stands in a row of weight 0 reaches nothing."""
    return torch.where(weights != 0, values * weights, 0)
