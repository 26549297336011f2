"""What the built libraries ask of the machine that loads them: torch's stable ABI, the C and C++ libraries of
a Linux of 2018, and nothing of Python. So one wheel serves every Python, every torch from 2.11 on, and every
Linux that manylinux_2_28 names."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import normface_ext
from normface_ext.engine import native

PACKAGE = Path(normface_ext.__file__).parent
LIBRARIES = [path for path in (PACKAGE / "_C.so", PACKAGE / "_cuda.so") if path.exists()]
#: What manylinux_2_28 has at most: glibc 2.28, and the libstdc++ and libgcc of GCC 8.
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
NEEDED = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "libtorch_cpu.so"}
NEEDED |= {"libtorch.so"}  # _cuda: it brings libtorch_cuda
#: What older C libraries keep outside libc, for the CUDA runtime.
NEEDED |= {"libpthread.so.0", "libdl.so.2", "librt.so.1"}
STABLE = re.compile(r"(aoti_torch|torch)_[a-z0-9_]+")
#: Without a version: hooks that need not be there; members of libstdc++'s types that libtorch has as well.
UNVERSIONED = re.compile(r"_ITM_(de)?registerTMCloneTable|__gmon_start__|__cxa_finalize|_ZNK?St\w+")
#: The CUDA runtime inside `_cuda` asks for these by the version that they have where it was linked, and glibc
#: 2.34 has them anew, in libc: a wheel with CUDA kernels is manylinux_2_28 only if an image of that makes it.
MOVED = re.compile(r"(dl|pthread_|sem_|shm_)[a-z_]+@GLIBC_2\.34")

needs_binutils = pytest.mark.skipif(
    shutil.which("nm") is None or shutil.which("readelf") is None, reason="nm or readelf not found"
)
each_library = pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.stem)


def undefined_symbols(library: Path) -> list[str]:
    """Such as "exp@GLIBC_2.2.5", "aoti_torch_get_dtype"."""
    command = ["nm", "--dynamic", "--undefined-only", str(library)]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [line.split()[-1] for line in listing.splitlines()]


def foreign(symbols: list[str]) -> list[str]:
    """Those that not every machine has which we promise."""
    return [symbol for symbol in symbols if not is_allowed(symbol)]


def is_allowed(symbol: str) -> bool:
    name, _, version = symbol.partition("@")
    if not version:
        return bool(STABLE.fullmatch(name) or UNVERSIONED.fullmatch(name))
    library, _, number = version.lstrip("@").rpartition("_")
    if not re.fullmatch(r"[\d.]+", number):  # such as GLIBC_PRIVATE
        return False
    return library in NEWEST and tuple(map(int, number.split("."))) <= NEWEST[library]


@needs_binutils
@each_library
def test_every_undefined_symbol_is_on_the_list(library):
    symbols = undefined_symbols(library)
    assert any(STABLE.fullmatch(symbol) for symbol in symbols), "no symbol of torch: is this the right file?"
    beyond = foreign(symbols)
    assert [symbol for symbol in beyond if library.stem != "_cuda" or not MOVED.fullmatch(symbol)] == []


def test_what_is_not_on_the_list_is_recognised():
    fine = ["aoti_torch_get_dtype", "torch_get_num_threads", "__gmon_start__", "memcpy@GLIBC_2.14"]
    fine += ["_ZNSt13runtime_errorC1EPKc@GLIBCXX_3.4.21", "_ZdlPvm@CXXABI_1.3.9", "_Unwind_Resume@GCC_3.0"]
    changing = ["_ZN3c105ErrorD1Ev", "_ZN2at4_ops2mm4callERKNS_6TensorES4_", "_ZTVN5torch3jit6ModuleE"]
    python = ["PyErr_CheckSignals", "_Py_NoneStruct"]
    newer = ["exp@GLIBC_2.29", "__libc_single_threaded@GLIBC_2.32", "_dl_x@GLIBC_PRIVATE"]
    newer += ["_ZSt28__throw_bad_array_new_lengthv@GLIBCXX_3.4.29", "x@CXXABI_1.3.13", "y@GCC_12.0.0"]
    other = ["cudaLaunchKernel", "cublasGemmEx", "omp_get_num_threads@OMP_1.0", "GOMP_parallel@GOMP_4.0"]
    assert foreign([*fine, *changing, *python, *newer, *other]) == [*changing, *python, *newer, *other]
    moved = ["dlopen@GLIBC_2.34", "pthread_create@GLIBC_2.34", "sem_wait@GLIBC_2.34"]
    assert foreign(moved) == moved and all(map(MOVED.fullmatch, moved))
    assert not any(map(MOVED.fullmatch, [*changing, *python, *newer, *other]))


@needs_binutils
@each_library
def test_only_these_libraries_are_needed(library):
    command = ["readelf", "--dynamic", "--wide", str(library)]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", listing)
    assert "libtorch_cpu.so" in needed
    assert {name for name in needed if not name.startswith("ld-linux")} <= NEEDED
    assert not re.search(r"\((RPATH|RUNPATH)\)", listing), "a folder of the machine that built"


@needs_binutils
def test_what_ctypes_calls_is_what_is_exported():
    listing = subprocess.run(
        ["nm", "--dynamic", "--defined-only", str(PACKAGE / "_C.so")],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    exported = {line.split()[-1] for line in listing.splitlines() if re.search(r" T ", line)}
    source = Path(native.__file__).read_text()
    assert exported == set(re.findall(r'_function\("(nf_\w+)"', source))


LOADER = r"""
#include <dlfcn.h>
#include <stdio.h>
int main(int count, char** paths) {
  for (int k = 1; k < count; ++k)
    if (!dlopen(paths[k], RTLD_NOW | RTLD_GLOBAL)) return puts(dlerror()), 1;
  const char* (*tables)(void) = (const char* (*)(void))dlsym(RTLD_DEFAULT, "nf_tables");
  return puts(tables()), 0;
}
"""


@pytest.mark.skipif(shutil.which("cc") is None or sys.platform != "linux", reason="no C compiler for Linux")
def test_a_process_without_python_loads_the_library(tmp_path):
    """As a C++ program does that serves an exported model which has our ops."""
    import torch

    source, program = tmp_path / "loader.c", tmp_path / "loader"
    source.write_text(LOADER)
    subprocess.run(["cc", str(source), "-o", str(program), "-ldl"], check=True)
    folder = Path(torch.__file__).parent / "lib"
    paths = [folder / "libtorch_cpu.so", PACKAGE / "_C.so"]
    ran = subprocess.run(
        [program, *paths], capture_output=True, text=True, env={"LD_LIBRARY_PATH": str(folder)}
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert '"terms": ["softmax", ' in ran.stdout


def test_sizes_beyond_64_bits_are_refused_before_the_library_sees_them():
    facts = (False, 1, 0, 0, 0, "")
    step = native.Step(1, 1, 1 << 63, 4)
    with pytest.raises(OverflowError, match="expected sizes of at most 64 bits"):
        native.ways(step, facts, 1 << 30)
    with pytest.raises(ctypes.ArgumentError):
        native.has_fixed_shift("64", 7, False)
