"""The benchmark script: it measures, it records, and it refuses to time a wrong kernel.

Nothing here asserts a time.
"""

from __future__ import annotations

import csv
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import normface_ext as nf

FOLDER = Path(__file__).parent.parent / "benchmarks"
SIBLINGS = ("cases", "competitors", "floor", "measure", "report", "truth", "bench_kernels", "accuracy")
COLUMNS = [
    *("case", "N", "D", "C", "dtype", "provider", "mode"),
    *("median_ms", "p20_ms", "p80_ms", "ratio_to_eager", "peak_extra_mib"),
    *("err_loss", "err_dx", "err_dw", "err_ds", "floor_ms", "percent_of_floor"),
    *("device", "torch", "version", "threads", "commit", "timestamp", "note"),
]


def run(*command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    # One thread: with more, a machine busy with other tests makes tiny operations crawl.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=600, env=environment, cwd=cwd
    )


def quick(out: Path, *options: str) -> list[dict[str, str]]:
    done = run(str(FOLDER / "bench_kernels.py"), "--quick", "--threads", "1", "--out", str(out), *options)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "normface_ext:" in done.stdout and "CPU" in done.stdout, done.stdout
    with (out / "kernels.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return quick(tmp_path_factory.mktemp("bench"))


def test_columns(rows: list[dict[str, str]]) -> None:
    assert list(rows[0]) == COLUMNS


def test_every_case_has_ours_and_eager(rows: list[dict[str, str]]) -> None:
    cases = {row["case"] for row in rows}
    assert len(cases) == 5, cases
    for case in cases:
        providers = [row["provider"] for row in rows if row["case"] == case]
        assert {"normface_ext", "eager"} <= set(providers), f"{case}: {providers}"


def test_errors_and_times_are_recorded(rows: list[dict[str, str]]) -> None:
    for row in rows:
        if row["provider"] not in ("normface_ext", "eager"):
            continue
        wanted = ["err_loss", "err_dx"] + (["err_dw", "err_ds"] if row["C"] != "0" else [])
        for name in wanted:
            assert 0 <= float(row[name]) < 1e-4, f"{row['case']}, {row['provider']}: {name} = {row[name]!r}"
        recorded = ["median_ms", "p20_ms", "p80_ms", "ratio_to_eager", "floor_ms", "percent_of_floor"]
        if sys.platform.startswith("linux"):
            recorded.append("peak_extra_mib")
        for name in recorded:
            assert row[name] != "" and float(row[name]) >= 0, f"{row['case']}, {row['provider']}: {name}"
        if row["provider"] == "eager":
            assert float(row["ratio_to_eager"]) == 1.0, row


def test_who_cannot_take_part_says_why(rows: list[dict[str, str]]) -> None:
    compiled = [row for row in rows if row["provider"] == "compile"]
    assert compiled and all(row["note"] and not row["median_ms"] for row in compiled), compiled


def test_options(tmp_path: Path) -> None:
    rows = quick(tmp_path, "--forward-only", "--amortise-page-faults", "--cases", "normalize 64x32")
    assert {row["case"] for row in rows} == {"normalize 64x32"}
    assert {row["mode"] for row in rows} == {"fwd"}
    assert {row["note"] for row in rows if row["median_ms"]} == {"page faults amortised"}


def test_unknown_case_is_an_error(tmp_path: Path) -> None:
    done = run(str(FOLDER / "bench_kernels.py"), "--quick", "--cases", "no such", "--out", str(tmp_path))
    assert done.returncode == 2, done.stdout + done.stderr


# Each keeps what it can and spoils one thing; w + m (w - w) has w's value and m times its gradient.
SABOTAGE = """
import json, sys
import torch
import normface_ext as nf
sys.path.insert(0, sys.argv[1])
import bench_kernels

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
status = {}
for name, kernel in wrong.items():
    nf.functional.normface_loss = kernel
    bench_kernels.measure.peak_extra_mib = lambda *a: None  # no child processes from a -c script
    sys.argv[1:] = ["--quick", "--threads", "1", "--cases", "head 32", "--out", sys.argv[-1]]
    status[name] = bench_kernels.main()
print("STATUS " + json.dumps(status))
"""


def test_a_wrong_kernel_is_not_timed(tmp_path: Path) -> None:
    # Elsewhere than in the root, where -c would find the source folder before the installed package.
    done = run("-c", SABOTAGE, str(FOLDER), str(tmp_path), cwd=tmp_path)
    last = next((line for line in done.stdout.splitlines() if line.startswith("STATUS ")), None)
    assert last, f"the script failed\n{done.stdout}\n{done.stderr}"
    status = json.loads(last.removeprefix("STATUS "))
    assert status.pop("nothing") == 0, done.stderr
    assert len(status) == 5 and all(code == 1 for code in status.values()), f"{status}\n{done.stderr}"
    assert done.stderr.count("WRONG RESULT") == 5, done.stderr


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The script's modules, gone again afterwards: their names are too common to stay."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in SIBLINGS})
    for name in SIBLINGS:
        sys.modules.pop(name, None)


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


def test_rounds_are_balanced(bench: SimpleNamespace) -> None:
    """A B C, then C B A; gradients are gone before each call."""
    inputs = bench.cases.make_inputs(bench.cases.normalize(2, 3), "cpu")
    order: list[str] = []

    def call(name: str) -> None:
        assert inputs.x.grad is None, name
        inputs.x.sum().backward()
        order.append(name)

    times = bench.measure.rounds_ms({n: lambda n=n: call(n) for n in "ABC"}, inputs, 0.0, least=4, most=9)
    assert "".join(order) == "ABC" + "ABCCBA" * 2  # the first three warm up
    assert {name: len(values) for name, values in times.items()} == {"A": 4, "B": 4, "C": 4}


def test_quantiles(bench: SimpleNamespace) -> None:
    assert bench.measure.quantiles([float(v) for v in range(11)]) == pytest.approx((2.0, 5.0, 8.0))
    assert bench.measure.quantiles([7.0]) == (7.0, 7.0, 7.0)
