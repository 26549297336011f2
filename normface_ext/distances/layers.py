"""Layers of the distances: parameters and state only; every formula is in ``functions``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..cosine.rows import gaussian_unitball_, unit_rows_
from ..engine import checks
from ..engine.arguments import flag, number, size
from . import functions


class Agents(nn.Module):
    """A weight [classes, features], rows uniform on the unit sphere."""

    weight: nn.Parameter
    eps: float

    def __init__(
        self, features: int, classes: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        gaussian_unitball_(self.weight)

    def renormalize_(self) -> None:
        """Overwrites the weight by its unit rows; see ``caffe.renormalize_after_step``."""
        unit_rows_(self.weight, self.eps, type(self).__name__)


class InnerDistance(Agents):
    """Distances to every agent: [N, in_features] -> [N, out_features] (Caffe ``InnerDistance``).

    Args:
        in_features: D.
        out_features: C; ``weight`` is [C, D], rows uniform on the unit sphere.

    ``p``, ``normalize``, ``update_center_only`` and ``eps`` are those of ``functional.inner_distance``.
    ``forward(x, labels)`` needs the labels with ``update_center_only`` and refuses them without.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        p: int = 2,
        normalize: bool = False,
        update_center_only: bool = False,
        eps: float = 1e-12,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        owner = type(self).__name__
        in_features = size(owner, "in_features", in_features)
        out_features = size(owner, "out_features", out_features)
        super().__init__(in_features, out_features, device, dtype)
        self.in_features, self.out_features = in_features, out_features
        self.p, self.eps = checks.exponent(owner, "p", p), checks.eps(owner, "eps", eps)
        self.normalize = flag(owner, "normalize", normalize)
        self.update_center_only = flag(owner, "update_center_only", update_center_only)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return functions.inner_distance(
            x,
            self.weight,
            p=self.p,
            normalize=self.normalize,
            labels=labels,
            update_center_only=self.update_center_only,
            eps=self.eps,
        )

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, p={self.p}, normalize={self.normalize}"


class PairContrastiveLoss(nn.Module):
    """(a [N, D], b [N, D], same [N]) -> loss; see ``functional.pair_contrastive_loss``."""

    def __init__(self, *, margin: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        owner = type(self).__name__
        checks.reduction(owner, "reduction", reduction)
        self.margin, self.reduction = number(owner, "margin", margin), reduction

    def forward(self, a: Tensor, b: Tensor, same: Tensor) -> Tensor:
        return functions.pair_contrastive_loss(a, b, same, margin=self.margin, reduction=self.reduction)

    def extra_repr(self) -> str:
        return f"margin={self.margin:g}, reduction={self.reduction!r}"


class TripletLoss(nn.Module):
    """(anchor, positive, negative), each [N, D] -> loss; see ``functional.triplet_loss``."""

    def __init__(self, *, margin: float = 0.2, reduction: str = "mean") -> None:
        super().__init__()
        owner = type(self).__name__
        checks.reduction(owner, "reduction", reduction)
        self.margin, self.reduction = number(owner, "margin", margin), reduction

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        return functions.triplet_loss(
            anchor, positive, negative, margin=self.margin, reduction=self.reduction
        )

    def extra_repr(self) -> str:
        return f"margin={self.margin:g}, reduction={self.reduction!r}"
