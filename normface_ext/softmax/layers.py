"""The softmax head as a layer: parameters and state only; every formula is in ``functions``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import theory
from ..cosine.layers import ScaledHead
from ..engine import checks
from ..engine.arguments import size
from ..engine.options import HoldsOptions, holds, takes
from . import functions
from .options import HeadKeywords, HeadOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


@holds(HeadOptions)
class NormFaceLoss(HoldsOptions, ScaledHead):
    """The normalised softmax head and its loss in one: (features [N, D], labels [N]) -> loss.

    ``forward`` also takes ``sample_weight`` [N].

    Args:
        in_features: D.
        num_classes: C; ``weight`` is [C, D], rows uniform on the unit sphere.
        scale: s, or "auto": the smallest scale whose loss bound is ``theory.AUTO_SCALE_BOUND``.
        learn_scale: make s a parameter, kept within [min_scale, max_scale]. It needs no weight decay:
            ``parameter_groups`` gives it a group without.

    ``margin``, ``reduction``, ``ignore_index``, ``eps``, ``class_weight``, ``label_smoothing``, ``workspace``
    and ``check_finite`` are those of ``functional.normface_loss``; ``class_weight`` becomes a buffer.

    Constructor and forward call raise what ``functional.normface_loss`` raises. To classify use
    ``functional.norm_linear(x, head.weight, head.scale)``; to verify, compare normalised features.
    """

    options: HeadOptions
    class_weight: Tensor | None

    @takes(HeadOptions)
    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        scale: float | str = "auto",
        learn_scale: bool = False,
        min_scale: float = 0.01,
        max_scale: float | None = None,
        class_weight: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[HeadKeywords],
    ) -> None:
        owner = type(self).__name__
        in_features = size(owner, "in_features", in_features)
        num_classes = size(owner, "num_classes", num_classes)
        chosen = HeadOptions.of(owner, options)
        if isinstance(scale, str):
            if scale != "auto":
                raise ValueError(f"{owner}: expected `scale` to be a number or 'auto', got {scale!r}")
            scale = theory.auto_scale(num_classes)
        super().__init__(
            num_classes, in_features, scale, learn_scale, min_scale, max_scale, device, dtype
        )
        self.in_features, self.num_classes = in_features, num_classes
        self.keep_options(chosen)
        if class_weight is not None:
            checks.factors(owner, "class_weight", class_weight, num_classes)
        self.register_buffer("class_weight", class_weight)

    def forward(self, features: Tensor, labels: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        return functions.head_loss(
            "normface_loss",
            features,
            self.weight,
            labels,
            self.bounded_scale(),
            sample_weight,
            self.class_weight,
            self.options,
        )

    def loss_lower_bound(self) -> float:
        """The paper's bound at the present scale: print it beside the loss (host sync on CUDA)."""
        return theory.loss_lower_bound(self.num_classes, self.scale_value())

    def extra_repr(self) -> str:
        margin = "" if self.options.margin is None else f", margin={self.options.margin}"
        return f"{self.in_features}, {self.num_classes}, {self.scale_repr()}{margin}"
