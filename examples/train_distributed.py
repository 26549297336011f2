"""A head whose classes are spread over processes, trained with a data-parallel backbone.

    torchrun --nproc-per-node 2 examples/train_distributed.py
    torchrun --nproc-per-node 2 --max-restarts 3 examples/train_distributed.py --checkpoints run1

Every process trains its part of each batch and keeps its share of the identities. On CPUs the processes
talk through gloo, on GPUs (one per process) through NCCL. With --checkpoints the run goes on from the newest
checkpoint found there, on any number of processes; `torchrun --max-restarts` starts it again by itself when
a process dies (set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, or gloo may look for the dead one). Without torchrun
it is one process.

The data are made up so that the number of identities can be anything: each identity is a point on a
sphere, its images are noisy projections of that point. What is learned is measured on unseen images of
unseen identities: do two images show the same one?
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import normface_ext as nf
from normface_ext import distributed as nfd

POINT, PIXELS, FEATURES = 16, 256, 64
UNSEEN = 1000


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--identities", type=int, default=5000)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=256, help="rows of all processes together")
    parser.add_argument("--accumulate", type=int, default=1, help="backward passes per step")
    parser.add_argument("--sample-rate", type=float, default=1.0,
                        help="share of the negative classes in a step (Partial FC); 1 is all")  # fmt: skip
    parser.add_argument("--amp", choices=["off", "bf16", "fp16"], default="off")
    parser.add_argument("--clip", type=float, default=5.0, help="largest gradient norm")
    parser.add_argument("--checkpoints", type=Path, metavar="DIR")
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--timeout", type=int, default=600,
                        help="seconds until a silent process counts as dead")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("train_distributed"))
    return parser.parse_args(arguments)


class World:
    """Identities, and images of them: every draw follows from seeds alone, on every process the same."""

    def __init__(self, identities: int, seed: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.points = nn.functional.normalize(torch.randn(identities + UNSEEN, POINT, generator=generator))
        self.projection = torch.randn(POINT, PIXELS, generator=generator)
        self.identities, self.device = identities, device

    def images(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        points = self.points[labels] + 0.1 * torch.randn(labels.shape[0], POINT, generator=generator)
        return (points @ self.projection).tanh().to(self.device)

    def batch(self, size: int, step: int, seed: int, part: slice) -> tuple[Tensor, Tensor]:
        """A part of the training batch of a step."""
        generator = torch.Generator().manual_seed((seed << 32) + step)
        labels = torch.randint(self.identities, (size,), generator=generator)
        return self.images(labels, generator)[part], labels[part].to(self.device)

    def pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Two images per pair of unseen identities, and whether they are the same."""
        generator = torch.Generator().manual_seed(1)
        first = torch.randint(UNSEEN, (4000,), generator=generator) + self.identities
        second = torch.randint(UNSEEN, (4000,), generator=generator) + self.identities
        second[::2] = first[::2]
        return self.images(first, generator), self.images(second, generator), first == second


class Net(nn.Module):
    """Backbone and head under one roof, so that every parameter has a name in a checkpoint."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head


def start_process_group(device: str, timeout: int) -> torch.device:
    """torchrun's environment, or a group of one process."""
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    chosen = torch.device(device)
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(chosen)
    else:
        # Processes on one machine would otherwise all use all of its cores.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["WORLD_SIZE"])))
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout))
    return chosen


def verification_auc(backbone: nn.Module, world: World) -> float:
    first, second, same = world.pairs()
    with torch.no_grad():
        similarity = nn.functional.cosine_similarity(backbone(first), backbone(second))
    return float(roc_auc_score(same.numpy(), similarity.cpu().numpy()))


def train(options: argparse.Namespace, on_step: Callable[[int], None] = lambda step: None) -> list[float]:
    """Trains in an initialised process group; returns the losses of the steps this run made."""
    device = torch.device(options.device)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(options.seed)
    world = World(options.identities, options.seed, device)
    backbone = nn.Sequential(
        nn.Linear(PIXELS, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, FEATURES)
    ).to(device)
    # On the meta device no process ever holds all the classes.
    head = nf.NormFaceLoss(
        FEATURES,
        options.identities,
        margin=nf.CosFace(0.2),
        scale=32.0,
        check_finite=options.amp != "fp16",  # there an overflow is the scaler's to skip
        device="meta",
    )
    mesh = init_device_mesh(device.type, (ranks,))
    sharded = nfd.shard_head(head, mesh, sample_rate=options.sample_rate, seed=options.seed)
    net = Net(backbone, sharded)
    parallel = DistributedDataParallel(backbone)
    # A sampled head's gradient is sparse; one optimizer per kind of parameter, as GradScaler needs it.
    optimizers = [
        torch.optim.AdamW(backbone.parameters(), lr=1e-3),
        nfd.RowAdamW(sharded.parameters(), lr=1e-2, weight_decay=0.0),
    ]
    scaler = ShardedGradScaler(device.type, init_scale=2.0**12, enabled=options.amp == "fp16")
    extra = scaler.state_dict()
    done = None
    if options.checkpoints:
        done = nfd.load_checkpoint(options.checkpoints, net, optimizers, extra=extra)
        scaler.load_state_dict(extra)
    if rank == 0:
        print(f"{ranks} process(es), {sharded}")
        print("from the beginning" if done is None else f"from the checkpoint of step {done}")

    share = -(-options.batch // ranks)
    mine = slice(rank * share, min((rank + 1) * share, options.batch))
    precision = torch.bfloat16 if options.amp == "bf16" else torch.float16
    losses = []
    steps = tqdm(range(done or 0, options.steps), disable=rank != 0, unit="step")
    for step in steps:
        on_step(step)
        total = 0.0
        for part in range(options.accumulate):
            images, labels = world.batch(options.batch, step * options.accumulate + part, options.seed, mine)
            last = part == options.accumulate - 1
            with nullcontext() if last else parallel.no_sync():
                with torch.autocast(device.type, precision, enabled=options.amp != "off"):
                    loss = sharded(parallel(images), labels) / options.accumulate
                scaler.scale(loss).backward()
            total += float(loss.detach())
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        nfd.clip_grad_norm_(net.parameters(), options.clip)
        for optimizer in optimizers:
            scaler.step(optimizer)
            optimizer.zero_grad()
        scaler.update()
        losses.append(total)
        steps.set_postfix(loss=f"{total:.3f}", refresh=False)
        if options.checkpoints and (step + 1) % options.save_every == 0:
            nfd.save_checkpoint(options.checkpoints, step + 1, net, optimizers, extra=scaler.state_dict())

    if rank == 0:
        print(f"loss {losses[-1]:.3f}" if losses else "nothing left to do", end="; ")
        print(f"verification AUC on {UNSEEN} unseen identities: {verification_auc(backbone, world):.4f}")
        options.out.mkdir(parents=True, exist_ok=True)
        with open(options.out / "loss.csv", "w", newline="") as file:
            csv.writer(file).writerows([["step", "loss"], *enumerate(losses, start=done or 0)])
    return losses


def main(arguments: Sequence[str] | None = None, on_step: Callable[[int], None] = lambda step: None) -> None:
    options = parse(arguments)
    options.device = start_process_group(options.device, options.timeout)
    try:
        train(options, on_step)
    finally:
        dist.destroy_process_group()


def leave() -> NoReturn:
    """Ends the process without ending the interpreter.

    gloo's threads may outlive `destroy_process_group` and let go of a last tensor while the interpreter
    ends, which aborts the process now and then (pytorch/pytorch#179291) and makes torchrun report a failure.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
    leave()
