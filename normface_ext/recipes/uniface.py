"""UniFace: one threshold between the cosines of all rows with their own class and with the others."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..engine.dtypes import accumulator
from ..engine.options import holds, takes
from ..engine.reduce import softplus
from ..engine.state import WideState
from .batch import Recipe
from .options import UniFaceKeywords, UniFaceOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


@holds(UniFaceOptions)
class UniFace(WideState, Recipe):
    """``softplus(b - s (cos_y - m)) + l sum_{j != y} softplus(s cos_j - b)`` (Zhou et al., *UniFace: Unified
    Cross-Entropy Loss for Deep Face Recognition*, ICCV 2023, section 3).

    Needs N x C numbers: for class counts where that fits. b is learned, one for all classes, the parameter
    ``bias`` [1]: b / s is the threshold. It begins as ln(10 C), as in the released code, and stays float32 or
    wider. Weight decay is not for it.

    Defaults are the released code's: s 64, m 0.4, l 1. The code clamps the arguments of both softplus to +-s,
    which the paper lacks; rows beyond get no gradient there, the hardest ones among them. Here is no clamp.
    Nor is there the code's sampling of classes (its r < 1).

    Args:
        in_features: D.
        num_classes: C.
        scale: s, above 0.
        margin: m, at least 0.
        negative_weight: l, at least 0.
        reduction, ignore_index, eps: as in ``functional.normface_loss``.
        device, dtype: of the parameters.

    All but in_features and num_classes are attributes, checked when they are set. ``forward`` takes features
    [N, D], labels [N] and perhaps sample_weight [N].

    Raises:
        TypeError, ValueError, IndexError: as ``functional.normface_loss``.
    """

    options: UniFaceOptions

    @takes(UniFaceOptions)
    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[UniFaceKeywords],
    ) -> None:
        chosen = UniFaceOptions.of(type(self).__name__, options)
        super().__init__(in_features, num_classes, chosen, device, dtype)
        wide = accumulator(self.weight.dtype)
        self.bias: nn.Parameter = nn.Parameter(torch.empty(1, dtype=wide, device=self.weight.device))
        self.reset_parameters()

    def wide_state(self) -> list[Tensor]:
        # b, and its gradient, which has b's dtype.
        return [self.bias] if self.bias.grad is None else [self.bias, self.bias.grad]

    def reset_parameters(self) -> None:
        """Weight rows uniform on the unit sphere; b = ln(10 C)."""
        super().reset_parameters()
        if "bias" in self._parameters:
            nn.init.constant_(self.bias, math.log(10 * self.num_classes))

    def forward(self, features: Tensor, labels: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        batch, chosen = self.batch(features, labels, sample_weight), self.options
        logits = chosen.scale * batch.cosines(chosen.eps) - self.bias.to(batch.x.dtype)
        target = logits.gather(1, batch.columns)[:, 0] - chosen.scale * chosen.margin
        others = logits.scatter(1, batch.columns, -math.inf)  # of which the softplus is 0, and its slope
        losses = softplus(-target) + chosen.negative_weight * softplus(others).sum(1)
        return batch.reduced(losses, chosen.reduction)
