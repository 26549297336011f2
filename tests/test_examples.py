"""The digits example shows what it promises: s = 1 stalls at its bound, the scaled head converges."""

from __future__ import annotations

import csv
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import normface_ext as nf

pytest.importorskip("sklearn")
SCRIPT = Path(__file__).parent.parent / "examples" / "train_digits.py"


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("digits")
    command = [sys.executable, str(SCRIPT), "--epochs", "8", "--device", "cpu", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "lower bound 1.377" in done.stdout, done.stdout
    return out


def losses(results: Path, head: str) -> list[float]:
    found = [float(row["loss"]) for row in read(results / "losses.csv") if row["head"] == head]
    assert len(found) == 8, f"{head}: {found}"
    return found


def test_unscaled_head_stalls_at_its_bound(results: Path) -> None:
    bound = nf.theory.loss_lower_bound(10, 1.0)
    curve = losses(results, "s = 1")
    assert min(curve) >= bound, f"a loss below {bound}: {curve}"
    left = (curve[-1] - bound) / (curve[0] - bound)
    assert left < 0.2, f"{left:.0%} of the way from {curve[0]} to the bound {bound} is left: {curve}"


def test_scaled_head_converges(results: Path) -> None:
    bound = nf.theory.loss_lower_bound(10, 1.0)
    curve = losses(results, "s = auto")
    assert curve[-1] < 0.1 * bound, f"expected a loss far below {bound}: {curve}"


def test_features_verify_and_classify(results: Path) -> None:
    summary = {row["head"]: row for row in read(results / "summary.csv")}
    assert list(summary) == ["plain", "s = 1", "s = auto"]
    scaled = summary["s = auto"]
    assert float(scaled["scale"]) == pytest.approx(nf.NormFaceLoss(2, 10).scale, rel=1e-5)
    assert 0.9 < float(scaled["verification"]) <= 1, scaled
    assert 0.95 < float(scaled["classification"]) <= 1, scaled


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_digits", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_digits"] = module  # its dataclasses look it up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["train_digits"]


@pytest.mark.parametrize(
    ("similarity", "same", "low", "high"),
    [
        ([0.9, 0.8, 0.2, 0.1], [1, 1, 0, 0], 0.2, 0.8),  # separable
        ([0.9, 0.3, 0.8, 0.1, 0.2], [1, 1, 0, 0, 0], 0.2, 0.3),  # one mistake is the least
        ([0.5, 0.6], [1, 1], -9, 0.5),  # all the same
        ([0.5, 0.6], [0, 0], 0.6, 9),  # all different
    ],
)
def test_best_threshold(
    example: ModuleType, similarity: list[float], same: list[int], low: float, high: float
) -> None:
    cut = example.best_threshold(torch.tensor(similarity), torch.tensor(same, dtype=torch.bool))
    assert low < cut < high, f"{cut} is not between {low} and {high}"


def test_pairs_are_balanced_and_differ(example: ModuleType) -> None:
    labels = torch.arange(60) % 5
    first, second, same = example.make_pairs(labels, seed=0, count=100)
    assert int(same.sum()) == 100 and len(same) == 200
    assert bool((first != second).all())
    assert torch.equal(labels[first] == labels[second], same)
