"""The state of margins that look at the batch and of CContrastiveLoss: what may move it, how wide it is, and
what becomes of it in a pass that is run again."""

import copy
import math

import batch_margin_jobs as jobs
import pytest
import torch
from dense_head import problem
from ranks import ranks
from torch import nn
from torch.utils.checkpoint import checkpoint

import normface_ext as nf

NOT_FINITE = [math.nan, math.inf, -math.inf]


def adaface(**given):
    return nf.AdaFace(t_alpha=0.25, **given)


def contrastive(**given):
    torch.manual_seed(0)
    return nf.CContrastiveLoss(16, 7, add_intra_mae=True, neg_margin=1.9, **given)


# One row that is not finite ---------------------------------------------------------------------------


@pytest.mark.parametrize("filler", NOT_FINITE)
@pytest.mark.parametrize("entries", [1, 16])
def test_adafaces_statistics_are_of_the_finite_norms(lane, filler, entries):
    x, weight, labels = (lane.tensor(t) for t in problem())
    spoilt, margins = x.clone(), [adaface(device=lane.device) for _ in range(2)]
    spoilt[0, :entries] = filler
    without = labels.clone()
    without[0] = -100
    nf.functional.normface_loss(spoilt, weight, labels, 16.0, margin=margins[0])
    nf.functional.normface_loss(x, weight, without, 16.0, margin=margins[1])
    for a, b in zip(*(m.buffers() for m in margins), strict=True):
        assert torch.equal(a, b) and a.isfinite().all()
    assert float(margins[0].mean) != 20.0
    assert nf.functional.normface_loss(x, weight, labels, 16.0, margin=margins[0]).isfinite()


def test_a_batch_without_a_finite_norm_moves_nothing():
    x, weight, labels = problem()
    margin = adaface()
    nf.functional.normface_loss(x * math.nan, weight, labels, 16.0, margin=margin)
    assert (float(margin.mean), float(margin.std)) == (20.0, 100.0)


@pytest.mark.parametrize("filler", NOT_FINITE)
def test_the_running_mean_of_agents_does_not_move_by_it(lane, filler):
    layer = contrastive().to(lane.device)
    x, _, labels = (lane.tensor(t) for t in problem(dtype=torch.float32))
    layer(x, labels)
    before, spoilt = layer.intra_mae.clone(), x.clone()
    assert before > 0
    spoilt[0, 0] = filler
    layer(spoilt, labels)
    assert torch.equal(layer.intra_mae, before)
    assert layer(x, labels).isfinite() and layer.intra_mae > before


# Width ------------------------------------------------------------------------------------------------


class Learned(nf.BatchMargin):
    """CosFace with a number that is learned."""

    def __init__(self):
        super().__init__()
        self.size = nn.Parameter(torch.tensor([0.3]))

    def of(self, rows):
        return nf.RowMargin(m3=self.size.expand(len(rows.labels)))


NARROW = {
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "to": lambda module: module.to(torch.float16),
    "type": lambda module: module.type(torch.bfloat16),
    "inside": lambda module: nn.Sequential(module).half(),
}


@pytest.mark.parametrize("narrow", NARROW.values(), ids=NARROW)
@pytest.mark.parametrize("made", [torch.float32, torch.float64])
def test_the_running_mean_stays_wide_and_the_agents_do_not(narrow, made):
    layer = contrastive().to(made)
    x, _, labels = problem(dtype=made)
    layer(x, labels).backward()
    before = layer.intra_mae.clone()
    narrow(layer)
    assert torch.equal(layer.intra_mae, before) and layer.intra_mae.dtype == made
    assert layer.weight.dtype.itemsize == layer.weight.grad.dtype.itemsize == 2
    assert layer.to("meta").intra_mae.is_meta


def test_the_mean_of_a_16_bit_layer_is_that_of_a_wide_one():
    """In bfloat16 it would stop at a part of it, where a step is less than half of the last digit."""
    narrow = contrastive().bfloat16()
    wide, (x, _, labels) = copy.deepcopy(narrow).float(), problem(dtype=torch.bfloat16)
    for _ in range(100):
        narrow(x, labels)
        wide(x.float(), labels)
    torch.testing.assert_close(narrow.intra_mae, wide.intra_mae, rtol=1e-3, atol=0)


