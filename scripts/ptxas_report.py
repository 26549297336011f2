#!/usr/bin/env python3
"""Compiles csrc/cuda for each architecture and holds what ptxas reports against tests/cuda_budget.json.

    scripts/ptxas_report.py                       # the budget's architectures: table, then complaints
    scripts/ptxas_report.py --arch sm_90 --csv out.csv

No kernel may spill or keep a stack frame, unless the budget's "local_memory" names it, says how many bytes
are fine and why. Registers have no numbers there: how many blocks share a multiprocessor is in a kernel's
launch bounds (NF_KERNEL_RESIDENT), to which the compiler keeps; what then finds no register is a spill. A
kernel is named with its template arguments, or without them for all of its instances. Needs no GPU.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BUDGET = ROOT / "tests" / "cuda_budget.json"


@dataclass
class Kernel:
    arch: str
    file: str
    name: str
    registers: int
    shared: int  # static, bytes
    stack: int  # bytes of local frame
    spill: int  # bytes stored and loaded


def short_name(demangled: str) -> str:
    """`void nf::(anonymous namespace)::f<float>(float*)` is `nf::f<float>`."""
    name = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w+::", "", demangled).removeprefix("void ")
    if not name.endswith(")"):
        return name
    depth = 0
    for position in range(len(name) - 1, -1, -1):
        depth += {")": 1, "(": -1}.get(name[position], 0)
        if depth == 0:
            return name[:position]
    return name


def parse(report: str, arch: str, file: str) -> list[Kernel]:
    """Reads the output of `nvcc -Xptxas -v`, demangled or not."""
    kernels = []
    for entry in re.split(r"Compiling entry function '", report)[1:]:
        name = entry.split("' for '", 1)[0]
        frame = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry
        )
        used = re.search(r"Used (\d+) registers", entry)
        shared = re.search(r"(\d+) bytes smem", entry)
        if frame is None or used is None:
            raise ValueError(f"ptxas_report: expected stack frame and registers of {name}, got:\n{entry}")
        stack, stores, loads = map(int, frame.groups())
        bytes_shared = int(shared[1]) if shared else 0
        kernels.append(
            Kernel(arch, file, short_name(name), int(used[1]), bytes_shared, stack, stores + loads)
        )
    return kernels


def target_of(build: dict[str, Any], source: Path, arch: str) -> str | None:
    """What a source is compiled for where `arch` is wanted; None if its kernels are for another."""
    prefix, only = build["SM90A"]
    if not source.name.startswith(prefix):
        return arch
    return "sm_90a" if arch.removeprefix("sm_").rstrip("a") == only.replace(".", "").rstrip("a") else None


def compile_for(arch: str, source: Path, command: list[str]) -> list[Kernel]:
    with tempfile.TemporaryDirectory() as folder:
        full = [
            *command,
            f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}",
            "-cubin",
            "-Xptxas=-v",
            "-o",
            f"{folder}/out.cubin",
            str(source),
        ]
        done = subprocess.run(full, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            f"ptxas_report: {source.name} does not compile for {arch}:\n{done.stdout}{done.stderr}"
        )
    plain = subprocess.run(["c++filt"], input=done.stderr, capture_output=True, text=True, check=True)
    return parse(plain.stdout, arch, source.name)


def allowed(name: str, limits: dict[str, Any]) -> dict[str, Any]:
    """What the budget says of a kernel: of this instance, else of all of them."""
    found: dict[str, Any] = limits.get(name, limits.get(name.partition("<")[0], {}))
    return found


def complaints(kernels: list[Kernel], budget: dict[str, Any]) -> list[str]:
    """One sentence for each kernel that costs more than it may, and for each name no kernel has any more."""
    said = []
    for kernel in kernels:
        most = {"stack": 0, "spill": 0} | allowed(kernel.name, budget["local_memory"])
        for cost in ("stack", "spill"):
            used = getattr(kernel, cost)
            if used > most[cost]:
                where = f"{kernel.arch} {kernel.file} {kernel.name}"
                said.append(f"{where}: {cost} expected at most {most[cost]}, got {used}")
    names = {kernel.name for kernel in kernels} | {kernel.name.partition("<")[0] for kernel in kernels}
    gone = [name for name in budget["local_memory"] if name not in names]
    return said + [f"{name}: in the budget, but no such kernel" for name in gone]


def print_table(kernels: list[Kernel]) -> None:
    print(f"{'arch':8}{'registers':>10}{'shared':>8}{'stack':>7}{'spill':>7}  kernel")
    for kernel in kernels:
        numbers = f"{kernel.registers:10}{kernel.shared:8}{kernel.stack:7}{kernel.spill:7}"
        print(f"{kernel.arch:8}{numbers}  {kernel.file}: {kernel.name}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--arch", nargs="+", help="such as sm_90; default: the budget's")
    parser.add_argument("--csv", type=Path, help="also write the table there")
    parser.add_argument("--jobs", type=int, default=1, help="compilers at a time")
    options = parser.parse_args(arguments)

    build = runpy.run_path(str(ROOT / "setup.py"))  # the flags of the real build
    nvcc = build["find_nvcc"]()
    if nvcc is None or shutil.which("c++filt") is None:
        raise SystemExit("ptxas_report: nvcc or c++filt not found (or NORMFACE_CUDA=0)")
    folders = [str(ROOT / "csrc"), str(ROOT / "csrc" / "cuda")]
    headers = [build["package_dir"]("torch") / "include"]
    command = [nvcc, *build["NVCC_FLAGS"], *build["include_flags"](folders, headers)]

    budget: dict[str, Any] = json.loads(BUDGET.read_text())
    archs = options.arch or budget["architectures"]
    sources = sorted((ROOT / "csrc" / "cuda").glob("*/*.cu"))
    work = [
        (target, source) for arch in archs for source in sources if (target := target_of(build, source, arch))
    ]
    if not work:
        raise SystemExit("ptxas_report: no .cu file in csrc/cuda")
    with ThreadPoolExecutor(options.jobs) as pool:
        compiled = pool.map(lambda pair: compile_for(*pair, command), work)
        kernels = [kernel for group in compiled for kernel in group]
    print_table(kernels)
    if options.csv and kernels:
        with options.csv.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, asdict(kernels[0]))
            writer.writeheader()
            writer.writerows(map(asdict, kernels))
    said = complaints(kernels, budget)
    print("\n".join(said) or f"{len(kernels)} kernels within the budget")
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
