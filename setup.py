"""Builds two libraries: `_C` (schemas, CPU kernels) always, `_cuda` when a CUDA toolkit is found.

They use only torch's stable ABI and nothing of Python's, and `_cuda` carries its own CUDA runtime. So the
torch in the build environment lends its headers and nothing else: it may be a CPU build, or made with another
CUDA than nvcc's; and a wheel serves every Python. torch.utils.cpp_extension refuses both, hence the small
ninja file written here. It tracks headers, so a second build compiles only what changed.

Environment: NORMFACE_CUDA=0|1 (default: if nvcc is found), CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS,
NORMFACE_LOCAL_VERSION (default: cpu, or cu130 with CUDA 13.0; empty for none), DEBUG=1, and CXX, CXXFLAGS,
LDFLAGS as usual.
"""

import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1 leaves wheels to the package `wheel`
    from wheel.bdist_wheel import bdist_wheel

VERSION = "0.1.0"

DEBUG = os.environ.get("DEBUG", "0") not in ("", "0")
# No fast-math of any kind: the losses promise NaN, infinity and the last bits.
COMMON = ["-std=c++20", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
COMMON += ["-O0", "-g"] if DEBUG else ["-O3"]
CXX_FLAGS = [*COMMON, "-fPIC", "-Wall", "-Wextra", "-fvisibility=hidden", "-UNDEBUG" if DEBUG else "-g0"]
NVCC_FLAGS = [*COMMON, "-DUSE_CUDA", "--expt-relaxed-constexpr"]
NVCC_FLAGS += ["-Xcompiler=-fPIC,-Wall,-Wextra,-fvisibility=hidden", *["-lineinfo"] * DEBUG]
ARCHITECTURES = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]  # without a GPU at hand
#: PTX is made once per generation and serves all its GPUs and the newer ones up to the next entry: no source
#: asks for more than compute capability 9.0, and making PTX is the longer half of a compilation.
PTX_GENERATIONS = ["7.5", "8.0", "9.0"]
#: What `pip install --no-build-isolation` must find, as `pip install` takes it.
BUILD_REQUIREMENTS = {"torch": "torch>=2.11", "ninja": "ninja"}
#: Functions of libm that glibc has in two versions: csrc/older_linux.cpp asks for the older one.
TWO_VERSIONS = ["exp", "exp2", "log", "log2"]
LINK_FLAGS = [f"-Wl,--wrap={name}" for name in TWO_VERSIONS] if sys.platform == "linux" else []
OLDER_LINUX = "csrc/older_linux.cpp"  # in both libraries
#: How names of sources begin, and the compute capability below which their kernels are empty (mma.sync).
LEAST_CAPABILITY = ("sm80_", "8.0")
#: The same of instructions that no other architecture has (wgmma): compiled for this one alone, where 9.0
#: is among the wanted, with or without the "a".
SM90A = ("sm90_", "9.0a")


def stop(sentence: str) -> "SystemExit":
    """What pip shows last when it is raised."""
    return SystemExit(f"normface_ext: {sentence}")


def find_nvcc() -> str | None:
    wanted = os.environ.get("NORMFACE_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise stop(f"expected NORMFACE_CUDA to be 0 or 1, got {wanted!r}")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    places = [f"{home}/bin/nvcc" for home in homes if home]
    places += [shutil.which("nvcc") or "", "/usr/local/cuda/bin/nvcc"]
    nvcc = next((place for place in places if os.access(place, os.X_OK)), None)
    if wanted == "1" and nvcc is None:
        raise stop(
            "NORMFACE_CUDA=1 asks for the CUDA kernels, but there is no nvcc in CUDA_HOME, CUDA_PATH, PATH "
            "or /usr/local/cuda. Install the CUDA toolkit, or unset NORMFACE_CUDA."
        )
    return None if wanted == "0" else nvcc


def output_of(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def nvcc_version(nvcc: str) -> str:
    return re.search(r"release ([\d.]+)", output_of(nvcc, "--version"))[1]


def architectures(nvcc: str) -> list[str]:
    """Such as ["8.0", "9.0+PTX"]: TORCH_CUDA_ARCH_LIST, else the GPUs at hand, else every generation."""
    asked = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip("; "))
    if asked != [""]:
        return asked
    known = re.findall(r"compute_(\d+)(\d)\b", output_of(nvcc, "--list-gpu-arch"))
    wanted = ARCHITECTURES
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True).stdout
        wanted = sorted(set(re.findall(r"^\d+\.\d$", answer, re.M)), key=float) or wanted
    # A GPU newer than nvcc runs the newest PTX that nvcc can write.
    chosen = [arch for arch in wanted if tuple(arch.split(".")) in known] or [".".join(known[-1])]
    return [*chosen[:-1], chosen[-1] + "+PTX"]


