"""The class-parallel head as a module: every rank has some of the classes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from ..cosine.functions import scaled_cosine
from ..cosine.options import LinearOptions
from ..cosine.rows import unit_rows_
from ..engine.arguments import RATE, flag, integer, number
from ..softmax.layers import NormFaceLoss
from . import ranking, softmax
from .sampling import ClassSampler
from .shard import ClassShard

#: Classes whose initial weights come from one generator: the start does not depend on the number of ranks.
_INIT_BLOCK = 4096


class ShardedNormFaceLoss(NormFaceLoss):
    """``NormFaceLoss`` with its classes spread over the ranks of a mesh; made by :func:`shard_head`.

    ``weight`` is a DTensor ``Shard(0)`` of [num_classes, D]; optimizers, ``state_dict`` and
    ``torch.distributed.checkpoint`` take it as it is. ``forward`` is called by all ranks together, with the
    rows of each; see ``distributed.normface_loss`` for what it returns and what it costs. In eval mode all
    classes take part.
    """

    def __init__(
        self,
        head: NormFaceLoss,
        mesh: DeviceMesh,
        *,
        sample_rate: float = 1.0,
        seed: int = 0,
        backbone_gradients: str = "mean",
        equal_batches: bool = False,
    ) -> None:
        super().__init__(
            head.in_features,
            head.num_classes,
            scale=head.first_scale,
            min_scale=head.min_scale,
            max_scale=None if head.max_scale == float("inf") else head.max_scale,
            **{**vars(head.options), "margin": head.given_margin()},
            device="meta",
            dtype=head.weight.dtype,
        )
        device = _device_of(mesh)
        self.scale = head.scale  # the parameter itself, if it is learned
        if isinstance(head.scale, nn.Parameter) and head.scale.is_meta:
            first = torch.full((1,), head.first_scale, dtype=head.scale.dtype, device=device)
            self.scale = nn.Parameter(first, requires_grad=head.scale.requires_grad)
        self.shard = ClassShard.of(self.num_classes, mesh.get_group())
        self.backbone_gradients, self.equal_batches = backbone_gradients, equal_batches
        self.sampler = None if sample_rate == 1 else ClassSampler(sample_rate, seed)
        self._seed = seed
        if head.weight.is_meta:
            local = torch.empty(self.shard.count, self.in_features, dtype=head.weight.dtype, device=device)
            self._draw_(local)
            shape = torch.Size([self.num_classes, self.in_features])
            weight = DTensor.from_local(
                local, mesh, [Shard(0)], run_check=False, shape=shape, stride=(self.in_features, 1)
            )
        else:
            weight = distribute_tensor(head.weight.detach(), mesh, [Shard(0)])
        self.weight = nn.Parameter(weight, requires_grad=head.weight.requires_grad)
        self.class_weight, self.margin = head.given_class_weight(), head.given_margin()
        self.training = head.training

    def _draw_(self, local: Tensor) -> None:
        """Uniform on the unit sphere, the same for any number of ranks; nobody holds other ranks' classes."""
        shard, width, seed = self.shard, self.in_features, self._seed
        for begin in range(shard.first - shard.first % _INIT_BLOCK, shard.first + shard.count, _INIT_BLOCK):
            generator = torch.Generator().manual_seed((seed << 32) + begin // _INIT_BLOCK)
            block = torch.randn(_INIT_BLOCK, width, generator=generator)
            first, last = max(begin, shard.first), min(begin + _INIT_BLOCK, shard.first + shard.count)
            local[first - shard.first : last - shard.first] = block[first - begin : last - begin]
        unit_rows_(local, self.eps, type(self).__name__)

    def _reset_weight(self) -> None:
        if isinstance(self.weight, DTensor):  # before that it is a placeholder without memory
            with torch.no_grad():
                self._draw_(self.weight.to_local())

    def forward(
        self, features: Tensor, labels: Tensor | None = None, sample_weight: Tensor | None = None
    ) -> Tensor:
        if labels is None:
            return self._without_labels(features, sample_weight)
        return softmax.sharded_loss(
            features,
            self.weight,
            labels,
            self.bounded_scale(),
            self.shard,
            sample_weight,
            self.class_weight,
            self.present_options(),
            largest_scale=None if self.max_scale == float("inf") else self.max_scale,
            sample=self.sampler if self.training else None,
            backbone_gradients=self.backbone_gradients,
            equal_batches=self.equal_batches,
        )

    def logits(self, x: Tensor) -> Tensor:
        """s cos(x_i, w_j) [N, num_classes] of this rank's rows, called by all ranks together: each of them
        holds the whole weight for it. The gradient of the weight is that of the sum over the ranks."""
        weight = self.weight
        assert isinstance(weight, DTensor)
        whole = weight.full_tensor(grad_placements=[Partial()])
        options = LinearOptions(eps=self.options.eps)
        return scaled_cosine("norm_linear", x, whole, self.bounded_scale(), options)

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """The class of the largest logit of this rank's rows, int64 [N]; of several the first. All ranks call
        it together; no rank holds all classes."""
        options = self.present_options()
        return ranking.nearest_class(
            type(self).__name__,
            x,
            self._local_weight(),
            self.shard,
            options.eps,
            options.workspace,
        )

    def _ranks(self, x: Tensor, labels: Tensor) -> Tensor:
        options = self.present_options()
        return ranking.target_rank(
            type(self).__name__,
            x,
            self._local_weight(),
            labels,
            self.shard,
            options.ignore_index,
            options.eps,
            options.workspace,
        )

    def _local_weight(self) -> Tensor:
        weight = self.weight
        assert isinstance(weight, DTensor)
        return weight.to_local().detach()

    def renormalize_(self) -> None:
        """Overwrites this rank's rows by unit rows; see ``NormFaceLoss.renormalize_``."""
        weight = self.weight
        assert isinstance(weight, DTensor)
        unit_rows_(weight.to_local().detach(), self.eps, type(self).__name__)

    def extra_repr(self) -> str:
        mine = (
            f"{self.shard.first}..{self.shard.first + self.shard.count - 1} here"
            if self.shard.count
            else "none here"
        )
        return f"{super().extra_repr()}, classes {mine}"


def _device_of(mesh: DeviceMesh) -> torch.device:
    if mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(mesh.device_type)


def shard_head(
    head: NormFaceLoss,
    mesh: DeviceMesh,
    *,
    sample_rate: float = 1.0,
    seed: int = 0,
    backbone_gradients: str = "mean",
    equal_batches: bool = False,
) -> ShardedNormFaceLoss:
    """A class-parallel head out of a ``NormFaceLoss``: rank r of W keeps ceil(C / W) of its classes.

    Args:
        head: on every rank; the weight of the mesh's first rank is the one that counts. On the "meta"
            device no rank ever holds all classes: the weights are then drawn here, uniform on the unit
            sphere, the same for any number of ranks.
        mesh: 1-D, over the ranks that share the classes; of a larger mesh pass ``mesh["name"]``.
        sample_rate: below 1, a training step takes part in this share of the negative classes (Partial
            FC); the rows' own classes are always in. The weight's gradient is sparse then: use
            ``distributed.RowSGD`` or ``RowAdamW``.
        seed: of the initial weights and of the draws, in [0, 2^32); the same on all ranks.
        backbone_gradients: "mean" for backbones under DistributedDataParallel or FSDP, which average
            gradients over ranks; "sum" if they are added.
        equal_batches: see ``distributed.normface_loss``.

    The scale parameter of a head that learns it stays one parameter per rank; its gradient is the same on
    all of them.

    Raises:
        TypeError: head or mesh.
        ValueError: a mesh that is not 1-D, sample_rate outside (0, 1], seed, backbone_gradients.
    """
    op = "shard_head"
    if not isinstance(head, NormFaceLoss) or isinstance(head, ShardedNormFaceLoss):
        raise TypeError(f"{op}: expected `head` to be a NormFaceLoss, got {type(head).__name__}")
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"{op}: expected `mesh` to be a DeviceMesh, got {type(mesh).__name__}")
    if mesh.ndim != 1:
        raise ValueError(f"{op}: expected `mesh` to be 1-D, got {mesh.ndim} dimensions; pass mesh['name']")
    sample_rate = number(op, "sample_rate", sample_rate, RATE)
    seed = integer(op, "seed", seed, 0, (1 << 32) - 1)
    softmax.check_backbone_gradients(op, backbone_gradients)
    equal_batches = flag(op, "equal_batches", equal_batches)
    return ShardedNormFaceLoss(
        head,
        mesh,
        sample_rate=sample_rate,
        seed=seed,
        backbone_gradients=backbone_gradients,
        equal_batches=equal_batches,
    )
