"""The benchmark of the host's time, and its results that are committed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench_folder import FOLDER, run

RECORDS = sorted((FOLDER / "results").rglob("bench_host.jsonl"))
PARTS = ["forward", "forward + backward", "no grad", "checks", "plan", "op", "of it dispatch"]
PARTS += ["of it allocation", "of it launch and arithmetic"]


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_every_cause_is_timed(tmp_path: Path) -> None:
    done = run(str(FOLDER / "bench_host.py"), "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "bench_host.jsonl")
    assert [row["part"] for row in rows] == PARTS
    for row in rows[:3]:
        assert set(row["us"]) == {"normface_ext", "eager"} and min(row["us"].values()) > 0
    assert all(part in done.stdout for part in PARTS)


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.parent.name)
def test_committed_rows_name_every_cause(path: Path) -> None:
    rows = rows_of(path)
    assert {row["part"] for row in rows} == set(PARTS) and all(row["device"] for row in rows)


def test_there_are_committed_rows() -> None:
    assert RECORDS
