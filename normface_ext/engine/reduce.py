"""How the losses of rows become one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def weighted(losses: Tensor, total_weight: Tensor, reduction: str) -> Tensor:
    """Losses [N] that carry their weights already. The mean divides by the sum of the weights, and is 0 where
    that is 0."""
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    empty = total_weight == 0
    # Chosen before the division too: one by 0 has no gradient but NaN.
    return torch.where(empty, 0, losses.sum() / torch.where(empty, 1, total_weight))


def softplus(z: Tensor) -> Tensor:
    """ln(1 + e^z), exact also past 20, where torch's own leaves off, and with a second derivative also where
    e^z has no number, which torch.logaddexp's lacks."""
    return -F.logsigmoid(-z)