def version_key(version: str) -> tuple[int, ...]:
    """(2, 11) of "2.11.0+cu130", (9, 0) of "9.0a+PTX": its first two numbers."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def gencode(arch: str) -> list[str]:
    """nvcc's options for machine code of one architecture, and with "+PTX" for the PTX too."""
    match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
    if not match:
        raise stop(f"expected TORCH_CUDA_ARCH_LIST like '8.0;9.0+PTX', got {arch!r} in it")
    number = match[1] + match[2] + match[3]
    older = [made for made in PTX_GENERATIONS if version_key(made) <= version_key(arch)]
    ptx = number if match[3] or not older else older[-1].replace(".", "")
    codes = [f"sm_{number}", *[f"compute_{ptx}"] * bool(match[4])]
    return [f"-gencode=arch=compute_{ptx},code={code}" for code in codes]


def has_sm90(archs: list[str]) -> bool:
    return any(version_key(arch) == version_key(SM90A[1]) for arch in archs)


def archs_for(source: str, archs: list[str]) -> list[str]:
    """Those of `archs` that can run the kernels of a source; all of them if none can, for its host code."""
    name, (prefix, least) = Path(source).name, LEAST_CAPABILITY
    if name.startswith(SM90A[0]) and has_sm90(archs):
        return [SM90A[1]]
    able = [arch for arch in archs if version_key(arch) >= version_key(least)]
    return able if name.startswith(prefix) and able else archs


