"""The class-parallel losses over agents as modules: every rank has some of the agents."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..agents.layers import AgentLoss, CContrastiveLoss, CTripletLoss
from ..agents.losses import AgentRows
from . import agents
from .spread import SpreadClasses, device_of


class _Sharded(SpreadClasses, AgentLoss):
    """What both are beside the loss of one process: who has which rows and agents."""

    backbone_gradients: str
    equal_batches: bool

    def _take_over(
        self, head: AgentLoss, mesh: DeviceMesh, seed: int, backbone_gradients: str, equal_batches: bool
    ) -> None:
        self.backbone_gradients, self.equal_batches = backbone_gradients, equal_batches
        self._spread(head.weight, mesh, seed)
        self.training: bool = head.training

    def _rows_and_loss(
        self,
        features: Tensor,
        labels: Tensor,
        sample_weight: Tensor | None,
        margin: Tensor | None,
        labels_b: Tensor | None,
        lam: float | Tensor | None,
        need_largest: bool,
    ) -> tuple[AgentRows, Tensor]:
        return agents.rows_and_loss(
            f"distributed.{self.LOSS}",
            features,
            self.weight,
            labels,
            self.shard,
            sample_weight,
            self.options,
            margin,
            labels_b,
            lam,
            backbone_gradients=self.backbone_gradients,
            equal_batches=self.equal_batches,
            need_largest=need_largest,
        )

    def _stats(
        self, features: Tensor, labels: Tensor, sample_weight: Tensor | None, margin: Tensor | None
    ) -> Tensor:
        return agents.stats(
            f"distributed.{self.STATS}",
            features,
            self.weight,
            labels,
            self.shard,
            sample_weight,
            self.options,
            margin,
            equal_batches=self.equal_batches,
        )


class ShardedCContrastiveLoss(_Sharded, CContrastiveLoss):
    """``CContrastiveLoss`` with its agents spread over the ranks of a mesh; made by :func:`shard_head`.

    ``weight`` is a DTensor ``Shard(0)`` of [num_classes, D]; optimizers, ``state_dict`` and
    ``torch.distributed.checkpoint`` take it as it is. ``forward`` and ``stats`` are called by all ranks
    together, with the rows of each; see ``distributed.c_contrastive_loss`` for what they return and what it
    costs. With ``add_intra_mae`` the running mean is over the rows of all ranks, the same on each.
    ``copy.deepcopy`` makes a loss among the same ranks.
    """

    def __init__(
        self,
        head: CContrastiveLoss,
        mesh: DeviceMesh,
        seed: int,
        backbone_gradients: str,
        equal_batches: bool,
    ) -> None:
        super().__init__(
            head.in_features, head.num_classes, device="meta", dtype=head.weight.dtype, **vars(head.options)
        )
        self._take_over(head, mesh, seed, backbone_gradients, equal_batches)
        if head.add_intra_mae:
            mean = head.intra_mae
            self.intra_mae: Tensor = (
                mean.new_zeros((), device=device_of(mesh)) if mean.is_meta else mean.clone()
            )


class ShardedCTripletLoss(_Sharded, CTripletLoss):
    """``CTripletLoss`` with its agents spread over the ranks of a mesh; made by :func:`shard_head`. As
    ``ShardedCContrastiveLoss``, with ``distributed.c_triplet_loss``."""

    def __init__(
        self, head: CTripletLoss, mesh: DeviceMesh, seed: int, backbone_gradients: str, equal_batches: bool
    ) -> None:
        super().__init__(
            head.in_features, head.num_classes, device="meta", dtype=head.weight.dtype, **vars(head.options)
        )
        self._take_over(head, mesh, seed, backbone_gradients, equal_batches)
