"""What the tests of benchmarks/ share: its modules, its script as a user runs it, and bad competitors."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
MODULES = (
    *("cases", "competitors", "peers", "floor", "truth", "measure", "processes", "report", "machine"),
    *("host", "contest", "bench_kernels", "accuracy"),
)


@contextlib.contextmanager
def modules() -> Iterator[SimpleNamespace]:
    """The script's modules, gone again afterwards: their names are too common to stay."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        try:
            yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
        finally:
            for name in MODULES:
                sys.modules.pop(name, None)


def environment(**more: str) -> dict[str, str]:
    # One thread: with more, a machine busy with other tests makes tiny operations crawl.
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def run(*command: str, cwd: Path | None = None, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=900,
        cwd=cwd,
        env=environment(**more),
    )


def quick(out: Path, *options: str) -> list[dict]:
    done = run(str(FOLDER / "bench_kernels.py"), "--quick", "--out", str(out), *options)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "normface_ext:" in done.stdout and "CPU" in done.stdout, done.stdout
    return read(out)


def read(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "kernels.jsonl").read_text().splitlines()]


def gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state == "Z"


def eventually(condition: Callable[[], object], seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


class Rival:
    """Stands in for `measure.Measured`: its name says how it behaves."""

    def __init__(self, name: str, *about: object) -> None:
        self.name, self.file = name, ""

    def remember(self, file: str) -> None:
        self.file = file

    def first(self) -> float:
        if self.name == "hangs":
            # With the interpreter's lock held, as a kernel or a compiler might: no signal handler would run.
            ctypes.PyDLL(None).sleep(1000)
        if self.name == "starts another":
            child = subprocess.Popen(["sleep", "1000"])
            Path(self.file).write_text(str(child.pid))
            time.sleep(1000)
        if self.name == "crashes":
            os.abort()
        if self.name == "raises":
            raise RuntimeError("no kernel for this size\nand more lines")
        return 1.5
