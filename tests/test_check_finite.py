"""NaN and infinity: what `check_finite` names, and what stays right without it."""

from __future__ import annotations

import math
import os

import distributed_jobs as jobs
import pytest
import torch
from ranks import ranks
from torch._subclasses.fake_tensor import FakeTensorMode

import normface_ext as nf

LOSSES = {
    "normface_loss": lambda x, w, y, **options: nf.functional.normface_loss(x, w, y, 12.0, **options),
    "c_contrastive_loss": nf.functional.c_contrastive_loss,
    "c_triplet_loss": nf.functional.c_triplet_loss,
}
LAYERS = {"normface_loss": nf.NormFaceLoss, "c_contrastive_loss": nf.CContrastiveLoss}
LAYERS["c_triplet_loss"] = nf.CTripletLoss
BAD = [math.nan, math.inf, -math.inf]


@pytest.fixture(params=LOSSES)
def loss(request):
    return request.param


def problem(lane):
    return lane.randn(7, 8), lane.randn(20, 8, seed=1), lane.labels(7, 20)


@pytest.mark.parametrize("bad", BAD)
def test_rows_are_named(lane, loss, bad):
    x, weight, labels = problem(lane)
    poisoned = x.clone()
    poisoned[4, 3] = bad
    with pytest.raises(
        ValueError, match=f"^{loss}: expected `x` to be finite, got NaN or infinity in row 4$"
    ):
        LOSSES[loss](poisoned, weight, labels, check_finite=True)
    poisoned[[1, 5]] = bad
    with pytest.raises(ValueError, match=r"in rows 1, 4, 5$"):
        LOSSES[loss](poisoned, weight, labels, check_finite=True)
    poisoned[:] = bad
    with pytest.raises(ValueError, match=r"in rows 0, 1, 2, 3 and 3 more$"):
        LOSSES[loss](poisoned, weight, labels, check_finite=True)
    wrong = weight.clone()
    wrong[19, 0] = bad
    with pytest.raises(ValueError, match=r"expected `weight` to be finite, got NaN or infinity in row 19$"):
        LOSSES[loss](x, wrong, labels, check_finite=True)


def test_ignored_rows_may_hold_anything(lane, loss):
    x, weight, labels = problem(lane)
    labels[2] = -100
    clean = LOSSES[loss](x, weight, labels)
    x[2] = math.nan
    assert torch.equal(LOSSES[loss](x, weight, labels, check_finite=True), clean)
    assert LOSSES[loss](x[:0], weight, labels[:0], check_finite=True) == 0


def test_a_finite_step_is_the_same_with_it(lane, loss):
    results = []
    for check in (False, True):
        x, weight, labels = problem(lane)
        x.requires_grad_(), weight.requires_grad_()
        value = LOSSES[loss](x, weight, labels, check_finite=check)
        value.backward()
        results.append((value.detach(), x.grad, weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("bad", BAD)
def test_without_it_other_rows_keep_their_gradients(lane, loss, bad):
    """As if the poisoned rows were not there."""
    gradients = []
    for poison in (True, False):
        x, weight, labels = problem(lane)
        if poison:
            x[1, 0], x[4] = bad, bad
        else:
            labels[[1, 4]] = -100
        x.requires_grad_()
        LOSSES[loss](x, weight.requires_grad_(), labels, reduction="sum").backward()
        gradients.append(x.grad[[0, 2, 3, 5, 6]])
    assert gradients[1].abs().amax(1).gt(0).all()
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-7)


def test_scale_and_sample_weight_are_looked_at():
    x, weight, labels = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, -100, 4])
    call = nf.functional.normface_loss
    with pytest.raises(ValueError, match=r"expected `scale` to be finite, got NaN or infinity$"):
        call(x, weight, labels, torch.tensor(math.nan), check_finite=True)
    factors = torch.tensor([1.0, math.nan, 1.0])
    assert call(x, weight, labels, 4.0, sample_weight=factors, check_finite=True).isfinite()
    with pytest.raises(ValueError, match=r"expected `sample_weight` to be finite, .* in row 2$"):
        call(x, weight, labels, 4.0, sample_weight=factors[[0, 2, 1]], check_finite=True)


