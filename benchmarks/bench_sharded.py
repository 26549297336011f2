"""The class-parallel head: what nf.plan says of it, beside what a step really takes.

    torchrun --nproc-per-node 2 benchmarks/bench_sharded.py               measured here, CPU or GPU
    python benchmarks/bench_sharded.py --calculator                       what fits where, by the plan

Measured, on every rank: the most memory a step holds beyond weight and optimizer state, against the
plan's; and the time of a step against that of a head of one process with this rank's classes and all
ranks' rows, which without sampling is the same arithmetic without communication. Times are medians over
rounds in which both take turns.

The calculator's times are floors: the products at --tflops, the weight, its gradient and E through memory
at --memory-gbs, the collectives at --link-gbs, as if all overlapped. They are predictions, not
measurements.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import normface_ext as nf
from normface_ext import testing

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from train_distributed import start_process_group

GIB, MIB = 2**30, 2**20
#: N per rank, D, C, sample rate
CASES = [(128, 128, 20_000, 1.0), (128, 512, 20_000, 1.0), (64, 128, 200_000, 1.0), (64, 128, 200_000, 0.1)]


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["--"] + ["--:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def calculator(options: argparse.Namespace) -> str:
    rows = []
    for classes in (1_000_000, 10_000_000, 100_000_000):
        for world in (1, 8, 64):
            for rate in (1.0, 0.1):
                plan = nf.plan(
                    options.batch, options.dim, classes, torch.bfloat16, "cuda",
                    world_size=world, sample_rate=rate, optimizer=options.optimizer,
                )  # fmt: skip
                seconds = {
                    "products": plan.local.flops / (options.tflops * 1e12),
                    "memory": (plan.local.bytes_moved + 2 * plan.optimizer_bytes * rate)
                    / (options.memory_gbs * 1e9),
                    "links": plan.received_bytes / (options.link_gbs * 1e9),
                }
                slowest = max(seconds, key=lambda name: seconds[name])
                rows.append([
                    f"{classes:,}", str(world), f"{rate:g}", f"{plan.total_bytes / GIB:,.1f}",
                    "yes" if plan.fits(80 * GIB) else "no", "yes" if plan.fits(141 * GIB) else "no",
                    f"{plan.received_bytes / MIB:,.1f}", f"{1e3 * seconds[slowest]:,.1f} ({slowest})",
                ])  # fmt: skip
    header = ["classes", "GPUs", "sample rate", "GiB per GPU", "fits 80 GiB", "fits 141 GiB",
              "MiB received per step", "floor, ms"]  # fmt: skip
    return table(header, rows)


def peak_extra(call: Callable[[], None], device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    return testing.peak_bytes(call)


def step(head: torch.nn.Module, x: torch.Tensor, labels: torch.Tensor) -> None:
    head.zero_grad()
    head(x.detach().requires_grad_(), labels).backward()


def timed(call: Callable[[], None], device: torch.device) -> float:
    dist.barrier()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(options: argparse.Namespace, device: torch.device) -> str:
    world = dist.get_world_size()
    mesh = init_device_mesh(device.type, (world,))
    rows = []
    for batch, dim, classes, rate in CASES:
        sharded = nf.distributed.shard_head(
            nf.NormFaceLoss(dim, classes, device="meta"), mesh, sample_rate=rate, equal_batches=True
        )
        alone = nf.NormFaceLoss(dim, sharded.shard.count).to(device)
        generator = torch.Generator().manual_seed(dist.get_rank())
        x = torch.randn(batch, dim, generator=generator).to(device)
        labels = torch.randint(classes, (batch,), generator=generator).to(device)
        every, local_labels = x.repeat(world, 1), (labels % sharded.shard.count).repeat(world)

        ours = functools.partial(step, sharded, x, labels)
        bare = functools.partial(step, alone, every, local_labels)
        ours(), bare()
        sharded.zero_grad()
        peak = peak_extra(ours, device)
        plan = nf.plan(batch, dim, classes, torch.float32, device, world_size=world, sample_rate=rate)
        planned = plan.total_bytes - plan.parameter_bytes - plan.optimizer_bytes
        times = [(timed(ours, device), timed(bare, device)) for _ in range(options.rounds)]
        ours_ms, bare_ms = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
        rows.append([
            f"{batch} x {dim}, {classes:,}", f"{rate:g}", f"{peak / MIB:.1f}", f"{planned / MIB:.1f}",
            f"{plan.received_bytes / MIB:.2f}", f"{ours_ms:.1f}", f"{bare_ms:.1f}",
            f"{ours_ms / bare_ms:.2f}",
        ])  # fmt: skip
    header = ["N per rank x D, C", "sample rate", "peak MiB", "planned MiB", "MiB received",
              "step, ms", "one process, ms", "ratio"]  # fmt: skip
    return f"{world} ranks, {device.type}, rank 0:\n\n" + table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calculator", action="store_true")
    parser.add_argument("--batch", type=int, default=128, help="rows per GPU")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--optimizer", choices=["none", "sgd", "momentum", "adamw"], default="momentum")
    parser.add_argument("--tflops", type=float, default=700, help="bf16 products, of one GPU")
    parser.add_argument("--memory-gbs", type=float, default=4000)
    parser.add_argument("--link-gbs", type=float, default=100)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="also write the table there, as Markdown")
    options = parser.parse_args()
    if options.calculator:
        text, first = calculator(options), True
    else:
        device = start_process_group(options.device, 600)
        text, first = measure(options, device), dist.get_rank() == 0
        dist.destroy_process_group()
    if first:
        print(text)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
