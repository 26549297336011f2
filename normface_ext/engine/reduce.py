"""How the losses of rows become one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def over_rows(total: Tensor, count: int | Tensor) -> Tensor:
    """ "batchmean" of the sum of the losses: divided by the number of rows given, 0 where there is none. In a
    class-parallel head that is the number of all ranks, which may be a tensor."""
    return total / (count.to(total.dtype).clamp_min(1) if isinstance(count, Tensor) else max(1, count))


def weighted(
    losses: Tensor, total_weight: Tensor, reduction: str, count: int | Tensor | None = None
) -> Tensor:
    """Losses [N] that carry their weights already. The mean divides by the sum of the weights, and is 0 where
    that is 0; "batchmean" by the `count` of rows, by default N."""
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if reduction == "batchmean":
        return over_rows(losses.sum(), losses.shape[0] if count is None else count)
    empty = total_weight == 0
    # Chosen before the division too: one by 0 has no gradient but NaN.
    return torch.where(empty, 0, losses.sum() / torch.where(empty, 1, total_weight))


def softplus(z: Tensor) -> Tensor:
    """ln(1 + e^z), exact also past 20, where torch's own leaves off, and with a second derivative also where
    e^z has no number, which torch.logaddexp's lacks."""
    return -F.logsigmoid(-z)