def package_dir(name: str) -> Path:
    """The folder of a package that the build needs, imported or not: its headers are what counts."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise stop(
            f"building needs {name}, which this Python ({sys.executable}) does not have: `pip install "
            f"{BUILD_REQUIREMENTS[name]}`, or leave --no-build-isolation out and pip brings it."
        )
    return Path(spec.origin).parent


def check_requirements(compiler: list[str]) -> None:
    """Ends the build with one sentence on the first thing that is missing or too old."""
    for name, requirement in BUILD_REQUIREMENTS.items():
        if name == "ninja" and shutil.which("ninja"):
            continue  # the system's will do
        package_dir(name)
        least = requirement.partition(">=")[2]
        found = importlib.metadata.version(name)
        if least and version_key(found) < version_key(least):
            raise stop(
                f"building needs {requirement}, got {name} {found}: `pip install '{requirement}'`, or leave "
                "--no-build-isolation out and pip brings it."
            )
    if shutil.which(compiler[0]) is None:
        raise stop(
            f"building needs a C++20 compiler, and there is no `{compiler[0]}`: install GCC 11 or newer (on "
            "Debian: apt-get install g++), or name another in CXX."
        )
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder, "probe.cpp")
        probe.write_text("#include <bit>\n#include <concepts>\nstatic_assert(std::integral<int>);\n")
        command = [*compiler, "-std=c++20", "-fsyntax-only", str(probe)]
        tried = subprocess.run(command, capture_output=True, text=True)
    if tried.returncode:
        asked = subprocess.run([compiler[0], "--version"], capture_output=True, text=True).stdout
        raise stop(
            f"building needs a C++20 compiler (GCC 11 or newer), and `{compiler[0]}` is none: "
            f"{(asked or 'unknown').splitlines()[0]}. Name a newer one in CXX."
        )


def check_nvcc(nvcc: str) -> None:
    if version_key(nvcc_version(nvcc)) < (12, 0):
        raise stop(
            f"the CUDA kernels need CUDA 12.0 or newer (C++20), got {nvcc_version(nvcc)} ({nvcc}): put a "
            "newer toolkit in CUDA_HOME, or leave the kernels out with NORMFACE_CUDA=0."
        )


def include_flags(folders: list[str], theirs: list[Path]) -> list[str]:
    ours = [f"-I{Path(folder).resolve()}" for folder in folders]
    return ours + [flag for path in theirs for flag in ("-isystem", str(path))]


class Toolchain(NamedTuple):
    """How one of the two libraries is made: `compile ... -c source`, `link objects libraries`."""

    compile: list[str]
    link: list[str]
    libraries: list[str]
    archs: list[str]  # of CUDA sources; each gets those that can run it


def cxx_commands(compiler: Any) -> tuple[list[str], list[str]]:
    """The C++ compiler with the options for a shared object, and the same as the linker."""
    if hasattr(compiler, "compiler_so_cxx"):
        return [*compiler.compiler_so_cxx], [*compiler.linker_so_cxx]
    # setuptools before 72 has the options of the C compiler and the name of the C++ compiler.
    words = len(shlex.split(os.environ.get("CC", "cc")))
    cxx = compiler.compiler_cxx
    return [*cxx, *compiler.compiler_so[words:]], [*cxx, *compiler.linker_so[words:]]


def cxx_toolchain(build: build_ext, macros: dict[str, str]) -> Toolchain:
    includes = include_flags(["csrc"], [package_dir("torch") / "include"])
    defines = [f'-D{name}="{value}"' for name, value in macros.items()]
    compiler, linker = cxx_commands(build.compiler)
    return Toolchain(
        [*compiler, *CXX_FLAGS, *includes, *defines], linker, [*LINK_FLAGS, *torch_libraries()], []
    )


def cuda_toolchain(build: build_ext, nvcc: str, archs: list[str], threads: int) -> Toolchain:
    """nvcc compiles; the C++ compiler links. As the linker, nvcc takes libstdc++ as an archive, and a second
    copy of its locales ends the process at the first number that an error message prints."""
    host = [f"-ccbin={os.environ['CXX']}"] if os.environ.get("CXX") else []
    includes = include_flags(["csrc", "csrc/cuda"], [package_dir("torch") / "include"])
    libraries = [*LINK_FLAGS, *cuda_folders(nvcc), "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    # libtorch is kept though it looks unused: at run time it brings libtorch_cuda, the stream's home.
    libraries += [*torch_libraries(), "-Wl,--no-as-needed", "-ltorch"]
    built = ["-DNF_SM90A"] * has_sm90(archs)
    compile_command = [nvcc, *host, *NVCC_FLAGS, *built, f"--threads={threads}", *includes]
    return Toolchain(compile_command, cxx_commands(build.compiler)[1], libraries, archs)


def torch_libraries() -> list[str]:
    return [f"-L{package_dir('torch') / 'lib'}", "-ltorch_cpu"]


def cuda_folders(nvcc: str) -> list[str]:
    """-L options for the CUDA runtime, from nvcc itself: every packager puts it elsewhere."""
    plan = subprocess.run([nvcc, "-dryrun", "probe.cu"], capture_output=True, text=True)
    line = re.search(r"^#\$ LIBRARIES=(.*)$", plan.stdout + plan.stderr, re.M)
    return shlex.split(line[1]) if line else []


def escaped(path: object) -> str:
    """For a path in a ninja `build` line."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def ninja_lines(ext: Extension, folder: Path, tools: Toolchain) -> list[str]:
    name = ext.name.rpartition(".")[2]
    compiler, linker, libraries = (shlex.join(part).replace("$", "$$") for part in tools[:3])
    lines = [f"rule compile{name}", f"  command = {compiler} $targets -MD -MF $out.d -c $in -o $out"]
    lines += ["  depfile = $out.d", "  deps = gcc"]
    lines += [f"rule link{name}", f"  command = {linker} $in {libraries} -o $out"]
    objects = [escaped(folder / name / source) + ".o" for source in ext.sources]
    for source, built in zip(ext.sources, objects, strict=True):
        lines.append(f"build {built}: compile{name} {escaped(Path(source).resolve())}")
        targets = [flag for arch in archs_for(source, tools.archs) for flag in gencode(arch)]
        lines.append(f"  targets = {' '.join(targets)}")
    return [*lines, f"build {escaped(folder / name)}.so: link{name} {' '.join(objects)}"]


def failed_architecture(log: str, sources: list[str], tools: Toolchain) -> str:
    """A sentence on the first CUDA source that ninja gave up on and the first architecture it fails for: nvcc
    compiles for all of them in one run and does not say."""
    failed = [source for source in sources if re.search(rf"^FAILED: .*{re.escape(source)}\.o", log, re.M)]
    for source in failed[:1]:
        for arch in archs_for(source, tools.archs):
            command = [*tools.compile, *gencode(arch), "-c", source, "-o", os.devnull]
            if subprocess.run(command, capture_output=True).returncode:
                return f" {source} does not compile for compute capability {arch}."
    return ""


