"""The benchmark script: it measures, and it records.

Nothing here asserts a time. `test_benchmark_processes.py` and `test_benchmark_runs.py` have competitors that
misbehave, `test_benchmark_peers.py` the other packages.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bench_folder import FOLDER, modules, quick, run

import normface_ext as nf

KEYS = [
    *("case", "N", "D", "C", "dtype", "provider", "mode"),
    *("median_ms", "p20_ms", "p80_ms", "ratio_to_eager", "peak_extra_mib"),
    *("err_loss", "err_dx", "err_dw", "err_ds", "floor_ms", "percent_of_floor"),
    *("device", "torch", "version", "threads", "commit", "timestamp"),
    *("package", "how", "outcome", "note"),
]
GPU_ONLY = {
    f"{name}{norm}"
    for name in ("liger-scaled", "liger-triton", "cce", "cce-exact", "quack")
    for norm in ("", "+compiled-norm")
}


def check_rows(rows: list[dict], cases: int) -> None:
    """Every row has every key; every case has ours and eager, measured; who could not take part says why."""
    assert all(list(row) == KEYS for row in rows)
    names = {row["case"] for row in rows}
    assert len(names) == cases, names
    for name in names:
        group = {row["provider"]: row for row in rows if row["case"] == name}
        assert group["compile"]["outcome"] == "unavailable" and "--quick" in group["compile"]["note"]
        if name == "head 32x16x100":
            assert {n for n, row in group.items() if row["note"] == "needs CUDA"} == GPU_ONLY
            assert "torch.lin_ce" in group and "torch.lin_ce+compiled-norm" in group
        for provider in ("normface_ext", "eager"):
            check_numbers(group[provider])


def check_numbers(row: dict) -> None:
    which = f"{row['case']}, {row['provider']}"
    assert (row["outcome"], row["how"]) == ("measured", "benchmark"), which
    for name in ["err_loss", "err_dx"] + (["err_dw", "err_ds"] if row["C"] else []):
        assert 0 <= row[name] < 1e-4, f"{which}: {name} = {row[name]!r}"
    recorded = ["median_ms", "p20_ms", "p80_ms", "ratio_to_eager", "floor_ms", "percent_of_floor"]
    if sys.platform.startswith("linux"):
        recorded.append("peak_extra_mib")
    for name in recorded:
        assert row[name] is not None and row[name] >= 0, f"{which}: {name}"
    if row["provider"] == "eager":
        assert row["ratio_to_eager"] == 1.0, row


def test_a_run(tmp_path: Path) -> None:
    """From the command line, with processes, files and figure, on the first of the toy cases."""
    rows = quick(tmp_path, "--cases", "head 32")
    check_rows(rows, 1)
    assert {row["mode"] for row in rows} == {"fwd+bwd"}
    summary = (tmp_path / "kernels.md").read_text()
    assert "| normface_ext |" in summary and "needs CUDA): liger-scaled, " in summary
    assert (tmp_path / "kernels.png").stat().st_size > 10_000


@pytest.mark.slow
def test_every_toy_case(tmp_path: Path) -> None:
    check_rows(quick(tmp_path), 5)


@pytest.mark.slow
def test_options(tmp_path: Path) -> None:
    rows = quick(tmp_path, "--forward-only", "--amortise-page-faults", "--cases", "normalize 64x32")
    assert {row["case"] for row in rows} == {"normalize 64x32"}
    assert {row["mode"] for row in rows} == {"fwd"}
    notes = {row["note"] for row in rows if row["median_ms"]}
    assert notes == {"page faults amortised"}


@pytest.mark.slow
def test_unknown_case_is_an_error(tmp_path: Path) -> None:
    done = run(str(FOLDER / "bench_kernels.py"), "--quick", "--cases", "no such", "--out", str(tmp_path))
    assert done.returncode == 2, done.stdout + done.stderr


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    with modules() as found:
        yield found


@pytest.mark.parametrize("margin", list(nf.reference.MARGINS))
def test_the_judge_agrees_with_autograd(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, margin: str
) -> None:
    """Its chunked float64 formulas against autograd through the specification."""
    case = bench.cases.head(6, 5, 23, margin=margin)
    inputs = bench.cases.make_inputs(case, "cpu")
    inputs.labels[0], inputs.labels[1] = 0, 22  # first and last class
    monkeypatch.setattr(bench.truth, "CHUNK_BYTES", 8 * 6 * 7)  # four chunks, the last one short
    found = bench.truth.truth(case, inputs, 10.0)
    x, w = (t.detach().double().requires_grad_() for t in (inputs.x, inputs.weight))
    s = torch.tensor(10.0, dtype=torch.float64, requires_grad=True)
    loss = nf.reference.normface_loss(x, w, inputs.labels, s, margin=nf.reference.MARGINS[margin])
    loss.backward()
    for name, right in zip(bench.truth.QUANTITIES, (loss.detach(), x.grad, w.grad, s.grad), strict=True):
        error = bench.truth.relative_errors(found[name], right)
        assert max(error) < 1e-12, f"{margin}: {name} differs by {error}"


@pytest.mark.slow
def test_accuracy_over_the_scale(bench: SimpleNamespace, tmp_path: Path) -> None:
    """The documentation's table: every cell is there, and no fused float32 error is far above eager's."""
    found = bench.accuracy.main(
        ["--seeds", "1", "--classes", "40", "--device", "cpu", "--out", str(tmp_path)]
    )
    cells = {(m.situation, m.scale, m.provider, m.dtype): m for m in found}
    assert len(cells) == 2 * 5 * 4
    for (situation, scale, provider, dtype), ours in cells.items():
        assert ours.fallback == (scale == 128)
        if (provider, dtype) == ("normface_ext", "float32"):
            eager = cells[situation, scale, "eager", "float32"]
            for quantity in bench.truth.QUANTITIES:
                allowed = 4 * getattr(eager, quantity) + 4 * torch.finfo(torch.float32).eps
                assert getattr(ours, quantity) <= allowed, (situation, scale, quantity)
    with (tmp_path / "accuracy.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["dw"]) == pytest.approx(found[0].dw, rel=0.01)
    table = (tmp_path / "accuracy.md").read_text().splitlines()
    assert sum(line.startswith("|") for line in table) == 2 * (2 + 5 * 4)
    worst = {key[2:]: max(m.dw for k, m in cells.items() if k[2:] == key[2:]) for key in cells}
    assert worst["normface_ext", "bfloat16"] < worst["eager", "bfloat16"]


def test_relative_errors(bench: SimpleNamespace) -> None:
    right = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert bench.truth.relative_errors(torch.tensor([3.0, 5.0]), right) == pytest.approx((0.2, 0.25))
    assert bench.truth.relative_errors(torch.tensor([3.0, float("nan")]), right) == (float("inf"),) * 2


def test_quantiles(bench: SimpleNamespace) -> None:
    assert bench.measure.quantiles([float(v) for v in range(11)]) == pytest.approx((2.0, 5.0, 8.0))
    assert bench.measure.quantiles([7.0]) == (7.0, 7.0, 7.0)


def test_a_turn(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call to warm up, one that counts, however slow; gradients are gone before each."""
    monkeypatch.setattr(bench.measure, "TURN_MS", 0.0)
    measured = bench.measure.Measured(
        "x", bench.cases.normalize(2, 3), "fwd+bwd", "cpu", torch.get_num_threads()
    )
    calls = []

    def call() -> None:
        x = measured._ready().x
        assert x.grad is None
        x.sum().backward()
        calls.append(len(calls))

    measured.call = call
    monkeypatch.setattr(bench.measure, "_cpu_ms", lambda call: (call(), float(len(calls)))[1])
    assert measured.turn() == 2.0 and calls == [0, 1]
    assert measured._ready().x.grad is None


