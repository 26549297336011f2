"""What a class-parallel head costs one rank: memory, and bytes sent and received per step.

python examples/plan_sharded.py --classes 10000000 --ranks 8
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

import torch

import normface_ext as nf

#: Tensors of the weight's shape that an optimizer keeps.
OPTIMIZER_STATES = {"none": 0, "sgd": 0, "momentum": 1, "adamw": 2}


@dataclass(frozen=True)
class ShardedPlan:
    """Of a head over `world_size` ranks, for the rank with the most classes; `local` is the plan of its sweep
    over the rows of all ranks and its classes, or those of them that a step draws."""

    world_size: int
    classes: int  # of that rank
    sampled_classes: int  # that a step takes part in: all, or the expected number of a draw
    local: nf.Plan
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    gathered_bytes: int  # the features of all ranks, the gradient of theirs, and this rank's part of that
    # What the collectives of a step carry: what a rank contributes to the first, the tensor of the others.
    all_gather_bytes: int
    all_reduce_bytes: int
    reduce_scatter_bytes: int

    @property
    def total_bytes(self) -> int:
        """Everything the head keeps on a rank at its peak; the backbone comes on top."""
        kept = self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes
        return kept + self.gathered_bytes + self.local.workspace_bytes

    @property
    def received_bytes(self) -> int:
        """What a rank receives per step at least: (W - 1) batches, and rings of the two reductions."""
        others = self.world_size - 1
        ring = 2 * self.all_reduce_bytes + self.reduce_scatter_bytes
        return others * self.all_gather_bytes + others * ring // self.world_size

    def __str__(self) -> str:
        drawn = "" if self.sampled_classes == self.classes else f" ({self.sampled_classes} drawn)"
        return (
            f"{self.world_size} ranks, {self.classes} classes{drawn} each: {self.total_bytes / 2**30:.2f} GiB"
            f" per rank, {self.received_bytes / 2**20:.1f} MiB received per step; {self.local}"
        )


def sharded_plan(
    batch: int,
    dim: int,
    classes: int,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    *,
    world_size: int,
    sample_rate: float = 1.0,
    optimizer: str = "momentum",
    workspace: int | None = None,
) -> ShardedPlan:
    """`batch` rows per rank, `dtype` of the products; the weight is float32, or float64 with float64."""
    here, every = -(-classes // world_size), batch * world_size
    # A draw has the rows' own classes and its share of the others.
    positives = min(every, here) if sample_rate < 1 else 0
    drawn = min(here, positives + math.ceil((here - positives) * sample_rate))
    master, item = (8 if dtype == torch.float64 else 4), dtype.itemsize
    sampled = drawn != here
    return ShardedPlan(
        world_size=world_size,
        classes=here,
        sampled_classes=drawn,
        local=nf.plan(every, dim, drawn, dtype, device, workspace=workspace),
        parameter_bytes=here * dim * master,
        # A draw copies its rows and their gradient has indices.
        gradient_bytes=drawn * (dim * master * (2 if sampled else 1) + (8 if sampled else 0)),
        optimizer_bytes=OPTIMIZER_STATES[optimizer] * here * dim * master
        + (4 * here if optimizer == "adamw" else 0),
        # Packed rows (sent, received), the features unpacked; their gradient and this rank's part of it.
        gathered_bytes=(every + batch) * (dim * item + 8)
        + every * (dim * item + 16)
        + (every + batch) * dim * master,
        all_gather_bytes=batch * (dim * item + 8),
        all_reduce_bytes=every * 3 * 8,
        reduce_scatter_bytes=every * dim * master,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=128, help="rows per rank")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--classes", type=int, default=10_000_000)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--sample-rate", type=float, default=1.0)
    parser.add_argument("--optimizer", choices=OPTIMIZER_STATES, default="momentum")
    given = parser.parse_args()
    shape = given.batch, given.dim, given.classes, torch.bfloat16, "cuda"
    found = sharded_plan(
        *shape, world_size=given.ranks, sample_rate=given.sample_rate, optimizer=given.optimizer
    )
    print(found)
    for name in ("parameter", "gradient", "optimizer", "gathered", "total", "received"):
        print(f"{name:>10} {getattr(found, f'{name}_bytes') / 2**20:12,.1f} MiB")
