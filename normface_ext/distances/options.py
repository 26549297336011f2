"""The options of the distances, once: ``functional`` says what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, TypedDict

from ..engine import checks
from ..engine.arguments import flag, number
from ..engine.options import Options, declared, option


@declared
@dataclass(frozen=True)
class DistanceOptions(Options):
    WHY_NOT: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("reduction", "sample_weight", "class_weight", "label_smoothing"), "it gives distances and no loss"
    )

    p: int = option(2, checks.exponent)
    normalize: bool = option(False, flag)
    update_center_only: bool = option(False, flag)
    eps: float = option(1e-12, checks.eps)


class DistanceKeywords(TypedDict, total=False):
    """The same for static type checkers."""

    p: int
    normalize: bool
    update_center_only: bool
    eps: float


_WITHOUT_CLASSES = dict.fromkeys(
    ("class_weight", "label_smoothing"), "its rows have no classes; sample_weight weighs them"
)


@declared
@dataclass(frozen=True)
class PairOptions(Options):
    WHY_NOT: ClassVar[Mapping[str, str]] = _WITHOUT_CLASSES

    margin: float = option(1.0, number)
    reduction: str = option("mean", checks.reduction)


@declared
@dataclass(frozen=True)
class RowTripletOptions(Options):
    WHY_NOT: ClassVar[Mapping[str, str]] = _WITHOUT_CLASSES

    margin: float = option(0.2, number)
    reduction: str = option("mean", checks.reduction)


class RowLossKeywords(TypedDict, total=False):
    """Of both, for static type checkers."""

    margin: float
    reduction: str
