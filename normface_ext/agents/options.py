"""The options of the losses over agents, once: ``functional`` says what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, TypedDict

from torch import Tensor

from ..engine import arguments, checks
from ..engine.arguments import flag, number
from ..engine.options import Options, declared, option


def margin_argument(op: str, name: str, value: object) -> float | Tensor:
    """A number, or a 0-d tensor that is read where it lies."""
    if not isinstance(value, Tensor):
        return number(op, name, value)
    checks.tensor(op, name, value)
    if value.dim() != 0 or value.dtype not in checks.FLOATING or value.requires_grad:
        raise ValueError(
            f"{op}: expected `{name}` to be a number or a 0-d floating tensor without gradient, got"
            f" {value.dtype} of shape {list(value.shape)}{' with gradient' * value.requires_grad}"
        )
    return value


def ratio_argument(op: str, name: str, value: object) -> float | None:
    return None if value is None else number(op, name, value, arguments.POSITIVE, kind="a number or None")


@declared
@dataclass(frozen=True)
class AgentTerms(Options):
    """What both losses say of the distances of a row."""

    pos_weight: float = option(1.0, number)
    neg_weight: float = option(1.0, number)
    hardest_only: bool = option(False, flag)
    positive_first: bool = option(False, flag)
    positive_upper_bound: float = option(1.0, number)


class AgentTermKeywords(TypedDict, total=False):
    """The same for static type checkers, here and below."""

    pos_weight: float
    neg_weight: float
    hardest_only: bool
    positive_first: bool
    positive_upper_bound: float


@declared
@dataclass(frozen=True)
class ContrastiveTerms(AgentTerms):
    pos_margin: float = option(0.0, number)
    neg_margin: float | Tensor = option(1.0, margin_argument)
    max_positive_only: bool = option(False, flag)
    positive_outlier_thresh: float = option(4.0, number)
    exp_negative_weight: bool = option(False, flag)
    normalize_negative: float | None = option(None, ratio_argument)


class ContrastiveTermKeywords(AgentTermKeywords, total=False):
    pos_margin: float
    neg_margin: float | Tensor
    max_positive_only: bool
    positive_outlier_thresh: float
    exp_negative_weight: bool
    normalize_negative: float | None


@declared
@dataclass(frozen=True)
class TripletTerms(AgentTerms):
    margin: float = option(0.8, number)
    add_center_loss: bool = option(False, flag)


class TripletTermKeywords(AgentTermKeywords, total=False):
    margin: float
    add_center_loss: bool


@declared
@dataclass(frozen=True)
class AgentOptions(Options):
    """How both losses go over the agents, and what they make of the rows."""

    WHY_NOT: ClassVar[Mapping[str, str]] = checks.NO_SOFTMAX

    ignore_index: int | None = option(-100, checks.ignore_index)
    reduction: str = option("mean", checks.reduction)
    eps: float = option(1e-12, checks.eps)
    workspace: int | None = option(None, checks.workspace)
    active_limit: int | None = option(None, checks.active_limit)
    check_finite: bool = option(False, flag)


class AgentKeywords(TypedDict, total=False):
    ignore_index: int | None
    reduction: str
    eps: float
    workspace: int | None
    active_limit: int | None
    check_finite: bool


@declared
@dataclass(frozen=True)
class ContrastiveOptions(AgentOptions, ContrastiveTerms):
    """Those of ``c_contrastive_loss``."""


class ContrastiveKeywords(ContrastiveTermKeywords, AgentKeywords, total=False):
    pass


@declared
@dataclass(frozen=True)
class TripletOptions(AgentOptions, TripletTerms):
    """Those of ``c_triplet_loss``."""


class TripletKeywords(TripletTermKeywords, AgentKeywords, total=False):
    pass


@declared
@dataclass(frozen=True)
class ContrastiveLayerOptions(ContrastiveOptions):
    """Those of ``CContrastiveLoss``."""

    add_intra_mae: bool = option(False, flag)
    max_negative_margin: float = option(1.2, number)


class ContrastiveLayerKeywords(ContrastiveKeywords, total=False):
    add_intra_mae: bool
    max_negative_margin: float
