"""The benchmark of the heads on toy sizes, and the results that are committed."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from bench_folder import FOLDER, modules

import normface_ext as nf

RECORDS = sorted((FOLDER / "results").rglob("heads.jsonl"))


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    with modules():
        yield importlib.import_module("bench_heads")


def test_every_head_is_measured_and_right(
    bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main(["--quick", "--out", str(tmp_path)]) == 0
    rows = rows_of(tmp_path / "heads.jsonl")
    assert [row["head"] for row in rows] == list(bench.HEADS)
    assert rows[0]["head"] == "NormFace" and rows[0]["ratio"] == 1
    for row in rows:
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] and row["ratio"] > 0
        assert max(row["err_loss"], row["err_dx"], row["err_dw"]) < 1e-5, row["head"]
    assert (tmp_path / "heads.md").read_text() in capsys.readouterr().out


def test_a_wrong_head_is_not_timed(
    bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = nf.functional.normface_loss

    def wrong(*given: object, **options: object) -> object:
        return right(*given, **options) * (1.001 if isinstance(options.get("margin"), nf.MagFace) else 1)

    monkeypatch.setattr(nf.functional, "normface_loss", wrong)
    assert bench.main(["--quick", "--out", str(tmp_path)]) == 1
    assert "WRONG RESULT, not timed: MagFace" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("file", RECORDS, ids=lambda file: file.parent.name)
def test_the_table_is_made_from_its_rows(bench: ModuleType, file: Path) -> None:
    rows = rows_of(file)
    assert file.with_suffix(".md").read_text() == bench.table(rows, rows[0])
