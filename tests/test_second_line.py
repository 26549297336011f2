"""Ops called past the Python functions: what does not fit is refused in C++, not read as it lies."""

from __future__ import annotations

import pytest
import torch
from kernel_cases.engine_ops import arguments, call, sweep

from normface_ext.engine.sweep import SINKS, TERMS

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
