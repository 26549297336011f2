"""The options of the recipes, once; each class says what they mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

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
    workspace: int | None = option(None, checks.workspace)


class AdaCosKeywords(RowKeywords, total=False):
    dynamic: bool
    workspace: int | None


@declared
@dataclass(frozen=True)
class ProxyNCAOptions(RowOptions):
    form: str = option("paper", form)
    softmax_scale: float = option(1.0, within(POSITIVE))
    workspace: int | None = option(None, checks.workspace)


class ProxyNCAKeywords(RowKeywords, total=False):
    form: str
    softmax_scale: float
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


class SoftTripleKeywords(RowKeywords, total=False):
    la: float
    gamma: float
    margin: float
    tau: float


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


@declared
@dataclass(frozen=True)
class ProxyAnchorOptions(BatchOptions):
    alpha: float = option(32.0, within(POSITIVE))
    margin: float = option(0.1, within(FINITE))


class ProxyAnchorKeywords(BatchKeywords, total=False):
    alpha: float
    margin: float
