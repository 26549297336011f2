"""ElasticFace: margins drawn anew for every row."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .. import reference
from ..engine.arguments import NOT_NEGATIVE, number, shown
from ..engine.options import Check
from .batch_margins import BatchMargin, Psi, Rows
from .margins import LIMITS, Margin, RowMargin

Plus = bool | str


def _plus(owner: str, name: str, value: object) -> Plus:
    if value is True or value is False or value == "released":
        return value
    raise ValueError(f"{owner}: expected `{name}` to be True, False or 'released', got {shown(value)}")


def drawn(m: float, std: float, rows: Rows) -> Tensor:
    """Margins [N] from N(m, std), float64, by torch's generator of the rows' device."""
    device = rows.labels.device
    return m + std * rows.once_per_row(lambda count: torch.randn(count, dtype=torch.float64, device=device))


def by_difficulty(margins: Tensor, cosine: Tensor, counts: Tensor, plus: Plus) -> Tensor:
    """The margins of the rows that count, handed out anew among them by their target cosines [N]."""
    from_easy = torch.where(counts, cosine.detach(), -torch.inf).argsort(descending=True)
    from_small = torch.where(counts, margins, torch.inf).sort().values
    if plus == "released":  # the inverse of the order that is meant
        place = counts.cumsum(0) - 1  # among the rows that count
        return torch.where(counts, from_small[place[from_easy[place]]], margins)
    return torch.where(counts, torch.empty_like(margins).scatter(0, from_easy, from_small), margins)


class ElasticFace(BatchMargin):
    """What both have in common; they say what a margin is, and what psi."""

    CHECKS: ClassVar[dict[str, Check]] = {
        "std": lambda owner, name, value: number(owner, name, value, NOT_NEGATIVE),
        "plus": _plus,
    }
    m: float
    std: float
    plus: Plus

    def __init__(self, m: float, std: float, plus: Plus) -> None:
        super().__init__()
        self.m, self.std, self.plus = m, std, plus

    def _margin(self, m: float | Tensor) -> RowMargin:
        raise NotImplementedError

    def _psi(self, cosine: Tensor, m: Tensor) -> Tensor:
        raise NotImplementedError

    def of(self, rows: Rows) -> Margin | Psi:
        if not self.training:
            return self._margin(self.m)
        margins, plus = drawn(self.m, self.std, rows), self.plus
        if plus is False:
            return self._margin(margins)
        return lambda cosine: self._psi(cosine, by_difficulty(margins, cosine, rows.counts, plus))

    def extra_repr(self) -> str:
        return f"m={self.m:g}, std={self.std:g}, plus={self.plus!r}"


class ElasticArcFace(ElasticFace):
    """``psi = cos(theta + m_i)``, m_i ~ N(m, std) anew in every forward (Boutros et al. 2022).

    As in the authors' code there is no guard past pi, and draws are not clipped. They come from torch's
    default generator of x's device: ``torch.manual_seed`` repeats them, and activation checkpointing (which
    restores the generator) has the same ones when it runs a forward again. In eval mode m_i = m.

    Args:
        m: mean of the margin, an angle in [0, pi).
        std: their deviation, at least 0. The authors train with 0.05, and with 0.0175 for "plus".
        plus: True hands the draws out by difficulty: the smallest to the row with the largest target cosine,
            and so on (section 3.3, "ElasticFace+"). "released" does what the authors' code does instead: it
            applies the inverse of that order, which is all but random. Rows that do not count take no part.

    All are attributes, checked when they are set as here.

    Raises:
        TypeError, ValueError: an argument out of range.
    """

    CHECKS: ClassVar[dict[str, Check]] = {
        **ElasticFace.CHECKS,
        "m": lambda owner, name, value: number(owner, name, value, LIMITS["m2"]),
    }

    def __init__(self, m: float = 0.5, std: float = 0.05, plus: Plus = False) -> None:
        super().__init__(m, std, plus)

    def _margin(self, m: float | Tensor) -> RowMargin:
        return RowMargin(m2=m, guard="none")

    def _psi(self, cosine: Tensor, m: Tensor) -> Tensor:
        return reference.margin(cosine, self._margin(m))


class ElasticCosFace(ElasticFace):
    """``psi = cos theta - m_i``, m_i ~ N(m, std) anew in every forward; all else as :class:`ElasticArcFace`.

    Args:
        m: mean of the margin, a cosine, at least 0.
        std: their deviation, at least 0. The authors train with 0.05, and with 0.02 for "plus".
        plus: see :class:`ElasticArcFace`.

    Raises:
        TypeError, ValueError: an argument out of range.
    """

    CHECKS: ClassVar[dict[str, Check]] = {
        **ElasticFace.CHECKS,
        "m": lambda owner, name, value: number(owner, name, value, LIMITS["m3"]),
    }

    def __init__(self, m: float = 0.35, std: float = 0.05, plus: Plus = False) -> None:
        super().__init__(m, std, plus)

    def _margin(self, m: float | Tensor) -> RowMargin:
        return RowMargin(m3=m)

    def _psi(self, cosine: Tensor, m: Tensor) -> Tensor:
        return cosine - m
