"""Which classes a rank has, and where its rows' targets are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

# For what is no place in a shard: the user's own ignored index may be any number, that of ELSEWHERE too.
from ..engine.row_state import ELSEWHERE, IGNORED
from ..softmax.centers import as_rows

__all__ = ["IGNORED", "ClassShard", "shard_range"]


@dataclass(frozen=True)
class ClassShard:
    """The classes [first, first + count) of num_classes, on one rank of a group.

    The split is that of ``torch.distributed.tensor.Shard(0)`` and ``torch.chunk``: ceil(C / W) classes on
    the first ranks, fewer or none on the last.
    """

    num_classes: int
    first: int
    count: int
    group: ProcessGroup

    @classmethod
    def of(cls, num_classes: int, group: ProcessGroup) -> ClassShard:
        first, count = shard_range(num_classes, dist.get_world_size(group), dist.get_rank(group))
        return cls(num_classes, first, count, group)

    @property
    def after(self) -> int:
        """The first class after this rank's."""
        return self.first + self.count

    @property
    def world(self) -> int:
        return dist.get_world_size(self.group)

    def __deepcopy__(self, memo: Any) -> ClassShard:
        """Itself: a copy of a head is among the same ranks, whose group cannot be copied."""
        return self

    def places(self, labels: Tensor, ignore_index: int) -> Tensor:
        """Global labels [N] -> places in this shard, ELSEWHERE, or IGNORED.

        A label that no shard has is an error: the door has seen it on the CPU; on CUDA the device asserts.
        """
        ignored = labels == ignore_index
        if labels.is_cuda:
            valid = ignored | ((labels >= 0) & (labels < self.num_classes))
            torch._assert_async(valid.all(), "normface_ext.distributed: expected labels in [0, num_classes)")
        place = labels - self.first
        here = (place >= 0) & (place < self.count)
        return place.where(here, ELSEWHERE).where(~ignored, IGNORED)


def shard_range(num_classes: int, world_size: int, rank: int) -> tuple[int, int]:
    """(first class, number of classes) of a rank."""
    each = -(-num_classes // world_size)
    first = min(rank * each, num_classes)
    return first, min(each, num_classes - first)


def owners(classes: Tensor, num_classes: int, world_size: int, rank: int) -> tuple[Tensor, int]:
    """(the rank that has each of ``classes``, the first class of ``rank``)."""
    each = -(-num_classes // world_size)
    return classes // each, shard_range(num_classes, world_size, rank)[0]


def local_rows(op: str, weight: Tensor, centers: int) -> Tensor:
    """This rank's rows, whole classes of `centers`, of a weight whose classes are spread over ranks."""
    local = weight.to_local() if isinstance(weight, DTensor) else weight
    if centers == 1:
        return local
    if local.dim() != 3 or local.shape[1] != centers:
        raise ValueError(
            f"{op}: expected `weight` to be [classes, sub_centers={centers}, D], got shape"
            f" {list(local.shape)}"
        )
    return as_rows(local)
