"""Classes that come, go or change places: the rows of a head and of all that has one per class follow.

Everything is worked out before anything is changed: an error leaves head and optimizers as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from ..cosine.functions import normalize
from ..cosine.rows import gaussian_unitball_
from ..engine import checks
from ..engine.arguments import choice, integer, size
from .carry import Carrier
from .centers import as_rows, by_class
from .margins import Margin

if TYPE_CHECKING:
    from .layers import NormFaceLoss

Checked = TypeVar("Checked")
INITS = ("random", "imprint")
#: New classes that are imprinted at a time.
BLOCK = 1 << 14
#: How long what is added at random to a class's direction is, where its sub-centres are to differ.
_APART = 0.1


class Asked(NamedTuple):
    """The arguments, checked, and who carries the rows."""

    carrier: Carrier
    labelled: Labelled | None  # of "imprint"

    @property
    def changes(self) -> bool:
        source = self.carrier.source
        return len(source) != self.carrier.classes or not torch.equal(source, torch.arange(len(source)))


class Resizing:
    """What it takes to resize a head whose classes are all in this process."""

    def __init__(self, head: NormFaceLoss) -> None:
        self.head = head

    def agreed(self, check: Callable[[], Checked]) -> Checked:
        """What ``check`` returns, or its error."""
        return check()

    def check_same(self, op: str, asked: Asked) -> None:
        """Raises where processes that resize a head together would make different ones of it."""

    def check_weight(self, op: str) -> None:
        weight = self.head.weight
        if checks.is_dtensor(weight):
            raise TypeError(f"{op}: expected a head of one process, got one that is spread over ranks")
        if weight.is_meta:
            raise ValueError(f"{op}: expected a head with values, got one on the meta device")
        if weight.requires_grad and not weight.is_leaf:  # an optimizer has what it is made of
            raise ValueError(
                f"{op}: expected `weight` to be a parameter of the head, got one that is made of others"
            )

    def carrier(
        self, op: str, source: Tensor, new: Tensor, classes: int, optimizers: Sequence[Optimizer]
    ) -> Carrier:
        return Carrier(op, source, new, classes, optimizers)

    def drawn(self, asked: Asked, generator: torch.Generator | None) -> Tensor:
        """Rows of new classes, [new * K, D], uniform on the unit sphere, as the constructor draws them."""
        weight, count = self.head.weight, len(asked.carrier.new) * self.head.options.sub_centers
        device = weight.device if generator is None else generator.device
        rows = torch.empty(count, weight.shape[1], dtype=weight.dtype, device=device)
        return gaussian_unitball_(rows, generator=generator).to(weight.device)

    def summed(self, sums: Tensor) -> Tensor:
        """Of the features of all processes."""
        return sums

    def kept(self, asked: Asked, begin: int, end: int) -> slice:
        """Which of the new rows [begin, end) are wanted here."""
        return slice(0, end - begin)

    def finish(self, classes: int) -> None:
        self.head.num_classes = classes

    def check_labels(self, op: str, labels: Tensor) -> None:
        if checks.readable(labels):
            checks.label_range(op, labels, self.head.num_classes, None)

    def rows(self, labels: Tensor) -> Tensor:
        """The weight's rows of labels, [N, D] or [N, K, D]."""
        weight, centers = self.head.weight, self.head.options.sub_centers
        return (by_class(weight, centers) if centers > 1 else weight).index_select(0, labels)


