"""SphereFace: the label's angle is multiplied, and the plain cosine is blended in, less and less."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from ..engine import checks
from ..engine.arguments import NOT_NEGATIVE, Range, number
from ..engine.options import Check
from .batch_margins import FollowingMargin, Rows
from .margins import RowMargin

_FACTOR = Range("to be finite and >= 1", 1.0, math.nextafter(math.inf, 0.0))


def annealed(passes: Tensor, base: float, gamma: float, power: float, least: float) -> Tensor:
    """lambda = max(least, base (1 + gamma t)^-power) of pass t, float64."""
    return (base * (1 + gamma * passes.double()) ** -power).clamp(min=least)


class SphereMargin(RowMargin):
    """``psi = (m2 c + phi(theta)) / (1 + m2)``, ``phi = (-1)^k cos(m1 theta) - 2 k``."""

    formula = 3


class SphereFace(FollowingMargin):
    """``psi = (lambda cos theta + phi(theta)) / (1 + lambda)``, ``phi = (-1)^k cos(m theta) - 2 k``,
    ``k = floor(m theta / pi)`` (Liu et al. 2017; A-Softmax).

    phi falls from 1 to 1 - 2 m as theta goes from 0 to pi. ``lambda = max(lambda_min, base (1 + gamma
    t)^-power)`` in the t-th forward pass in training mode, counted from 1 on: at first nearly plain cosines,
    later mostly the margin. The count is the buffer ``iteration``, in the ``state_dict``; ``eval()`` stops
    it, and a pass in eval mode has the lambda of the last one in training. With activation checkpointing it
    is as with ``AdaFace``.

    Published SphereFace leaves features as long as they are: ``NormFaceLoss(..., normalize_input=False,
    margin=SphereFace())``, or ``NormFaceLoss.preset("sphereface", ...)``.

    Args:
        m: factor of the angle, at least 1, whole or not.
        base, gamma, power, lambda_min: of lambda, at least 0. These are the released Caffe net's and
            wespeaker's. base = lambda_min = 0 has no blend; gamma = 0 a constant one.
        device: of the buffer ``iteration`` ([1] int64).

    All but device are attributes, checked when they are set as here.

    Raises:
        TypeError, ValueError: an argument out of range.
    """

    STATE: ClassVar[tuple[str, ...]] = ("iteration",)
    CHECKS: ClassVar[dict[str, Check]] = {
        "m": lambda owner, name, value: number(owner, name, value, _FACTOR),
        "base": lambda owner, name, value: number(owner, name, value, NOT_NEGATIVE),
        "gamma": lambda owner, name, value: number(owner, name, value, NOT_NEGATIVE),
        "power": lambda owner, name, value: number(owner, name, value, NOT_NEGATIVE),
        "lambda_min": lambda owner, name, value: number(owner, name, value, NOT_NEGATIVE),
    }
    m: float
    base: float
    gamma: float
    power: float
    lambda_min: float
    iteration: Tensor

    def __init__(
        self,
        m: float = 4.0,
        base: float = 1000.0,
        gamma: float = 0.12,
        power: float = 1.0,
        lambda_min: float = 5.0,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.m, self.base, self.gamma, self.power, self.lambda_min = m, base, gamma, power, lambda_min
        device = checks.device_or_none(type(self).__name__, device)
        # Not 0-d: torch.compile takes a 0-d number of the CPU for one, and loses what is written to it.
        self.register_buffer("iteration", torch.empty(1, dtype=torch.int64, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """No pass yet."""
        self.iteration.zero_()

    def of(self, rows: Rows) -> SphereMargin:
        (passes,) = self.present(rows)
        blend = annealed(passes, self.base, self.gamma, self.power, self.lambda_min)
        return SphereMargin(m1=self.m, m2=blend.reshape(()))

    def follow_rows(self, rows: Rows) -> None:
        self.iteration.add_(1)

    def extra_repr(self) -> str:
        names = "m", "base", "gamma", "power", "lambda_min"
        return ", ".join(f"{name}={getattr(self, name):g}" for name in names)
