"""Builds the CUDA kernels for the CPU, against the emulation, and loads them as operators.

    emulation.build.load("emulation")   torch.ops.normface_emulation: csrc/cuda/*/*.cu on CPU tensors
    emulation.build.load("faults")      torch.ops.normface_faults: the lane's own seeded faults
    emulation.build.load("cpu")         torch.ops.normface_sanitized: csrc/cpu/*.cpp once more

With NORMFACE_SANITIZE=1 in the environment everything is built with AddressSanitizer and
UndefinedBehaviorSanitizer. Their libraries must then be in the process from its beginning, see
`sanitizer_environment`. Without it, the kernels' memory accesses are watched by hooks.cpp.

Ninja brings them up to date in build/emulation; cache.py keeps them for the next checkout. Needs g++ and
ninja.
"""

from __future__ import annotations

import fcntl
import functools
import os
import platform
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from emulation import cache
from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
OUTPUT = ROOT / "build" / "emulation"

SANITIZED = os.environ.get("NORMFACE_SANITIZE") == "1"
# GCC's sanitizers report to hooks.cpp; other compilers call theirs differently.
CXX = os.environ.get("CXX", "g++") if "clang" not in os.environ.get("CXX", "") else "g++"

ENGINE = [path for path in sorted(HERE.glob("*.cpp")) if path.name not in ("hooks.cpp", "library.cpp")]
NAMESPACES = {
    "emulation": "normface_emulation",
    "faults": "normface_faults",
    "faults_hopper": "normface_faults_hopper",
    "faults_cluster": "normface_faults_cluster",
    "cpu": "normface_sanitized",
}

