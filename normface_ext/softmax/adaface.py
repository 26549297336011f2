"""AdaFace: a margin by the norm of the features, against the norms of late."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..engine import checks
from ..engine.arguments import ANGLE, NOT_NEGATIVE, SHARE, choice, number
from ..engine.options import Check
from .batch_margins import FollowingMargin, Rows
from .margins import RowMargin

SMALLEST_NORM, LARGEST_NORM = 1e-3, 100.0
FIRST_MEAN, FIRST_STD = 20.0, 100.0


class HeldMargin(RowMargin):
    """``psi = cos(theta + m2) - m3``, the cosine held in +-0.999 and the angle in [0.001, pi - 0.001]."""

    formula = 1


class AdaFace(FollowingMargin):
    """``psi = cos(theta - m k) - (m + m k)``, k in [-1, 1] by the norm of the features (Kim et al. 2022).

    ``k = clip(h (a - mean) / (std + 0.001), -1, 1)`` with a = |x|, held in [0.001, 100]. Norms are taken for
    the quality of an image: of a clear face the margin is an angle as ArcFace's pushes hard, of a blurred
    one it spares. mean and std are running ones: ``mean = t_alpha * (mean of the batch) + (1 - t_alpha) *
    mean``, std likewise of the unbiased deviation, moved before they are used. No gradient goes through k.

    With ``margin_gradient="exact"`` this is the authors' code: the target cosine is held in +-0.999 and
    the angle theta - m k in [0.001, pi - 0.001], both with slope 0 outside. With "straight" it is CVLface's:
    neither is held, and the slope is 1. (The authors' code holds the others' cosines in +-0.999 as well; here
    they are what they are.)

    A call in training mode moves mean and std, and so may another in the same step (gradient accumulation):
    ``eval()`` stops it. Rows that are ignored or have weight 0 take no part, nor do norms that are not
    finite. A batch with a single row that counts leaves std as it is (the authors' code gets NaN there, for
    good), an empty one both. Activation checkpointing runs a forward again inside the backward: that run
    moves nothing and has the mean and std it had, found again by the memory of its labels, which are to come
    from outside of what runs again, a tensor per pass; RuntimeError where they could be of several passes or
    of none.

    Args:
        m: size of the margin, in [0, pi).
        h: how steeply k follows the norm, at least 0.
        t_alpha: share of the new batch in mean and std, in [0, 1].
        sync: "local": every process has the mean and std of its own rows, as the authors' code
            (DistributedDataParallel hands out the first rank's buffers before each forward). "global": those
            of the rows of all ranks of the default process group, by two small all-reduces. In a
            class-parallel head they are those of all its ranks in either case, as one margin has to serve
            them all.
        device: of the buffers ``mean`` and ``std`` ([1] float64; ``float()`` makes them float32, and
            narrower they do not become).

    m, h, t_alpha and sync are attributes, checked when they are set as here.

    Raises:
        TypeError, ValueError: an argument out of range.
    """

    uses_norms = True
    STATE: ClassVar[tuple[str, ...]] = ("mean", "std")
    CHECKS: ClassVar[dict[str, Check]] = {
        "m": lambda owner, name, value: number(owner, name, value, ANGLE),
        "h": lambda owner, name, value: number(owner, name, value, NOT_NEGATIVE),
        "t_alpha": lambda owner, name, value: number(owner, name, value, SHARE),
        "sync": lambda owner, name, value: choice(owner, name, value, ("local", "global")),
    }
    m: float
    h: float
    t_alpha: float
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        m: float = 0.4,
        h: float = 0.333,
        t_alpha: float = 0.01,
        sync: str = "local",
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.m = m
        self.h = h
        self.t_alpha = t_alpha
        self.sync: str = sync
        device = checks.device_or_none(type(self).__name__, device)
        # Not 0-d: torch.compile takes a 0-d float64 of the CPU for a number, and loses what is written to it.
        self.register_buffer("mean", torch.empty(1, dtype=torch.float64, device=device))
        self.register_buffer("std", torch.empty(1, dtype=torch.float64, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """mean = 20, std = 100, as the authors start."""
        self.mean.fill_(FIRST_MEAN)
        self.std.fill_(FIRST_STD)

    def of(self, rows: Rows) -> RowMargin:
        assert rows.norms is not None
        norms = _held(rows.norms)
        mean, std = self.present(rows)
        k = (self.h * (norms - mean) / (std + 1e-3)).clamp(-1, 1)
        angle, offset = self.m * k, self.m + self.m * k
        if rows.straight:
            return RowMargin(m2=-angle, m3=offset, guard="none")
        return HeldMargin(m2=-angle, m3=offset)

    def follow_rows(self, rows: Rows) -> None:
        assert rows.norms is not None
        norms = _held(rows.norms)
        follows = rows.counts & rows.norms.isfinite()  # one NaN in mean or std would stay for good
        count, sum_of_norms = self.totals(rows, follows, torch.ones_like(norms), norms)
        mean = sum_of_norms / count
        (squares,) = self.totals(rows, follows, (norms - mean).square())
        std = (squares / (count - 1)).sqrt()
        for state, new, enough in ((self.mean, mean, count > 0), (self.std, std, count > 1)):
            moved = self.t_alpha * new + (1 - self.t_alpha) * state
            state.copy_(torch.where(enough, moved, state))

    def extra_repr(self) -> str:
        sync = "" if self.sync == "local" else f", sync={self.sync!r}"
        return f"m={self.m:g}, h={self.h:g}, t_alpha={self.t_alpha:g}{sync}"


def _held(norms: Tensor) -> Tensor:
    return norms.detach().clamp(SMALLEST_NORM, LARGEST_NORM)
