"""Accuracy, with Caffe's ties."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..engine import checks
from .layer import Layer
from .losses import scores_and_labels
from .spec import Context, Spec


def accuracy(
    scores: Tensor,
    labels: Tensor,
    *,
    min_is_better: bool = False,
    top_k: int = 1,
    ignore_label: int | None = None,
) -> Tensor:
    """The fraction of rows whose label is among the ``top_k`` best scores (Caffe ``Accuracy``).

    Ties go as in Caffe, which sorts (score, class) pairs: to the larger class where larger is better, to
    the smaller class with ``min_is_better`` (distances).

    Args:
        scores: [N, C], similarities or distances.
        labels: [N] int64.
        ignore_label: rows with it do not count. Without a row the accuracy is 0 / 0, NaN, as in Caffe.

    Returns:
        A 0-d tensor, float64 for float64 scores and float32 otherwise.

    Raises:
        ValueError: shapes, top_k, NaN among the scores.
        IndexError: a label out of range.
    """
    ignored = checks.ignored(ignore_label)
    scores, labels = scores_and_labels("accuracy", scores, labels, ignored)
    if not 1 <= top_k <= scores.shape[1]:
        raise ValueError(f"accuracy: expected `top_k` in [1, {scores.shape[1]}], got {top_k}")
    if scores.isnan().any():
        row = int(scores.isnan().any(1).nonzero()[0])
        raise ValueError(f"accuracy: expected `scores` without NaN, got one in row {row}")
    kept = labels != ignored
    safe = torch.where(kept, labels, 0)[:, None]
    own, columns = scores.gather(1, safe), torch.arange(scores.shape[1], device=scores.device)
    if min_is_better:
        before = (scores < own) | ((scores == own) & (columns < safe))
    else:
        before = (scores > own) | ((scores == own) & (columns > safe))
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    return ((before.sum(1) < top_k) & kept).sum().to(wide) / kept.sum()


class Accuracy(Layer):
    BOTTOMS: ClassVar[tuple[int, int]] = (2, 2)
    STATISTICS: ClassVar[tuple[int, ...]] = (0,)
    LABELS: ClassVar[tuple[int, ...]] = (1,)
    BOTTOM_NAMES: ClassVar[str] = "the second is the label"
    BLOCKS: ClassVar[tuple[str, ...]] = ("accuracy_param",)

    min_is_better: bool
    top_k: int

    def __init__(self, spec: Spec, context: Context) -> None:
        super().__init__(spec, context)
        spec.only("accuracy_param.axis", 1)
        self.min_is_better, self.top_k = (
            spec.get("accuracy_param.min_is_better"),
            spec.get("accuracy_param.top_k"),
        )
        ignored = spec.has("accuracy_param.ignore_label")
        self.ignore_label: int | None = spec.get("accuracy_param.ignore_label") if ignored else None

    @torch.no_grad()
    def forward(self, scores: Tensor, labels: Tensor) -> tuple[Tensor]:
        return (
            accuracy(
                scores,
                labels,
                min_is_better=self.min_is_better,
                top_k=self.top_k,
                ignore_label=self.ignore_label,
            ),
        )
