"""Layers of the distances: parameters and state only; every formula is in ``functions``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..cosine.rows import draw_weight_, renormalize_weight_
from ..engine import checks
from ..engine.arguments import size
from ..engine.options import HoldsOptions, holds, takes
from ..engine.state import explain_spread
from . import functions
from .options import DistanceKeywords, DistanceOptions, PairOptions, RowLossKeywords, RowTripletOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Agents(nn.Module):
    """A weight [classes, features], rows uniform on the unit sphere."""

    weight: nn.Parameter
    eps: float

    def __init__(
        self, features: int, classes: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        device = checks.device_or_none(owner, device)
        dtype = None if dtype is None else checks.floating_dtype(owner, dtype)
        self.weight = nn.Parameter(torch.empty(classes, features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight rows uniform on the unit sphere."""
        self._reset_weight()

    def _reset_weight(self) -> None:
        draw_weight_(self)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        explain_spread(self, state_dict, prefix, local_metadata, error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def renormalize_(self) -> None:
        """Overwrites the weight by its unit rows; see ``caffe.renormalize_after_step``."""
        renormalize_weight_(self, self.eps, type(self).__name__)


@holds(DistanceOptions)
class InnerDistance(HoldsOptions, Agents):
    """Distances to every agent: [N, in_features] -> [N, out_features] (Caffe ``InnerDistance``).

    For p = 2 they are squared and without a factor 1/2, as in the papers: 2 - 2 cos for unit rows.

    Args:
        in_features: D.
        out_features: C; ``weight`` is [C, D], rows uniform on the unit sphere.

    ``p``, ``normalize``, ``update_center_only`` and ``eps`` are those of ``functional.inner_distance``.
    ``forward(x, labels)`` needs the labels with ``update_center_only`` and refuses them without.
    """

    options: DistanceOptions

    @takes(DistanceOptions)
    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[DistanceKeywords],
    ) -> None:
        owner = type(self).__name__
        in_features = size(owner, "in_features", in_features)
        out_features = size(owner, "out_features", out_features)
        chosen = DistanceOptions.of(owner, options)
        super().__init__(in_features, out_features, device, dtype)
        self.in_features: int = in_features
        self.out_features: int = out_features
        self.keep_options(chosen)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return functions.distances("inner_distance", x, self.weight, labels, self.options)

    def extra_repr(self) -> str:
        return ", ".join([str(self.in_features), str(self.out_features), *self.options.shown()])


@holds(PairOptions)
class PairContrastiveLoss(HoldsOptions):
    """(a [N, D], b [N, D], same [N]) -> loss; see ``functional.pair_contrastive_loss``.

    The margin is one of the distance itself, and the factor 1/2 is the paper's. ``forward`` also takes
    ``sample_weight`` [N].
    """

    options: PairOptions

    @takes(PairOptions)
    def __init__(self, **options: Unpack[RowLossKeywords]) -> None:
        super().__init__()
        self.keep_options(PairOptions.of(type(self).__name__, options))

    def forward(self, a: Tensor, b: Tensor, same: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        return functions.contrastive("pair_contrastive_loss", a, b, same, sample_weight, self.options)

    def extra_repr(self) -> str:
        return ", ".join(self.options.shown())


@holds(RowTripletOptions)
class TripletLoss(HoldsOptions):
    """(anchor, positive, negative), each [N, D] -> loss; see ``functional.triplet_loss``.

    Distances are squared and without a factor 1/2, as in the paper. ``forward`` also takes ``sample_weight``
    [N].
    """

    options: RowTripletOptions

    @takes(RowTripletOptions)
    def __init__(self, **options: Unpack[RowLossKeywords]) -> None:
        super().__init__()
        self.keep_options(RowTripletOptions.of(type(self).__name__, options))

    def forward(
        self, anchor: Tensor, positive: Tensor, negative: Tensor, sample_weight: Tensor | None = None
    ) -> Tensor:
        return functions.triplet("triplet_loss", anchor, positive, negative, sample_weight, self.options)

    def extra_repr(self) -> str:
        return ", ".join(self.options.shown())
