"""The ops of the metric losses on shards of the classes: what each shard returns adds up to the whole.

Here one process plays all shards, on the kernels of every lane; test_distributed_metric.py starts real ones.
"""

import itertools
from dataclasses import replace

import pytest
import torch

from normface_ext.agents import ops as agent_ops
from normface_ext.agents.ops import EXCESS_SUM, HINGE_BEST, HINGE_COSINE, HINGE_SLOPE, HingeOptions
from normface_ext.engine import sweep
from normface_ext.engine.calls import accumulator

BATCH, DIM, CLASSES, IGNORED = 9, 11, 23, -100
#: First classes of the shards; the third is empty.
BOUNDS = [0, 7, 15, 15, CLASSES]
SHARDS = list(itertools.pairwise(BOUNDS))
SUMS = [EXCESS_SUM, HINGE_SLOPE, HINGE_COSINE]


def problem(lane, dtype):
    weight = lane.randn(CLASSES, DIM, seed=1)
    labels = lane.labels(BATCH, CLASSES, seed=3)
    x = lane.tensor(weight[labels] + 1.5 * lane.randn(BATCH, DIM), dtype)
    labels[4] = IGNORED
    return x, weight.to(dtype), labels


def swept(x, weight, labels, cosine, options, upstream):
    """(state, gradients) of these classes."""
    _, _, *state = agent_ops.sweep(x, weight, labels, cosine, None, options)
    return state, lambda slope, hinges: agent_ops.sweep_gradients(
        *agent_ops.cosine_factors(state[0], slope, upstream[0], upstream[1] * hinges, options.triplet),
        x, weight, labels, state, options, (True, True),
    )  # fmt: skip


@pytest.mark.parametrize("capacity", [0, 30])
@pytest.mark.parametrize("mode", ["plain", "triplet", "exponential", "hardest"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_shards_add_up(lane, dtype, mode, capacity):
    x, weight, labels = problem(lane, dtype)
    options = HingeOptions(
        margin_value=0.3 if mode == "triplet" else 2.1,
        triplet=mode == "triplet",
        hardest=mode == "hardest",
        exponential=mode == "exponential",
        ignore_index=IGNORED,
        eps=1e-12,
        class_chunk=4,
        capacity=1 if mode == "hardest" else capacity,
    )
    wide = accumulator(dtype)
    upstream = [lane.randn(BATCH, dtype=wide, seed=seed) for seed in (5, 6)]
    cosine = agent_ops.target_cosine(x, weight, labels, options)
    state, gradients = swept(x, weight, labels, cosine, options, upstream)
    options = replace(options, is_shard=True)
    slope = state[0][HINGE_SLOPE].to(wide)
    dx, dw = gradients(slope, 1)

    places = []
    for first, last in SHARDS:
        here = (labels >= first) & (labels < last)
        elsewhere = torch.where(labels == IGNORED, IGNORED, sweep.ELSEWHERE)
        places.append(torch.where(here, labels - first, elsewhere))
    shards = [(weight[first:last], place) for (first, last), place in zip(SHARDS, places, strict=True)]
    parts = [agent_ops.target_cosine(x, w, place, options) for w, place in shards]
    assert all(part.dtype == torch.float64 for part in parts)
    assert torch.equal(torch.stack(parts).sum(0), cosine)  # one shard's number and zeros
    found = [swept(x, w, place, cosine, options, upstream) for w, place in shards]
    rows = [part[0] for part, _ in found]
    tolerance = {"rtol": 32 * torch.finfo(wide).eps, "atol": 32 * torch.finfo(wide).eps}
    best = torch.stack([part[HINGE_BEST] for part in rows])
    assert torch.allclose(best.amax(0), state[0][HINGE_BEST], **tolerance)
    owner = best.argmax(0)
    mine = [owner == k if options.hardest else torch.ones_like(labels).bool() for k in range(len(SHARDS))]
    for field in SUMS:
        kept = [
            torch.where(m, part[field], 0) if field == HINGE_SLOPE else part[field]
            for m, part in zip(mine, rows, strict=True)
        ]
        assert torch.allclose(torch.stack(kept).sum(0), state[0][field], **tolerance)
    each = [gradients(slope, m) for (_, gradients), m in zip(found, mine, strict=True)]
    assert all(part.dtype == wide and part.shape == x.shape for part, _ in each)
    terms = sum(part.abs() for part, _ in each).amax()
    whole_dx = torch.stack([part for part, _ in each]).sum(0)
    rounding = torch.finfo(dtype).eps * dx.abs().amax()
    assert (whole_dx - dx).abs().max() <= rounding + 32 * torch.finfo(wide).eps * terms
    got = torch.cat([part for _, part in each])
    assert got.dtype == dtype and got.abs().max() > 0
    assert (got - dw).abs().max() <= 32 * torch.finfo(dtype).eps * dw.abs().amax()


def test_labels_of_a_shard_are_checked():
    """The second line: an op called past the door. (On CUDA the kernel stops.)"""
    x, weight = torch.randn(3, 4), torch.randn(2, 4)
    op = torch.ops.normface_ext.target_cosine
    assert op(x, weight, torch.tensor([0, -1, IGNORED]), IGNORED, 1e-12, True)[1:].tolist() == [0, 0]
    for labels, partial in (([0, -1, 1], False), ([0, -3, 1], True), ([0, 2, 1], True)):
        with pytest.raises(
            RuntimeError, match=rf"target_cosine: expected `labels` .* got {labels[1]} at row 1"
        ):
            op(x, weight, torch.tensor(labels), IGNORED, 1e-12, partial)
    with pytest.raises(RuntimeError, match="expected `weight` to have at least one class"):
        op(x, weight[:0], torch.tensor([-1, -1, -1]), -1, 1e-12, False)
