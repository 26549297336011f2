"""The class-parallel head: what examples/plan_sharded.py says of it, beside what a step really takes.

    torchrun --nproc-per-node 2 benchmarks/bench_sharded.py               measured here, CPU or GPU
    python benchmarks/bench_sharded.py --calculator                       what fits where, by the plan

Measured, on every rank: the most memory a step holds beyond weight and optimizer state, against the
plan's; and the time of a step against that of a head of one process with this rank's classes and all
ranks' rows, which without sampling is the same arithmetic without communication. Times are medians over
rounds in which both take turns. Before that, loss and gradients are compared with float64 over all classes;
with sampling the loss is another one by intent, and is compared without. Each case is on the screen, and in
a JSON lines file beside --out, as soon as it is known; a rank that hangs ends the run after --limit seconds.

The calculator's times are floors: the products at --tflops, the weight, its gradient and E through memory
at --memory-gbs, the collectives at --link-gbs, as if all overlapped. They are predictions, not
measurements.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import machine
import torch
import torch.distributed as dist
import truth
from cases import Inputs, head
from torch.distributed.device_mesh import init_device_mesh

import normface_ext as nf
from normface_ext import testing

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from plan_sharded import sharded_plan
from train_distributed import leave, start_process_group

GIB, MIB = 2**30, 2**20
#: N per rank, D, C, sample rate
CASES = [(128, 128, 20_000, 1.0), (128, 512, 20_000, 1.0), (64, 128, 200_000, 1.0), (64, 128, 200_000, 0.1)]

TOYS = [(8, 16, 201, 1.0), (8, 16, 201, 0.5)]
RIGHT = 1e-5  # relative error in float32
COLUMNS = ["N per rank x D, C", "sample rate", "peak MiB", "planned MiB", "MiB received",
           "step, ms", "one process, ms", "ratio"]  # fmt: skip


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["--"] + ["--:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def calculator(options: argparse.Namespace) -> str:
    rows = []
    for classes in (1_000_000, 10_000_000, 100_000_000):
        for world in (1, 8, 64):
            for rate in (1.0, 0.1):
                plan = sharded_plan(
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
                    *("yes" if plan.total_bytes <= size * GIB else "no" for size in (80, 141)),
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


def every_rank(local: torch.Tensor) -> torch.Tensor:
    """The ranks' rows one after another."""
    pieces = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(pieces, local)
    return torch.cat(pieces)


def check(sharded: torch.nn.Module, x: torch.Tensor, labels: torch.Tensor) -> None:
    """Loss, dX and this rank's dW against float64; whoever finds a fault ends the run."""
    rank, world, shard = dist.get_rank(), dist.get_world_size(), sharded.shard
    inputs = Inputs(every_rank(x), sharded.weight.detach().full_tensor(), every_rank(labels), None)
    case = head(len(inputs.x), x.shape[1], shard.num_classes)
    right = truth.truth(case, inputs, float(sharded.scale))
    mine = x.detach().requires_grad_()
    sharded.zero_grad()
    loss = sharded(mine, labels)
    loss.backward()
    rows, classes = slice(rank * len(x), (rank + 1) * len(x)), slice(shard.first, shard.first + shard.count)
    for name, value, wanted in (
        ("loss", loss, right["loss"]),
        ("dX", mine.grad / world, right["dx"][rows]),  # times world: DistributedDataParallel averages
        ("dW", sharded.weight.grad.to_local(), right["dw"][classes]),
    ):
        error, _ = truth.relative_errors(value, wanted)
        if not error <= RIGHT:
            raise SystemExit(f"WRONG RESULT, not timed: rank {rank}, {name}: error {error:.1e}")
    sharded.zero_grad()


def over(start: float, seconds: float, device: torch.device) -> bool:
    """Whether the slowest rank's time is up: all ranks must end with the same round."""
    passed = torch.tensor(time.monotonic() - start, device=device)
    dist.all_reduce(passed, op=dist.ReduceOp.MAX)
    return float(passed) > seconds


