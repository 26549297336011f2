"""setup.py: what it asks of a machine and how it says so, what it compiles for which GPU, how it links."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

import normface_ext

ROOT = Path(__file__).parents[1]
PACKAGE = Path(normface_ext.__file__).parent
LIBRARIES = [path for path in (PACKAGE / "_C.so", PACKAGE / "_cuda.so") if path.exists()]
SETUP = runpy.run_path(str(ROOT / "setup.py"))
COMPILER = [os.environ.get("CXX", "c++")]
NVCC = SETUP["find_nvcc"]()


# What a machine lacks is one sentence.


def sentence(compiler: list[str] = COMPILER) -> str:
    with pytest.raises(SystemExit) as stopped:
        SETUP["check_requirements"](compiler)
    assert "\n" not in str(stopped.value)
    return str(stopped.value)


@pytest.fixture(autouse=True)
def packages(monkeypatch) -> dict[str, str | None]:
    """What setup.py finds of the build requirements, None where one is missing. The tests' own environment
    has torch; pip brought the others into one that is gone."""
    found: dict[str, str | None] = {"torch": "2.13.0", "ninja": "1.13"}
    real_spec, real_version = importlib.util.find_spec, importlib.metadata.version

    def find_spec(name: str, package: str | None = None) -> object:
        if name not in found:
            return real_spec(name, package)
        return types.SimpleNamespace(origin=f"/packages/{name}/__init__.py") if found[name] else None

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: found.get(name) or real_version(name))
    return found


def test_a_machine_with_everything_is_not_complained_about():
    SETUP["check_requirements"](COMPILER)


@pytest.mark.parametrize("name", ["torch", "ninja"])
def test_a_missing_package_is_named_with_the_remedy(name, packages, monkeypatch):
    packages[name] = None
    monkeypatch.setattr(shutil, "which", lambda tool: None)  # a ninja of the system would do
    said = sentence()
    assert said.startswith(f"normface_ext: building needs {name}, which this Python")
    assert f"`pip install {SETUP['BUILD_REQUIREMENTS'][name]}`" in said


def test_the_ninja_of_the_system_will_do(packages, monkeypatch):
    packages["ninja"] = None
    real = shutil.which
    monkeypatch.setattr(shutil, "which", lambda tool: "/usr/bin/ninja" if tool == "ninja" else real(tool))
    SETUP["check_requirements"](COMPILER)


def test_a_torch_that_is_too_old_is_named_with_its_version(packages):
    packages["torch"] = "2.10.1+cu128"
    said = sentence()
    assert said.startswith("normface_ext: building needs torch>=2.11, got torch 2.10.1+cu128: `pip install")


def test_a_missing_compiler_is_named():
    assert "there is no `no-such-compiler`" in sentence(["no-such-compiler"])


def test_a_compiler_without_cxx20_is_named_with_its_version(tmp_path):
    old = tmp_path / "old-c++"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "g++ 9.4.0" && exit 0\nexit 1\n')
    old.chmod(0o755)
    said = sentence([str(old)])
    assert f"needs a C++20 compiler (GCC 11 or newer), and `{old}` is none: g++ 9.4.0." in said


def test_an_nvcc_without_cxx20_is_named_with_its_version(tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text('#!/bin/sh\necho "Cuda compilation tools, release 11.8, V11.8.89"\n')
    nvcc.chmod(0o755)
    with pytest.raises(SystemExit, match=r"the CUDA kernels need CUDA 12\.0 or newer \(C\+\+20\), got 11\.8"):
        SETUP["check_nvcc"](str(nvcc))


@pytest.mark.parametrize(
    ("version", "field"), [("65.5.0", "license"), ("76.1", "license"), ("77.0.3", "license_expression")]
)
def test_the_licence_is_spelled_as_setuptools_does(version, field, monkeypatch):
    monkeypatch.setattr("setuptools.__version__", version)
    assert SETUP["licence"]() == {field: "MIT"}


def test_the_installed_package_says_its_licence():
    metadata = importlib.metadata.metadata("normface_ext")
    assert "MIT" in (metadata.get("License-Expression"), metadata.get("License"))


# What is compiled for which GPU.


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("7.5", ["arch=compute_75,code=sm_75"]),
        ("8.6", ["arch=compute_80,code=sm_86"]),
        ("9.0+PTX", ["arch=compute_90,code=sm_90", "arch=compute_90,code=compute_90"]),
        ("12.0+PTX", ["arch=compute_90,code=sm_120", "arch=compute_90,code=compute_90"]),
        ("9.0a", ["arch=compute_90a,code=sm_90a"]),  # its instructions are in no other's PTX
        ("7.0", ["arch=compute_70,code=sm_70"]),
    ],
)
def test_ptx_is_made_once_per_generation(arch, options):
    assert SETUP["gencode"](arch) == [f"-gencode={option}" for option in options]


@pytest.mark.parametrize("arch", ["", "9", "sm_90", "9.0+ptx", "9.0b"])
def test_an_unknown_architecture_is_refused(arch):
    with pytest.raises(SystemExit, match=r"expected TORCH_CUDA_ARCH_LIST like '8.0;9.0\+PTX', got"):
        SETUP["gencode"](arch)


def test_kernels_are_compiled_only_for_architectures_that_run_them():
    archs = ["7.5", "8.0", "9.0a", "12.0+PTX"]
    assert SETUP["archs_for"]("csrc/cuda/host/normalize.cu", archs) == archs
    assert SETUP["archs_for"]("csrc/cuda/products/sm80_scores.cu", archs) == archs[1:]
    # Its host code is asked for all the same.
    assert SETUP["archs_for"]("csrc/cuda/products/sm80_scores.cu", ["7.5"]) == ["7.5"]
    for asked in (archs, ["9.0"], ["8.0", "9.0+PTX"]):
        assert SETUP["archs_for"]("csrc/cuda/products/sm90_scores.cu", asked) == ["9.0a"]
    assert SETUP["archs_for"]("csrc/cuda/products/sm90_scores.cu", ["8.0", "10.0"]) == ["8.0", "10.0"]
    kinds = {path.name.partition("_")[0] for path in (ROOT / "csrc" / "cuda" / "products").glob("*.cu")}
    prefixes = {SETUP[name][0].rstrip("_") for name in ("LEAST_CAPABILITY", "SM90A")}
    assert kinds == prefixes | {"simt"}


def toolchain(**parts):
    tools = {"compile": [], "link": [], "libraries": [], "archs": []}
    return types.SimpleNamespace(**tools | parts)


def test_a_failed_cuda_compilation_names_the_file_and_the_architecture(tmp_path):
    """A stand-in for nvcc that cannot compile broken.cu for 9.0."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text('#!/bin/sh\ncase "$*" in *sm_90*broken.cu*) exit 1;; esac\n')
    nvcc.chmod(0o755)
    log = "[1/3] nvcc fine.cu\nFAILED: [code=1] /build/csrc/cuda/broken.cu.o \nbroken.cu(3): error: no\n"
    sources = ["csrc/cuda/fine.cu", "csrc/cuda/broken.cu"]
    tools = toolchain(compile=[str(nvcc)], archs=["8.0", "9.0", "12.0"])
    said = SETUP["failed_architecture"](log, sources, tools)
    assert said == " csrc/cuda/broken.cu does not compile for compute capability 9.0."
    assert SETUP["failed_architecture"]("FAILED: /build/csrc/ops.cpp.o", sources, tools) == ""


