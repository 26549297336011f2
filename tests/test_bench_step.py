"""The benchmark of the whole step on toy sizes, and the results that are committed."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from bench_folder import FOLDER, modules, run

RECORDS = sorted((FOLDER / "results").rglob("steps.jsonl"))


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    with modules():
        try:
            yield importlib.import_module("bench_step")
        finally:
            for name in ("bench_step", "steps"):
                sys.modules.pop(name, None)


@pytest.mark.slow
def test_every_step_is_measured_and_right(bench: ModuleType, tmp_path: Path) -> None:
    done = run(str(FOLDER / "bench_step.py"), "--quick", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "steps.jsonl")
    assert [row["step"] for row in rows] == [*bench.steps.STEPPERS] * len(bench.steps.OPTIMIZERS)
    for row in rows:
        assert row["outcome"] == "measured" and row["err_weight"] < 1e-3
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] and row["ratio"] > 0
    assert (tmp_path / "steps.md").read_text() in done.stdout


def test_a_wrong_step_is_not_timed(bench: ModuleType) -> None:
    case = bench.cases.head(16, 8, 40)
    rows = {name: {"err_weight": 1e-7, "outcome": "measured"} for name in bench.steps.STEPPERS}
    bench.judge(rows, case)
    rows[bench.steps.IN_BACKWARD]["err_weight"] = 1e-4
    with pytest.raises(ValueError, match=r"ours, in backward: error 0\.0001, allowed"):
        bench.judge(rows, case)
    rows[bench.steps.IN_BACKWARD] = {"outcome": "failed: it died"}
    with pytest.raises(ValueError, match="failed: it died"):
        bench.judge(rows, case)


@pytest.mark.parametrize("file", RECORDS, ids=lambda file: file.parent.name)
def test_the_table_is_made_from_its_rows(bench: ModuleType, file: Path) -> None:
    rows = rows_of(file)
    assert file.with_suffix(".md").read_text() == bench.table(rows, rows[0])
