"""What the two losses over agents make of the distances of a row: their options and formulas.

``functional`` and ``distributed`` find the distances, each in its way; here they become losses.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, TypedDict, TypeVar

import torch
from torch import Tensor

from .. import reference
from ..caffe import released_losses
from ..engine import checks
from ..engine.arguments import flag, number
from ..engine.calls import accumulator, plan_device
from ..engine.plan import plan
from .ops import HingeOptions


class AgentRows(NamedTuple):
    """What is known of the rows, [N] each, zero where a row is ignored; target and hinges have a gradient."""

    kept: Tensor  # bool: not ignored
    target: Tensor  # distance to the label's agent
    hinges: Tensor  # what the loss takes of the hinges of the other agents
    slope: Tensor  # sum of the slopes of those


Options = TypeVar("Options", bound="AgentOptions")


class AgentOptions:
    """One loss of the two: the options that users give under the same names."""

    hardest_only: bool
    #: Which of the fields must be numbers, and which True or False.
    NUMBERS: ClassVar[tuple[str, ...]]
    FLAGS: ClassVar[tuple[str, ...]]
    triplet: ClassVar[bool]

    def checked(self: Options, op: str, mode: str) -> Options:
        """The options as Python's own numbers and flags; raises what is none."""
        foreign: dict[str, Any] = self.checked_special(op, mode)
        for name in self.NUMBERS:
            value = getattr(self, name)
            plain = number(op, name, value)
            if not isinstance(value, (int, float)):
                foreign[name] = plain
        for name in self.FLAGS:
            value = getattr(self, name)
            if flag(op, name, value) is not value:
                foreign[name] = bool(value)
        return replace(self, **foreign) if foreign else self  # type: ignore[type-var]

    def checked_special(self, op: str, mode: str) -> dict[str, Any]:
        """Checks the fields that are neither; those that were not Python's own, as they should be."""
        return {}

    @property
    def margin(self) -> float | Tensor:
        """Of the threshold t = margin [+ d_iy] that makes a hinge (t - d_ij)_+."""
        raise NotImplementedError

    @property
    def exponential(self) -> bool:
        return False

    def check_device(self, op: str, x: Tensor) -> None:
        """A margin that is a tensor is read where x lies."""
        if isinstance(self.margin, Tensor):
            checks.same_device(op, "neg_margin", self.margin, "x", x)

    def sweep_options(
        self,
        x: Tensor,
        classes: int,
        ignore_index: int,
        eps: float,
        workspace: int | None,
        active_limit: int | None,
    ) -> tuple[Tensor | None, HingeOptions]:
        """(the margin where it is a tensor, the other arguments of the sweep) for x [N, D] and `classes`."""
        batch, dim = x.shape
        wide, classes = accumulator(x.dtype), max(1, classes)
        chosen = plan(batch, max(1, dim), classes, wide, plan_device(x), workspace=workspace)
        if self.hardest_only:
            capacity = 1
        elif not checks.has_values(x):
            capacity = 0  # following a list needs its length on the host
        elif active_limit is not None:
            capacity = min(active_limit, classes - 1)
        else:
            capacity = min(classes // 16, 512)
        margin = self.margin
        tensor, value = (margin, 0.0) if isinstance(margin, Tensor) else (None, float(margin))
        return tensor, HingeOptions(
            value,
            self.triplet,
            self.hardest_only,
            self.exponential,
            ignore_index,
            eps,
            chosen.class_chunk,
            capacity,
        )

    def losses(self, rows: AgentRows) -> Tensor:
        """[N], before the reduction."""
        raise NotImplementedError

    def positives(self, target: Tensor) -> Tensor:
        """The first statistic of every row."""
        raise NotImplementedError

    @torch.no_grad()
    def stats(
        self, kept: Tensor, target: Tensor, hinge_sum: Tensor, distance_sum: Tensor, classes: int
    ) -> Tensor:
        """[mean positive, mean negative] over the rows that are kept; the sums are over the other classes."""
        negatives = (distance_sum if self.triplet else hinge_sum) / max(1, classes - 1)
        parts = self.positives(target), negatives
        return torch.stack([reference._reduce(part, kept, "mean").to(target.dtype) for part in parts])

    def of_distances(
        self, distances: Tensor, labels: Tensor, ignore_index: int, reduction: str
    ) -> tuple[Tensor, Tensor]:
        """(loss, stats) of a given matrix [N, C], in plain torch."""
        name = "c_triplet_loss" if self.triplet else "c_contrastive_loss"
        loss: Tensor = getattr(reference, name)(
            distances, None, labels, ignore_index=ignore_index, reduction=reduction, **vars(self)
        )
        wide = distances.detach().to(accumulator(distances.dtype))
        target, others = reference._split(wide, labels)
        hinge_sum = (self.margin - others).clamp_min(0).sum(1)
        kept, distance_sum = labels != ignore_index, wide.sum(1) - target
        return loss, self.stats(kept, target, hinge_sum, distance_sum, wide.shape[1])

    def of_caffe(self, distances: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, gradient [N, C], stats) as the released layers have them."""
        released: Any = released_losses.triplet if self.triplet else released_losses.contrastive
        result: tuple[Tensor, Tensor, Tensor] = released(distances, labels, **vars(self))
        return result


class AgentArguments(TypedDict, total=False):
    """Keywords of both losses, as their overloads and ``distributed`` take them."""

    ignore_index: int
    reduction: str
    mode: str
    eps: float
    workspace: int | None
    active_limit: int | None
    check_finite: bool


class ContrastiveArguments(AgentArguments, total=False):
    pos_margin: float
    neg_margin: float | Tensor
    pos_weight: float
    neg_weight: float
    hardest_only: bool
    max_positive_only: bool
    positive_outlier_thresh: float
    positive_first: bool
    positive_upper_bound: float
    exp_negative_weight: bool
    normalize_negative: float | None


class TripletArguments(AgentArguments, total=False):
    margin: float
    pos_weight: float
    neg_weight: float
    hardest_only: bool
    add_center_loss: bool
    positive_first: bool
    positive_upper_bound: float


@dataclass(frozen=True)
class ContrastiveOptions(AgentOptions):
    """``functional.c_contrastive_loss`` says what they mean."""

    pos_margin: float = 0.0
    neg_margin: float | Tensor = 1.0
    pos_weight: float = 1.0
    neg_weight: float = 1.0
    hardest_only: bool = False
    max_positive_only: bool = False
    positive_outlier_thresh: float = 4.0
    positive_first: bool = False
    positive_upper_bound: float = 1.0
    exp_negative_weight: bool = False
    normalize_negative: float | None = None

    NUMBERS = ("pos_margin", "pos_weight", "neg_weight", "positive_outlier_thresh", "positive_upper_bound")
    FLAGS = ("hardest_only", "max_positive_only", "positive_first", "exp_negative_weight")
    triplet = False

    def checked_special(self, op: str, mode: str) -> dict[str, Any]:
        margin, ratio = self.neg_margin, self.normalize_negative
        foreign: dict[str, Any] = {}
        if not isinstance(margin, Tensor):
            plain = number(op, "neg_margin", margin)
            if not isinstance(margin, (int, float)):
                foreign["neg_margin"] = plain
        elif margin.dim() != 0 or margin.dtype not in checks.FLOATING or margin.requires_grad:
            raise ValueError(
                f"{op}: expected `neg_margin` to be a number or a 0-d floating tensor without gradient, got"
                f" {margin.dtype} of shape {list(margin.shape)}{' with gradient' * margin.requires_grad}"
            )
        if ratio is not None:
            plain = number(op, "normalize_negative", ratio, kind="a number or None")
            if mode == "math" and plain <= 0:
                raise ValueError(f"{op}: expected `normalize_negative` > 0, got {plain}")
            if not isinstance(ratio, (int, float)):
                foreign["normalize_negative"] = plain
        return foreign

    @property
    def margin(self) -> float | Tensor:
        return self.neg_margin

    @property
    def exponential(self) -> bool:
        return self.exp_negative_weight

    def positives(self, target: Tensor) -> Tensor:
        return (target - self.pos_margin).clamp(0, self.positive_outlier_thresh)

    def losses(self, rows: AgentRows) -> Tensor:
        kept, hinges, slope = rows.kept, rows.hinges, rows.slope
        positive = self.positives(rows.target)
        if self.max_positive_only and len(kept):
            best = torch.where(kept, positive.detach(), -torch.inf).argmax()
            positive = torch.where(torch.arange(len(kept), device=kept.device) == best, positive, 0)
        if self.positive_first:
            dropped = rows.target.detach() > self.positive_upper_bound
            hinges, slope = torch.where(dropped, 0, hinges), torch.where(dropped, 0, slope)
        if self.normalize_negative is not None:
            count = kept.sum().clamp_min(1)
            size = abs(self.neg_weight) * slope.sum() / self.normalize_negative / count
            # Chosen before the division: one by 0, where nothing is active, has no gradient but NaN.
            hinges = hinges / torch.where((size > self.pos_weight) & (size > 0), size, 1)
        return self.pos_weight * positive + self.neg_weight * hinges


@dataclass(frozen=True)
class TripletOptions(AgentOptions):
    """``functional.c_triplet_loss`` says what they mean."""

    margin: float = 0.8
    pos_weight: float = 1.0
    neg_weight: float = 1.0
    hardest_only: bool = False
    add_center_loss: bool = False
    positive_first: bool = False
    positive_upper_bound: float = 1.0

    NUMBERS = ("margin", "pos_weight", "neg_weight", "positive_upper_bound")
    FLAGS = ("hardest_only", "add_center_loss", "positive_first")
    triplet = True

    def positives(self, target: Tensor) -> Tensor:
        return target

    def losses(self, rows: AgentRows) -> Tensor:
        hinges = rows.hinges
        if self.positive_first:
            hinges = torch.where(rows.target.detach() > self.positive_upper_bound, 0, hinges)
        losses = self.neg_weight * hinges
        return losses + self.pos_weight * rows.target if self.add_center_loss else losses
