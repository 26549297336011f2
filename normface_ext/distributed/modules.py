"""The class-parallel heads as modules: every rank has some of the classes."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial

from ..agents.layers import CContrastiveLoss, CTripletLoss
from ..cosine.functions import scaled_cosine
from ..engine.arguments import RATE, flag, integer, number
from ..engine.statistics import Statistics, given_back
from ..sigmoid.layers import SphereFace2Loss
from ..softmax.centers import pooled
from ..softmax.layers import NormFaceLoss
from ..softmax.margins import Margin
from . import ranking, softmax
from .agent_modules import ShardedCContrastiveLoss, ShardedCTripletLoss
from .resize import SpreadResizing
from .sampling import ClassSampler
from .shard import local_rows
from .sigmoid_modules import ShardedSphereFace2Loss
from .spread import SpreadClasses, device_of

Head = NormFaceLoss | CContrastiveLoss | CTripletLoss | SphereFace2Loss


class ShardedNormFaceLoss(SpreadClasses, NormFaceLoss):
    """``NormFaceLoss`` with its classes spread over the ranks of a mesh; made by :func:`shard_head`.

    ``weight`` is a DTensor ``Shard(0)`` of [num_classes, D], with ``sub_centers`` K of [num_classes, K, D] so
    that no class is split; optimizers, ``state_dict`` and ``torch.distributed.checkpoint`` take it as it is.
    ``load_state_dict`` also takes the state of one process, which every rank has, and each of them its rows
    of it; ``distributed.full_state_dict`` is the way back. ``forward`` is called by all ranks together, with
    the rows of each; see ``distributed.normface_loss`` for what it returns and what it costs. In eval mode
    all classes take part. So are ``logits``, ``predict``, ``accuracy``, ``centers_of`` and ``weight_for``,
    and those give what is found of this rank's rows alone, and ``resize_classes``. ``copy.deepcopy`` makes a
    head among the same ranks. DistributedDataParallel around it leaves the weight alone.
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
            # The margin comes last, so that its parameters do: optimizers know them by their order.
            **{**vars(head.options), "margin": None},
            device="meta",
            dtype=head.weight.dtype,
        )
        self.scale = head.scale  # the parameter itself, if it is learned
        if isinstance(head.scale, nn.Parameter) and head.scale.is_meta:
            first = torch.full((1,), head.first_scale, dtype=head.scale.dtype, device=device_of(mesh))
            self.scale = nn.Parameter(first, requires_grad=head.scale.requires_grad)
        self.backbone_gradients: str = backbone_gradients
        self.equal_batches: bool = equal_batches
        self.sampler: ClassSampler | None = None if sample_rate == 1 else ClassSampler(sample_rate, seed)
        self._spread(head.weight, mesh, seed)
        self.class_weight: Tensor | None = head.given_class_weight()
        self.margin: Margin | None = head.given_margin()
        self.training: bool = head.training

    def forward(
        self,
        features: Tensor,
        labels: Tensor | None = None,
        sample_weight: Tensor | None = None,
        *,
        return_statistics: bool = False,
        labels_b: Tensor | None = None,
        lam: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Statistics]:
        if labels is None:
            given = {"sample_weight": sample_weight, "labels_b": labels_b, "lam": lam}
            return self._without_labels(features, return_statistics, **given)
        found = softmax.sharded_loss(
            features,
            self.weight,
            labels,
            self.bounded_scale(),
            self.shard,
            sample_weight,
            self.class_weight,
            self.present_options(),
            labels_b=labels_b,
            lam=lam,
            largest_scale=None if self.max_scale == float("inf") else self.max_scale,
            sample=self.sampler if self.training else None,
            backbone_gradients=self.backbone_gradients,
            equal_batches=self.equal_batches,
            statistics=flag(type(self).__name__, "return_statistics", return_statistics),
        )
        return given_back(found)

    def logits(self, x: Tensor) -> Tensor:
        """s cos(x_i, w_j) [N, num_classes] of this rank's rows, called by all ranks together: each of them
        holds the whole weight for it. The gradient of the weight is that of the sum over the ranks."""
        weight = self.weight
        assert isinstance(weight, DTensor)
        whole = weight.full_tensor(grad_placements=[Partial()])
        centers = self.options.sub_centers
        rows = local_rows(type(self).__name__, whole, centers)
        scaled = scaled_cosine("norm_linear", x, rows, self.bounded_scale(), self.linear_options())
        return pooled(scaled, centers)

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """The class of the largest logit of this rank's rows, int64 [N]; of several the first. All ranks call
        it together; no rank holds all classes."""
        options = self.present_options()
        return ranking.nearest_class(
            type(self).__name__,
            x,
            self._local_rows(),
            self.shard,
            options.eps,
            options.workspace,
            options.sub_centers,
        )

    def _local_rows(self) -> Tensor:
        return local_rows(type(self).__name__, self._local_weight(), self.options.sub_centers)

    @torch.no_grad()
    def centers_of(self, x: Tensor, labels: Tensor) -> Tensor:
        """``NormFaceLoss.centers_of`` of this rank's rows; all ranks call it together."""
        options, owner = self.present_options(), type(self).__name__
        given = options.sub_centers, options.ignore_index, options.eps
        return ranking.nearest_center(owner, x, self._local_rows(), labels, self.shard, *given)

    def _ranks(self, x: Tensor, labels: Tensor) -> Tensor:
        options = self.present_options()
        return ranking.target_rank(
            type(self).__name__,
            x,
            self._local_rows(),
            labels,
            self.shard,
            options.ignore_index,
            options.eps,
            options.workspace,
            options.sub_centers,
        )

    def _resizing(self) -> SpreadResizing:
        return SpreadResizing(self)


