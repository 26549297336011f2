"""SoftTriple: several centres for each class, softly chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cosine.functions import normalize
from ..engine.arguments import size
from ..engine.dtypes import full_precision
from ..engine.options import holds, takes
from .batch import Recipe
from .options import SoftTripleKeywords, SoftTripleOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


@holds(SoftTripleOptions)
class SoftTriple(Recipe):
    """``-log softmax_j(la (S_j - margin [j = y]))[y] + tau R``, where ``S_j = sum_k p_jk cos_jk``,
    ``p_j = softmax_k(cos_jk / gamma)``, and ``R = sum_j sum_{k < l} sqrt(2 - 2 w_jk . w_jl) / (C K (K - 1))``
    draws the K centres of a class together (Qian et al., *SoftTriple Loss: Deep Metric Learning Without
    Triplet Sampling*, ICCV 2019, section 3).

    Needs N x C K numbers, and C x K x K for R: for class counts where that fits. The gradient goes through p.

    Defaults are those of paper and released code: K 10, la 20, gamma 0.1, margin 0.01, tau 0.2. As in the
    code there is 1e-5 below the root in R, which keeps its slope finite where centres meet.
    pytorch-metric-learning's ``SoftTripleLoss`` has no R: ``tau=0``. R is added to the loss of each row.

    Args:
        in_features: D.
        num_classes: C.
        centers: K; ``weight`` is [C K, D], the centres of a class one after another.
        la, gamma: above 0.
        margin, tau: at least 0.
        label_smoothing: over the logits la (S_j - margin [j = y]), as ``torch.nn.functional.cross_entropy``.
        reduction, ignore_index, eps: as in ``functional.normface_loss``.
        device, dtype: of the weight.

    All but in_features, num_classes and centers are attributes, checked when they are set. ``forward`` takes
    features [N, D], labels [N] and perhaps sample_weight [N].

    Raises:
        TypeError, ValueError, IndexError: as ``functional.normface_loss``.
    """

    options: SoftTripleOptions

    @takes(SoftTripleOptions)
    def __init__(
        self,
        in_features: int,
        num_classes: int,
        centers: int = 10,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[SoftTripleKeywords],
    ) -> None:
        owner = type(self).__name__
        chosen, centers = SoftTripleOptions.of(owner, options), size(owner, "centers", centers)
        super().__init__(in_features, num_classes, chosen, device, dtype, centers=centers)
        self.centers = centers

    def forward(self, features: Tensor, labels: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        batch, chosen = self.batch(features, labels, sample_weight), self.options
        cosine = batch.cosines(chosen.eps).unflatten(1, (self.num_classes, self.centers))
        of_class = ((cosine / chosen.gamma).softmax(2) * cosine).sum(2)
        margin = torch.full_like(batch.x[:, :1], -chosen.margin)
        logits = chosen.la * of_class.scatter_add(1, batch.columns, margin)
        losses = F.cross_entropy(
            logits, batch.columns[:, 0], reduction="none", label_smoothing=chosen.label_smoothing
        )
        if chosen.tau > 0 and self.centers > 1:
            losses = losses + chosen.tau * self._spread(batch.agents)
        return batch.reduced(losses, chosen.reduction)

    def _spread(self, agents: Tensor) -> Tensor:
        """R, of the weight."""
        units = normalize(agents, eps=self.options.eps).unflatten(0, (self.num_classes, self.centers))
        with full_precision(units):
            products = units @ units.mT
        first, second = torch.triu_indices(self.centers, self.centers, 1, device=agents.device)
        roots = (2 + 1e-5 - 2 * products[:, first, second]).sqrt()
        spread: Tensor = roots.sum() / (self.num_classes * self.centers * (self.centers - 1))
        return spread

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, centers={self.centers}"
