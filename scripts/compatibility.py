#!/usr/bin/env python3
"""One build, any torch: compiles against other torches' headers and runs wheels under other torches.

    scripts/compatibility.py [--oldest 2.11.0] [--newest 2.14.1] [--headers 2.12.0] [--work DIR] [STEP ...]

Steps, in order:

    fetch       virtual environments with the oldest torch and setuptools 65, and with the newest torch
    headers     every C++ file against the headers of each torch, the .cu files by nvcc too where it is found
    oldest      `pip install --no-build-isolation .` with the oldest torch, a short test set, a wheel
    wheels      that wheel under this torch and the newest; sdist -> wheel by this torch, under the oldest
    editable    `pip install -e .` with the newest torch and setuptools, imported here and elsewhere

and only where it is asked for, since it compares nothing but compilers:

    cross       every C++ file for Linux on aarch64 and for macOS, by zig (`pip install ziglang`)

Run by the Python of an environment with torch and the build requirements. Needs the network and about 12 GB
under --work (a temporary folder by default): torch's own wheels bring CUDA.
"""

from __future__ import annotations

import argparse
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
#: Each family of ops forward and backward, compile, the libraries' symbols; on the CPU kernels alone.
SHORT_SET = ["test_build", "test_normalize", "test_norm_linear", "test_normface_loss", "test_metric_losses"]
SHORT_SET += ["test_modules", "test_arguments", "test_compile"]
CROSS_TARGETS = ["aarch64-linux-gnu.2.28", "aarch64-macos"]
SMOKE = (
    "import torch, normface_ext as nf; head = nf.NormFaceLoss(8, 5, margin=nf.CosFace(0.2));"
    "x = torch.randn(4, 8, requires_grad=True); head(x, torch.arange(4)).backward();"
    "assert x.grad.isfinite().all(); print(torch.__version__, nf.build_info()['torch_built'], nf.__file__)"
)


def run(*command: object, **options: object) -> None:
    print("+", *command, flush=True)
    environment = {**os.environ, "NORMFACE_CUDA": "0", **options.pop("environment", {})}  # type: ignore[dict-item]
    subprocess.run([str(part) for part in command], check=True, env=environment, **options)  # type: ignore[call-overload]


def one_of(folder: Path, pattern: str) -> Path:
    found = list(folder.glob(pattern))
    if len(found) != 1:
        raise SystemExit(
            f"compatibility: expected one {pattern} in {folder}, got {[path.name for path in found]}"
        )
    return found[0]


@dataclass
class Work:
    folder: Path
    oldest: str
    newest: str
    between: list[str]

    def python(self, name: str) -> Path:
        return self.folder / name / "bin" / "python"

    def copy_of_checkout(self, name: str) -> Path:
        """Tracked and new files, nothing built: what a clone would have."""
        target = self.folder / name
        shutil.rmtree(target, ignore_errors=True)
        listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        for file in filter(None, names.split("\0")):
            if (ROOT / file).is_file():
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / file, target / file)
        return target

    def environment(self, name: str, *packages: str) -> None:
        if not self.python(name).exists():
            venv.create(self.folder / name, with_pip=True)
        run(self.python(name), "-m", "pip", "install", "--quiet", *packages)

    def beside_this_torch(self, name: str) -> Path:
        """An environment of its own that borrows the packages of this one, torch among them."""
        if not self.python(name).exists():
            venv.create(self.folder / name, with_pip=True)
            site = next((self.folder / name / "lib").glob("python3*/site-packages"))
            # After the environment's own: what is installed there comes first.
            borrowed = [path for path in sys.path if Path(path).name == "site-packages"]
            (site / "zz_borrowed.pth").write_text("".join(f"{path}\n" for path in borrowed))
        return self.python(name)

    def install(self, python: Path, wheel: Path) -> None:
        run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", wheel)

    def smoke(self, python: Path) -> None:
        run(python, "-W", "ignore", "-c", SMOKE, cwd=self.folder)

    def short_tests(self, python: Path, checkout: Path) -> None:
        files = [path for name in SHORT_SET if (path := checkout / "tests" / f"{name}.py").exists()]
        lane = {"NORMFACE_TEST_NAMESPACES": "normface_ext"}
        run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, cwd=checkout, environment=lane)

    # The steps.

    def fetch(self) -> None:
        tests = ["pytest", "pytest-xdist", "hypothesis", "numpy"]
        build = ["ninja", "wheel"]
        self.environment("oldest", f"torch=={self.oldest}", "setuptools<66", *build, *tests)
        self.environment("newest", f"torch=={self.newest}", "setuptools>=77", *build, *tests)

    def headers(self) -> None:
        for version in self.between:
            folder = self.folder / f"torch-{version}"
            if not (folder / "torch").exists():
                pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
                run(*pip, "--dest", folder, f"torch=={version}")
                with zipfile.ZipFile(one_of(folder, "torch-*.whl")) as wheel:
                    wheel.extractall(folder, [n for n in wheel.namelist() if n.startswith("torch/include/")])
                one_of(folder, "torch-*.whl").unlink()
            compile_against(folder / "torch" / "include", version)
        for name, version in (("oldest", self.oldest), ("newest", self.newest)):
            site = next((self.folder / name / "lib").glob("python3*/site-packages"))
            compile_against(site / "torch" / "include", version)

    def oldest_torch(self) -> None:
        python, checkout = self.python("oldest"), self.copy_of_checkout("checkout-oldest")
        pip = [python, "-m", "pip"]
        run(*pip, "install", "--quiet", "--no-build-isolation", "--no-deps", ".", cwd=checkout)
        self.short_tests(python, checkout)
        wheels = self.folder / "by-oldest"
        shutil.rmtree(wheels, ignore_errors=True)
        run(*pip, "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", wheels, ".", cwd=checkout)

    def wheels(self) -> None:
        by_oldest = one_of(self.folder / "by-oldest", "*.whl")
        here = self.beside_this_torch("here")
        self.install(here, by_oldest)
        self.smoke(here)
        self.install(self.python("newest"), by_oldest)
        self.short_tests(self.python("newest"), self.copy_of_checkout("checkout-newest"))

        checkout, made = self.copy_of_checkout("checkout-sdist"), self.folder / "by-this"
        shutil.rmtree(made, ignore_errors=True)
        run(here, "setup.py", "--quiet", "sdist", "--dist-dir", made, cwd=checkout)
        sdist = one_of(made, "*.tar.gz")
        pip = [here, "-m", "pip"]
        run(*pip, "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", made, sdist, cwd=self.folder)
        self.install(self.python("oldest"), one_of(made, "*.whl"))
        self.short_tests(self.python("oldest"), checkout)

    def cross(self) -> None:
        build = runpy.run_path(str(ROOT / "setup.py"))
        include = build["package_dir"]("torch") / "include"
        for target in CROSS_TARGETS:
            compiler = [sys.executable, "-m", "ziglang", "c++", "-target", target, "-fPIC", "-Wall"]
            with tempfile.TemporaryDirectory() as objects:
                flags = [*build["COMMON"], *cxx_flags(build, include)]
                sources = cxx_sources()
                compile_all(
                    [[*compiler, *flags, "-c", str(s), "-o", f"{objects}/{s.name}.o"] for s in sources],
                    f"for {target}",
                )

    def editable(self) -> None:
        checkout, python = self.copy_of_checkout("checkout-editable"), self.python("newest")
        pip = [python, "-m", "pip", "install", "--quiet"]
        run(*pip, "--no-build-isolation", "--no-deps", "-e", ".", cwd=checkout)
        inside = f"import normface_ext as nf; assert nf.__file__.startswith({str(checkout)!r}), nf.__file__"
        for where in (checkout, checkout / "tests", self.folder):
            run(python, "-W", "ignore", "-c", f"{SMOKE}; {inside}", cwd=where)


