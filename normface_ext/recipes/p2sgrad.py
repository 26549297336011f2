"""P2SGrad: the gradient of a cosine error, without a scale and without a softmax."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..cosine.functions import normalize
from ..engine.dtypes import full_precision
from ..engine.options import holds, takes
from .batch import Recipe
from .options import P2SGradKeywords, P2SGradOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


@holds(P2SGradOptions)
class P2SGrad(Recipe):
    """``1/2 sum_j (cos_j - [j = y])^2`` (Zhang et al., *P2SGrad: Refined Gradients for Optimizing Deep Face
    Models*, CVPR 2019, section 4): its gradient is the one that equation 11 puts in the place of softmax's.

    Without an N x C matrix: ``sum_j cos_j^2 = x_hat' (W_hat' W_hat) x_hat`` takes D x D numbers, and a
    normalised copy of the weight. The loss is right to a rounding of 1, so what is left of one below that is
    noise; the gradient keeps its digits.

    The paper gives no loss, only the gradient, and its authors have released no code.
    pytorch-metric-learning has ``mean_ij (cos_ij - [j = y])^2``, which is 2 / C of it: ``form="pml"``. It
    also moves its weight onto the sphere at every step, in data, and does not differentiate through that:
    the gradient of its weight has a radial part, which is left out here.

    Args:
        in_features: D.
        num_classes: C.
        form: "paper" or "pml".
        reduction, ignore_index, eps: as in ``functional.normface_loss``.
        device, dtype: of the weight.

    All but in_features and num_classes are attributes, checked when they are set. ``forward`` takes features
    [N, D], labels [N] and perhaps sample_weight [N].

    Raises:
        TypeError, ValueError, IndexError: as ``functional.normface_loss``.
    """

    options: P2SGradOptions

    @takes(P2SGradOptions)
    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[P2SGradKeywords],
    ) -> None:
        chosen = P2SGradOptions.of(type(self).__name__, options)
        super().__init__(in_features, num_classes, chosen, device, dtype)

    def forward(self, features: Tensor, labels: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        batch, chosen = self.batch(features, labels, sample_weight), self.options
        x_hat, w_hat = normalize(batch.x, eps=chosen.eps), normalize(batch.agents, eps=chosen.eps)
        with full_precision(x_hat):
            squares = (x_hat @ (w_hat.T @ w_hat) * x_hat).sum(1)
        target = (x_hat * w_hat[batch.columns[:, 0]]).sum(1)
        factor = 0.5 if chosen.form == "paper" else 1 / self.num_classes
        return batch.reduced(factor * (squares - 2 * target + 1), chosen.reduction)
