"""Measures the whole step, head and optimizer: ours and eager PyTorch with torch.optim, and ours with the
step of the weight inside backward (normface_ext.optim).

    python benchmarks/bench_step.py                 three sizes, SGD with momentum and AdamW
    python benchmarks/bench_step.py --case 64x512x200000 --optimizer sgd
    python benchmarks/bench_step.py --quick         seconds, on toy sizes: does it work at all?

Everybody is in a process of their own, and takes turns with the others. Before that the weights after three
steps are compared with those of float64; ours may err as much as eager PyTorch's, or the run ends with exit
status 1. steps.jsonl has a row per line, steps.md the tables.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import cases
import machine
import measure
import steps
import torch
from processes import Dropped, Worker
from truth import FACTOR, HAIR

CPU_CASES = [cases.head(256, 512, cases.CASIA), cases.head(256, 128, 100_000), cases.head(64, 512, 100_000)]
CUDA_CASES = [
    cases.head(256, 512, cases.CASIA, "mixed-bfloat16"),
    cases.head(256, 512, cases.MS1MV2, "mixed-bfloat16"),
    cases.head(1024, 512, cases.MILLION_128, "mixed-bfloat16"),
]
LEAST = 4  # rounds
COLUMNS = "| step | median ms | p20 | p80 | time / eager + foreach | peak MiB | err weight |"


def named(text: str) -> cases.Case:
    batch, dim, classes = map(int, text.split("x"))
    return cases.head(batch, dim, classes)


def measured(
    case: cases.Case, optimizer: str, device: str, options: argparse.Namespace
) -> list[dict[str, object]]:
    """A row for each; ValueError for a wrong one of ours."""
    with tempfile.TemporaryDirectory() as folder:
        right = Path(folder) / "right.pt"
        weight, moved = steps.right_weight(case, optimizer, device)
        torch.save({"weight": weight.cpu(), "moved": moved}, right)
        del weight
        rows: dict[str, dict[str, object]] = {}
        workers: dict[str, Worker] = {}
        try:
            for name in steps.STEPPERS:
                worker = Worker(
                    name,
                    case,
                    optimizer,
                    device,
                    torch.get_num_threads(),
                    options.budget,
                    steps.MeasuredStep,
                )
                workers[name] = worker
                row = {"case": case.name, "optimizer": optimizer, "step": name, "outcome": "measured"}
                rows[name] = row
                try:
                    row["err_weight"] = worker.ask("errors", right)["weight"]  # type: ignore[index]
                    row["peak_mib"] = worker.ask("first")
                except Dropped as dropped:
                    row["outcome"] = f"{dropped.outcome}: {dropped}"
                    workers.pop(name).close()
            judge(rows, case)
            times = rounds(workers, options)
        finally:
            for worker in workers.values():
                worker.close()
    for name, each in times.items():
        p20, median, p80 = measure.quantiles(each)
        rows[name] |= {"median_ms": median, "p20_ms": p20, "p80_ms": p80, "rounds": len(each)}
        if steps.BASELINE in times:
            ratios = [a / b for a, b in zip(each, times[steps.BASELINE], strict=True)]
            rows[name]["ratio"] = measure.quantiles(ratios)[1]
    return list(rows.values())


def judge(rows: dict[str, dict[str, object]], case: cases.Case) -> None:
    eager = rows[steps.BASELINE].get("err_weight", 0.0)
    allowed = FACTOR * float(eager) + HAIR * torch.finfo(case.precision.operand).eps  # type: ignore[arg-type]
    for name, row in rows.items():
        if steps.STEPPERS[name].ours and not float(row.get("err_weight", float("inf"))) <= allowed:  # type: ignore[arg-type]
            error = row.get("err_weight", row["outcome"])
            raise ValueError(f"{case.name}, {name}: error {error}, allowed {allowed:.1e}")


def rounds(workers: dict[str, Worker], options: argparse.Namespace) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in workers}
    start, count = time.monotonic(), 0
    while count < LEAST or (time.monotonic() - start < options.seconds and not options.quick):
        for name in workers if count % 2 == 0 else reversed(workers):
            times[name].append(workers[name].ask("turn"))  # type: ignore[arg-type]
        count += 1
    return times


def table(rows: list[dict[str, object]], common: dict[str, object]) -> str:
    lines = [f"{common['device']}, {common['threads']} thread(s), torch {common['torch']}"]
    for key in dict.fromkeys((row["case"], row["optimizer"]) for row in rows):
        group = [row for row in rows if (row["case"], row["optimizer"]) == key]
        lines += ["", f"**{key[0]}**, {key[1]}, {group[0].get('rounds', 0)} interleaved rounds", ""]
        lines += [COLUMNS, "|--|--:|--:|--:|--:|--:|--:|"]
        for row in group:
            if row["outcome"] != "measured":
                lines.append(f"| {row['step']} | {row['outcome']} | | | | | |")
                continue
            ms = " | ".join(f"{row[name]:.1f}" for name in ("median_ms", "p20_ms", "p80_ms"))
            peak = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
            ratio = f"{row['ratio']:.2f}" if "ratio" in row else "-"
            lines.append(f"| {row['step']} | {ms} | {ratio} | {peak} | {row['err_weight']:.0e} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="toy sizes; for tests")
    parser.add_argument("--case", type=named, action="append", help="NxDxC, float32; may be given again")
    parser.add_argument("--optimizer", choices=steps.OPTIMIZERS, action="append")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of rounds per case (default: 10)")
    parser.add_argument("--budget", type=float, default=120.0, help="seconds for each of them (default: 120)")
    parser.add_argument("--append", action="store_true", help="to the rows of an earlier run")
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("bench_results"))
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = options.case or (CUDA_CASES if device == "cuda" else CPU_CASES)
    if options.quick:
        chosen = [cases.head(16, 8, 40)]
    common = {**machine.about(device), "load": round(machine.load(), 1)}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "steps.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if options.append else []
    for case in chosen:
        for optimizer in options.optimizer or steps.OPTIMIZERS:
            try:
                found = measured(case, optimizer, device, options)
            except ValueError as wrong:
                print(f"WRONG RESULT, not timed: {wrong}", file=sys.stderr)
                return 1
            for row in found:
                shortened = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}
                rows.append({**shortened, **common})
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            path.with_suffix(".md").write_text(table(rows, rows[0]))
    print(table(rows, rows[0]))
    print(f"written: {path}, {path.with_suffix('.md')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
