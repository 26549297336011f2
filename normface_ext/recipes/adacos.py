"""AdaCos: a scale from the number of classes, or from the batch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine import checks
from ..engine.options import holds, takes
from ..engine.state import Passes, WideState, recomputing
from ..softmax.functions import head_parts, normface_loss
from .batch import Recipe
from .options import AdaCosKeywords, AdaCosOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


@holds(AdaCosOptions)
class AdaCos(WideState, Recipe):
    """``-log softmax_j(s cos_j)[y]`` with a scale that nobody chooses (Zhang et al., *AdaCos: Adaptively
    Scaling Cosine Logits for Effectively Learning Deep Face Representations*, CVPR 2019).

    Fixed (section 4.1): ``s = sqrt(2) ln(C - 1)``. Dynamic (section 4.2): that at first, and in every
    training step before it is used ``s <- ln(B) / cos(min(pi / 4, median))``, where B is the mean over the
    rows of ``sum_{j != y} exp(s cos_j)`` at the scale so far and median that of the rows' target angles, the
    lower one of two. s has no gradient. Without an N x C matrix: a dynamic step costs a second forward sweep.

    The code in use (4uiiurz1's, FaceX-Zoo's) has the paper's formula, and a scale that no state_dict holds.
    Copies of the former from before it was mended take the median over the angles with *all* classes, which
    is near pi / 2, so that the cosine is always that of pi / 4.

    The scale is the buffer ``scale``, [1] float64, saved with the module. It moves in training mode only,
    once per forward, not when ``torch.utils.checkpoint`` runs a forward again (that run has the scale it
    had, found by the memory of its labels, which are to come from outside of what runs again). Rows that are
    ignored, have weight 0 or are not finite move nothing, and neither does a batch that gives no positive
    number. Every process has the scale of its own rows (DistributedDataParallel hands out the first rank's).

    Args:
        in_features: D.
        num_classes: C, at least 3: with 2 classes the scale would be 0.
        dynamic: False keeps the scale.
        reduction, label_smoothing, ignore_index, eps, workspace: as in ``functional.normface_loss``.
        device, dtype: of the weight.

    All but in_features and num_classes are attributes, checked when they are set. ``forward`` takes features
    [N, D], labels [N] and perhaps sample_weight [N].

    Raises:
        TypeError, ValueError, IndexError: as ``functional.normface_loss``.
    """

    options: AdaCosOptions
    scale: Tensor

    @takes(AdaCosOptions)
    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[AdaCosKeywords],
    ) -> None:
        chosen = AdaCosOptions.of(type(self).__name__, options)
        super().__init__(in_features, num_classes, chosen, device, dtype, least=3)
        # Not 0-d: torch.compile takes a 0-d float64 of the CPU for a number, and loses what is written to it.
        self.register_buffer("scale", torch.empty(1, dtype=torch.float64, device=device))
        self._passes = Passes()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight rows uniform on the unit sphere; the scale back to sqrt(2) ln(C - 1)."""
        super().reset_parameters()
        if "scale" in self._buffers:
            self.scale.fill_(math.sqrt(2) * math.log(self.num_classes - 1))

    def forward(self, features: Tensor, labels: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        chosen = self.options
        return normface_loss(
            features,
            self.weight,
            labels,
            self._scale_of(features, labels, sample_weight),
            sample_weight=sample_weight,
            reduction=chosen.reduction,
            label_smoothing=chosen.label_smoothing,
            ignore_index=chosen.ignore_index,
            eps=chosen.eps,
            workspace=chosen.workspace,
        )

    def _scale_of(self, features: Tensor, labels: Tensor, sample_weight: Tensor | None) -> Tensor:
        """The scale for these rows, moved by them first; the one it had, for a pass that is run again."""
        if not (self.options.dynamic and self.training):
            return self.scale.clone()
        again = recomputing()
        if again and checks.has_values(labels):
            return self._passes.state(type(self).__name__, labels)
        if not again:
            self._move(features, labels, sample_weight)
            if checks.has_values(labels):
                self._passes.add(labels, self.scale.clone())
        return self.scale.clone()  # the loss keeps it for its backward pass, and the next forward moves it

    @torch.no_grad()
    def _move(self, features: Tensor, labels: Tensor, sample_weight: Tensor | None) -> None:
        labels, chosen = self.batch(features, labels, sample_weight).labels, self.options
        cosine, others, counts = head_parts(
            features,
            self.weight,
            labels,
            self.scale,
            ignore_index=-1,
            eps=chosen.eps,
            workspace=chosen.workspace,
        )
        follows = counts & cosine.isfinite() & others.isfinite()  # one NaN in the scale would stay for good
        count = follows.sum()
        mean = F.pad(torch.where(follows, others, -math.inf), (0, 1), value=-math.inf).logsumexp(0)
        angles = torch.where(follows, cosine.clamp(-1, 1).arccos(), math.inf)
        middle = ((count - 1).clamp(min=0) // 2).reshape(1)
        median = F.pad(angles, (0, 1), value=math.inf).sort().values.gather(0, middle)
        found = (mean - count.double().log()) / median.clamp(max=math.pi / 4).cos()
        self.scale.copy_(torch.where(found.isfinite() & (found > 0), found, self.scale))
