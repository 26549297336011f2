"""What plain `pytest` leaves out, and what brings it back."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import combinations, product
from pathlib import Path

import pytest
from selection import covering

HERE = Path(__file__).resolve().parent


def pairs(cases):
    return {(i, case[i], j, case[j]) for case in cases for i, j in combinations(range(len(case)), 2)}


@pytest.mark.parametrize("sizes", [(2, 15, 4, 3), (5, 5), (1, 7), (2, 2, 2, 2, 2, 2)], ids=str)
def test_two_values_of_any_two_parameters_meet(sizes):
    cases = list(product(*map(range, sizes)))
    chosen = [cases[i] for i in covering(cases, 2)]
    assert pairs(chosen) == pairs(cases)
    largest = sorted(sizes)[-2] * max(sizes)
    assert largest <= len(chosen) <= 1.5 * largest + 2


def test_each_value_once_and_the_first_alone():
    cases = list(product(range(3), range(4), range(2)))
    chosen = covering(cases, 1)
    assert len(chosen) == 4
    assert [{cases[i][k] for i in chosen} for k in range(3)] == [{0, 1, 2}, {0, 1, 2, 3}, {0, 1}]
    assert covering(cases, 0) == {0}


def test_what_never_changes_counts_for_nothing():
    assert covering([("a", 0), ("a", 1)], 2) == {0, 1}
    assert covering([("a",)], 2) == {0}
    assert covering([], 1) == set()


SAMPLE = """
import pytest

@pytest.fixture(params=["cpu", "other"])
def lane(request): return request.param

@pytest.mark.slow
def test_slow(): pass

def test_quick(): pass

@pytest.mark.covering(1)
@pytest.mark.parametrize(("a", "b"), [(0, 0), (0, 1), (1, 0), (1, 1)])  # rows, not two parameters
def test_product(lane, a, b): pass
"""
CONFIGURATION = "[pytest]\naddopts = --strict-markers\nmarkers =\n  slow\n"
PRODUCT = [f"test_product[{lane}-{a}-{b}]" for lane, a, b in product(["cpu", "other"], [0, 1], [0, 1])]
CHOSEN = [f"test_product[{case}]" for case in ("cpu-0-0", "other-0-1", "cpu-1-0", "cpu-1-1")]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["test_quick", *CHOSEN]),
        (["test_sample.py"], ["test_quick", *CHOSEN]),
        (["--all"], ["test_slow", "test_quick", *PRODUCT]),
        (["--all", "-m", "slow"], ["test_slow", *(name for name in PRODUCT if name not in CHOSEN)]),
        (["test_sample.py::test_slow"], ["test_slow"]),
        (["test_sample.py::test_product"], PRODUCT),
        (["test_sample.py::test_product[other-1-1]"], ["test_product[other-1-1]"]),
        (["./test_sample.py::test_slow", "test_sample.py::test_quick"], ["test_slow", "test_quick"]),
    ],
    ids=lambda value: " ".join(value) or "plain" if value and "test_quick" not in value else None,
)
def test_a_marker_decides(tmp_path, arguments, expected):
    (tmp_path / "test_sample.py").write_text(SAMPLE)
    (tmp_path / "pytest.ini").write_text(CONFIGURATION)
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "selection", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    names = [line.partition("::")[2] for line in ran.stdout.splitlines() if "::" in line]
    assert sorted(names) == sorted(expected)
