"""NormSoftmax: the plain head under the name that metric learning knows."""

from __future__ import annotations

from typing import Any

from ..engine.arguments import POSITIVE, number
from ..softmax.layers import NormFaceLoss


class NormSoftmax(NormFaceLoss):
    """``-log softmax_j(cos_j / temperature)[y]`` (Zhai and Wu, *Classification is a Strong Baseline for Deep
    Metric Learning*, BMVC 2019, section 3): ``NormFaceLoss`` with scale 1 / temperature.

    Without an N x C matrix. The released code has temperature 0.05 and agrees with the paper. It leaves the
    features to the network, which ends with a layer norm without parameters and a normalisation; here they
    are normalised inside, as in pytorch-metric-learning's ``NormalizedSoftmaxLoss``.

    Args:
        in_features: D.
        num_classes: C.
        temperature: above 0.
        options: the others of ``NormFaceLoss``.

    Raises:
        TypeError, ValueError, IndexError: as ``NormFaceLoss``.
    """

    def __init__(
        self, in_features: int, num_classes: int, *, temperature: float = 0.05, **options: Any
    ) -> None:
        scale = 1 / number("NormSoftmax", "temperature", temperature, POSITIVE)
        super().__init__(in_features, num_classes, scale=scale, **options)
