"""The statistics of a softmax head, from the losses of its rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..engine.calls import accumulator
from ..engine.statistics import LEFT_TO_LEARN, Means, hits, means_of
from ..engine.sweep import COSINE, LARGEST

#: -ln p of a row whose 1 - p is LEFT_TO_LEARN.
_LEARNED = -math.log1p(-LEFT_TO_LEARN)


def means_of_losses(
    counts: Tensor, losses: Tensor, surprise: Tensor, state: Tensor, dtype: torch.dtype
) -> Means:
    """From the rows' losses and their -ln p_y, [N] each, and what the sweep found of them, with their largest
    cosines; `dtype` is the features'."""
    hit = hits(state[COSINE], state[LARGEST], accumulator(dtype))
    return means_of(counts, losses, state[COSINE], hit, ~(surprise <= _LEARNED))
