"""Measures the kernels against plain PyTorch and its rivals: time, memory, error, distance to the floor.

    python benchmarks/bench_kernels.py                about two minutes on two cores
    python benchmarks/bench_kernels.py --quick        seconds, on toy sizes: does it work at all?
    python benchmarks/bench_kernels.py --full         more shapes, margins and dtypes

It runs on the GPU if there is one. Every provider gets raw features and raw weights and has to give the
gradients of both, so normalisation counts for all. Results are compared with float64 before anything is
timed; if ours are wrong, the run ends there with exit status 1. Files: kernels.csv, kernels.png.

On Linux eager PyTorch pays for fresh memory pages at each call, because malloc hands large blocks back.
That is what users see. `--amortise-page-faults` keeps the pages, which shows the arithmetic alone.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

import cases as case_list
import competitors
import floor
import measure
import report
import torch
import truth
from cases import SCALE, Case, make_inputs
from competitors import COMPILE, EAGER, OURS, PROVIDERS, CompileBudget, Forward, Unavailable
from report import Row

import normface_ext as nf

KEEP_PAGES = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}


class WrongKernel(Exception):
    """Ours differs from float64 by more than eager PyTorch's own error allows."""


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="toy sizes, nothing compiled; for tests")
    size.add_argument("--full", action="store_true", help="more shapes, margins and dtypes")
    parser.add_argument("--forward-only", action="store_true", help="as in validation: no gradients")
    parser.add_argument("--cases", metavar="REGEX", help="only cases whose name matches")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="timing per case, at least 4 rounds (default: 4)"
    )
    limit = 300.0 if torch.cuda.is_available() else 45.0
    text = f"for compiling all cases, outside the times; 0: none (default: {limit:.0f})"
    parser.add_argument("--compile-limit", type=float, metavar="SECONDS", default=limit, help=text)
    parser.add_argument("--amortise-page-faults", action="store_true", help="see above")
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("bench_results"),
                        help="where the files go (default: ./bench_results)")  # fmt: skip
    return parser.parse_args(argv)


def cpu_model() -> str:
    try:
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()


