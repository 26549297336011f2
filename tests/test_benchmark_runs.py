"""Whole runs of the benchmark that meet what must not happen: bad competitors, an end, a wrong kernel."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from bench_folder import FOLDER, environment, eventually, gone, read, run

# What every process of a run, its fork server included, imports first.
MEDDLER = """
import ctypes, os
import competitors, peers

def add(name, call):
    peers.PROVIDERS[name] = competitors.Provider(lambda case, mode, device: call)

def hang(*a):
    open(os.environ["HANGS"], "w").close()
    ctypes.PyDLL(None).sleep(1000)  # with the interpreter's lock held

add("hangs", hang)
add("crashes", lambda *a: os.abort())
"""
MEDDLED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
import meddler, processes, bench_kernels
processes.PRELOAD.append("meddler")
sys.exit(bench_kernels.main())
"""


def meddled(tmp_path: Path, *options: str, **more: str) -> tuple[list[str], dict[str, str]]:
    """The command and the environment of a run with MEDDLER."""
    (tmp_path / "meddler.py").write_text(MEDDLER)
    path = os.pathsep.join((str(tmp_path), str(FOLDER)))
    command = ["-c", MEDDLED, "--quick", "--cases", "head 32|norm_linear", "--out", str(tmp_path), *options]
    return command, {"PYTHONPATH": path, "HANGS": str(tmp_path / "hangs"), **more}


@pytest.mark.slow
def test_a_run_with_bad_competitors(tmp_path: Path) -> None:
    command, more = meddled(tmp_path, "--budget", "15")
    began = time.monotonic()
    done = run(*command, cwd=tmp_path, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - began < 600
    rows = {row["provider"]: row for row in read(tmp_path) if row["case"].startswith("head")}
    assert rows["hangs"]["outcome"] == "over budget" and "15 s left" in rows["hangs"]["note"]
    assert rows["crashes"]["outcome"] == "failed" and "exit code -6" in rows["crashes"]["note"]
    assert rows["normface_ext"]["median_ms"] and rows["eager"]["median_ms"]
    assert "over budget (" in done.stdout and "hangs" in (tmp_path / "kernels.md").read_text()


def left_over(mark: str) -> list[str]:
    """Processes that have `mark` in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes() and not gone(int(folder.name)):
                found.append((folder / "cmdline").read_text())
        except OSError:
            continue
    return found


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_ended(tmp_path: Path, how: signal.Signals) -> None:
    """In the middle of a competitor's call: rows known so far are there, and no process is left."""
    mark = uuid.uuid4().hex
    command, more = meddled(tmp_path, MARK=mark)
    process = subprocess.Popen(
        [sys.executable, *command], cwd=tmp_path, env=environment(**more), stdout=subprocess.DEVNULL
    )
    try:
        file = tmp_path / "kernels.jsonl"
        assert eventually((tmp_path / "hangs").exists, 300)
        process.send_signal(how)
        assert process.wait(120) != 0
        assert eventually(lambda: not left_over(mark), 120), left_over(mark)
    finally:
        process.kill()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    outcomes = {row["provider"]: row["outcome"] for row in rows}
    assert outcomes["quack"] == "unavailable"
    if how != signal.SIGKILL:
        assert {outcomes[name] for name in ("normface_ext", "eager", "hangs")} == {"interrupted"}


# Imported by the fork server, so by every competitor's process. Each kernel keeps what it can and spoils
# one thing; w + m (w - w) has w's value and m times its gradient. A file says which of them is in use.
SABOTAGE = """
import os
import re
from pathlib import Path
import torch
import normface_ext as nf

def spoilt(tensor, factor):
    if isinstance(tensor, float):  # the fixed scale
        return tensor
    return tensor.detach() + factor * (tensor - tensor.detach())

def one_class(w, y):
    factor = torch.ones(len(w), 1)
    factor[y[0]] = 1.001
    return spoilt(w, factor)

right = nf.functional.normface_loss
wrong = {
    "nothing": right,
    "loss": lambda x, w, y, s, **k: right(x, w, y, s, **k) + 1e-4,
    "dx": lambda x, w, y, s, **k: right(spoilt(x, 1.001), w, y, s, **k),
    "one class of dw": lambda x, w, y, s, **k: right(x, one_class(w, y), y, s, **k),
    "ds": lambda x, w, y, s, **k: right(x, w, y, spoilt(s, 1.001), **k),
    "nan": lambda x, w, y, s, **k: right(x, w, y, s, **k) * float("nan"),
}
in_use = Path(os.environ["SABOTAGE"])
nf.functional.normface_loss = lambda *a, **k: wrong[in_use.read_text()](*a, **k)
"""
SABOTAGED = """
import json, sys
import sabotage, processes, bench_kernels
processes.PRELOAD.append("sabotage")
status = {}
for name in sabotage.wrong:
    sabotage.in_use.write_text(name)
    status[name] = bench_kernels.main()
print("STATUS " + json.dumps(status))
"""


@pytest.mark.slow
def test_a_wrong_kernel_is_not_timed(tmp_path: Path) -> None:
    (tmp_path / "sabotage.py").write_text(SABOTAGE)
    path = os.pathsep.join((str(tmp_path), str(FOLDER)))
    options = ("--quick", "--cases", "head 32", "--out", str(tmp_path))
    done = run("-c", SABOTAGED, *options, cwd=tmp_path, PYTHONPATH=path, SABOTAGE=str(tmp_path / "in_use"))
    last = next((line for line in done.stdout.splitlines() if line.startswith("STATUS ")), None)
    assert last, f"the script failed\n{done.stdout}\n{done.stderr}"
    status = json.loads(last.removeprefix("STATUS "))
    assert status.pop("nothing") == 0, done.stderr
    assert len(status) == 5 and all(code == 1 for code in status.values()), f"{status}\n{done.stderr}"
    assert done.stderr.count("WRONG RESULT") == 5, done.stderr
