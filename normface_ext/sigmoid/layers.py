"""The sigmoid heads as layers: parameters and state only; every formula is in ``functions``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ..distances.layers import Agents
from ..engine.arguments import choice, flag, size
from ..engine.dtypes import accumulator
from ..engine.options import HoldsOptions, holds, takes
from ..engine.state import WideState
from ..engine.statistics import Statistics, given_back
from . import functions, losses
from .options import SphereFace2LayerKeywords, SphereFace2LayerOptions
from .presets import PRESETS

if TYPE_CHECKING:
    from typing_extensions import Unpack

Head = TypeVar("Head", bound="SphereFace2Loss")


@holds(SphereFace2LayerOptions)
class SphereFace2Loss(WideState, HoldsOptions, Agents):
    """SphereFace2: (features [N, D], labels [N]) -> loss, with a weight and one learned b.

    ``forward`` also takes ``sample_weight`` [N], and ``labels_b`` [N] with ``lam``, see
    ``functional.sphereface2_loss``; with ``return_statistics=True`` it gives (loss, ``Statistics``). b is the
    parameter ``bias`` [1], float32 or wider whatever
    the weight's dtype. Weight decay is not for it.

    Args:
        in_features: D.
        num_classes: C; ``weight`` is [C, D], rows uniform on the unit sphere.
        first_bias: what b starts at, and ``reset_parameters`` sets. None: where the loss of a row whose
            cosines are all 0 has no slope in b, as in OpenSphere (0 where C = 1); wespeaker has 0.
        device, dtype: of the parameters.

    The others are those of ``functional.sphereface2_loss``; each is an attribute, which can be set. What is
    wrong raises here as it does there.
    """

    options: SphereFace2LayerOptions
    bias: nn.Parameter

    @takes(SphereFace2LayerOptions)
    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[SphereFace2LayerKeywords],
    ) -> None:
        owner = type(self).__name__
        in_features = size(owner, "in_features", in_features)
        num_classes = size(owner, "num_classes", num_classes)
        chosen = SphereFace2LayerOptions.of(owner, options)
        super().__init__(in_features, num_classes, device, dtype)
        self.in_features: int = in_features
        self.num_classes: int = num_classes
        self.keep_options(chosen)
        first = torch.empty(1, dtype=accumulator(self.weight.dtype), device=self.weight.device)
        self.bias = nn.Parameter(first)
        self._reset_bias()

    @classmethod
    def preset(cls: type[Head], name: str, in_features: int, num_classes: int, **changes: Any) -> Head:
        """The head as a library has it.

        Args:
            name: a key of ``sigmoid.presets.PRESETS``: "opensphere" (the authors', form C, the straight
                gradient), "wespeaker-c", "wespeaker-a" (r 32, W 1, b 0 at first; m 0.2 in form C, 0.15 in A).
            in_features: D.
            num_classes: C.
            changes: arguments of the constructor, in the place of the recipe's or beside them.

        Raises:
            ValueError: an unknown name; and what the constructor raises.
        """
        recipe = PRESETS[choice(f"{cls.__name__}.preset", "name", name, PRESETS)]
        return cls(in_features, num_classes, **{**recipe, **changes})

    def wide_state(self) -> list[Tensor]:
        # b, and its gradient, which has b's dtype.
        return [self.bias] if self.bias.grad is None else [self.bias, self.bias.grad]

    def reset_parameters(self) -> None:
        """Weight rows uniform on the unit sphere; b as at first."""
        super().reset_parameters()
        if "bias" in self._parameters:
            self._reset_bias()

    def _reset_bias(self) -> None:
        first = self.options.first_bias
        nn.init.constant_(
            self.bias, losses.balanced_bias(self.options, self.num_classes) if first is None else first
        )

    def forward(
        self,
        features: Tensor,
        labels: Tensor,
        sample_weight: Tensor | None = None,
        *,
        return_statistics: bool = False,
        labels_b: Tensor | None = None,
        lam: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Statistics]:
        statistics = flag(type(self).__name__, "return_statistics", return_statistics)
        given = features, self.weight, labels, self.bias, sample_weight, self.options, labels_b, lam
        return given_back(functions.head_loss(*given, statistics=statistics))

    def extra_repr(self) -> str:
        return ", ".join([f"{self.in_features}, {self.num_classes}", *self.options.shown()])
