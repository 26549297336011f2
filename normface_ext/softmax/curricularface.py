"""CurricularFace: hard classes weigh more the better the features are by now."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..engine import checks
from ..engine.arguments import ANGLE, SHARE, choice, number
from ..engine.options import Check
from .batch_margins import FollowingMargin, Rows
from .hard_negatives import HardNegatives, added_angle
from .margins import ArcFace


class CurricularFace(FollowingMargin):
    """``psi = cos(theta + m)``, and another class past it, ``c_j > cos(theta + m)``, has the logit
    ``s c_j (t + c_j)`` (Huang et al. 2020).

    t is a running mean of the target cosines, moved before it is used: ``t = alpha * (mean of the batch) +
    (1 - alpha) * t``, 0 at first. Early on hard classes count for less than they are (c_j^2), later for more.
    As in the authors' code psi goes on as ``c - m sin m`` past pi while the threshold is cos(theta + m) all
    the way, and neither t nor the threshold has a gradient: a hard class has the slope s (t + 2 c_j).
    ``margin_gradient="straight"`` is about psi alone.

    A call in training mode moves t, and so may another in the same step (gradient accumulation): ``eval()``
    stops it. Rows that are ignored or have weight 0 take no part, nor do cosines that are not finite; a
    batch without any leaves t as it is. With activation checkpointing it is as with ``AdaFace``.

    Args:
        m: size of the margin, an angle in [0, pi).
        alpha: share of the new batch in t, in [0, 1]. The authors' code has 0.01, TFace's 0.1.
        sync: "local": every process has the t of its own rows, as the authors' code. "global": that of the
            rows of all ranks of the default process group, by a small all-reduce. In a class-parallel head
            it is that of all its ranks in either case.
        device: of the buffer ``t`` ([1] float64; ``float()`` makes it float32, and narrower it does not
            become).

    m, alpha and sync are attributes, checked when they are set as here.

    Raises:
        TypeError, ValueError: an argument out of range.
    """

    hard_negatives = True
    STATE: ClassVar[tuple[str, ...]] = ("t",)
    CHECKS: ClassVar[dict[str, Check]] = {
        "m": lambda owner, name, value: number(owner, name, value, ANGLE),
        "alpha": lambda owner, name, value: number(owner, name, value, SHARE),
        "sync": lambda owner, name, value: choice(owner, name, value, ("local", "global")),
    }
    m: float
    alpha: float
    t: Tensor

    def __init__(
        self,
        m: float = 0.5,
        alpha: float = 0.01,
        sync: str = "local",
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.m = m
        self.alpha = alpha
        self.sync: str = sync
        device = checks.device_or_none(type(self).__name__, device)
        # Not 0-d: torch.compile takes a 0-d float64 of the CPU for a number, and loses what is written to it.
        self.register_buffer("t", torch.empty(1, dtype=torch.float64, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """t = 0, as the authors start."""
        self.t.zero_()

    def of(self, rows: Rows) -> HardNegatives:
        assert rows.cosine is not None
        (t,) = self.present(rows)
        # For c in [-1, 1] and t, a mean of cosines, in [-1, 1]: c (t + c) >= -t^2 / 4 and <= 1 + |t|.
        return HardNegatives(
            ArcFace(self.m),
            added_angle(rows.cosine, self.m),
            logit=(1.0, t, 0.0),
            slope=(2.0, t),
            highest=2.0,
        )

    def follow_rows(self, rows: Rows) -> None:
        assert rows.cosine is not None
        follows = rows.counts & rows.cosine.isfinite()  # one NaN in t would stay for good
        count, total = self.totals(rows, follows, torch.ones_like(rows.cosine), rows.cosine)
        moved = self.alpha * (total / count) + (1 - self.alpha) * self.t
        self.t.copy_(torch.where(count > 0, moved, self.t))

    def extra_repr(self) -> str:
        sync = "" if self.sync == "local" else f", sync={self.sync!r}"
        return f"m={self.m:g}, alpha={self.alpha:g}{sync}"