COMMON = ["-std=c++20", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-Wall", "-Wextra"]
COMMON += ["-DNF_SM90A", "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{HERE}", f"-I{CSRC}"]
COMMON += [flag for path in include_paths() for flag in ("-isystem", path)]
# Kernels read memory through vector types, as CUDA allows; and `#pragma unroll` is for nvcc.
KERNELS = ["-O1", "-x", "c++", "-fno-strict-aliasing", "-Wno-unknown-pragmas"]
REAL_SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
OUR_SANITIZERS = ["-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0"]
OUR_SANITIZERS += ["-fsanitize=signed-integer-overflow,shift,integer-divide-by-zero,bounds"]


def unavailable() -> str | None:
    """Why nothing can be built here, if so."""
    if sys.platform != "linux":
        return "the emulation is for Linux"
    missing = [tool for tool in (shlex.split(CXX)[0], "ninja") if shutil.which(tool) is None]
    return f"not found: {', '.join(missing)}" if missing else None


def sources_of(library: str) -> list[Path]:
    if library.startswith("faults"):
        return [HERE / f"{library}.cu"]
    folder = sorted(
        (CSRC / "cuda").glob("*/*.cu") if library == "emulation" else (CSRC / "cpu").glob("*.cpp")
    )
    return [HERE / "library.cpp", *folder]


def flags_of(library: str, source: Path, sanitize: bool) -> list[str]:
    flags = [*COMMON, f"-DNF_NAMESPACE={NAMESPACES[library]}"]
    if sanitize:
        flags += REAL_SANITIZERS
    elif source.suffix == ".cu":
        flags += OUR_SANITIZERS
    return flags + (KERNELS if source.suffix == ".cu" else ["-O2"])


def ninja_file(library: str, sanitize: bool) -> str:
    lines = [
        "rule compile",
        f"  command = {CXX} $flags -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {CXX} -shared $in $flags -o $out",
    ]
    sources = sources_of(library)
    if library != "cpu":
        # The sanitizers' own libraries take the place of the hooks. Before the kernels: of a template of the
        # standard library that both use the linker takes the first, and nobody is to watch the engine's own.
        sources = ENGINE + ([] if sanitize else [HERE / "hooks.cpp"]) + sources
    objects = [f"{source.name}.o" for source in sources]
    for source, built in zip(sources, objects, strict=True):
        escaped = str(source).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
        lines += [
            f"build {built}: compile {escaped}",
            f"  flags = {shlex.join(flags_of(library, source, sanitize))}",
        ]
    link = ["-Wl,-z,defs", *(f"-L{path}" for path in library_paths()), "-ltorch_cpu"]
    link += REAL_SANITIZERS if sanitize else []
    lines += [f"build {library}.so: link {' '.join(objects)}", f"  flags = {shlex.join(link)}"]
    return "\n".join(lines) + "\n"


@functools.cache
def compiler_version() -> str:
    return subprocess.run([*shlex.split(CXX), "--version"], check=True, capture_output=True, text=True).stdout


def name_of(library: str, sanitize: bool) -> str:
    """What the cache calls the library that would be built now."""
    elsewhere = CSRC / ("cuda" if library == "cpu" else "cpu")  # the other lane's kernels
    files = [path for path in (*CSRC.rglob("*"), *HERE.rglob("*")) if path.is_file()]
    read = [path for path in files if elsewhere not in path.parents and path.suffix not in (".pyc", ".md")]
    recipe = ninja_file(library, sanitize)
    for place in (ROOT, Path(torch.__file__).parent):  # where they lie does not change the result
        recipe = recipe.replace(str(place), "")
    versions = compiler_version(), torch.__version__, platform.machine()
    known = cache.fingerprint(ROOT, read, recipe, *versions)
    return f"{library}-{known}.so"


def build(library: str = "emulation", sanitize: bool = SANITIZED) -> Path:
    """Brings the library up to date and returns its path. MAX_JOBS limits how much compiles at once."""
    name = name_of(library, sanitize)
    if kept := cache.find(name):
        return kept
    folder = OUTPUT / ("sanitized" if sanitize else "plain") / library
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test runs may come at once
        if kept := cache.find(name):
            return kept
        (folder / "build.ninja").write_text(ninja_file(library, sanitize))
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
        ran = subprocess.run(["ninja", "-C", folder, "-j", jobs], capture_output=True, text=True)
        if ran.returncode != 0:
            raise RuntimeError(
                f"the {library} library of the test build does not compile:\n{ran.stdout}{ran.stderr}"
            )
        built = folder / f"{library}.so"
        # Unless somebody saved a source meanwhile: then it is not what the name says.
        return cache.keep(name, built) if name_of(library, sanitize) == name else built


@functools.cache
def load(library: str = "emulation"):
    """The operators of a library, built and loaded."""
    torch.ops.load_library(build(library))
    return getattr(torch.ops, NAMESPACES[library])


def nvcc() -> str | None:
    return runpy.run_path(str(ROOT / "setup.py"))["find_nvcc"]()


def build_faults_with_nvcc(name: str = "faults") -> tuple[Path, str]:
    """The faults against the real headers, and what the compiler said.

    faults is PTX for two generations, which any GPU since can run; the others are for Hopper alone.
    """
    real = runpy.run_path(str(ROOT / "setup.py"))
    library = OUTPUT / "nvcc" / f"{name}.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    command = [
        nvcc(),
        *real["NVCC_FLAGS"],
        f"-DNF_NAMESPACE={NAMESPACES[name]}",
        f"-I{CSRC}",
        f"-I{CSRC / 'cuda'}",
    ]
    command += [flag for path in include_paths() for flag in ("-isystem", path)]
    if name == "faults":
        command += [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in (75, 80)]
    else:
        command += ["-gencode=arch=compute_90a,code=[compute_90a,sm_90a]"]
    command += ["--no-compress"]  # so that the PTX can be read in the library
    command += ["-shared", "-cudart=static", "-Xlinker=--no-as-needed"]
    command += [*(f"-L{path}" for path in library_paths()), "-ltorch", "-ltorch_cpu"]
    ran = subprocess.run([*command, HERE / f"{name}.cu", "-o", library], capture_output=True, text=True)
    if ran.returncode != 0:
        raise RuntimeError(f"{name}.cu does not compile against the real headers:\n{ran.stdout}{ran.stderr}")
    return library, ran.stdout + ran.stderr


def sanitizer_environment() -> dict[str, str]:
    """The environment for a Python process that loads what was built with the sanitizers."""

    def find(name: str) -> str:
        return subprocess.run(
            [*shlex.split(CXX), f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()

    return {
        **os.environ,
        "NORMFACE_SANITIZE": "1",
        # The sanitizer looks up what it intercepts when it starts: the C++ library must be there by then.
        "LD_PRELOAD": f"{find('libasan.so')} {find('libstdc++.so')}",
        # Python frees nothing on exit, and torch not all.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