@pytest.mark.parametrize("narrow", NARROW.values(), ids=NARROW)
def test_a_margins_state_stays_wide(narrow):
    head = nf.NormFaceLoss(16, 7, margin=Learned())
    x, _, labels = problem(dtype=torch.float32)
    head(x, labels).backward()
    narrow(head)
    assert head.margin.size.dtype == head.margin.size.grad.dtype == torch.float32
    assert head.weight.dtype.itemsize == 2


# Run again in the backward ----------------------------------------------------------------------------


def margins_step(dtype, chosen, together, order):
    """Batches whose norms differ by much, as k does: losses, gradients and state of two epochs."""
    torch.manual_seed(0)
    head, found = nf.NormFaceLoss(16, 7, scale=16.0, margin=adaface(), dtype=torch.float64), []
    data = [(problem(seed=i)[0] * (1 + 4 * i), problem(seed=i)[2].to(dtype)) for i in range(3)]
    for _ in range(2):
        values = []
        for x, labels in data:
            leaf = x.clone().requires_grad_()
            values.append((chosen(head, leaf, labels), leaf))
            if not together:
                values[-1][0].backward()
        if together:
            for loss, _ in values[::order]:
                loss.backward()
        found += [t for loss, leaf in values for t in (loss.detach(), leaf.grad)]
        found += [head.weight.grad.clone(), head.margin.mean.clone(), head.margin.std.clone()]
    return found


def plain(head, x, labels):
    return head(x, labels)


AGAIN = {
    "reentrant": lambda head, x, labels: checkpoint(head, x, labels, use_reentrant=True),
    "other": lambda head, x, labels: checkpoint(head, x, labels, use_reentrant=False),
    "block": lambda head, x, labels: checkpoint(
        lambda x, labels: head(1.0 * x, labels), x, labels, use_reentrant=False
    ),
}


@pytest.mark.parametrize("way", AGAIN.values(), ids=AGAIN)
@pytest.mark.parametrize("together, order", [(False, 1), (True, 1), (True, -1)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_adaface_has_the_statistics_it_had(way, together, order, dtype):
    expected = margins_step(dtype, plain, together, order)
    for found, want in zip(margins_step(dtype, way, together, order), expected, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_so_it_has_in_a_class_parallel_head(dtype):
    (expected,), (found,) = (ranks(1).run(jobs.passes, dtype, again) for again in (False, True))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def test_a_pass_of_adaface_that_cannot_be_told_apart_is_refused():
    x, _, labels = problem()
    head = nf.NormFaceLoss(16, 7, margin=adaface(), dtype=torch.float64)
    x.requires_grad_()
    first, second = (checkpoint(head, x, labels, use_reentrant=False) for _ in range(2))
    with pytest.raises(RuntimeError, match=r"^AdaFace: expected `labels` to be .* got those of 2; give the"):
        (first + second).backward()
    loss = checkpoint(lambda x: head(x, labels.clone()), x, use_reentrant=False)
    with pytest.raises(RuntimeError, match=r"^AdaFace: expected `labels` to be .* got those of 0; give the"):
        loss.backward()


def test_a_frozen_adaface_asks_for_no_pass():
    x, _, labels = problem()
    head = nf.NormFaceLoss(16, 7, margin=adaface(), dtype=torch.float64).eval()
    x.requires_grad_()
    checkpoint(lambda x: head(x, labels.clone()), x, use_reentrant=False).backward()
    assert x.grad.isfinite().all()


class Counting(nf.BatchMargin):
    """Counts the passes that are not run again, as docs/architecture.md says."""

    def __init__(self):
        super().__init__()
        self.register_buffer("passes", torch.zeros(1))

    def of(self, rows):
        if self.training and not self.recomputing():
            self.passes += 1
        return nf.CosFace(0.3)


def test_a_margin_of_ones_own_knows_when_it_is_run_again():
    x, _, labels = problem()
    head = nf.NormFaceLoss(16, 7, margin=Counting(), dtype=torch.float64)
    checkpoint(head, x.requires_grad_(), labels, use_reentrant=False).backward()
    assert head.margin.passes == 1 and not head.margin.recomputing()
