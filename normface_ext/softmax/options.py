"""The options of the softmax head, once: ``functional.normface_loss`` says what they mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from ..engine import checks
from ..engine.arguments import choice, flag
from ..engine.options import Options, declared, option
from .margins import Margin, margin_argument


def margin_gradient(op: str, name: str, value: object) -> str:
    return choice(op, name, value, ("exact", "straight"))


@declared
@dataclass(frozen=True)
class HeadOptions(Options):
    margin: Margin | None = option(None, margin_argument)
    margin_gradient: str = option("exact", margin_gradient)
    reduction: str = option("mean", checks.reduction)
    ignore_index: int | None = option(-100, checks.ignore_index)
    eps: float = option(1e-12, checks.eps)
    label_smoothing: float = option(0.0, checks.smoothing)
    workspace: int | None = option(None, checks.workspace)
    check_finite: bool = option(False, flag)


class HeadKeywords(TypedDict, total=False):
    """The same for static type checkers."""

    margin: Margin | None
    margin_gradient: str
    reduction: str
    ignore_index: int | None
    eps: float
    label_smoothing: float
    workspace: int | None
    check_finite: bool


@declared
@dataclass(frozen=True)
class PartsOptions(Options):
    ignore_index: int | None = option(-100, checks.ignore_index)
    eps: float = option(1e-12, checks.eps)
    workspace: int | None = option(None, checks.workspace)


class PartsKeywords(TypedDict, total=False):
    """The same for static type checkers."""

    ignore_index: int | None
    eps: float
    workspace: int | None


@declared
@dataclass(frozen=True)
class NearestOptions(Options):
    eps: float = option(1e-12, checks.eps)
    workspace: int | None = option(None, checks.workspace)


class NearestKeywords(TypedDict, total=False):
    """The same for static type checkers."""

    eps: float
    workspace: int | None
