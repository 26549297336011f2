"""Workers of `pytest -n` share the cores, and one has all tests with processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from workers import WITH_PROCESSES, threads_of

HERE = Path(__file__).resolve().parent


@pytest.mark.parametrize(
    ("workers", "cores", "threads"), [(1, 2, 2), (2, 2, 1), (8, 2, 1), (2, 16, 8), (3, 16, 5)]
)
def test_threads_of_a_worker(workers, cores, threads):
    assert threads_of(workers, cores) == threads


def test_files_that_start_ranks_are_known():
    starting = [path.name for path in HERE.glob("test_*.py") if "\nfrom ranks import" in path.read_text()]
    assert starting and all(name.startswith(WITH_PROCESSES) for name in starting)


SAMPLE = """
import os, pytest, torch
from pathlib import Path

@pytest.mark.parametrize("i", range(6))
def test_it(i, request):
    line = f"{os.environ['PYTEST_XDIST_WORKER']} {torch.get_num_threads()} {os.environ['OMP_NUM_THREADS']}"
    Path(f"{request.path.stem} {i}.note").write_text(line)
"""
CONFTEST = """
import workers

def pytest_xdist_make_scheduler(config, log): return workers.scheduler(config, log)

def pytest_configure(config): workers.prepare(config)
"""


@pytest.mark.slow
def test_files_and_threads_of_two_workers(tmp_path):
    pytest.importorskip("xdist")
    for name in ("test_distributed_a", "test_distributed_b", "test_other"):
        (tmp_path / f"{name}.py").write_text(SAMPLE)
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\n")
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    command = [sys.executable, "-m", "pytest", "-n", "2", "-p", "no:cacheprovider"]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0 and "18 passed" in ran.stdout, ran.stdout + ran.stderr
    notes = {path.name: path.read_text().split() for path in tmp_path.glob("*.note")}
    assert len(notes) == 18
    assert len({worker for name, (worker, *_) in notes.items() if "distributed" in name}) == 1
    assert {worker for worker, *_ in notes.values()} == {"gw0", "gw1"}
    threads = str(threads_of(2, len(os.sched_getaffinity(0))))
    assert all(counts == [threads, threads] for _, *counts in notes.values())
