"""Measures the kernels against plain PyTorch and its rivals: time, memory, error, distance to the floor.

    python benchmarks/bench_kernels.py                about three minutes on two cores
    python benchmarks/bench_kernels.py --quick        seconds, on toy sizes: does it work at all?
    python benchmarks/bench_kernels.py --full         more shapes, margins and dtypes
    python benchmarks/bench_kernels.py --host         where the host's time of a step goes

It runs on the GPU if there is one. Every provider gets raw features and raw weights and has to give the
gradients of both, so normalisation counts for all. Results are compared with float64 before anything is
timed; if ours are wrong, the run ends there with exit status 1. Each row is on the screen and in
kernels.jsonl as soon as it is known; at the end come kernels.md and kernels.png.

Every competitor runs in a process of its own (`processes.py`), they take turns, and each has --budget
seconds for a case, and all together --compile-limit seconds for compiling. Who needs more is stopped and
reported as over budget. The peers are installed by

    pip install liger-kernel==0.8.5 cut-cross-entropy==25.1.1 quack-kernels==0.6.5

On Linux eager PyTorch pays for fresh memory pages at each call, because malloc hands large blocks back.
That is what users see. `--amortise-page-faults` keeps the pages, which shows the arithmetic alone.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import signal
import sys
import tempfile
from pathlib import Path

import cases as case_list
import host
import machine
import report
import torch
from competitors import EAGER, OURS
from contest import CompileBudget, Contest, WrongKernel

import normface_ext as nf

KEEP_PAGES = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="toy sizes, nothing compiled; for tests")
    size.add_argument("--full", action="store_true", help="more shapes, margins and dtypes")
    size.add_argument("--host", action="store_true", help="what a step costs the host, instead of times")
    parser.add_argument("--forward-only", action="store_true", help="as in validation: no gradients")
    parser.add_argument("--cases", metavar="REGEX", help="only cases whose name matches")
    parser.add_argument(
        "--threads", type=int, help="CPU threads (default: torch's; with --quick and --host 1)"
    )
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="timing per case, at least 4 rounds (default: 4)"
    )
    text = "for each competitor on a case, but for compiling (default: 60)"
    parser.add_argument("--budget", type=float, metavar="SECONDS", default=60.0, help=text)
    limit = 300.0 if torch.cuda.is_available() else 90.0
    text = f"for compiling all cases, outside the times; 0: none (default: {limit:.0f})"
    parser.add_argument("--compile-limit", type=float, metavar="SECONDS", default=limit, help=text)
    parser.add_argument("--amortise-page-faults", action="store_true", help="see above")
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("bench_results"),
                        help="where the files go (default: ./bench_results)")  # fmt: skip
    options = parser.parse_args(argv)
    # Toy sizes crawl with more threads on a machine that is busy with other things.
    if options.quick or options.host:
        options.threads = options.threads or 1
    return options


def stop(signum: int, frame: object) -> None:
    """So that a run that is told to end closes its processes and writes what it knows."""
    raise SystemExit(128 + signum)


def main() -> int:
    options = arguments()
    if options.amortise_page_faults and any(os.environ.get(k) != v for k, v in KEEP_PAGES.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_PAGES})
    if options.threads:
        torch.set_num_threads(options.threads)
    signal.signal(signal.SIGTERM, stop)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    common = machine.about(device)
    name, threads = common["device"], common["threads"]
    kind = "GPU" if device == "cuda" else "CPU (no GPU found)"
    print(f"running on the {kind}: {name}; machine {platform.node()}")
    print(f"CPU {machine.cpu_model()}, {threads} threads; torch {torch.__version__}")
    if (load := machine.load()) > 0.5:
        print(f"WARNING: others are using this machine (load {load:.1f}); close them for times worth quoting")
    print("normface_ext: " + ", ".join(f"{key}={value}" for key, value in nf.build_info().items() if value))
    options.out.mkdir(parents=True, exist_ok=True)
    if options.host:
        print("written: " + str(host.run(device, common, options.out)))
        return 0

    cases = case_list.choose(device, options.quick, options.full)
    chosen = [case for case in cases if re.search(options.cases or "", case.name)]
    if not chosen:
        print(f"no case matches {options.cases!r}", file=sys.stderr)
        return 2
    compiling = CompileBudget(options.compile_limit)
    record = report.Record(options.out / "kernels.jsonl", common)
    for index, case in enumerate(chosen):
        print(f"\n[{index + 1}/{len(chosen)}] {case.name}\n{report.heading()}", flush=True)
        try:
            with tempfile.TemporaryDirectory() as folder:
                Contest(case, device, options, compiling, record).run(Path(folder))
        except WrongKernel as wrong:
            print(f"WRONG RESULT, not timed: {wrong}", file=sys.stderr)
            return 1

    heads = [row for row in record.rows if row.case.startswith("head ")]
    print("\nThe classification head with its loss, gradients to raw features and raw weights:")
    print("\n".join(report.headline(heads, OURS, EAGER)[:2]))
    print("\ntime/eager: median over rounds of the ratio within a round. err: relative, against float64.")
    print("% of floor: bare matrix products (a bare copy) of the same shape, over the time measured.")
    files = [record.path, options.out / "kernels.md"]
    files[1].write_text(report.summary(record.rows))
    try:
        title = f"{name}, {threads} threads, torch {torch.__version__}, {record.rows[0].mode}"
        report.plot(record.rows, options.out / "kernels.png", title)
        files.append(options.out / "kernels.png")
    except ImportError:
        print("no figure: matplotlib is not installed")
    print("written: " + ", ".join(map(str, files)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