def test_a_row_of_weight_0_is_an_ignored_one(lane):
    x, weight, labels = problem(lane)
    factors = lane.tensor([1.0, 0.0, 2.0, 1.0, 1.0, 1.0, 1.0], torch.float32)
    clean = LOSSES["normface_loss"](x, weight, labels, sample_weight=factors)
    x[1] = math.nan
    checked = LOSSES["normface_loss"](x, weight, labels, sample_weight=factors, check_finite=True)
    assert torch.equal(checked, clean)
    x[2] = math.nan
    with pytest.raises(ValueError, match=r"expected `x` to be finite, got NaN or infinity in row 2$"):
        LOSSES["normface_loss"](x, weight, labels, sample_weight=factors, check_finite=True)


def test_tensors_without_values_pass(loss):
    x, weight, labels = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 4])
    meta = [tensor.to("meta") for tensor in (x, weight, labels)]
    assert LOSSES[loss](*meta, check_finite=True).shape == ()
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(tensor) for tensor in (x, weight, labels)]
        assert LOSSES[loss](*fake, check_finite=True).shape == ()


def test_distances_and_the_released_layers_are_looked_at():
    distances, labels = torch.rand(3, 4), torch.tensor([0, -100, 3])
    distances[1] = math.nan
    assert nf.reference.triplet_of_distances(distances, labels).isfinite()
    for call in (nf.caffe.general_contrastive_loss, nf.caffe.general_triplet_loss):
        assert call(distances[[0, 2]], labels[[0, 2]], check_finite=True)[0].isfinite()
        with pytest.raises(ValueError, match=rf"{call.__name__}: expected `distances` to be .* in row 1$"):
            call(distances, labels.abs() % 4, check_finite=True)


def test_layers_pass_it_on(loss):
    x, labels = torch.randn(3, 4), torch.tensor([0, 1, 4])
    x[1, 2] = math.nan
    layer = LAYERS[loss](4, 5, check_finite=True)
    with pytest.raises(ValueError, match=f"{loss}: expected `x` to be finite, .* in row 1$"):
        layer(x, labels)
    assert LAYERS[loss](4, 5)(x, labels).isnan()


def test_a_compiled_step_stops_too(loss, compile_fully):
    step = compile_fully(lambda *arguments: LOSSES[loss](*arguments, check_finite=True))
    x, weight, labels = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 4])
    assert torch.equal(step(x, weight, labels), LOSSES[loss](x, weight, labels))
    x[1, 2] = math.nan
    with pytest.raises(RuntimeError, match=f"{loss}: expected `x` to be finite, got NaN or infinity"):
        step(x, weight, labels)


def test_every_rank_hears_of_it():
    for heard in ranks(2).run(jobs.not_finite):
        for row, ignored, weight in (heard[:3], heard[5:8], heard[8:]):
            assert row.endswith("expected `x` to be finite, got NaN or infinity in row 2 of rank 1")
            assert ignored is True
            assert weight.endswith("expected `weight` to be finite, got NaN or infinity in class 6")
            assert row.startswith("distributed.") and weight.startswith("distributed.")
        assert heard[3].endswith("normface_loss: expected `scale` to be finite, got NaN or infinity")
        assert heard[4] is True  # the row has weight 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_training_run_stops_at_a_bad_image_and_leaves_a_good_checkpoint(tmp_path, monkeypatch):
    import train_distributed as example

    batch = example.World.batch

    def poisoned(self, size, step, seed, part):
        images, labels = batch(self, size, step, seed, part)
        if step == 7:
            images[3, 0] = math.nan
        return images, labels

    monkeypatch.setattr(example.World, "batch", poisoned)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    threads = torch.get_num_threads()
    options = ["--identities", "30", "--batch", "8", "--steps", "14", "--save-every", "2", "--device", "cpu"]
    kept = ["--checkpoints", str(tmp_path / "kept"), "--out", str(tmp_path)]
    try:
        for _ in range(2):  # a restart stops there again
            with pytest.raises(ValueError, match=r"expected `x` to be finite, .* in row 3 of rank 0"):
                example.main([*options, *kept])
            assert [step for step, _ in nf.distributed.checkpoints(tmp_path / "kept")] == [4, 6]
    finally:
        torch.set_num_threads(threads)