def test_host_time(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where a step's host time goes: our op each way, what is allocated, and planning."""
    monkeypatch.setattr(bench.host, "CALLS", 5)
    monkeypatch.setattr(bench.host, "PROFILED", 3)
    path = bench.host.run("cpu", {"device": "some CPU"}, tmp_path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["device"] for row in rows} == {"some CPU"}
    found = {(row["provider"], row["part"]): row for row in rows}
    for provider in ("normface_ext", "eager"):
        for part in ("forward", "forward + backward", "no grad"):
            assert found[provider, part]["us_per_step"] > 0
        allocations = found[provider, "allocations"]["per_step"]
        assert allocations >= 2 and allocations == int(allocations), "the same in every step"
    assert found["normface_ext", "our ops"]["per_step"] == 2
    assert ("eager", "our ops") not in found and ("eager", "planning") not in found


def test_a_row_is_written_at_once(
    bench: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = bench.report.Record(tmp_path / "rows.jsonl", {"device": "some CPU"})
    row = bench.report.Row("a case", 1, 2, 3, "float32", "eager", "fwd", median_ms=1.23456789)
    for count in (1, 2, 3):
        record.write(row)
        lines = record.path.read_text().splitlines()
        assert len(lines) == count and json.loads(lines[-1])["median_ms"] == 1.23457
        assert capsys.readouterr().out.startswith("eager ")
    record.write(
        bench.report.Row("a case", 1, 2, 3, "float32", "quack", "fwd", outcome="unavailable", note="x")
    )
    assert capsys.readouterr().out == "unavailable (x): quack\n"
    assert [r.provider for r in bench.report.read(record.path)] == ["eager"] * 3 + ["quack"]


def test_the_summary_says_what_was_measured_by_hand(bench: SimpleNamespace) -> None:
    def row(provider: str, **more: object) -> object:
        return bench.report.Row("a case", 1, 2, 3, "float32", provider, "fwd", **more)

    by_hand = bench.report.summary([row("eager", median_ms=2.0, how="by hand")])
    assert "a case** (fwd, measured by hand;" in by_hand
    rows = [row("eager", median_ms=2.0), row("quack", outcome="over budget", note="a turn takes 9 s")]
    text = bench.report.summary(rows)
    assert "by hand" not in text and "- over budget (a turn takes 9 s): quack" in text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "amp-bfloat16", "mixed-bfloat16"])
def test_every_precision_passes_the_judge(bench: SimpleNamespace, dtype: str) -> None:
    case = bench.cases.head(16, 24, 40, dtype)
    inputs = bench.cases.make_inputs(case, "cpu")
    right = bench.truth.truth(case, inputs, bench.cases.SCALE)
    errors = {
        name: bench.truth.errors(
            bench.competitors.BASE[name].build(case, "fwd+bwd", "cpu"), inputs, bench.cases.SCALE, case, right
        )
        for name in ("normface_ext", "eager")
    }
    assert set(bench.truth.QUANTITIES) <= set(errors["normface_ext"])
    assert not bench.truth.complaints(errors["normface_ext"], errors["eager"], case.precision.operand)


def test_a_figure_of_nothing(bench: SimpleNamespace, tmp_path: Path) -> None:
    """A run in which eager never ended still ends well."""
    row = bench.report.Row("a case", 1, 2, 3, "float32", "normface_ext", "fwd", median_ms=1.0)
    bench.report.plot([row], tmp_path / "nothing.png", "title")
    assert (tmp_path / "nothing.png").stat().st_size > 1000
    assert bench.report.headline([row], "normface_ext", "eager") == []
