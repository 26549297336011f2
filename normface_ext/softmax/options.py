"""The options of the softmax head, once: ``functional.normface_loss`` says what they mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from ..engine import checks
from ..engine.arguments import Range, choice, flag, number, size
from ..engine.options import Options, declared, option
from .batch_margins import BatchMargin
from .margins import Margin, margin_argument

_COSINES = Range("in [-1, 1]", -1.0, 1.0)


def margin_gradient(op: str, name: str, value: object) -> str:
    return choice(op, name, value, ("exact", "straight"))


def filter_threshold(op: str, name: str, value: object) -> float | None:
    return None if value is None else number(op, name, value, _COSINES, kind="a number or None")


@declared
@dataclass(frozen=True)
class HeadOptions(Options):
    margin: Margin | None = option(None, margin_argument)
    margin_gradient: str = option("exact", margin_gradient)
    filter_threshold: float | None = option(None, filter_threshold)
    sub_centers: int = option(1, size)
    reduction: str = option("mean", checks.reduction)
    ignore_index: int | None = option(-100, checks.ignore_index)
    eps: float = option(1e-12, checks.eps)
    label_smoothing: float = option(0.0, checks.smoothing)
    workspace: int | None = option(None, checks.workspace)
    check_finite: bool = option(False, flag)
    normalize_input: bool = option(True, flag)

    def agree(self, op: str) -> None:
        """One thing alone makes other logits of the cosines of other classes, and label smoothing wants them
        as they are."""
        if self.filter_threshold is None and self.label_smoothing == 0:
            return
        if self.label_smoothing > 0 and self.sub_centers > 1:
            raise ValueError(
                f"{op}: expected `label_smoothing` 0 with `sub_centers`, since it would be spread over the"
                f" cosines of the nearest centres, whose sum no kernel has, got {self.label_smoothing:g}"
            )
        hard = isinstance(self.margin, BatchMargin) and self.margin.hard_negatives
        if hard and self.filter_threshold is not None:
            raise ValueError(
                f"{op}: expected `filter_threshold` None with {type(self.margin).__name__}, which has a"
                f" threshold of its own, got {self.filter_threshold:g}"
            )
        if self.label_smoothing > 0 and (hard or self.filter_threshold is not None):
            other = type(self.margin).__name__ if hard else "a `filter_threshold`"
            raise ValueError(
                f"{op}: expected `label_smoothing` 0 with {other}, which changes the logits that it would"
                f" be spread over, got {self.label_smoothing:g}"
            )


class HeadKeywords(TypedDict, total=False):
    """The same for static type checkers."""

    margin: Margin | None
    margin_gradient: str
    filter_threshold: float | None
    sub_centers: int
    reduction: str
    ignore_index: int | None
    eps: float
    label_smoothing: float
    workspace: int | None
    check_finite: bool
    normalize_input: bool


@declared
@dataclass(frozen=True)
class PartsOptions(Options):
    sub_centers: int = option(1, size)
    ignore_index: int | None = option(-100, checks.ignore_index)
    eps: float = option(1e-12, checks.eps)
    workspace: int | None = option(None, checks.workspace)


class PartsKeywords(TypedDict, total=False):
    """The same for static type checkers."""

    sub_centers: int
    ignore_index: int | None
    eps: float
    workspace: int | None


@declared
@dataclass(frozen=True)
class NearestOptions(Options):
    sub_centers: int = option(1, size)
    eps: float = option(1e-12, checks.eps)
    workspace: int | None = option(None, checks.workspace)


class NearestKeywords(TypedDict, total=False):
    """The same for static type checkers."""

    sub_centers: int
    eps: float
    workspace: int | None
