"""The ops of the metric losses on shards of the classes: what each shard returns adds up to the whole.

Here one process plays all shards, on the kernels of every lane; test_distributed_metric.py starts real ones.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from kernel_cases import engine_ops

from normface_ext.agents import functions, ops
from normface_ext.agents.options import ContrastiveOptions, TripletOptions
from normface_ext.engine import row_state
from normface_ext.engine.dtypes import accumulator
from normface_ext.engine.sweep import target_cosine

BATCH, DIM, CLASSES, IGNORED = 9, 11, 23, -100
#: First classes of the shards; the third is empty.
BOUNDS = [0, 7, 15, 15, CLASSES]
SHARDS = list(itertools.pairwise(BOUNDS))


def problem(lane, dtype):
    weight = lane.randn(CLASSES, DIM, seed=1)
    labels = lane.labels(BATCH, CLASSES, seed=3)
    x = lane.tensor(weight[labels] + 1.5 * lane.randn(BATCH, DIM), dtype)
    labels[4] = IGNORED
    return x, weight.to(dtype), labels


class Shard:
    """What one process does with the classes it has."""

    def __init__(self, x, weight, labels, cosine, options):
        self.given, self.options = (x, weight, labels), options
        self.distance, self.threshold = ops.hinge_threshold(*self.given, cosine, None, options)
        self.swept, self.collected, self.options = ops.sweep_hinges(
            *self.given, self.threshold, options, need_gradient=True
        )

    @property
    def best(self):
        return self.collected.values[:, 0]

    def gradients(self, slopes, mine):
        slopes = slopes.clone()
        slopes[ops.OTHERS] *= mine
        return ops.hinge_gradients(
            slopes, *self.given, self.threshold, self.swept, self.collected, self.options, (True, True)
        )


@pytest.mark.parametrize("store", [True, False])
@pytest.mark.parametrize("capacity", [0, 22])
@pytest.mark.parametrize("mode", ["plain", "triplet", "exponential", "hardest"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_shards_add_up(lane, dtype, mode, capacity, store):
    x, weight, labels = problem(lane, dtype)
    kind = TripletOptions if mode == "triplet" else ContrastiveOptions
    terms = {"margin": 0.3} if mode == "triplet" else {"neg_margin": 2.1}
    if mode == "exponential":
        terms["exp_negative_weight"] = True
    chosen = kind(**terms, hardest_only=mode == "hardest", active_limit=capacity)
    _, options = functions.sweep_options("", x, weight, BATCH, CLASSES, IGNORED, chosen, True)
    # All in float32: shards in 16 bits would not agree on what is active.
    wide = accumulator(dtype)
    few = engine_ops.arguments(x, weight, labels, class_chunk=4, product_precision=wide)
    options = replace(options, product_precision=wide, keep=store, **engine_ops.budget(few))
    upstream = [lane.randn(BATCH, dtype=wide, seed=seed) for seed in (5, 6)]
    cosine = target_cosine(x, weight, labels, options)
    whole = Shard(x, weight, labels, None, options)
    slopes = ops.hinge_slopes(whole.swept.rows, *upstream, options)
    dx, dw = whole.gradients(slopes, 1)
    options = replace(options, is_shard=True)

    places = []
    for first, last in SHARDS:
        here = (labels >= first) & (labels < last)
        elsewhere = torch.where(labels == IGNORED, IGNORED, row_state.ELSEWHERE)
        places.append(torch.where(here, labels - first, elsewhere))
    shards = [(weight[first:last], place) for (first, last), place in zip(SHARDS, places, strict=True)]
    parts = [target_cosine(x, w, place, options) for w, place in shards]
    assert all(part.dtype == torch.float64 for part in parts)
    assert torch.equal(torch.stack(parts).sum(0), cosine)  # one shard's number and zeros
    found = [Shard(x, w, place, cosine, options) for w, place in shards]
    for shard in found:
        assert torch.equal(shard.distance, whole.distance) and torch.equal(shard.threshold, whole.threshold)
    tolerance = {"rtol": 32 * torch.finfo(wide).eps, "atol": 32 * torch.finfo(wide).eps}
    mine = [torch.ones_like(labels).bool() for _ in SHARDS]
    if options.hardest:
        best = torch.stack([shard.best for shard in found])
        assert torch.allclose(best.amax(0), whole.best, **tolerance)
        mine = [best.argmax(0) == k for k in range(len(SHARDS))]
    rows = found[0].swept.rows.clone()
    for field in (row_state.SUM, row_state.SECOND_SUM):
        kept = [shard.swept.rows[field] * m for m, shard in zip(mine, found, strict=True)]
        rows[field] = torch.stack(kept).sum(0)
    assert torch.allclose(
        rows[: row_state.SECOND_SUM + 1], whole.swept.rows[: row_state.SECOND_SUM + 1], **tolerance
    )
    slopes = ops.hinge_slopes(rows, *upstream, options)
    each = [shard.gradients(slopes, m) for m, shard in zip(mine, found, strict=True)]
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