# What a wheel is called.


def test_wheels_of_one_version_are_told_apart_by_their_kernels(tmp_path, monkeypatch):
    monkeypatch.delenv("NORMFACE_LOCAL_VERSION", raising=False)
    monkeypatch.chdir(tmp_path)
    nvcc = tmp_path / "nvcc"
    nvcc.write_text('#!/bin/sh\necho "Cuda compilation tools, release 13.0, V13.0.88"\n')
    nvcc.chmod(0o755)
    assert SETUP["local_version"](None) == "+cpu"
    assert SETUP["local_version"](str(nvcc)) == "+cu130"
    Path("PKG-INFO").touch()  # out of an sdist pip wants the version that it chose it by
    assert SETUP["local_version"](None) == SETUP["local_version"](str(nvcc)) == ""
    monkeypatch.setenv("NORMFACE_LOCAL_VERSION", "cpu")
    assert SETUP["local_version"](None) == "+cpu"


@pytest.mark.parametrize(("name", "version"), [("", ""), ("cu130.h100", "+cu130.h100")])
def test_the_environment_names_the_local_version(name, version, monkeypatch):
    monkeypatch.setenv("NORMFACE_LOCAL_VERSION", name)
    assert SETUP["local_version"](None) == version


@pytest.mark.parametrize("name", ["cu 130", "+cpu", "CPU", "cpu.", "a-b"])
def test_a_local_version_that_is_none_is_refused(name, monkeypatch):
    monkeypatch.setenv("NORMFACE_LOCAL_VERSION", name)
    with pytest.raises(SystemExit, match="expected NORMFACE_LOCAL_VERSION like 'cpu' or 'cu130', got"):
        SETUP["local_version"](None)