def commit() -> str:
    """Of the checkout this file lies in; "+" if it was changed since."""

    def git(*command: str) -> str:
        folder = Path(__file__).parent
        return subprocess.run(
            ["git", *command], cwd=folder, check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def version() -> str:
    try:
        return importlib.metadata.version("normface_ext")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def progress(items: list[Case]) -> Iterable[Case]:
    """With a bar where tqdm is installed, else a line per case; on stderr."""
    try:
        from tqdm import tqdm
    except ImportError:
        for index, case in enumerate(items):
            print(f"[{index + 1}/{len(items)}] {case.name}", file=sys.stderr, flush=True)
            yield case
        return
    with tqdm(items, unit="case", file=sys.stderr) as bar:
        for case in bar:
            bar.set_description(case.name)
            yield case


def run_case(case: Case, device: str, options: argparse.Namespace, budget: CompileBudget) -> list[Row]:
    """Builds, checks, times and weighs every provider; the rows share `floor_ms`."""
    mode = "fwd" if options.forward_only else "fwd+bwd"
    inputs = make_inputs(case, device)
    right = truth.truth(case, inputs, SCALE)
    forwards: dict[str, Forward] = {}
    rows: dict[str, Row] = {}
    for name in PROVIDERS:
        row = Row(case.name, case.batch, case.dim, case.classes, case.dtype, name, mode)
        try:
            if name == COMPILE and options.quick:
                raise Unavailable("not with --quick")
            forward = competitors.build(name, case, budget)
            # A learned scale would be another graph, and compiling it takes as long again.
            errors = truth.errors(forward, inputs, SCALE, case, right, learn_scale=name != COMPILE)
        except Exception as problem:
            if name in (OURS, EAGER):
                raise
            row.note = str(problem).splitlines()[0][:100] if str(problem) else ""
            if row.note:
                rows[name] = row
            continue
        for quantity in truth.QUANTITIES:
            setattr(row, f"err_{quantity}", errors.get(quantity))
        forwards[name], rows[name] = forward, row
        if name == OURS:
            ours = errors
        elif name == EAGER and (found := truth.complaints(ours, errors, case.precision.operand)):
            raise WrongKernel(f"{case.name}: " + "; ".join(found))
    del right

    calls = {n: lambda f=f: competitors.step(f, inputs, SCALE, case, mode) for n, f in forwards.items()}
    if device == "cpu":
        calls["floor"] = floor.cpu_call(case, inputs, mode)
    rounds = (4, 4) if options.quick else (4, 60)
    times = measure.rounds_ms(calls, inputs, options.seconds, *rounds)
    floor_ms = measure.quantiles(times["floor"])[1] if device == "cpu" else floor.cuda_ms(case, mode)
    for name, row in rows.items():
        row.floor_ms = floor_ms
        if name in forwards:
            row.p20_ms, row.median_ms, row.p80_ms = measure.quantiles(times[name])
            ratios = [a / b for a, b in zip(times[name], times[EAGER], strict=True)]
            row.ratio_to_eager = measure.quantiles(ratios)[1]
            row.percent_of_floor = 100 * floor_ms / row.median_ms
            row.peak_extra_mib = measure.peak_extra_mib(name, forwards[name], case, inputs, mode)
            row.note = "page faults amortised" if options.amortise_page_faults else ""
    return list(rows.values())


def main() -> int:
    options = arguments()
    if options.amortise_page_faults and any(os.environ.get(k) != v for k, v in KEEP_PAGES.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_PAGES})
    if options.threads:
        torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", module="torch")  # torch.compile's, about itself
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_model()
    common = {
        "device": name,
        "torch": torch.__version__,
        "version": version(),
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "timestamp": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    kind = "GPU" if device == "cuda" else "CPU (no GPU found)"
    print(f"running on the {kind}: {name}; machine {platform.node()}")
    print(f"CPU {cpu_model()}, {common['threads']} threads; torch {torch.__version__}")
    if hasattr(os, "getloadavg") and (load := os.getloadavg()[0]) > 0.5:
        print(f"WARNING: others are using this machine (load {load:.1f}); close them for times worth quoting")
    print("normface_ext: " + ", ".join(f"{key}={value}" for key, value in nf.build_info().items() if value))

    chosen = [
        c
        for c in case_list.choose(device, options.quick, options.full)
        if re.search(options.cases or "", c.name)
    ]
    if not chosen:
        print(f"no case matches {options.cases!r}", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    budget, rows = CompileBudget(options.compile_limit, options.forward_only), []
    try:
        for case in progress(chosen):
            for row in run_case(case, device, options, budget):
                rows.append(row)
                vars(row).update(common)
    except WrongKernel as wrong:
        print(f"WRONG RESULT, not timed: {wrong}", file=sys.stderr)
        return 1
    finally:  # an interrupted run keeps the cases it finished
        report.write_csv(rows, options.out / "kernels.csv")

    heads = [row for row in rows if row.case.startswith("head ")]
    print("\nThe classification head with its loss, gradients to raw features and raw weights:")
    print("\n".join(report.headline(heads, OURS, EAGER)[:2]))
    print(report.table(rows))
    print("\ntime/eager: median over rounds of the ratio within a round. err: relative, against float64.")
    print("% of floor: bare matrix products (a bare copy) of the same shape, over the time measured.")
    files = [options.out / "kernels.csv"]
    try:
        files.append(options.out / "kernels.png")
        report.plot(
            rows, files[1], f"{name}, {common['threads']} threads, torch {torch.__version__}, {rows[0].mode}"
        )
    except ImportError:
        files[1:] = []
        print("no figure: matplotlib is not installed")
    print("written: " + ", ".join(map(str, files)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
