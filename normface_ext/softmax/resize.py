"""Classes that come, go or change places: the rows of a head and of all that has one per class follow.

Everything is worked out before anything is changed: an error leaves head and optimizers as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from ..cosine.functions import normalize
from ..cosine.rows import gaussian_unitball_
from ..engine import checks
from ..engine.arguments import choice, integer, size
from .centers import as_rows, by_class
from .margins import Margin

if TYPE_CHECKING:
    from .layers import NormFaceLoss

INITS = ("random", "imprint")
#: How long what is added at random to a class's direction is, where its sub-centres are to differ.
_APART = 0.1
#: What an optimizer starts a new row with, from its group and the row, where that is not 0.
_FIRST_STATE: Mapping[str, Callable[[dict[str, Any], Tensor], Any]] = {
    "step_size": lambda group, rows: group["lr"],  # Rprop
    "sum": lambda group, rows: group.get("initial_accumulator_value", 0.0),  # Adagrad
    "ax": lambda group, rows: rows,  # ASGD: the average begins with the weight itself
}
#: State of Adafactor with one number per feature, whatever its shape may look like.
_PER_FEATURE = frozenset({"col_var"})


def resize_classes(
    head: NormFaceLoss,
    n: int,
    keep: Sequence[int | None] | Tensor | None,
    optimizer: Optimizer | Iterable[Optimizer] | None,
    init: str,
    features: Tensor | None,
    labels: Tensor | None,
    generator: torch.Generator | None,
) -> None:
    """``NormFaceLoss.resize_classes``."""
    op = "resize_classes"
    weight = _plain_weight(op, head)
    source = _source(op, size(op, "n", n), keep, head.num_classes)
    optimizers = _optimizers(op, optimizer, weight)
    choice(op, "init", init, INITS)
    if init == "random" and (features is not None or labels is not None):
        raise ValueError(f"{op}: expected `init` to be 'imprint' where `features` or `labels` are given")
    new = (source < 0).nonzero()[:, 0]
    if init == "imprint" and len(new):
        first = _imprinted(op, head, features, labels, new, len(source), generator)
    else:
        first = _drawn(len(new) * head.options.sub_centers, weight, generator)
    if torch.equal(source, torch.arange(head.num_classes)):
        return
    rows = _Rows(op, source, new, head.num_classes, optimizers)
    first = by_class(first.to(weight.dtype), head.options.sub_centers)
    with torch.no_grad():
        change = rows.change(weight, first)
        class_weight = None if head.class_weight is None else rows.of(head.class_weight, 1.0)
        margin = head.options.margin
        margins = {
            name: rows.change(value, value.detach().mean().item())
            for name, value in _per_class(margin, head.num_classes)
        }
        head.weight, head.num_classes = change.make(), len(source)  # type: ignore[assignment]
        head.class_weight = class_weight
        if margins:
            new_values = {name: each.make() for name, each in margins.items()}
            head.margin = replace(margin, **new_values)  # type: ignore[type-var]


def weight_for(head: NormFaceLoss, labels: Tensor) -> Tensor:
    """``NormFaceLoss.weight_for``."""
    op = "weight_for"
    weight = _plain_weight(op, head)
    checked = checks.label_tensor(op, labels)
    if checked.dim() != 1:
        raise ValueError(f"{op}: expected `labels` to be [N], got shape {list(checked.shape)}")
    checks.same_device(op, "labels", checked, "weight", weight)
    if checks.readable(checked):
        checks.label_range(op, checked, head.num_classes, None)
    centers = head.options.sub_centers
    if centers > 1:
        return normalize(by_class(weight, centers).index_select(0, checked), dim=2, eps=head.eps)
    return normalize(weight.index_select(0, checked), dim=1, eps=head.eps)


def _plain_weight(op: str, head: NormFaceLoss) -> nn.Parameter:
    if checks.is_dtensor(head.weight):
        raise TypeError(f"{op}: expected a head of one process, got one whose classes are spread over ranks")
    if head.weight.is_meta:
        raise ValueError(f"{op}: expected a head with values, got one on the meta device")
    return head.weight


def _source(op: str, n: int, keep: Sequence[int | None] | Tensor | None, classes: int) -> Tensor:
    """[n] int64: the old class of each new one, or -1."""
    if keep is None:
        index = torch.arange(n)
        return index.where(index < classes, -1)
    if isinstance(keep, Tensor):
        keep = keep.tolist() if keep.dim() == 1 else [keep]  # type: ignore[list-item]
    try:
        given = list(keep)
    except TypeError:
        raise TypeError(
            f"{op}: expected `keep` to be a sequence of old classes, got {type(keep).__name__}"
        ) from None
    if len(given) != n:
        raise ValueError(
            f"{op}: expected `keep` to have one entry for each of the {n} classes, got {len(given)}"
        )
    return torch.tensor(
        [
            -1 if old is None else integer(op, f"keep[{new}]", old, -1, classes - 1, kind="an int or None")
            for new, old in enumerate(given)
        ]
    )


def _optimizers(
    op: str, given: Optimizer | Iterable[Optimizer] | None, weight: nn.Parameter
) -> list[Optimizer]:
    if given is None:
        return []
    found = [given] if isinstance(given, Optimizer) else list(given)
    for each in found:
        if not isinstance(each, Optimizer):
            raise TypeError(f"{op}: expected `optimizer` to be an Optimizer, got {type(each).__name__}")
        if isinstance(each, LBFGS):
            raise TypeError(f"{op}: expected `optimizer` to keep its state by parameter, got LBFGS")
        if not any(parameter is weight for group in each.param_groups for parameter in group["params"]):
            raise ValueError(f"{op}: expected `optimizer` to have the head's weight, got one that does not")
    return found


# New rows ---------------------------------------------------------------------------------------------------


def _drawn(count: int, weight: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform on the unit sphere, as the constructor draws them."""
    device = weight.device if generator is None else generator.device
    rows = torch.empty(count, weight.shape[1], dtype=weight.dtype, device=device)
    return gaussian_unitball_(rows, generator=generator).to(weight.device)