def test_the_installed_wheel_is_for_every_python():
    # Where the sources are on sys.path, the egg-info that a build leaves there has no such file.
    found = (each.read_text("WHEEL") for each in importlib.metadata.distributions(name="normface_ext"))
    wheel = next(text for text in found if text is not None)
    assert re.findall(r"^Tag: (\S+?-\S+?)-", wheel, re.MULTILINE) == ["py3-none"]


# How the libraries are linked.


@pytest.mark.parametrize(
    "compiler",
    [
        {"compiler_so_cxx": ["c++", "-O2", "-fPIC"], "linker_so_cxx": ["c++", "-shared"]},
        # setuptools 65
        {
            "compiler_cxx": ["c++"],
            "compiler_so": ["ccache", "gcc", "-O2", "-fPIC"],
            "linker_so": ["ccache", "gcc", "-shared"],
        },
    ],
)
def test_the_cxx_compiler_is_found_in_any_setuptools(compiler, monkeypatch):
    monkeypatch.setenv("CC", "ccache gcc")
    commands = SETUP["cxx_commands"](types.SimpleNamespace(**compiler))
    assert commands == (["c++", "-O2", "-fPIC"], ["c++", "-shared"])


def dynamic_symbols(library: Path, which: str) -> list[str]:
    command = ["nm", "--dynamic", which, "--demangle", str(library)]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [line.strip() for line in listing.splitlines()]


def needed(library: Path) -> list[str]:
    command = ["readelf", "--dynamic", "--wide", str(library)]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return re.findall(r"\(NEEDED\).*\[(.*)\]", listing)


def own_copies(library: Path) -> list[str]:
    """Strong symbols of the C++ library that a library defines itself. Templates instantiated in our own
    code are weak (W, V, u) and shared with the others."""
    defined = dynamic_symbols(library, "--defined-only")
    return [line for line in defined if re.match(r"\S+ [TDBR] (std::|__cxa|__gxx)", line)]


def assert_linked_as_cxx(library: Path) -> None:
    assert "libstdc++.so.6" in needed(library)
    assert own_copies(library) == []


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf not found")
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name.split(".")[0])
def test_the_cxx_library_is_shared_with_torch(library):
    assert_linked_as_cxx(library)


