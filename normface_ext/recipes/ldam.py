"""LDAM: larger margins for rare classes, and weights for them late."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..engine.arguments import INT64_MAX, SHARE, integer, number, size
from ..softmax.class_margins import image_counts, ldam_margins
from ..softmax.layers import NormFaceLoss
from ..softmax.margins import CosFace


def drw_weights(counts: Tensor | Sequence[int], beta: float = 0.9999) -> Tensor:
    """u_j in proportion to (1 - beta) / (1 - beta^n_j), with mean 1, [C] float64: the weights by effective
    numbers (Cui et al., CVPR 2019) that LDAM's released code switches on late.

    Args:
        counts: [C] images of each class, all positive.
        beta: in [0, 1]: 0 weighs all classes alike, 1 by 1 / n_j, as LDAM's algorithm 1.

    Returns:
        [C] float64, on the device of `counts`.

    Raises:
        TypeError, ValueError: an argument out of range.
    """
    images = image_counts("drw_weights", counts)
    beta = number("drw_weights", "beta", beta, SHARE)
    if beta == 0:
        return torch.ones_like(images)
    # (1 - beta) is common to all and drops out of the mean of 1.
    rarity = 1 / images if beta == 1 else -1 / torch.expm1(images * math.log(beta))
    return rarity / rarity.mean()


class LDAM(NormFaceLoss):
    """``NormFaceLoss`` with ``psi = c - m_j`` for class j, ``m_j = max_m (n_j / min n)^(-1/4)``, and class
    weights from an epoch on (Cao et al., *Learning Imbalanced Datasets with Label-Distribution-Aware Margin
    Loss*, NeurIPS 2019, sections 3.2 and 3.3).

    Without an N x C matrix. ``head.set_epoch(epoch)`` at the start of each epoch, also of the first after a
    resume, switches the deferred weights (DRW): ``class_weight`` is None before ``reweight_from`` and
    ``drw_weights(counts, beta)`` from then on; the mean divides by the sum of the weights, as the released
    code. Margins and weights are no state: they come from `counts`.

    Defaults are the released code's: max_m 0.5, s = 30, and of 200 epochs the last 40 weighted, by effective
    numbers with beta 0.9999. The paper's algorithm 1 weighs by 1 / n_j, which is ``beta=1``.

    Args:
        in_features: D.
        num_classes: C.
        counts: [C] images of each class, all positive.
        max_m: margin of the rarest class, positive.
        scale: s.
        reweight_from: the first epoch, counted from 0, with class weights.
        beta: of ``drw_weights``.
        options: the others of ``NormFaceLoss``, except margin and class_weight.

    Raises:
        TypeError, ValueError, IndexError: as ``NormFaceLoss``; `counts` of another length.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        counts: Tensor | Sequence[int],
        *,
        max_m: float = 0.5,
        scale: float | Tensor | str = 30.0,
        reweight_from: int = 160,
        beta: float = 0.9999,
        **options: Any,
    ) -> None:
        margins, classes = ldam_margins(counts, max_m), size("LDAM", "num_classes", num_classes)
        if margins.shape[0] != classes:
            raise ValueError(f"LDAM: expected `counts` to have shape [{classes}], got [{len(margins)}]")
        super().__init__(in_features, num_classes, scale=scale, margin=CosFace(margins), **options)
        self.reweight_from: int = integer("LDAM", "reweight_from", reweight_from, 0, INT64_MAX)
        self._late_weight = drw_weights(counts, beta)

    def set_epoch(self, epoch: int) -> None:
        """Class weights as this epoch has them, counted from 0."""
        late = integer("LDAM", "epoch", epoch, 0, INT64_MAX) >= self.reweight_from
        self.class_weight: Tensor | None = self._late_weight if late else None
