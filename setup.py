"""Builds two libraries: `_C` (schemas, CPU kernels) always, `_cuda` when a CUDA toolkit is found.

They use only torch's stable ABI, and `_cuda` carries its own CUDA runtime. So the torch in the build
environment lends its headers and nothing else: it may be a CPU build, or made with another CUDA than
nvcc's. torch.utils.cpp_extension refuses both, hence the small ninja file written here. It tracks
headers, so a second build compiles only what changed.

Environment: NORMFACE_CUDA=0|1 (default: if nvcc is found), CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS,
DEBUG=1, and CXX, CXXFLAGS, LDFLAGS as usual.
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
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

DEBUG = os.environ.get("DEBUG", "0") not in ("", "0")
# No fast-math of any kind: the losses promise NaN, infinity and the last bits.
COMMON = ["-std=c++20", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
COMMON += ["-O0", "-g"] if DEBUG else ["-O3"]
CXX_FLAGS = [*COMMON, "-fPIC", "-Wall", "-Wextra", "-fvisibility=hidden", "-UNDEBUG" if DEBUG else "-g0"]
NVCC_FLAGS = [*COMMON, "-DUSE_CUDA", "--expt-relaxed-constexpr"]
NVCC_FLAGS += ["-Xcompiler=-fPIC,-Wall,-Wextra,-fvisibility=hidden", *["-lineinfo"] * DEBUG]
ARCHITECTURES = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]  # without a GPU at hand


def find_nvcc() -> str | None:
    wanted = os.environ.get("NORMFACE_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"normface_ext: expected NORMFACE_CUDA to be 0 or 1, got {wanted!r}")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    places = [f"{home}/bin/nvcc" for home in homes if home]
    places += [shutil.which("nvcc") or "", "/usr/local/cuda/bin/nvcc"]
    nvcc = next((place for place in places if os.access(place, os.X_OK)), None)
    if wanted == "1" and nvcc is None:
        raise SystemExit(
            "normface_ext: NORMFACE_CUDA=1 asks for the CUDA kernels, but there is no nvcc in CUDA_HOME, "
            "CUDA_PATH, PATH or /usr/local/cuda. Install the CUDA toolkit, or unset NORMFACE_CUDA."
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


def gencode(arch: str) -> list[str]:
    match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", arch)
    if not match:
        raise SystemExit(
            f"normface_ext: expected TORCH_CUDA_ARCH_LIST like '8.0;9.0+PTX', got {arch!r} in it"
        )
    number = match[1] + match[2]
    codes = [f"sm_{number}", *[f"compute_{number}"] * bool(match[3])]
    return [f"-gencode=arch=compute_{number},code={code}" for code in codes]


def package_dir(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"normface_ext: --no-build-isolation needs {name} (pyproject.toml lists them all)")
    return Path(spec.origin).parent


def include_flags(folders: list[str], theirs: list[Path]) -> list[str]:
    ours = [f"-I{Path(folder).resolve()}" for folder in folders]
    return ours + [flag for path in theirs for flag in ("-isystem", str(path))]


def cxx_commands(build: build_ext, macros: dict[str, str]) -> tuple[list[str], list[str]]:
    headers = [package_dir("torch") / "include", Path(sysconfig.get_path("include"))]
    if importlib.util.find_spec("pybind11"):  # else the copy that torch bundles
        headers.insert(0, package_dir("pybind11") / "include")
    defines = [f'-D{name}="{value}"' for name, value in macros.items()]
    compile_command = build.compiler.compiler_so_cxx + CXX_FLAGS + include_flags(["csrc"], headers) + defines
    return compile_command, [*build.compiler.linker_so_cxx]


def cuda_commands(nvcc: str, archs: list[str], threads: int) -> tuple[list[str], list[str]]:
    host = [f"-ccbin={os.environ['CXX']}"] if os.environ.get("CXX") else []
    targets = [flag for arch in archs for flag in gencode(arch)] + [f"--threads={threads}"]
    includes = include_flags(["csrc", "csrc/cuda"], [package_dir("torch") / "include"])
    # libtorch is kept though it looks unused: at run time it brings libtorch_cuda, the stream's home.
    link_flags = ["-shared", "-cudart=static", "-Xlinker=--no-as-needed", "-ltorch"]
    return [nvcc, *host, *NVCC_FLAGS, *targets, *includes], [nvcc, *host, *link_flags]


def escaped(path: object) -> str:
    """For a path in a ninja `build` line."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def ninja_lines(
    ext: Extension, folder: Path, compile_command: list[str], link_command: list[str]
) -> list[str]:
    name = ext.name.rpartition(".")[2]
    libraries = [f"-L{package_dir('torch') / 'lib'}", "-ltorch_cpu"]
    compiler, linker, libs = (
        shlex.join(c).replace("$", "$$") for c in (compile_command, link_command, libraries)
    )
    lines = [f"rule compile{name}", f"  command = {compiler} -MD -MF $out.d -c $in -o $out"]
    lines += ["  depfile = $out.d", "  deps = gcc"]
    lines += [f"rule link{name}", f"  command = {linker} $in {libs} -o $out"]
    objects = [escaped(folder / source) + ".o" for source in ext.sources]
    for source, built in zip(ext.sources, objects, strict=True):
        lines.append(f"build {built}: compile{name} {escaped(Path(source).resolve())}")
    return [*lines, f"build {escaped(folder / name)}.so: link{name} {' '.join(objects)}"]


class NinjaBuild(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        # _cuda is no Python module: torch.ops.load_library loads it, under any Python.
        is_cuda = fullname.endswith("_cuda")
        return fullname.replace(".", os.sep) + ".so" if is_cuda else super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        folder = Path("build", "ninja-" + sysconfig.get_config_var("SOABI")).resolve()
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
        lines = ninja_lines(main, folder, *cxx_commands(self, macros))
        if nvcc:
            # Files compile side by side; threads within a file take the cores left over.
            threads = -(-jobs // len(cuda[0].sources))
            lines += ninja_lines(cuda[0], folder, *cuda_commands(nvcc, archs, threads))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        ninja = ["ninja"] if shutil.which("ninja") else [sys.executable, "-m", "ninja"]
        if subprocess.run([*ninja, "-C", str(folder), "-v", "-j", str(jobs)]).returncode:
            hint = " NORMFACE_CUDA=0 builds without the CUDA kernels." if nvcc else ""
            raise SystemExit(f"normface_ext: the build failed, see the message above.{hint}")

        for ext in self.extensions:
            target = Path(self.get_ext_fullpath(ext.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / (ext.name.rpartition(".")[2] + ".so"), target)
        if not nvcc:  # one from an earlier build would be packed, or found by an editable install
            Path(self.get_ext_fullpath("normface_ext._cuda")).unlink(missing_ok=True)
            if self.editable_mode:
                Path("normface_ext/_cuda.so").unlink(missing_ok=True)


def extension(name: str, *patterns: str) -> Extension:
    sources = sorted(str(path) for pattern in patterns for path in Path().glob(pattern))
    return Extension(f"normface_ext.{name}", sources)


if __name__ == "__main__":  # scripts/ptxas_report.py reads the flags above
    extensions = [extension("_C", "csrc/ops.cpp", "csrc/cpu/*.cpp")]
    if find_nvcc() and any(Path("csrc/cuda").glob("*.cu")):
        extensions.append(extension("_cuda", "csrc/cuda/*.cu"))
    setup(ext_modules=extensions, cmdclass={"build_ext": NinjaBuild})
