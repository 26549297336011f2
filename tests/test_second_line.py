"""Ops called past the Python functions: what does not fit is refused in C++, not read as it lies."""

from __future__ import annotations

import pytest
import torch

from normface_ext.engine import library

N, D, C = 4, 8, 6


def swept(lane):
    ops, x, weight = library.namespace(), lane.randn(N, D), lane.randn(C, D, seed=1)
    labels = lane.labels(N, C)
    names = [a.name for a in ops.head_sweep.default._schema.arguments]
    given = {
        "x": x, "weight": weight, "labels": labels, "scale": None, "sample_weight": None,
        "class_weight": None, "shift": None, "store": False, "need_x": True,
        "need_class_sum": False, "scale_value": 8.0,
        "ignore_index": -100, "eps": 1e-12, "workspace": 1 << 30, "product": "auto",
        "product_precision": x.dtype, "threshold": None, "numbers": None, "term": 0, "lowest": -1.0,
        "highest": 1.0, "sink": 0, "capacity": 0,
        "total_classes": C, "is_shard": False,
    }  # fmt: skip
    results = ops.head_sweep(*[given[n] for n in names])[:5]
    return ops, given, dict(zip(("rows", "inverse_norm", "x_sum", "class_sum", "stored"),
                                results, strict=True))  # fmt: skip


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


def call(op, given):
    return op(*[given[a.name] for a in op.default._schema.arguments])


def finished(lane):
    ops, given, found = swept(lane)
    given |= found | {"m1": None, "m2": None, "m3": None, "m1_value": 1.0, "m2_value": 0.0, "m3_value": 0.0,
                      "formula": 0, "guard": 0, "straight": False, "reduction": 1, "smoothing": 0.0,
                      "need_margin": False}  # fmt: skip
    return ops, given


@pytest.mark.parametrize("name", FINISH)
def test_finish(lane, name):
    ops, given = finished(lane)
    call(ops.softmax_finish, given)
    ((argument, change),) = FINISH[name].items()
    with pytest.raises(RuntimeError, match=f"softmax_finish: expected `{argument}` to be contiguous"):
        call(ops.softmax_finish, {**given, argument: change(given[argument])})


@pytest.mark.parametrize("name", BACKWARD)
def test_backward(lane, name):
    ops, given = finished(lane)
    loss, slopes = call(ops.softmax_finish, given)
    given |= {"grad_loss": torch.ones_like(loss), "slopes": slopes, "need_weight": True, "need_scale": False}
    call(ops.head_backward, given)
    ((argument, change),) = BACKWARD[name].items()
    with pytest.raises(RuntimeError, match=f"head_backward: expected `{argument}` "):
        call(ops.head_backward, {**given, argument: change(given[argument])})


def test_gradients_of_another_type(lane):
    ops, x, weight = library.namespace(), lane.randn(N, D), lane.randn(C, D, seed=1)
    wide = lane.tensor(torch.ones(N, C, dtype=torch.float64))
    given = {"x": x, "weight": weight, "grad": wide, "scale": None, "scale_value": 1.0,
             "normalize_input": True, "eps": 1e-12, "need_x": True, "need_weight": True,
             "need_scale": False}  # fmt: skip
    with pytest.raises(RuntimeError, match="norm_linear_backward: expected `grad` to be contiguous float32"):
        call(ops.norm_linear_backward, given)
    with pytest.raises(
        RuntimeError, match="pair_distance_backward: expected `grad` to be contiguous float32"
    ):
        call(ops.pair_distance_backward, {"grad": wide[:, 0], "a": x, "b": x, "p": 2, "need_a": True,
                                          "need_b": True})  # fmt: skip
