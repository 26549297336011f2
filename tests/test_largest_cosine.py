"""The largest cosine of another class, beside the sums of a sweep: what a hit at rank 1 is decided by."""

import math

import pytest
import torch
from kernel_cases.engine_ops import arguments, sweep, wide
from kernel_cases.plain_terms import CASES, IGNORED, unit
from kernel_cases.softmax import is_here
from lanes import DTYPES

from normface_ext.engine.calls import plan_device
from normface_ext.engine.row_state import LARGEST, ROW_FIELDS, SINKS

N, D, C = 9, 16, 45
#: Every product but the single sweep, which has no room for it: (name, operands of 16 bits).
PRODUCTS = [("cublas", True), ("cublas", False), ("simt", False), ("sm80_scores", True)]
PRODUCTS += [("sm90_scores", True)] * is_here("sm90_scores")
ROOM = {torch.float64: 1e-13, torch.float32: 1e-6}


def problem(lane, dtype):
    """Two of each row's nearest classes are neighbours in different tiles, and one is the label's own."""
    weight, labels = lane.randn(C, D, dtype=dtype, seed=1), lane.labels(N, C, seed=3)
    x = (weight[labels].double() + weight[(labels + 9) % C].double() + lane.randn(N, D)).to(dtype)
    labels[4], x[4] = IGNORED, math.nan
    return x, weight, labels


def others(x, weight, labels):
    """The largest cosine of another class, float64, of the rows that count."""
    counts = labels != IGNORED
    cosines = unit(x[counts].double()) @ unit(weight.double()).T
    return cosines.scatter(1, labels[counts][:, None], -math.inf).amax(1)


def found(x, weight, labels, **given):
    swept, listed, values = sweep(arguments(x, weight, labels, need_largest=True, **given))
    return swept, swept.rows[LARGEST][labels != IGNORED], listed, values


def test_shards_take_the_maximum():
    assert ROW_FIELDS["largest"] == "max"


@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chunk", [C, 7])
def test_with_every_term(lane, name, dtype, chunk):
    x, weight, labels = problem(lane, dtype)
    options = CASES[name].options(lane, lane.tensor([1.5] * N, torch.float64))
    given = {**options, "class_chunk": chunk}
    plain, _, _ = sweep(arguments(x, weight, labels, **given))
    assert not plain.rows[LARGEST].any()
    swept, largest, _, _ = found(x, weight, labels, **given)
    assert (largest - others(x, weight, labels)).abs().max() < ROOM.get(dtype, 2e-3)
    # Nothing else moves.
    for got, wanted in zip(swept, plain, strict=True):
        if got.shape == swept.rows.shape and got.dtype == torch.float64:
            got, wanted = got[:LARGEST], wanted[:LARGEST]
        assert torch.equal(got, wanted)


@pytest.mark.parametrize(("product", "narrow"), PRODUCTS)
@pytest.mark.parametrize("store", [False, True])
def test_by_every_product(lane, product, narrow, store):
    dtypes = [torch.float16, torch.bfloat16] if narrow else [torch.float32, torch.float64]
    for dtype in dtypes:
        x, weight, labels = problem(lane, dtype)
        cuda = plan_device(x).type == "cuda"
        given = {"product": product if cuda else "blas", "store": store, "class_chunk": C if store else 7}
        for scale in (8.0, 300.0):  # a fixed shift, and one by the largest logits
            _, largest, _, _ = found(x, weight, labels, scale_value=scale, **given)
            assert (largest - others(x, weight, labels)).abs().max() < ROOM.get(dtype, 2e-3)


@pytest.mark.parametrize("sink", ["active", "hardest"])
def test_with_a_sink(lane, sink):
    x, weight, labels = problem(lane, torch.float32)
    options = CASES["hinge"].options(lane, lane.tensor([1.5] * N, torch.float64))
    given = {**options, "sink": SINKS[sink], "capacity": 1, "need_x": False, "class_chunk": 7}
    _, largest, listed, values = found(x, weight, labels, **given)
    assert (largest - others(x, weight, labels)).abs().max() < 1e-6
    _, listed_before, values_before = sweep(arguments(x, weight, labels, **given))
    assert torch.equal(listed, listed_before) and torch.equal(values, values_before)


@pytest.mark.parametrize("asked", ["sm80_single_sweep", "sm90_single_sweep"])
def test_the_single_sweep_leaves_it_to_another(lane, asked):
    """Asked for by name, too: it would have to keep one more number per row in registers."""
    x, weight, labels = problem(lane, torch.bfloat16)
    if plan_device(x).type != "cuda":
        weight, x = weight.float(), x.float()
    product = asked if plan_device(x).type == "cuda" else "blas"
    _, largest, _, _ = found(x, weight, labels, product=product, workspace=1 << 20)
    assert (largest - others(x, weight, labels)).abs().max() < 2e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("place", [0, 8, C - 1])
def test_nan_is_the_largest(lane, dtype, place):
    """Of a class, wherever it is among those that are swept before and after; and of a row."""
    x, weight, labels = problem(lane, dtype)
    labels[labels != IGNORED] = 3
    weight[place] = math.nan
    for chunk in (C, 7):
        _, largest, _, _ = found(x, weight, labels, class_chunk=chunk)
        assert largest.isnan().all()
    x, weight, labels = problem(lane, dtype)
    x[2] = math.nan
    _, largest, _, _ = found(x, weight, labels)
    assert largest.isnan().nonzero().tolist() == [[2]]


def test_nobody_else(lane):
    x, weight, labels = problem(lane, torch.float32)
    _, largest, _, _ = found(x, weight[:1], labels.clamp_max(0))
    assert (largest == -math.inf).all()
    shard = torch.where(labels == IGNORED, labels, -1)
    _, largest, _, _ = found(x, weight[:0], shard, is_shard=True)
    assert (largest == -math.inf).all()
    _, largest, _, _ = found(x, weight, shard, is_shard=True)  # the targets are elsewhere
    cosines = unit(x[labels != IGNORED].double()) @ unit(weight.double()).T
    assert (largest - cosines.amax(1)).abs().max() < 1e-6
    assert largest.dtype == torch.float64 and wide(x) == torch.float32