@overload
def shard_head(
    head: NormFaceLoss,
    mesh: DeviceMesh,
    *,
    sample_rate: float = 1.0,
    seed: int = 0,
    backbone_gradients: str = "mean",
    equal_batches: bool = False,
) -> ShardedNormFaceLoss: ...
@overload
def shard_head(
    head: CContrastiveLoss,
    mesh: DeviceMesh,
    *,
    sample_rate: float = 1.0,
    seed: int = 0,
    backbone_gradients: str = "mean",
    equal_batches: bool = False,
) -> ShardedCContrastiveLoss: ...
@overload
def shard_head(
    head: CTripletLoss,
    mesh: DeviceMesh,
    *,
    sample_rate: float = 1.0,
    seed: int = 0,
    backbone_gradients: str = "mean",
    equal_batches: bool = False,
) -> ShardedCTripletLoss: ...
@overload
def shard_head(
    head: SphereFace2Loss,
    mesh: DeviceMesh,
    *,
    sample_rate: float = 1.0,
    seed: int = 0,
    backbone_gradients: str = "mean",
    equal_batches: bool = False,
) -> ShardedSphereFace2Loss: ...
def shard_head(
    head: Head,
    mesh: DeviceMesh,
    *,
    sample_rate: float = 1.0,
    seed: int = 0,
    backbone_gradients: str = "mean",
    equal_batches: bool = False,
) -> ShardedNormFaceLoss | ShardedCContrastiveLoss | ShardedCTripletLoss | ShardedSphereFace2Loss:
    """A class-parallel head out of a ``NormFaceLoss``, a ``CContrastiveLoss``, a ``CTripletLoss`` or a
    ``SphereFace2Loss``: rank r of W keeps ceil(C / W) of its classes.

    Args:
        head: on every rank; the weight of the mesh's first rank is the one that counts. On the "meta"
            device no rank ever holds all classes: the weights are then drawn here, uniform on the unit
            sphere, the same for any number of ranks.
        mesh: 1-D, over the ranks that share the classes; of a larger mesh pass ``mesh["name"]``.
        sample_rate: below 1, a training step of a ``NormFaceLoss`` takes part in this share of the negative
            classes (Partial FC); the rows' own classes are always in. The weight's gradient is sparse then:
            use ``distributed.RowSGD`` or ``RowAdamW``. The other heads take all classes.
        seed: of the initial weights and of the draws, in [0, 2^32); the same on all ranks.
        backbone_gradients: "mean" for backbones under DistributedDataParallel or FSDP, which average
            gradients over ranks; "sum" if they are added.
        equal_batches: see ``distributed.normface_loss``.

    The scale parameter of a head that learns it, and SphereFace2's b, stays one parameter per rank; its
    gradient is the same on all of them.

    Raises:
        TypeError: head or mesh.
        ValueError: a mesh that is not 1-D, sample_rate outside (0, 1] or below 1 for another head,
            seed, backbone_gradients.
    """
    op = "shard_head"
    if not isinstance(head, Head) or isinstance(head, SpreadClasses):
        raise TypeError(
            f"{op}: expected `head` to be a NormFaceLoss, a CContrastiveLoss, a CTripletLoss or a"
            f" SphereFace2Loss, got {type(head).__name__}"
        )
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"{op}: expected `mesh` to be a DeviceMesh, got {type(mesh).__name__}")
    if mesh.ndim != 1:
        raise ValueError(f"{op}: expected `mesh` to be 1-D, got {mesh.ndim} dimensions; pass mesh['name']")
    sample_rate = number(op, "sample_rate", sample_rate, RATE)
    seed = integer(op, "seed", seed, 0, (1 << 32) - 1)
    softmax.check_backbone_gradients(op, backbone_gradients)
    equal_batches = flag(op, "equal_batches", equal_batches)
    if isinstance(head, NormFaceLoss):
        return ShardedNormFaceLoss(
            head,
            mesh,
            sample_rate=sample_rate,
            seed=seed,
            backbone_gradients=backbone_gradients,
            equal_batches=equal_batches,
        )
    if sample_rate != 1:
        raise ValueError(
            f"{op}: expected `sample_rate` to be 1 for a {type(head).__name__}, got {sample_rate:g}"
        )
    rest = mesh, seed, backbone_gradients, equal_batches
    if isinstance(head, CContrastiveLoss):
        return ShardedCContrastiveLoss(head, *rest)
    if isinstance(head, SphereFace2Loss):
        return ShardedSphereFace2Loss(head, *rest)
    return ShardedCTripletLoss(head, *rest)
