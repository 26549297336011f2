"""The benchmark of the class-parallel head: every case is checked, and written as soon as it is known."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from bench_folder import FOLDER, run
from plan_sharded import sharded_plan

# torchrun's own module, so that the ranks run with this interpreter.
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
WRONG = """
import runpy, sys
import normface_ext as nf
right = nf.NormFaceLoss.forward
head = nf.distributed.ShardedNormFaceLoss
forward = head.forward
head.forward = lambda self, x, y: 1.001 * forward(self, x, y)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_a_run_with_two_ranks(tmp_path: Path) -> None:
    out = tmp_path / "new" / "sharded.md"
    script = str(FOLDER / "bench_sharded.py")
    done = run(*TORCHRUN, script, "--quick", "--device", "cpu", "--rounds", "5", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    assert [row["sample_rate"] for row in rows] == [1.0, 0.5]
    for row in rows:
        assert row["world"] == 2 and row["rounds"] == 5 and row["step_ms"] > 0 and row["peak_mib"] > 0
        assert row["device"] and row["torch"] and row["commit"]
    table = [line for line in out.read_text().splitlines() if line.startswith("| 8 x 16, 201 |")]
    assert len(table) == 2 and all(line in done.stdout for line in table)


@pytest.mark.slow
def test_a_wrong_head_is_not_timed(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text(WRONG)
    out = tmp_path / "sharded.md"
    arguments = (str(tmp_path / "wrong.py"), str(FOLDER / "bench_sharded.py"), "--quick", "--out", str(out))
    done = run(*TORCHRUN, *arguments, "--device", "cpu", cwd=tmp_path, PYTHONPATH=str(FOLDER))
    assert done.returncode != 0
    assert "WRONG RESULT, not timed: rank " in done.stderr, done.stderr
    assert not out.exists() and out.with_suffix(".jsonl").read_text() == ""


@pytest.mark.slow
def test_the_calculator(tmp_path: Path) -> None:
    out = tmp_path / "calculator.md"
    done = run(str(FOLDER / "bench_sharded.py"), "--calculator", "--out", str(out))
    assert done.returncode == 0, done.stderr
    text = out.read_text()
    assert text.strip() == done.stdout.strip() and text.count("\n| 10") >= 12
    assert os.linesep.join(text.splitlines()[:1]).startswith("| classes | GPUs |")


# The calculator -----------------------------------------------------------------------------------


def test_a_sharded_plan_divides_what_can_be_divided():
    one = sharded_plan(128, 512, 10_000_000, torch.bfloat16, world_size=1)
    eight = sharded_plan(128, 512, 10_000_000, torch.bfloat16, world_size=8)
    assert eight.classes == 1_250_000 and eight.parameter_bytes == 1_250_000 * 512 * 4
    assert one.parameter_bytes == 8 * eight.parameter_bytes
    assert eight.optimizer_bytes == eight.parameter_bytes
    assert one.received_bytes == 0 < eight.received_bytes
    # One more rank gets fewer or as many classes, never too few in all.
    assert sharded_plan(1, 4, 10, world_size=4).classes == 3
    adamw = sharded_plan(128, 512, 10_000_000, world_size=8, optimizer="adamw")
    assert adamw.optimizer_bytes == 2 * adamw.parameter_bytes + 4 * adamw.classes
    assert "8 ranks, 1250000 classes each" in str(eight)


def test_a_sampled_plan_is_smaller():
    full = sharded_plan(128, 512, 1_000_000, world_size=4)
    tenth = sharded_plan(128, 512, 1_000_000, world_size=4, sample_rate=0.1)
    assert tenth.sampled_classes == 512 + math.ceil((250_000 - 512) * 0.1)
    assert tenth.gradient_bytes < 0.25 * full.gradient_bytes
    assert tenth.local.flops < 0.12 * full.local.flops
    assert tenth.parameter_bytes == full.parameter_bytes
