"""Backbone and head as one module under DistributedDataParallel or FSDP2's fully_shard.

    torchrun --nproc-per-node 2 examples/data_parallel.py           # DistributedDataParallel
    torchrun --nproc-per-node 2 examples/data_parallel.py --fsdp    # fully_shard

Every rank has the whole head, or a share of its parameters that FSDP2 gathers for each pass: for classes that
fit on one device. Past that `train_distributed.py` spreads the classes. The data are drawn: what a step does
is the point. Any number of processes gives the run of one, as the ranks' batches are equally large.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from train_distributed import leave

import normface_ext as nf

IDENTITIES, PIXELS, WIDTH, BATCH = 50, 64, 32, 24  # BATCH: rows of all ranks together


# --8<-- [start:wrap]
class Recogniser(nn.Module):
    """(images, labels) -> loss: what DDP and FSDP2 wrap has to have the whole forward pass inside."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(PIXELS, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        self.head = nf.NormFaceLoss(WIDTH, IDENTITIES, scale=16.0, learn_scale=True, margin=nf.ArcFace(0.2))

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.head(self.backbone(images), labels)


def wrapped(fsdp: bool, device: torch.device) -> nn.Module:
    torch.manual_seed(0)  # the same start on all ranks
    model = Recogniser().to(device)
    if not fsdp:
        return DistributedDataParallel(model)
    for part in (model.backbone, model.head, model):
        fully_shard(part)
    return model


# --8<-- [end:wrap]


def train(fsdp: bool, steps: int) -> dict[str, Tensor]:
    """The state_dict after so many steps, whole on rank 0."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if gpu else torch.device("cpu")
    model = wrapped(fsdp, device)
    optimizer = torch.optim.SGD(nf.parameter_groups(model, weight_decay=5e-4), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    faces = torch.randn(IDENTITIES, PIXELS, generator=generator)
    for step in range(steps):
        labels = torch.randint(IDENTITIES, (BATCH,), generator=generator)
        images = faces[labels] + 0.3 * torch.randn(BATCH, PIXELS, generator=generator)
        mine = slice(rank, None, ranks)
        loss = model(images[mine].to(device), labels[mine].to(device))
        loss.backward()  # both average the gradients over the ranks
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        if rank == 0 and step % 10 == 0:
            print(f"step {step}: loss {mean.item() / ranks:.4f}")
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=whole)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fsdp", action="store_true", help="fully_shard in the place of DDP")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", default=None, help="where rank 0 saves the state_dict, if anywhere")
    options = parser.parse_args(arguments)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        state = train(options.fsdp, options.steps)
        if options.out and dist.get_rank() == 0:
            torch.save(state, options.out)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
    leave()
