#!/usr/bin/env python3
"""Compiles csrc/cuda for each architecture and holds what ptxas reports against tests/cuda_budget.json.

    scripts/ptxas_report.py                       # the budget's architectures: table, then complaints
    scripts/ptxas_report.py --arch sm_90 --csv out.csv

No kernel may spill or keep a stack frame, unless the budget's "local_memory" names it, says how many bytes
are fine and why. Registers have no numbers there: how many blocks share a multiprocessor is in a kernel's
launch bounds (NF_KERNEL_RESIDENT), to which the compiler keeps; what then finds no register is a spill. A
kernel is named with its template arguments, or without them for all of its instances. Needs no GPU.

Kernels that only compute capability 9.0 has (sm90_*.cu) are in the budget one by one, under "sm_90a": the
most registers a thread has at the launch, and the instructions that must stand in the machine code, which
nvdisasm reads (`pip install nvidia-cuda-nvdisasm`). Warpgroups that exchange registers (USETMAXREG) must have
exactly so many: with fewer, who asks for more would wait for ever. A remark of ptxas that products wait for
each other, or that a change of registers was left out (C75..), is a complaint.
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
from dataclasses import asdict, dataclass, replace
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
    instructions: frozenset[str] = frozenset()  # of sm_90a, those of WATCHED


#: Products of a warpgroup, bulk copies each way, waits for their bytes, registers given to another warpgroup.
WATCHED = ("HGMMA", "UTMALDG", "UTMASTG", "SYNCS", "USETMAXREG")


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


def find_nvdisasm() -> str:
    """On the PATH, or where NVIDIA's wheel puts it, which is not."""
    found = shutil.which("nvdisasm")
    places = [path for folder in sys.path for path in Path(folder).glob("nvidia/*/bin/nvdisasm")]
    if found is None and not places:
        raise SystemExit("ptxas_report: nvdisasm not found: pip install nvidia-cuda-nvdisasm")
    return found or str(places[-1])


def demangled(text: str) -> str:
    return subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout


def instructions(listing: str) -> dict[str, frozenset[str]]:
    """Of WATCHED, those of each kernel of a listing by nvdisasm, by its name as ptxas says it."""
    sections = re.split(r"^\s*\.section\s+\.text\.(\w+)\b.*$", listing, flags=re.MULTILINE)[1:]
    names = demangled("\n".join(sections[::2])).splitlines()
    return {
        short_name(name): frozenset(word for word in WATCHED if re.search(rf"\b{word}\b", body))
        for name, body in zip(names, sections[1::2], strict=True)
    }


def compile_for(arch: str, source: Path, command: list[str]) -> tuple[list[Kernel], list[str]]:
    """The kernels, and what ptxas remarked."""
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
        report = demangled(done.stderr)
        kernels = parse(report, arch, source.name)
        if arch == "sm_90a" and kernels:
            listing = subprocess.run(
                [find_nvdisasm(), "-c", f"{folder}/out.cubin"], capture_output=True, text=True, check=True
            )
            found = instructions(listing.stdout)
            kernels = [replace(kernel, instructions=found[kernel.name]) for kernel in kernels]
    remarks = [line for line in report.splitlines() if re.search(r"\(C75\d\d\)", line)]
    return kernels, [f"{arch} {source.name}: {remark}" for remark in remarks]


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
        if kernel.arch == "sm_90a":
            said += hopper_complaints(kernel, budget["sm_90a"])
    names = {kernel.name for kernel in kernels} | {kernel.name.partition("<")[0] for kernel in kernels}
    wanted = list(budget["local_memory"])
    if any(kernel.arch == "sm_90a" for kernel in kernels):
        wanted += budget["sm_90a"]
    gone = [name for name in wanted if name not in names]
    return said + [f"{name}: in the budget, but no such kernel" for name in gone]


def hopper_complaints(kernel: Kernel, limits: dict[str, Any]) -> list[str]:
    entry, where = allowed(kernel.name, limits), f"{kernel.arch} {kernel.file} {kernel.name}"
    if not entry:
        return [f"{where}: expected it in the budget's sm_90a, and it is not"]
    said = []
    exchanged = "USETMAXREG" in entry["instructions"]
    if kernel.registers > entry["registers"] or (exchanged and kernel.registers < entry["registers"]):
        most = "" if exchanged else "at most "
        said.append(f"{where}: registers expected {most}{entry['registers']}, got {kernel.registers}")
    if missing := [word for word in entry["instructions"] if word not in kernel.instructions]:
        said.append(f"{where}: expected {', '.join(missing)} in its machine code, got none")
    return said


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
        groups = list(compiled)
    kernels = [kernel for group, _ in groups for kernel in group]
    print_table(kernels)
    if options.csv and kernels:
        with options.csv.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, asdict(kernels[0]))
            writer.writeheader()
            for kernel in kernels:
                writer.writerow(asdict(kernel) | {"instructions": " ".join(sorted(kernel.instructions))})
    said = [remark for _, remarks in groups for remark in remarks] + complaints(kernels, budget)
    print("\n".join(said) or f"{len(kernels)} kernels within the budget")
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
