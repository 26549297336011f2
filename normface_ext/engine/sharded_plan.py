"""What a class-parallel head will cost one rank: memory, and bytes sent and received per step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .plan import Plan

#: Tensors of the weight's shape that an optimizer keeps.
OPTIMIZER_STATES = {"none": 0, "sgd": 0, "momentum": 1, "adamw": 2}


@dataclass(frozen=True)
class ShardedPlan:
    """What :func:`plan` says of a head over ``world_size`` ranks, for the rank with the most classes.

    Attributes:
        world_size: W.
        classes: of that rank, ceil(C / W).
        sampled_classes: how many of them a step takes part in (all, or the expected number of a draw).
        local: the plan of its sweep, over the rows of all ranks and those classes.
        parameter_bytes, gradient_bytes, optimizer_bytes: of its share of the weight.
        gathered_bytes: the features of all ranks, the gradient of theirs, and its own part of that.
        all_gather_bytes, all_reduce_bytes, reduce_scatter_bytes: payload of the collectives of a step
            (forward and backward): what a rank contributes to the first, the size of the tensor for the
            others.
    """

    world_size: int
    classes: int
    sampled_classes: int
    local: Plan
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    gathered_bytes: int
    all_gather_bytes: int
    all_reduce_bytes: int
    reduce_scatter_bytes: int

    @property
    def total_bytes(self) -> int:
        """Everything the head keeps on a rank at its peak."""
        return (
            self.parameter_bytes
            + self.gradient_bytes
            + self.optimizer_bytes
            + self.gathered_bytes
            + self.local.workspace_bytes
        )

    @property
    def received_bytes(self) -> int:
        """What a rank receives per step at least: (W - 1) batches, and rings of the two reductions."""
        others = self.world_size - 1
        ring = 2 * self.all_reduce_bytes + self.reduce_scatter_bytes
        return others * self.all_gather_bytes + others * ring // self.world_size

    def fits(self, memory: int) -> bool:
        """Whether ``memory`` bytes of one device hold the head (the backbone comes on top)."""
        return self.total_bytes <= memory

    def __str__(self) -> str:
        drawn = "" if self.sampled_classes == self.classes else f" ({self.sampled_classes} drawn)"
        return (
            f"{self.world_size} ranks, {self.classes} classes{drawn} each: {self.total_bytes / 2**30:.2f} GiB"
            f" per rank, {self.received_bytes / 2**20:.1f} MiB received per step; {self.local}"
        )


def sharded_plan(
    local: Plan,
    batch: int,
    dim: int,
    classes: int,
    drawn: int,
    world_size: int,
    dtype: torch.dtype,
    optimizer: str,
) -> ShardedPlan:
    """From the plan of one rank's sweep; see :func:`plan`. ``classes`` are this rank's, ``drawn`` of them."""
    master = 8 if dtype == torch.float64 else 4  # bytes of a weight: training keeps at least float32
    item = dtype.itemsize
    every = batch * world_size
    states = OPTIMIZER_STATES[optimizer]
    sampled = drawn != classes
    return ShardedPlan(
        world_size=world_size,
        classes=classes,
        sampled_classes=drawn,
        local=local,
        parameter_bytes=classes * dim * master,
        # A draw copies its rows and their gradient has indices.
        gradient_bytes=drawn * (dim * master * (2 if sampled else 1) + (8 if sampled else 0)),
        optimizer_bytes=states * classes * dim * master + (4 * classes if optimizer == "adamw" else 0),
        # Packed rows (sent, received), the features unpacked; their gradient and this rank's part of it.
        gathered_bytes=(every + batch) * (dim * item + 8)
        + every * (dim * item + 16)
        + (every + batch) * dim * master,
        all_gather_bytes=batch * (dim * item + 8),
        all_reduce_bytes=every * 3 * 8,
        reduce_scatter_bytes=every * dim * master,
    )
