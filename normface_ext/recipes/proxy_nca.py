"""Proxy-NCA: neighbourhood components with a proxy for each class."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..engine.options import holds, takes
from ..softmax.functions import head_parts, normface_loss
from .batch import Recipe
from .options import ProxyNCAKeywords, ProxyNCAOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


@holds(ProxyNCAOptions)
class ProxyNCA(Recipe):
    """``-ln( exp(-d_y) / sum_{j != y} exp(-d_j) )``, ``d_j = a |x_hat - w_hat_j|^2`` (Movshovitz-Attias et
    al., *No Fuss Distance Metric Learning using Proxies*, ICCV 2017, section 3).

    With d_j = 2 a (1 - cos_j) that is ``ln sum_{j != y} exp(2 a cos_j) - 2 a cos_y``: ``form="paper"``. It
    falls below 0, and its pull never ends. ``form="pml"`` is pytorch-metric-learning's ``ProxyNCALoss``,
    which has the target in the sum: ``NormFaceLoss`` with s = 2 a. Without an N x C matrix, both.

    a is ``softmax_scale``: 1 in the paper and in pytorch-metric-learning. The authors have released no code.
    The best known (dichotomies/proxy-nca) has the target in the sum, proxies and features of lengths other
    than 1 (3 and 3 for CUB and Cars), and a label smoothing of 0.1 that the paper lacks.

    Args:
        in_features: D.
        num_classes: C, at least 2: a single class has no others.
        form: "paper" or "pml".
        softmax_scale: a, above 0.
        label_smoothing: of form "pml", as in ``functional.normface_loss``.
        reduction, ignore_index, eps, workspace: likewise.
        device, dtype: of the weight.

    All but in_features and num_classes are attributes, checked when they are set. ``forward`` takes features
    [N, D], labels [N] and perhaps sample_weight [N].

    Raises:
        TypeError, ValueError, IndexError: as ``functional.normface_loss``.
    """

    options: ProxyNCAOptions

    @takes(ProxyNCAOptions)
    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[ProxyNCAKeywords],
    ) -> None:
        chosen = ProxyNCAOptions.of(type(self).__name__, options)
        super().__init__(in_features, num_classes, chosen, device, dtype, least=2)

    def forward(self, features: Tensor, labels: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        chosen = self.options
        scale, eps, workspace = 2 * chosen.softmax_scale, chosen.eps, chosen.workspace
        if chosen.form == "pml":
            return normface_loss(
                features,
                self.weight,
                labels,
                scale,
                sample_weight=sample_weight,
                reduction=chosen.reduction,
                label_smoothing=chosen.label_smoothing,
                ignore_index=chosen.ignore_index,
                eps=eps,
                workspace=workspace,
            )
        batch = self.batch(features, labels, sample_weight)
        cosine, others, _ = head_parts(
            features, self.weight, batch.labels, scale, ignore_index=-1, eps=eps, workspace=workspace
        )
        return batch.reduced(others - scale * cosine, chosen.reduction)