def cxx_sources() -> list[Path]:
    return [*sorted((ROOT / "csrc").glob("*.cpp")), *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]


def cxx_flags(build: dict[str, Any], include: Path) -> list[str]:
    """Where headers are, and what setup.py defines."""
    macros = ["NF_VERSION", "NF_BUILD_TORCH", "NF_CUDA_ARCHS", "NF_CUDA_VERSION"]
    folders = build["include_flags"]([str(ROOT / "csrc")], [include])
    return [*folders, *(f'-D{name}=""' for name in macros)]


def compile_against(include: Path, version: str) -> None:
    """Syntax and types of every source: templates that the sources use are instantiated. The .cu files once
    by g++, with the emulation in CUDA's place, and by nvcc as far as PTX where it is found."""
    print(f"headers of torch {version}", flush=True)
    build = runpy.run_path(str(ROOT / "setup.py"))
    compiler = os.environ.get("CXX", "c++")
    plain = [compiler, *build["COMMON"][:-1], *cxx_flags(build, include), "-fsyntax-only"]
    commands = [[*plain, str(path)] for path in cxx_sources()]
    emulated = [
        f"-I{ROOT / 'tests' / 'emulation'}",
        "-DNF_NAMESPACE=normface_headers",
        "-Wno-unknown-pragmas",
    ]
    kernels = sorted((ROOT / "csrc" / "cuda").glob("*/*.cu"))
    commands += [[*plain, *emulated, "-x", "c++", str(path)] for path in kernels]
    if nvcc := build["find_nvcc"]():
        folders = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'cuda'}", "-isystem", str(include)]
        quick = ["-gencode=arch=compute_80,code=compute_80", "-Xcicc=-O0", "-c", "-o", os.devnull]
        commands += [[nvcc, *build["NVCC_FLAGS"], *folders, *quick, str(path)] for path in kernels]
    compile_all(commands, f"against torch {version}")


def compile_all(commands: list[list[str]], how: str) -> None:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        ran = pool.map(lambda command: subprocess.run(command, capture_output=True, text=True), commands)
    failed = [done for done in ran if done.returncode]
    for done in failed:
        print(f"{done.args}:\n{done.stderr[:3000]}", flush=True)
    if failed:
        raise SystemExit(f"compatibility: {len(failed)} files do not compile {how}")
    print(f"compiled {how}: {len(commands)} files", flush=True)


STEPS = {
    "fetch": Work.fetch,
    "headers": Work.headers,
    "oldest": Work.oldest_torch,
    "wheels": Work.wheels,
    "editable": Work.editable,
    "cross": Work.cross,
}
BY_DEFAULT = [name for name in STEPS if name != "cross"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(STEPS)}")
    parser.add_argument("--oldest", default="2.11.0")
    parser.add_argument("--newest", default="2.14.1")
    parser.add_argument(
        "--headers", nargs="*", default=["2.12.0"], help="more versions whose headers are tried"
    )
    parser.add_argument("--work", type=Path)
    options = parser.parse_args()
    if unknown := set(options.steps) - set(STEPS):
        parser.error(f"expected steps of {', '.join(STEPS)}, got {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.work or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        work = Work(folder, options.oldest, options.newest, options.headers)
        for name in options.steps or BY_DEFAULT:
            print(f"== {name}", flush=True)
            STEPS[name](work)
    print("compatibility: every step passed")


if __name__ == "__main__":
    main()