def resize_classes(
    way: Resizing,
    n: int,
    keep: Sequence[int | None] | Tensor | None,
    optimizer: Optimizer | Iterable[Optimizer] | None,
    init: str,
    features: Tensor | None,
    labels: Tensor | None,
    generator: torch.Generator | None,
) -> None:
    """``NormFaceLoss.resize_classes``."""
    op, head = "resize_classes", way.head

    def check() -> Asked:
        way.check_weight(op)
        source = _source(op, size(op, "n", n), keep, head.num_classes)
        optimizers = _optimizers(op, optimizer, head.weight)
        choice(op, "init", init, INITS)
        if init == "random" and (features is not None or labels is not None):
            raise ValueError(f"{op}: expected `init` to be 'imprint' where `features` or `labels` are given")
        new, labelled = (source < 0).nonzero()[:, 0], None
        if init == "imprint" and len(new):
            labelled = _labelled(op, head, features, labels, new, len(source))
        asked = Asked(way.carrier(op, source, new, head.num_classes, optimizers), labelled)
        if asked.changes:
            for _, tensor in [("weight", head.weight), *_per_class(head.options.margin, head.num_classes)]:
                asked.carrier.check(tensor)
        return asked

    asked = way.agreed(check)
    way.check_same(op, asked)
    first = way.drawn(asked, generator) if asked.labelled is None else _imprinted(op, way, asked, generator)
    if not asked.changes:
        return
    rows, classes = asked.carrier, len(asked.carrier.source)
    with torch.no_grad():
        change = rows.change(head.weight, first.to(head.weight.dtype))
        class_weight = None if head.class_weight is None else rows.of(head.class_weight, 1.0)
        margin = head.options.margin
        margins = {
            name: rows.change(value, value.detach().mean().item())
            for name, value in _per_class(margin, head.num_classes)
        }
        head.weight = change.make()  # type: ignore[assignment]
        way.finish(classes)
        head.class_weight = class_weight
        if margins:
            new_values = {name: each.make() for name, each in margins.items()}
            head.margin = replace(margin, **new_values)  # type: ignore[type-var]


def weight_for(way: Resizing, labels: Tensor) -> Tensor:
    """``NormFaceLoss.weight_for``."""
    op, head = "weight_for", way.head

    def check() -> Tensor:
        way.check_weight(op)
        checked = checks.label_tensor(op, labels)
        if checked.dim() != 1:
            raise ValueError(f"{op}: expected `labels` to be [N], got shape {list(checked.shape)}")
        checks.same_device(op, "labels", checked, "weight", head.weight)
        way.check_labels(op, checked)
        return checked

    return normalize(way.rows(way.agreed(check)), dim=-1, eps=head.eps)


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


class Labelled(NamedTuple):
    """Features of new classes, normalised, in float64 and on the CPU, where a sum has an order: [M, D], and
    of which new class each is, [M]."""

    units: Tensor
    place: Tensor


def _labelled(
    op: str, head: NormFaceLoss, features: Tensor | None, labels: Tensor | None, new: Tensor, classes: int
) -> Labelled:
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
    return Labelled(normalize(x[counts], dim=1, eps=head.eps), place[counts])


def _imprinted(op: str, way: Resizing, asked: Asked, generator: torch.Generator | None) -> Tensor:
    """[new * K, D]: of each new class the normalised mean of its normalised features, and K - 1 directions
    near it."""
    assert asked.labelled is not None
    (units, place), new, found = asked.labelled, asked.carrier.new, []
    width = units.shape[1]
    counted = torch.cat([units, units.new_ones(len(units), 1)], dim=1)
    for begin in range(0, len(new), BLOCK):
        classes = new[begin : begin + BLOCK]
        here = (place >= begin) & (place < begin + len(classes))
        added = units.new_zeros(len(classes), width + 1).index_add_(0, place[here] - begin, counted[here])
        sums, seen = way.summed(added).split([width, 1], dim=1)
        norms = sums.norm(dim=1, keepdim=True)
        for fault, sentence in (
            (seen == 0, "features of every new class, got none"),
            (norms <= 1e-9 * seen, "features of one direction, got ones that cancel out"),
        ):
            if fault.any():
                wrong = classes[fault[:, 0]].tolist()
                shown = ", ".join(map(str, wrong[:4])) + f" and {len(wrong) - 4} more" * (len(wrong) > 4)
                raise ValueError(f"{op}: expected {sentence} for {shown}")
        found.append((sums / norms)[way.kept(asked, begin, begin + len(classes))])
    directions, centers = torch.cat(found), way.head.options.sub_centers
    if centers > 1:
        apart = _APART * by_class(way.drawn(asked, generator).to(directions), centers)
        apart[:, 0] = 0
        directions = normalize(as_rows(directions[:, None] + apart), dim=1, eps=way.head.eps)
    return directions.to(way.head.weight.device)


def _per_class(margin: Margin | None, classes: int) -> Iterator[tuple[str, Tensor]]:
    """The fields of a margin with a number for each class."""
    if margin is None or margin.per_row or isinstance(margin, nn.Module) or not is_dataclass(margin):
        return
    for each in fields(margin):
        value = getattr(margin, each.name)
        if isinstance(value, Tensor) and value.dim() == 1 and value.shape[0] == classes:
            yield each.name, value
