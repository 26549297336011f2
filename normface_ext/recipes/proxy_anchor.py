"""Proxy-Anchor: each class's proxy against the rows of the batch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.options import holds, takes
from .batch import Recipe
from .options import ProxyAnchorKeywords, ProxyAnchorOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


@holds(ProxyAnchorOptions)
class ProxyAnchor(Recipe):
    """``1/|P| sum_{j in P} ln(1 + sum_{i: y_i = j} e^(-alpha (c_ij - margin)))``
    ``+ 1/C sum_j ln(1 + sum_{i: y_i != j} e^(alpha (c_ij + margin)))``, P being the classes of the batch's
    rows (Kim et al., *Proxy Anchor Loss for Deep Metric Learning*, CVPR 2020, section 3.2).

    Needs N x C numbers: for class counts where that fits. The sums run over rows, so processes see each their
    own: gather the batch first, if it is to count as one.

    Paper and released code agree: alpha 32, margin 0.1, the proxies' learning rate 100 times the network's.
    The code's exponentials overflow in float16; here logsumexp is used, in float32 at least.

    A loss of rows does not exist, so there is no ``reduction``. A row of sample_weight w, at least 0, counts
    as w rows in the sums; pytorch-metric-learning's weights of mined rows are e^(w - 1) instead.

    Args:
        in_features: D.
        num_classes: C.
        alpha: above 0.
        margin: delta.
        ignore_index: label of rows that do not count, or None.
        eps: inside both norms.
        device, dtype: of the weight.

    All but in_features and num_classes are attributes, checked when they are set. ``forward`` takes features
    [N, D], labels [N] and perhaps sample_weight [N] and returns a 0-d tensor, float64 for float64 features,
    float32 otherwise; without rows that count it is 0.

    Raises:
        TypeError, ValueError, IndexError: as ``functional.normface_loss``.
    """

    options: ProxyAnchorOptions

    @takes(ProxyAnchorOptions)
    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[ProxyAnchorKeywords],
    ) -> None:
        chosen = ProxyAnchorOptions.of(type(self).__name__, options)
        super().__init__(in_features, num_classes, chosen, device, dtype)

    def forward(self, features: Tensor, labels: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        batch, chosen = self.batch(features, labels, sample_weight), self.options
        cosine = batch.cosines(chosen.eps)
        log_weight = torch.where(batch.counts, batch.row_weight, 1).log()[:, None]
        own = batch.labels[:, None] == torch.arange(self.num_classes, device=cosine.device)
        others = batch.counts[:, None] & ~own
        pulled = _log_of_one_and_sum(own, log_weight - chosen.alpha * (cosine - chosen.margin))
        pushed = _log_of_one_and_sum(others, log_weight + chosen.alpha * (cosine + chosen.margin))
        present = own.any(0).sum().clamp(min=1)  # a class without rows adds ln 1 = 0 to the first sum
        return pulled.sum() / present + pushed.sum() / self.num_classes


def _log_of_one_and_sum(mask: Tensor, exponents: Tensor) -> Tensor:
    """[C]: ln(1 + sum_i e^exponents_i) over the rows of the mask [N, C]."""
    kept = torch.where(mask, exponents, -math.inf)
    return F.pad(kept, (0, 0, 1, 0)).logsumexp(0)  # a row of e^0
