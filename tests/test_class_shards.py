"""The stages of the fused head on shards of the classes: what each shard returns adds up to the whole.

Here one process plays all shards; tests/test_distributed_*.py start real ones.
"""

import itertools
from dataclasses import replace

import pytest
import torch

import normface_ext as nf
from normface_ext.engine import row_state, sweep
from normface_ext.engine.calls import plan_device
from normface_ext.engine.dtypes import accumulator
from normface_ext.engine.plan import products
from normface_ext.softmax import ops
from normface_ext.softmax.margins import NO_MARGIN

BATCH, DIM, CLASSES = 9, 11, 23
#: First classes of the shards; the third is empty.
BOUNDS = [0, 7, 15, 15, CLASSES]


def make(lane, dtype):
    x, weight = lane.randn(BATCH, DIM, dtype=dtype), lane.randn(CLASSES, DIM, dtype=dtype)
    labels = lane.labels(BATCH, CLASSES, seed=3)
    labels[4] = -100
    return x, weight, labels


def sharded(
    x, weight, labels, scale, upstream, *, shift=False, sample_weight=None, class_weight=None, **option
):
    """(loss, dx, dweight, dscale) the way a class-parallel head comes to them."""
    margin = option.get("margin", NO_MARGIN)
    m1, m2, m3 = margin.numbers()
    made = products(BATCH, DIM, CLASSES, x.dtype, plan_device(x), option.get("workspace"))
    options = ops.LossOptions(
        scale_value=0.0,
        m1_value=m1,
        m2_value=m2,
        m3_value=m3,
        reduction=option.get("reduction", 1),
        ignore_index=-100,
        eps=1e-12,
        smoothing=option.get("smoothing", 0.0),
        **made._asdict(),
        product_precision=x.dtype,
        total_classes=CLASSES,
        is_shard=True,
    )
    shards = []
    for first, last in itertools.pairwise(BOUNDS):
        here = (labels >= first) & (labels < last)
        local = torch.where(here, labels - first, row_state.ELSEWHERE).where(labels != -100, -100)
        factors = None if class_weight is None else class_weight[first:last].contiguous()
        shards.append((weight[first:last].contiguous(), local, factors))
    kappa = None
    if shift:
        each = [sweep.head_shift(x, w, local, scale, options) for w, local, _ in shards]
        kappa = torch.stack(each).amax(0)
    swept = [
        sweep.head_sweep(
            x, w, local, scale, sample_weight, factors, options, need_x=True, need_weight=True, shift=kappa
        )
        for w, local, factors in shards
    ]
    rows = swept[0].rows.clone()
    sums = 3 if class_weight is None else 4
    rows[:sums] = torch.stack([part.rows[:sums] for part in swept]).sum(0)
    class_sum = torch.stack([part.class_sum for part in swept]).sum(0)
    loss, slopes = ops.softmax_finish(rows, x, class_sum, scale, ops.NUMBERS, options)
    gradients = [
        sweep.head_backward(
            upstream, slopes, x, w, local, scale, factors, part._replace(rows=rows), options, (True,) * 3
        )
        for (w, local, factors), part in zip(shards, swept, strict=True)
    ]
    assert all(dx.dtype == accumulator(x.dtype) for dx, _, _ in gradients)
    for _, _, ds in gradients[1:]:
        assert torch.equal(ds, gradients[0][2])  # every shard knows the whole of it
    dx = torch.stack([dx for dx, _, _ in gradients]).sum(0)
    return loss, dx, torch.cat([dw for _, dw, _ in gradients]), gradients[0][2]


def whole(x, weight, labels, scale, upstream, **option):
    reductions = ("none", "mean", "sum")
    leaves = [t.clone().requires_grad_() for t in (x, weight, scale)]
    loss = nf.functional.normface_loss(
        leaves[0],
        leaves[1],
        labels,
        leaves[2],
        margin=option.get("margin"),
        reduction=reductions[option.get("reduction", 1)],
        label_smoothing=option.get("smoothing", 0.0),
        workspace=option.get("workspace"),
        sample_weight=option.get("sample_weight"),
        class_weight=option.get("class_weight"),
    )
    loss.backward(upstream)
    return loss.detach(), *(leaf.grad for leaf in leaves)


CASES = {
    "plain": {},
    "recomputed": {"workspace": 30_000},
    "arcface, none": {"margin": nf.ArcFace(0.4), "reduction": 0},
    "sum": {"reduction": 2, "margin": nf.CosFace(0.2)},
    "smoothing": {"smoothing": 0.2},
    "weights": {"weights": True, "smoothing": 0.1},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_shards_add_up_to_the_whole(lane, name, dtype):
    x, weight, labels = make(lane, dtype)
    case = dict(CASES[name])
    if case.pop("weights", False):
        wide = accumulator(dtype)
        case["sample_weight"] = lane.randn(BATCH, seed=5, dtype=wide).abs()
        case["class_weight"] = lane.randn(CLASSES, seed=6, dtype=wide).abs()
    upstream = lane.randn(BATCH, seed=7) if case.get("reduction") == 0 else lane.tensor(1.7)
    upstream = upstream.to(accumulator(dtype))
    scale = lane.tensor(12.0, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    expected = whole(x, weight, labels, scale, upstream, **case)
    got = sharded(x, weight, labels, scale, upstream, **case)
    wide = {torch.float64: (1e-12, 1e-12), torch.float32: (2e-5, 1e-6)}.get(dtype, (2e-2, 1e-3))
    for name_of, a, b in zip(("loss", "dx", "dweight", "dscale"), got, expected, strict=True):
        torch.testing.assert_close(
            a.double(), b.double(), rtol=wide[0], atol=wide[1], msg=lambda m, n=name_of: f"{n}: {m}"
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_beyond_the_fixed_shift_the_largest_logit_is_shared(lane, dtype):
    x, weight, labels = make(lane, dtype)
    scale = lane.tensor(3000.0 if dtype == torch.float64 else 400.0, dtype=dtype)
    upstream = lane.tensor(1.0, dtype=dtype)
    expected = whole(x, weight, labels, scale, upstream)
    got = sharded(x, weight, labels, scale, upstream, shift=True)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


def plain_options():
    return ops.LossOptions(16.0, 1e-12, CLASSES, True, 1 << 30, "auto", torch.float32, ignore_index=-100)


def test_inside_the_window_every_shard_has_the_same_shift(lane):
    x, weight, labels = make(lane, torch.float32)
    options = replace(plain_options(), is_shard=True)
    shifts = [
        sweep.head_shift(x, part.contiguous(), torch.full_like(labels, row_state.ELSEWHERE), None, options)
        for part in weight.split(8)
    ]
    assert all(torch.equal(shift, shifts[0]) for shift in shifts)
    assert torch.isfinite(shifts[0]).all()


def test_a_whole_head_refuses_a_target_elsewhere(lane):
    if not lane.widens:
        pytest.skip("CUDA kernels print the row and abort the process, see test_contract")
    x, weight, labels = make(lane, torch.float32)
    options = plain_options()
    labels[2] = row_state.ELSEWHERE
    with pytest.raises(RuntimeError, match=r"head_sweep: expected `labels` in \[0, 23\).*got -1 at row 2"):
        sweep.head_sweep(x, weight, labels, None, None, None, options, need_x=True, need_weight=True)
