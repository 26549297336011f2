"""The steps of scripts/gpu_pass.py, in the order of their worth."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"  # pytest runs there, on the files by their names
GPU_FILES = ["test_gpu.py", "test_gpu_graphs.py", "test_train_distributed.py"]
GPU_FILES += ["test_emulation.py", "test_emulation_hopper.py", "test_emulation_cluster.py"]


@dataclass(frozen=True)
class Options:
    out: Path
    device: str  # "cuda", or "emulated": the CUDA kernels on the CPU
    quick: bool
    select: str  # only tests and cases with this in their name


@dataclass(frozen=True)
class Step:
    """``evidence`` is what the log of a step has if it showed anything: an exit status of 0 is not enough."""

    name: str
    seconds: int
    quick_seconds: int | None  # None: not with --quick
    command: Callable[[Options], list[str]]
    evidence: str
    folder: Path = ROOT
    needs_gpu: bool = False  # it shows nothing on the emulated kernels, but its command line runs
    environment: tuple[tuple[str, str], ...] = ()
    of_build: bool = True  # what it shows is about the installed build, not about the machine alone


WHERE = """
import platform, torch
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
print(f"this machine: {gpu}, torch {torch.__version__}, Python {platform.python_version()}")
"""


def machine(options: Options) -> list[str]:
    tools = "if command -v nvidia-smi; then nvidia-smi; fi; if command -v nvcc; then nvcc --version; fi"
    script = f'{tools}; "$0" -m torch.utils.collect_env; exec "$0" -c "$1"'
    return ["sh", "-c", script, sys.executable, WHERE]


LOADED = """
import sys, normface_ext
info = normface_ext.build_info()
print(*(f"{name}: {value}" for name, value in info.items()), sep="\\n")
if not (info["cuda_loaded"] or sys.argv[1] == "emulated"):
    sys.exit("the CUDA kernels are not loaded")
print("the library is ready:", normface_ext.__file__)
"""


def library(options: Options) -> list[str]:
    """Builds only if what is installed is missing or has no CUDA kernels."""
    look = '"$0" -c "$1" "$2"'
    build = '"$0" -m pip install --no-build-isolation --no-deps --force-reinstall "$3"'
    script = f"{look} || {{ {build} && {look}; }}"
    return ["sh", "-c", script, sys.executable, LOADED, options.device, str(ROOT)]


def every_kernel(options: Options, *more: str) -> list[str]:
    command = [sys.executable, "scripts/every_kernel.py", "--device", options.device, *more]
    return command + (["--select", options.select] if options.select else [])


def kernels(options: Options) -> list[str]:
    return every_kernel(options, "--unwritten-is-nan")


def pytest(options: Options, files: list[str], keyword: str) -> list[str]:
    chosen = f"{keyword} and {options.select}" if options.select else keyword
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--durations=10", "-p", "no:cacheprovider"]
    return [*command, *([] if options.quick else ["--all"]), "-k", chosen, *files]


ON_LANES = re.compile(r"^def test_\w+\([^)]*\b(?:cuda_)?lane\b[^)]*\)", re.MULTILINE)


def op_files() -> list[str]:
    """Whatever has tests on the lanes of tests/lanes.py: a new file cannot be left out."""
    return [path.name for path in sorted(TESTS.glob("test_*.py")) if ON_LANES.search(path.read_text())]


def ops(options: Options) -> list[str]:
    """Its tests wait for the host more than for the GPU, so several processes share it where they can."""
    workers = min(8, (os.cpu_count() or 1) // 2)
    parallel = workers >= 4 and importlib.util.find_spec("xdist") is not None
    return pytest(options, op_files(), options.device) + (["-n", str(workers)] if parallel else [])


def gpu(options: Options) -> list[str]:
    return pytest(options, GPU_FILES, "gpu")


def bench(options: Options) -> list[str]:
    command = [sys.executable, "benchmarks/bench_kernels.py", "--out", str(options.out / "bench")]
    return command + (["--quick"] if options.quick or options.device != "cuda" else [])


def hopper(options: Options) -> list[str]:
    return [sys.executable, "scripts/hopper.py", "--device", options.device, "--out", str(options.out)]


def sanitizer() -> str:
    """NORMFACE_SANITIZER stands in for compute-sanitizer, in tests."""
    standard = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    return os.environ.get("NORMFACE_SANITIZER", standard)


def sanitized(tool: str) -> Callable[[Options], list[str]]:
    def command(options: Options) -> list[str]:
        watched = [sanitizer(), "--tool", tool, "--error-exitcode", "9"]
        watched += ["--kernel-name-exclude", "kernel_substring=gemm"]
        dtypes = ["--dtypes", "float32", "bfloat16"] if options.quick else []
        reader = [sys.executable, "scripts/initcheck.py"] if tool == "initcheck" else []
        return [*reader, *watched, *every_kernel(options, *dtypes)]

    return command


AGREED, PASSED = r"[1-9]\d* cases, all agree", r"\b[1-9]\d* passed"
STEPS = [
    Step("machine", 60, 15, machine, "this machine: ", of_build=False),
    Step("library", 900, 900, library, "the library is ready", TESTS, environment=(("NORMFACE_CUDA", "1"),)),
    Step("kernels", 120, 40, kernels, AGREED),
    Step("ops", 480, 70, ops, PASSED, TESTS),
    Step("gpu", 240, 40, gpu, PASSED, TESTS, needs_gpu=True),
    Step("hopper", 120, None, hopper, r"hopper: ([1-9]\d* choices, all right|.* another architecture)"),
    Step("bench", 420, 60, bench, r"normface_ext"),
    Step("memcheck", 180, 55, sanitized("memcheck"), AGREED),
    Step("racecheck", 240, None, sanitized("racecheck"), AGREED),
    Step("initcheck", 240, None, sanitized("initcheck"), AGREED),
    Step("synccheck", 180, None, sanitized("synccheck"), AGREED),
]