def _imprinted(
    op: str,
    head: NormFaceLoss,
    features: Tensor | None,
    labels: Tensor | None,
    new: Tensor,
    classes: int,
    generator: torch.Generator | None,
) -> Tensor:
    """[len(new) K, D]: of each new class the normalised mean of its normalised features, and K - 1 directions
    near it.

    In float64 and on the CPU, where the sum has an order.
    """
    if features is None or labels is None:
        raise ValueError(f"{op}: expected `features` and `labels` for `init`='imprint', got None")
    x = checks.matrix(op, "features", features, "[N, D]").detach().cpu().double()
    if x.shape[1] != head.in_features:
        raise ValueError(f"{op}: expected `features` to be [N, {head.in_features}], got {list(x.shape)}")
    y = checks.label_rows(op, labels, features).cpu()
    ignored = head.options.ignore_index
    checks.label_range(op, y, classes, ignored)
    counts = (y >= 0) & (y < classes)
    place = torch.full((classes,), -1)
    place[new] = torch.arange(len(new))
    place = place[y.where(counts, 0)].where(counts, -1)
    counts = place >= 0
    checks.finite_rows(op, "features", x, counts)
    sums = torch.zeros(len(new), x.shape[1], dtype=torch.float64)
    sums.index_add_(0, place[counts], normalize(x[counts], dim=1, eps=head.eps))
    seen = torch.bincount(place[counts], minlength=len(new))
    for fault, sentence in (
        (seen == 0, "features of every new class, got none"),
        (sums.norm(dim=1) <= 1e-9 * seen, "features of one direction, got ones that cancel out"),
    ):
        if fault.any():
            wrong = new[fault].tolist()
            shown = ", ".join(map(str, wrong[:4])) + f" and {len(wrong) - 4} more" * (len(wrong) > 4)
            raise ValueError(f"{op}: expected {sentence} for {shown}")
    directions: Tensor = sums / sums.norm(dim=1, keepdim=True)
    centers = head.options.sub_centers
    if centers > 1:
        apart = _APART * _drawn(len(new) * centers, directions, generator).view(len(new), centers, -1)
        apart[:, 0] = 0
        directions = normalize(as_rows(directions[:, None] + apart), dim=1, eps=head.eps)
    return directions.to(head.weight.device)


