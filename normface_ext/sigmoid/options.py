"""The options of the sigmoid heads, once: ``functional.sphereface2_loss`` says what they mean."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, TypedDict

from ..engine import checks
from ..engine.arguments import (
    ANGLE,
    BETWEEN_0_AND_1,
    FINITE,
    NOT_NEGATIVE,
    POSITIVE,
    choice,
    flag,
    integer,
    number,
)
from ..engine.options import Options, declared, option

#: Up to here every whole number has a float32, as which kernels keep it.
MOST_POWER = 1 << 24


def _scale(op: str, name: str, value: object) -> float:
    return number(op, name, value, POSITIVE)


def _margin(op: str, name: str, value: object) -> float:
    return number(op, name, value, NOT_NEGATIVE)


def _share(op: str, name: str, value: object) -> float:
    return number(op, name, value, BETWEEN_0_AND_1)


def _power(op: str, name: str, value: object) -> int:
    return integer(op, name, value, 1, MOST_POWER)


def _loss_weight(op: str, name: str, value: object) -> float | None:
    return None if value is None else number(op, name, value, POSITIVE, kind="a number or None")


def _first_bias(op: str, name: str, value: object) -> float | None:
    return None if value is None else number(op, name, value, FINITE, kind="a number or None")


def _form(op: str, name: str, value: object) -> str:
    return choice(op, name, value, ("C", "A"))


def _gradient(op: str, name: str, value: object) -> str:
    return choice(op, name, value, ("exact", "straight"))


@declared
@dataclass(frozen=True)
class SphereFace2Options(Options):
    WHY_NOT: ClassVar[Mapping[str, str]] = checks.NO_SOFTMAX

    alpha: float = option(0.7, _share)
    r: float = option(40.0, _scale)
    m: float = option(0.4, _margin)
    t: int = option(3, _power)
    form: str = option("C", _form)
    loss_weight: float | None = option(None, _loss_weight)
    margin_gradient: str = option("exact", _gradient)
    reduction: str = option("mean", checks.reduction)
    ignore_index: int | None = option(-100, checks.ignore_index)
    eps: float = option(1e-12, checks.eps)
    workspace: int | None = option(None, checks.workspace)
    check_finite: bool = option(False, flag)

    def agree(self, op: str) -> None:
        if self.form == "A" and not self.m < math.pi:
            raise ValueError(f"{op}: expected `m` {ANGLE.text}, an angle, with the form 'A', got {self.m:g}")


class SphereFace2Keywords(TypedDict, total=False):
    """The same for static type checkers, here and below."""

    alpha: float
    r: float
    m: float
    t: int
    form: str
    loss_weight: float | None
    margin_gradient: str
    reduction: str
    ignore_index: int | None
    eps: float
    workspace: int | None
    check_finite: bool


@declared
@dataclass(frozen=True)
class SphereFace2LayerOptions(SphereFace2Options):
    """Those of ``SphereFace2Loss``."""

    first_bias: float | None = option(None, _first_bias)


class SphereFace2LayerKeywords(SphereFace2Keywords, total=False):
    first_bias: float | None
