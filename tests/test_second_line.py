"""Ops called past the Python functions: what does not fit is refused in C++, not read as it lies."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases.engine_ops import arguments, call, sweep
from lanes import LANES

from normface_ext.engine.row_state import SINKS, TERMS

HERE = Path(__file__).resolve().parent
N, D, C = 4, 8, 6

SWEEP = {
    "an unknown term": ("term", len(TERMS)),
    "a hinge without threshold": ("threshold", {"term": TERMS["hinge"]}),
    "a threshold of float32": ("threshold", {"term": TERMS["hinge"], "threshold": torch.zeros(N)}),
    "a short threshold": (
        "threshold",
        {"term": TERMS["hinge"], "threshold": torch.zeros(N - 1, dtype=torch.float64)},
    ),
    "hard negatives without numbers": (
        "numbers",
        {"term": TERMS["hard_negatives"], "threshold": torch.zeros(N, dtype=torch.float64)},
    ),
    "five numbers": (
        "numbers",
        {
            "term": TERMS["hard_negatives"],
            "threshold": torch.zeros(N, dtype=torch.float64),
            "numbers": torch.zeros(5, dtype=torch.float64),
        },
    ),
    "a softmax with a threshold": ("threshold", {"threshold": torch.zeros(N, dtype=torch.float64)}),
    "a hinge with numbers": (
        "numbers",
        {
            "term": TERMS["hinge"],
            "threshold": torch.zeros(N, dtype=torch.float64),
            "numbers": torch.zeros(6, dtype=torch.float64),
        },
    ),
    "a range without width": ("lowest", 1.0),
    "a range without end": ("lowest", -math.inf),
    "a softmax with a short threshold": ("threshold", torch.zeros(N - 1, dtype=torch.float64)),
    "a softmax with five numbers": ("numbers", torch.zeros(5, dtype=torch.float64)),
    "16-bit products of float64": (
        "product_precision",
        {
            "x": torch.ones(N, D, dtype=torch.float64),
            "weight": torch.ones(C, D, dtype=torch.float64),
            "product_precision": torch.bfloat16,
        },
    ),
}
COLLECTED = {
    "an unknown sink": ("sink", len(SINKS)),
    "a capacity without sink": ("capacity", 3),
    "a negative capacity": ("capacity", {"sink": SINKS["active"], "capacity": -1}),
    "two hardest": ("capacity", {"sink": SINKS["hardest"], "capacity": 2}),
    "the stored coefficients of the hardest": (
        "store",
        {"sink": SINKS["hardest"], "capacity": 1, "need_x": False, "store": True},
    ),
    "the x_sum of the hardest": ("need_x", {"sink": SINKS["hardest"], "capacity": 1}),
}
FINISH = {
    "rows of float32": {"rows": torch.Tensor.float},
    "fewer rows": {"rows": lambda t: t[:, :2]},
    "a class_sum without smoothing": {"class_sum": lambda t: t.new_zeros(D + 1)},
}
BACKWARD = {
    "no inverse norms": {"inverse_norm": lambda t: t[:0]},
    "slopes of float32": {"slopes": torch.Tensor.float},
    "a short gradient": {"grad_loss": lambda t: t.new_ones(N - 1)},
    "a short x_sum": {"x_sum": lambda t: t[:1]},
    "a short E": {"stored": lambda t: t.new_zeros(3)},
}


def problem(lane):
    return arguments(lane.randn(N, D), lane.randn(C, D, seed=1), lane.labels(N, C))


def refused(lane, op, name, cases):
    argument, change = cases[name]
    change = change if isinstance(change, dict) else {argument: change}
    moved = {k: lane.tensor(v) if isinstance(v, torch.Tensor) else v for k, v in change.items()}
    with pytest.raises(RuntimeError, match=f"{op}: expected .*`{argument}`"):
        call(op, {**problem(lane), **moved})


@pytest.mark.parametrize("op", ["head_sweep", "head_shift"])
@pytest.mark.parametrize("name", SWEEP)
def test_what_the_term_wants(lane, name, op):
    call(op, problem(lane))
    refused(lane, op, name, SWEEP)


@pytest.mark.parametrize("name", COLLECTED)
def test_what_a_sink_takes(lane, name):
    refused(lane, "head_sweep", name, COLLECTED)


def finished(lane):
    given = problem(lane)
    swept, _, _ = sweep(given)
    return {
        **given, **swept._asdict(), "m1": None, "m2": None, "m3": None, "m1_value": 1.0, "m2_value": 0.0,
        "m3_value": 0.0, "formula": 0, "guard": 0, "straight": False, "reduction": 1, "smoothing": 0.0,
        "need_margin": False,
    }  # fmt: skip


@pytest.mark.parametrize("name", FINISH)
def test_finish(lane, name):
    given = finished(lane)
    call("softmax_finish", given)
    ((argument, change),) = FINISH[name].items()
    with pytest.raises(RuntimeError, match=f"softmax_finish: expected `{argument}` to be contiguous"):
        call("softmax_finish", {**given, argument: change(given[argument])})


@pytest.mark.parametrize("name", BACKWARD)
def test_backward(lane, name):
    given = finished(lane)
    loss, slopes = call("softmax_finish", given)
    given |= {"grad_loss": torch.ones_like(loss), "slopes": slopes}
    call("head_backward", given)
    ((argument, change),) = BACKWARD[name].items()
    with pytest.raises(RuntimeError, match=f"head_backward: expected `{argument}` "):
        call("head_backward", {**given, argument: change(given[argument])})


#: What E of a sweep may have become -> the change.
STORED = {
    "of another type": torch.Tensor.double,
    "with one value less": lambda t: t[:-1],
    "with one value more": lambda t: torch.cat([t, t[:1]]),
    "as [N, C]": lambda t: t[: N * C].reshape(N, C),
}


def stored_problem(lane):
    given = {**problem(lane), "store": True}
    swept, _, _ = sweep(given)
    slopes = lane.tensor(torch.ones(4, N, dtype=torch.float64))
    return {**given, **swept._asdict(), "slopes": slopes, "grad_loss": lane.tensor(1.0)}


@pytest.mark.parametrize("name", STORED)
def test_stored_coefficients(lane, name):
    given = stored_problem(lane)
    call("head_backward", given)
    with pytest.raises(RuntimeError, match="head_backward: expected `stored` "):
        call("head_backward", {**given, "stored": STORED[name](given["stored"])})


@pytest.mark.parametrize("width", [0.0, -1.0, C + 1.0, math.nan])
def test_stored_coefficients_say_how_wide_a_tile_is_on_a_cpu(width):
    given = stored_problem(LANES[0])
    given["stored"][-1] = width
    with pytest.raises(RuntimeError, match="head_backward: expected `stored` to end with"):
        call("head_backward", given)


#: By name: what the op is given.
PROBLEMS = {
    "stored": stored_problem,
    "made again": lambda lane: {**stored_problem(lane), "stored": lane.randn(0)},
}


def spoilt(lane, name, label):
    given = PROBLEMS[name](lane)
    call("head_backward", given)
    given["labels"] = given["labels"].clone()
    given["labels"][2] = label
    return given


@pytest.mark.parametrize("label", [-1, -(2**40), C, 2**40])
@pytest.mark.parametrize("name", PROBLEMS)
def test_labels_of_rows_with_slopes_on_a_cpu(name, label):
    given = spoilt(LANES[0], name, label)
    with pytest.raises(RuntimeError, match=rf"head_backward: expected `labels` .* got {label} at row 2"):
        call("head_backward", given)
    given["slopes"][:, 2] = 0  # then it may be anything
    assert (call("head_backward", given)[0][2] == 0).all()


ABORTS = """
import sys
from lanes import LANES
from test_second_line import call, spoilt
lane = next(lane for lane in LANES if lane.name == sys.argv[1])
with lane.active():
    print(float(call("head_backward", spoilt(lane, sys.argv[2], -7))[0].sum()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", PROBLEMS)
def test_kernels_refuse_labels_of_rows_with_slopes(lane, name):
    """On a GPU this ends the process, see test_contract."""
    command = [sys.executable, "-c", ABORTS, lane.name, name]
    paths = os.pathsep.join(map(str, (HERE, HERE.parent / "scripts")))
    ran = subprocess.run(
        command, capture_output=True, text=True, cwd="/", env={**os.environ, "PYTHONPATH": paths}
    )
    assert ran.returncode != 0, ran.stdout
    said = ran.stdout + ran.stderr
    assert re.search("head_backward: expected `labels` .* got -7 at row 2", said), said


def test_gradients_of_another_type(lane):
    x, weight = lane.randn(N, D), lane.randn(C, D, seed=1)
    wide = lane.tensor(torch.ones(N, C, dtype=torch.float64))
    given = {"x": x, "weight": weight, "grad": wide, "scale": None, "scale_value": 1.0,
             "normalize_input": True, "eps": 1e-12, "need_x": True, "need_weight": True,
             "need_scale": False}  # fmt: skip
    with pytest.raises(RuntimeError, match="norm_linear_backward: expected `grad` to be contiguous float32"):
        call("norm_linear_backward", given)
    with pytest.raises(
        RuntimeError, match="pair_distance_backward: expected `grad` to be contiguous float32"
    ):
        call("pair_distance_backward", {"grad": wide[:, 0], "a": x, "b": x, "p": 2, "need_a": True,
                                        "need_b": True})  # fmt: skip