# What has a row per class -----------------------------------------------------------------------------------


def _per_class(margin: Margin | None, classes: int) -> Iterator[tuple[str, Tensor]]:
    """The fields of a margin with a number for each class."""
    if margin is None or margin.per_row or isinstance(margin, nn.Module) or not is_dataclass(margin):
        return
    for each in fields(margin):
        value = getattr(margin, each.name)
        if isinstance(value, Tensor) and value.dim() == 1 and value.shape[0] == classes:
            yield each.name, value


class _Rows:
    """From old rows to new ones: ``source`` [n] is the old class of each, ``new`` those that have none."""

    def __init__(
        self, op: str, source: Tensor, new: Tensor, classes: int, optimizers: Sequence[Optimizer]
    ) -> None:
        self.op, self.source, self.new, self.classes = op, source, new, classes
        self.optimizers = optimizers

    def of(self, old: Tensor, first: Tensor | float) -> Tensor:
        """[n k, ...] out of [C k, ...], k rows of a class together; those of new ones are `first`,
        [new, k, ...] or one number for all."""
        source, new = self.source.to(old.device), self.new.to(old.device)
        of_classes = by_class(old.detach(), old.shape[0] // self.classes)
        rows = of_classes.index_select(0, source.clamp(min=0))
        rows[new] = first.to(rows) if isinstance(first, Tensor) else first
        return as_rows(rows)

    def change(self, old: Tensor, first: Tensor | float) -> _Change:
        """What becomes of a tensor with a row per class, in the optimizers too; nothing is changed yet."""
        if old.requires_grad and not old.is_leaf:
            raise ValueError(f"{self.op}: expected a margin of leaf tensors, got one that was computed")
        values, grad = self.of(old, first), None
        if old.grad is not None:
            if old.grad.layout != torch.strided:
                raise ValueError(
                    f"{self.op}: expected no sparse gradient, got one: call optimizer.zero_grad() first"
                )
            grad = self.of(old.grad, 0.0)
        return _Change(
            old, values, grad, [(each, self._state(each, old, values)) for each in self.optimizers]
        )

    def _state(self, optimizer: Optimizer, old: Tensor, values: Tensor) -> dict[str, Any] | None:
        """An optimizer's state of a tensor; None where there is none yet."""
        if old not in optimizer.state:
            return None
        (group,) = (g for g in optimizer.param_groups if any(p is old for p in g["params"]))
        state: dict[str, Any] = {}
        for name, value in optimizer.state[old].items():
            state[name] = value
            if isinstance(value, (list, tuple, dict)):
                raise TypeError(
                    f"{self.op}: expected `optimizer` to keep tensors and numbers, got"
                    f" {type(value).__name__} in {type(optimizer).__name__}'s `{name}`"
                )
            if isinstance(value, Tensor) and self._has_rows(name, value, old):
                first = _FIRST_STATE.get(name, lambda group, rows: 0.0)
                of_classes = by_class(values, old.shape[0] // self.classes)
                state[name] = self.of(value, first(group, of_classes[self.new.to(values.device)]))
        return state

    def _has_rows(self, name: str, value: Tensor, old: Tensor) -> bool:
        if name in _PER_FEATURE:
            return False
        one_each = value.dim() in (1, 2) and value.shape[0] == old.shape[0] == value.numel()
        return value.shape == old.shape or one_each


class _Change(NamedTuple):
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
