"""Where the label stands among the classes."""

from __future__ import annotations

import torch
from torch import Tensor

from .losses import rows_that_count
from .rows import cosine, pooled_cosines


def nearest_class(
    x: Tensor, weight: Tensor, *, sub_centers: int = 1, eps: float = 1e-12
) -> tuple[Tensor, Tensor]:
    """(argmax_j cos_ij, of equal ones the first, and that cosine), [N] each."""
    best = pooled_cosines(cosine(x, weight, eps).detach(), sub_centers).max(1)
    return best.indices, best.values


def target_rank(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    sub_centers: int = 1,
    ignore_index: int | None = -100,
    eps: float = 1e-12,
) -> Tensor:
    """#{j : cos_ij > cos_iy}, int64 [N]; -1 where the row is ignored."""
    cosines = pooled_cosines(cosine(x, weight, eps).detach(), sub_centers)
    kept = rows_that_count(labels, ignore_index, None)
    own = cosines.gather(1, labels.long().clamp(0, cosines.shape[1] - 1)[:, None])
    return torch.where(kept, (cosines > own).sum(1), -1)
