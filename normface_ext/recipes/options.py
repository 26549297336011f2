"""The options of the recipes, once; each class says what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, TypedDict

from ..engine import checks
from ..engine.arguments import FINITE, NOT_NEGATIVE, POSITIVE, Range, choice, flag, number
from ..engine.options import Check, Options, declared, option


def within(limits: Range) -> Check:
    return lambda op, name, value: number(op, name, value, limits)


def form(op: str, name: str, value: object) -> str:
    return choice(op, name, value, ("paper", "pml"))


@declared
@dataclass(frozen=True)
class BatchOptions(Options):
    """Of every recipe."""

    WHY_NOT: ClassVar[Mapping[str, str]] = checks.NO_SOFTMAX

    ignore_index: int | None = option(-100, checks.ignore_index)
    eps: float = option(1e-12, checks.eps)


class BatchKeywords(TypedDict, total=False):
    """The same for static type checkers, here and below."""

    ignore_index: int | None
    eps: float


@declared
@dataclass(frozen=True)
class RowOptions(BatchOptions):
    """Of those whose loss is made of losses of rows."""

    reduction: str = option("mean", checks.reduction)


class RowKeywords(BatchKeywords, total=False):
    reduction: str


@declared
@dataclass(frozen=True)
class AdaCosOptions(RowOptions):
    dynamic: bool = option(True, flag)
    label_smoothing: float = option(0.0, checks.smoothing)
    workspace: int | None = option(None, checks.workspace)


class AdaCosKeywords(RowKeywords, total=False):
    dynamic: bool
    label_smoothing: float
    workspace: int | None


@declared
@dataclass(frozen=True)
class ProxyNCAOptions(RowOptions):
    form: str = option("paper", form)
    softmax_scale: float = option(1.0, within(POSITIVE))
    label_smoothing: float = option(0.0, checks.smoothing)
    workspace: int | None = option(None, checks.workspace)

    def agree(self, op: str) -> None:
        if self.label_smoothing > 0 and self.form == "paper":
            raise ValueError(
                f"{op}: expected `label_smoothing` 0 with form='paper', whose sum leaves the label out:"
                f" that is no cross entropy, got {self.label_smoothing:g}"
            )


class ProxyNCAKeywords(RowKeywords, total=False):
    form: str
    softmax_scale: float
    label_smoothing: float
    workspace: int | None


@declared
@dataclass(frozen=True)
class P2SGradOptions(RowOptions):
    form: str = option("paper", form)


class P2SGradKeywords(RowKeywords, total=False):
    form: str


@declared
@dataclass(frozen=True)
class SoftTripleOptions(RowOptions):
    la: float = option(20.0, within(POSITIVE))
    gamma: float = option(0.1, within(POSITIVE))
    margin: float = option(0.01, within(NOT_NEGATIVE))
    tau: float = option(0.2, within(NOT_NEGATIVE))
    label_smoothing: float = option(0.0, checks.smoothing)


class SoftTripleKeywords(RowKeywords, total=False):
    la: float
    gamma: float
    margin: float
    tau: float
    label_smoothing: float


@declared
@dataclass(frozen=True)
class UniFaceOptions(RowOptions):
    scale: float = option(64.0, within(POSITIVE))
    margin: float = option(0.4, within(NOT_NEGATIVE))
    negative_weight: float = option(1.0, within(NOT_NEGATIVE))


class UniFaceKeywords(RowKeywords, total=False):
    scale: float
    margin: float
    negative_weight: float


_WITHOUT_ROWS = {
    **checks.NO_SOFTMAX,
    "reduction": "its sums run over rows within the logarithms, so a row has no loss of its own",
}


@declared
@dataclass(frozen=True)
class ProxyAnchorOptions(BatchOptions):
    WHY_NOT: ClassVar[Mapping[str, str]] = _WITHOUT_ROWS

    alpha: float = option(32.0, within(POSITIVE))
    margin: float = option(0.1, within(FINITE))


class ProxyAnchorKeywords(BatchKeywords, total=False):
    alpha: float
    margin: float
