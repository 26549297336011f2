"""The class-parallel sigmoid heads as modules: every rank has some of the classes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..engine.arguments import flag
from ..engine.statistics import Statistics, given_back
from ..sigmoid.layers import SphereFace2Loss
from . import sigmoid
from .spread import SpreadClasses, device_of


class ShardedSphereFace2Loss(SpreadClasses, SphereFace2Loss):
    """``SphereFace2Loss`` with its classes spread over the ranks of a mesh; made by :func:`shard_head`.

    ``weight`` is a DTensor ``Shard(0)`` of [num_classes, D]; optimizers, ``state_dict`` and
    ``torch.distributed.checkpoint`` take it as it is. ``bias`` is the head's own parameter, one per rank; its
    gradient is the same on all of them. ``forward`` is called by all ranks together, with the rows of each;
    see ``distributed.sphereface2_loss`` for what it returns and what it costs.
    """

    def __init__(
        self,
        head: SphereFace2Loss,
        mesh: DeviceMesh,
        seed: int,
        backbone_gradients: str,
        equal_batches: bool,
    ) -> None:
        super().__init__(
            head.in_features, head.num_classes, device="meta", dtype=head.weight.dtype, **vars(head.options)
        )
        self.backbone_gradients: str = backbone_gradients
        self.equal_batches: bool = equal_batches
        self._spread(head.weight, mesh, seed)
        self.bias = head.bias
        if head.bias.is_meta:
            first = torch.empty(1, dtype=head.bias.dtype, device=device_of(mesh))
            self.bias: nn.Parameter = nn.Parameter(first, requires_grad=head.bias.requires_grad)
            self._reset_bias()
        self.training: bool = head.training

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
        found = sigmoid.sharded_loss(
            features,
            self.weight,
            labels,
            self.bias,
            self.shard,
            sample_weight,
            self.options,
            labels_b,
            lam,
            backbone_gradients=self.backbone_gradients,
            equal_batches=self.equal_batches,
            statistics=flag(type(self).__name__, "return_statistics", return_statistics),
        )
        return given_back(found)
