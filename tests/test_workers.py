"""Workers of `pytest -n` share the cores, and tests of one group share a worker."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from workers import threads_of

HERE = Path(__file__).resolve().parent


@pytest.mark.parametrize(
    ("workers", "cores", "threads"), [(1, 2, 2), (2, 2, 1), (8, 2, 1), (2, 16, 8), (3, 16, 5)]
)
def test_threads_of_a_worker(workers, cores, threads):
    assert threads_of(workers, cores) == threads


SAMPLE = """
import os, pytest, torch
from pathlib import Path

def note(request):
    line = f"{os.environ['PYTEST_XDIST_WORKER']} {torch.get_num_threads()} {os.environ['OMP_NUM_THREADS']}"
    Path(request.node.name).write_text(line)

@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("i", range(6))
def test_grouped(i, request): note(request)

@pytest.mark.parametrize("i", range(6))
def test_alone(i, request): note(request)
"""
CONFTEST = """
import pytest, workers

@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config): workers.keep_groups(config)

def pytest_configure_node(node): workers.tell(node)

def pytest_configure(config): workers.prepare(config)
"""


@pytest.mark.slow
def test_groups_and_threads_of_two_workers(tmp_path):
    pytest.importorskip("xdist")
    (tmp_path / "test_sample.py").write_text(SAMPLE)
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    command = [sys.executable, "-m", "pytest", "-n", "2", "-p", "no:cacheprovider"]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0 and "12 passed" in ran.stdout, ran.stdout + ran.stderr
    notes = {path.name: path.read_text().split() for path in tmp_path.glob("test_*]*")}
    assert len(notes) == 12
    assert len({worker for name, (worker, *_) in notes.items() if "grouped" in name}) == 1
    assert {worker for worker, *_ in notes.values()} == {"gw0", "gw1"}
    threads = str(threads_of(2, len(os.sched_getaffinity(0))))
    assert all(counts == [threads, threads] for _, *counts in notes.values())
