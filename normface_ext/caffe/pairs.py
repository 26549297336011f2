"""The losses of pairs and triplets of feature rows: ContrastiveLoss and TripletLoss, without agents."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .. import functional
from ..distances.ops import pair_distance, with_gradient
from ..engine import checks
from . import released_losses
from .layer import Layer
from .spec import Context, Spec


def _rows(kind: str, bottoms: tuple[Tensor, ...]) -> list[Tensor]:
    """Bottoms [N, D] or [N, D, 1, 1] as matrices of one shape."""
    rows = []
    for i, bottom in enumerate(bottoms):
        checked = checks.floating(kind, f"bottom {i}", bottom)
        if checked.dim() < 2 or checked.shape != bottoms[0].shape or checked[:1, :1].numel() > 1:
            raise ValueError(
                f"{kind}: expected bottom {i} to be [N, D] or [N, D, 1, 1], like bottom 0, got shape"
                f" {list(checked.shape)}"
            )
        rows.append(checked.flatten(1))
    return rows


class ContrastiveLoss(Layer):
    """1/2N sum of d^2 where a pair is one identity, and of (margin - d)_+^2 elsewhere; with
    ``legacy_version`` of (margin - d^2)_+. Bottoms: features a, features b, labels a, labels b in NormFace's
    Caffe, which compares the labels; features a, features b, similarity (1 or 0) in BVLC's."""

    BOTTOMS: ClassVar[tuple[int, int]] = (3, 4)
    LOSS: ClassVar[float] = 1.0
    BOTTOM_NAMES: ClassVar[str] = "features a, features b, labels a, labels b or one similarity"
    LABELS: ClassVar[tuple[int, ...]] = (2, 3)
    BLOCKS: ClassVar[tuple[str, ...]] = ("contrastive_loss_param",)

    def __init__(self, spec: Spec, context: Context) -> None:
        super().__init__(spec, context)
        self.hard: bool = context.caffe
        self.margin: float = float(spec.get("contrastive_loss_param.margin"))
        self.legacy: bool = bool(spec.get("contrastive_loss_param.legacy_version"))

    def forward(self, a: Tensor, b: Tensor, *given: Tensor) -> tuple[Tensor]:
        a, b = _rows("ContrastiveLoss", (a, b))
        labels = [checks.label_rows("ContrastiveLoss", one, a) for one in given]
        same = labels[0] == (labels[1] if len(labels) > 1 else 1)
        if not self.legacy and not self.hard:
            return (functional.pair_contrastive_loss(a, b, same, margin=self.margin),)
        squared = pair_distance(a, b, 2)
        if self.legacy:
            losses = torch.where(same, squared, (self.margin - squared).clamp_min(0))
            return (losses.sum() / (2 * max(1, len(a))),)
        value, gradient = released_losses.pair_contrastive(squared.detach(), same, self.margin)
        return (with_gradient("pair_contrastive_loss", squared, value, gradient),)


class TripletLoss(Layer):
    """1/2N sum of (margin + |a - p|^2 - |a - n|^2)_+. Bottoms: anchors, positives, negatives."""

    BOTTOMS: ClassVar[tuple[int, int]] = (3, 3)
    LOSS: ClassVar[float] = 1.0
    BOTTOM_NAMES: ClassVar[str] = "anchors, positives, negatives"
    BLOCKS: ClassVar[tuple[str, ...]] = ("triplet_loss_param",)

    def __init__(self, spec: Spec, context: Context) -> None:
        super().__init__(spec, context)
        self.margin: float = float(spec.get("triplet_loss_param.margin"))

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor]:
        rows = _rows("TripletLoss", (anchor, positive, negative))
        return (functional.triplet_loss(*rows, margin=self.margin) / 2,)