def measure_case(
    case: tuple[int, int, int, float], options: argparse.Namespace, device: torch.device
) -> dict[str, object]:
    batch, dim, classes, rate = case
    world = dist.get_world_size()
    mesh = init_device_mesh(device.type, (world,))

    def shard(sample_rate: float) -> torch.nn.Module:
        return nf.distributed.shard_head(
            nf.NormFaceLoss(dim, classes, device="meta"), mesh, sample_rate=sample_rate, equal_batches=True
        )

    sharded = shard(rate)
    alone = nf.NormFaceLoss(dim, sharded.shard.count).to(device)
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(batch, dim, generator=generator).to(device)
    labels = torch.randint(classes, (batch,), generator=generator).to(device)
    check(sharded if rate == 1 else shard(1.0), x, labels)
    every, local_labels = x.repeat(world, 1), (labels % sharded.shard.count).repeat(world)

    ours = functools.partial(step, sharded, x, labels)
    bare = functools.partial(step, alone, every, local_labels)
    ours(), bare()
    sharded.zero_grad()
    peak = peak_extra(ours, device)
    plan = sharded_plan(batch, dim, classes, torch.float32, device, world_size=world, sample_rate=rate)
    planned = plan.total_bytes - plan.parameter_bytes - plan.optimizer_bytes
    times: list[tuple[float, float]] = []
    start = time.monotonic()
    while len(times) < options.rounds and not (len(times) >= 4 and over(start, options.seconds, device)):
        times.append((timed(ours, device), timed(bare, device)))
    ours_ms, bare_ms = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
    return {
        "batch": batch, "D": dim, "C": classes, "sample_rate": rate, "world": world, "rounds": len(times),
        "peak_mib": peak / MIB, "planned_mib": planned / MIB, "received_mib": plan.received_bytes / MIB,
        "step_ms": ours_ms, "one_process_ms": bare_ms,
    }  # fmt: skip


def cells(row: dict[str, object]) -> list[str]:
    return [
        f"{row['batch']} x {row['D']}, {row['C']:,}", f"{row['sample_rate']:g}", f"{row['peak_mib']:.1f}",
        f"{row['planned_mib']:.1f}", f"{row['received_mib']:.2f}", f"{row['step_ms']:.1f}",
        f"{row['one_process_ms']:.1f}", f"{row['step_ms'] / row['one_process_ms']:.2f}",
    ]  # fmt: skip


def measure(options: argparse.Namespace, device: torch.device) -> str:
    """Rank 0 says and writes each case at once."""
    first, rows = dist.get_rank() == 0, []
    about = machine.about(device.type)
    title = f"{dist.get_world_size()} ranks, {device.type}, rank 0:\n\n"
    if first:
        print(title + table(COLUMNS, []), flush=True)
        if options.out:
            options.out.with_suffix(".jsonl").write_text("")
    for case in TOYS if options.quick else CASES:
        row = measure_case(case, options, device)
        rows.append(cells(row))
        if first:
            print("| " + " | ".join(rows[-1]) + " |", flush=True)
            if options.out:
                with options.out.with_suffix(".jsonl").open("a") as file:
                    file.write(json.dumps(row | about) + "\n")
    return title + table(COLUMNS, rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calculator", action="store_true")
    parser.add_argument("--quick", action="store_true", help="toy sizes: does it work at all?")
    parser.add_argument("--batch", type=int, default=128, help="rows per GPU")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--optimizer", choices=["none", "sgd", "momentum", "adamw"], default="momentum")
    parser.add_argument("--tflops", type=float, default=700, help="bf16 products, of one GPU")
    parser.add_argument("--memory-gbs", type=float, default=4000)
    parser.add_argument("--link-gbs", type=float, default=100)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=30, help="timing per case, at least 4 rounds")
    parser.add_argument("--limit", type=int, default=120, help="seconds to wait for another rank")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="also write the table there, as Markdown")
    options = parser.parse_args()
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.calculator:
        text, first = calculator(options), True
        print(text)
    else:
        device = start_process_group(options.device, options.limit)
        text, first = measure(options, device), dist.get_rank() == 0
        dist.destroy_process_group()
    if first and options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
    leave()