PROBE = """
#include <torch/csrc/stable/library.h>
#include "checks.h"
__global__ void nothing() {}
void check(int64_t n) { if (n < 0) nothing<<<1, 1>>>(); nf::fail("probe: expected `n` to be 3, got ", n); }
STABLE_TORCH_LIBRARY(normface_probe, m) { m.def("check(int n) -> ()"); }
STABLE_TORCH_LIBRARY_IMPL(normface_probe, CompositeExplicitAutograd, m) {
  m.impl("check", TORCH_BOX(&check));
}
"""


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="nvcc not found")
def test_a_check_that_prints_a_number_raises(tmp_path, monkeypatch):
    """Compiled by nvcc and linked as `_cuda` is. nvcc as the linker takes libstdc++ as an archive, whose
    streams find no locale: that ended the process."""
    monkeypatch.undo()  # torch as it is
    source = tmp_path / "probe.cu"
    source.write_text(PROBE)
    compiler = types.SimpleNamespace(compiler_so_cxx=COMPILER, linker_so_cxx=[*COMPILER, "-shared"])
    tools = SETUP["cuda_toolchain"](types.SimpleNamespace(compiler=compiler), NVCC, ["8.0"], 1)
    library, built = tmp_path / "probe.so", tmp_path / "probe.o"
    compile_command = [flag.replace("-Icsrc", f"-I{ROOT}/csrc") for flag in tools.compile]
    subprocess.run(
        [*compile_command, *SETUP["gencode"]("8.0"), "-c", source, "-o", built], check=True, cwd=ROOT
    )
    subprocess.run([*tools.link, built, *tools.libraries, "-o", library], check=True)
    assert_linked_as_cxx(library)
    code = (
        "import sys, torch; torch.ops.load_library(sys.argv[1])\n"
        "try: torch.ops.normface_probe.check(7)\n"
        "except RuntimeError as error: print(error)"
    )
    ran = subprocess.run([sys.executable, "-c", code, library], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "probe: expected `n` to be 3, got 7" in ran.stdout


# What the import costs, and where it looks.

IMPORT = """
import json, sys, time
def seconds(name, clock=time.process_time):
    start = clock(); __import__(name); return clock() - start
taken = {name: seconds(name) for name in ("torch", "normface_ext")}
print(json.dumps({**taken, "modules": sorted(sys.modules)}))
"""


def test_the_import_adds_little_to_that_of_torch(tmp_path, record_property):
    ran = subprocess.run(
        [sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    seen = json.loads(ran.stdout)
    record_property("seconds of our import", seen["normface_ext"])
    heavy = {"torch._dynamo", "matplotlib", "sklearn", "google.protobuf", "torch.distributed.tensor"}
    assert heavy.isdisjoint(seen["modules"])
    # 0.04 on a quiet machine; it was more than 1 with torch._dynamo.
    assert seen["normface_ext"] < 0.2 * seen["torch"]


@pytest.mark.parametrize("where", ["", "tests"])
def test_a_checkout_uses_the_installed_package(tmp_path, where):
    """Python started in a folder that has the sources but no compiled module, or with that on its path."""
    shutil.copytree(
        ROOT / "normface_ext", tmp_path / "normface_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    (tmp_path / "tests").mkdir()
    code = (
        "import torch, normface_ext as nf, normface_ext.caffe, normface_ext.functional as f;"
        "assert f is nf.functional and nf.caffe is normface_ext.caffe;"
        "assert nf.NormalizeLayer()(torch.ones(2, 4))[0, 0] == 0.5;"
        "print(nf.__file__, nf.functional.__file__)"
    )
    # The current folder stands first on sys.path; from below, as with PYTHONPATH or a script's own folder.
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path / where, env=environment
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == [str(PACKAGE / "__init__.py"), str(PACKAGE / "functional.py")]


def test_a_checkout_without_an_installed_package_says_what_to_do(tmp_path):
    shutil.copytree(
        ROOT / "normface_ext", tmp_path / "normface_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    # Every path on which the installed package could be found is taken away; torch stays, imported before.
    code = (
        "import torch, numpy, sys; "
        f"sys.path[:] = [path for path in sys.path if path != {str(PACKAGE.parent)!r}]; import normface_ext"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 1
    assert "the compiled library `_C` is missing" in ran.stderr and "`pip install .`" in ran.stderr