class NinjaBuild(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        # No Python modules: torch.ops.load_library loads them, under any Python.
        return fullname.replace(".", os.sep) + ".so"

    def build_extensions(self) -> None:
        check_requirements(cxx_commands(self.compiler)[0])
        folder = Path("build", "ninja-" + sysconfig.get_platform()).resolve()
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        main, *cuda = self.extensions
        nvcc = find_nvcc() if cuda else None
        archs = architectures(nvcc) if nvcc else []
        macros = {
            "NF_VERSION": self.distribution.get_version(),
            "NF_BUILD_TORCH": importlib.metadata.version("torch"),
            "NF_CUDA_ARCHS": ";".join(archs),
            "NF_CUDA_VERSION": nvcc_version(nvcc) if nvcc else "",
        }
        lines = ninja_lines(main, folder, cxx_toolchain(self, macros))
        if nvcc:
            # Files compile side by side; threads within a file take the cores left over.
            cuda_tools = cuda_toolchain(self, nvcc, archs, -(-jobs // len(cuda[0].sources)))
            lines += ninja_lines(cuda[0], folder, cuda_tools)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        ninja = ["ninja"] if shutil.which("ninja") else [sys.executable, "-m", "ninja"]
        log = ""
        with subprocess.Popen(
            [*ninja, "-C", str(folder), "-v", "-j", str(jobs)], stdout=subprocess.PIPE, text=True
        ) as running:
            for line in running.stdout:
                print(line, end="", flush=True)
                log += line
        if running.returncode:
            where = failed_architecture(log, cuda[0].sources, cuda_tools) if nvcc else ""
            hint = " NORMFACE_CUDA=0 builds without the CUDA kernels." if nvcc else ""
            raise stop(f"the build failed, see the message above.{where}{hint}")

        for ext in self.extensions:
            target = Path(self.get_ext_fullpath(ext.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / (ext.name.rpartition(".")[2] + ".so"), target)
        if not nvcc:  # one from an earlier build would be packed, or found by an editable install
            Path(self.get_ext_fullpath("normface_ext._cuda")).unlink(missing_ok=True)
            if self.editable_mode:
                Path("normface_ext/_cuda.so").unlink(missing_ok=True)


class AnyPythonWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def local_version(nvcc: str | None) -> str:
    """What tells wheels of one version apart, as torch's do: "+cpu", or "+cu130" with kernels by CUDA 13.0.
    NORMFACE_LOCAL_VERSION names another, or none if it is empty, which is what PyPI takes. Out of an sdist
    there is none: pip, which chose it by its version, refuses to make another of it."""
    usual = "cpu" if nvcc is None else "cu" + nvcc_version(nvcc).replace(".", "")
    usual = "" if Path("PKG-INFO").exists() else usual  # only an sdist has it
    chosen = os.environ.get("NORMFACE_LOCAL_VERSION", usual)
    if not re.fullmatch(r"([a-z0-9]+(\.[a-z0-9]+)*)?", chosen):
        raise stop(f"expected NORMFACE_LOCAL_VERSION like 'cpu' or 'cu130', got {chosen!r}")
    return f"+{chosen}" if chosen else ""


def extension(name: str, *patterns: str) -> Extension:
    sources = sorted(str(path) for pattern in patterns for path in Path().glob(pattern))
    return Extension(f"normface_ext.{name}", sources)


def licence() -> dict[str, str]:
    """The licence as this setuptools spells it: an SPDX expression from 77 on. Either form, in
    pyproject.toml, makes some version of setuptools refuse the whole file."""
    return {"license_expression" if version_key(setuptools.__version__) >= (77,) else "license": "MIT"}


if __name__ == "__main__":  # scripts/ptxas_report.py reads the flags above
    extensions = [extension("_C", "csrc/*.cpp", "csrc/cpu/*.cpp")]
    nvcc = find_nvcc()
    if nvcc and any(Path("csrc/cuda").glob("*/*.cu")):
        check_nvcc(nvcc)
        extensions.append(extension("_cuda", "csrc/cuda/*/*.cu", OLDER_LINUX))
    sources_only = "sdist" in sys.argv  # they are the same for all
    setup(
        version=VERSION + ("" if sources_only else local_version(nvcc)),
        ext_modules=extensions,
        cmdclass={"build_ext": NinjaBuild, "bdist_wheel": AnyPythonWheel},
        **licence(),
    )
