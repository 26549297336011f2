"""The head's scale, options, logits and state where several processes share it."""

import head_jobs as jobs
import pytest
import torch
from distributed_jobs import problem
from ranks import ranks

import normface_ext as nf

WARNED = "of the state_dict, scale 64 replaces 10 and margin ArcFace(m=0.5) replaces CombinedMargin"


def test_logits_of_a_sharded_head_are_those_of_one_process():
    x, weight, _ = problem(jobs.CLASSES, 7, torch.float64)
    leaves = [
        x.requires_grad_(),
        weight.requires_grad_(),
        torch.tensor([4.0], dtype=torch.float64, requires_grad=True),
    ]
    logits = nf.functional.norm_linear(*leaves)
    dx, dw, ds = torch.autograd.grad(logits.sin().sum(), leaves)
    found = ranks(2).run(jobs.logits_and_gradients)
    for place, whole in ((0, logits), (1, logits.argmax(1)), (2, dx)):
        torch.testing.assert_close(torch.cat([of_rank[place] for of_rank in found]), whole.detach())
    for of_rank in found:
        torch.testing.assert_close(of_rank[3], dw)
    torch.testing.assert_close(sum(of_rank[4] for of_rank in found), ds)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_options_and_state_of_a_sharded_head(device):
    for shown, factors, names, said, scale, margin in ranks(2).run(jobs.options_of_a_sharded_head, device):
        assert shown.startswith("ShardedNormFaceLoss(6, 9, scale=40, margin=ArcFace(m=0.2), class_weight=[9]")
        assert factors == list(range(1, 10)) and names == ["_extra_state", "weight"]
        assert (scale, margin) == (40.0, "ArcFace(m=0.2)") and len(said) == 1


@pytest.mark.parametrize(
    ("device", "learned"), [("cpu", False), ("cpu", True), ("meta", False), ("meta", True)]
)
def test_a_sharded_head_keeps_mode_and_margin(device, learned):
    for training, names, margin, given, finite in ranks(2).run(jobs.mode_and_margin, device, learned):
        assert not training and names == ["weight"] + ["margin_m"] * learned
        assert margin == given and finite


@pytest.mark.parametrize("start", [-1.0, 5.0, 900.0])
def test_a_learned_scale_of_a_sharded_head_keeps_its_bounds(start):
    for now, slope, expected in ranks(2).run(jobs.kept_scale, start):
        assert now == start
        torch.testing.assert_close(slope, expected)


@pytest.mark.parametrize("drop", [False, True])
def test_a_checkpoint_restores_scale_and_margin(tmp_path, drop):
    """One that was saved without them loads as before and leaves them."""
    for said, scale, margin in ranks(2).run(jobs.through_a_checkpoint, str(tmp_path), drop):
        if drop:
            assert (said, scale, margin) == ([], 10.0, "CombinedMargin(m1=1.0, m2=0.25, m3=0.125)")
        else:
            assert (scale, margin) == (64.0, "ArcFace(m=0.5)") and len(said) == 1 and WARNED in said[0]


@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
def test_data_parallel_training_learns_the_scale(wrap):
    for sharded, value, single, expected in ranks(2).run(jobs.trained, wrap):
        for name, tensor in single.items():
            torch.testing.assert_close(sharded[name], tensor, rtol=1e-4, atol=1e-5)
        assert value == pytest.approx(expected, rel=1e-5) and value <= 8.05
        assert single["scale"] != 8.0


@pytest.mark.parametrize("kind", ["NormFaceLoss", "NormLinear", "InnerDistance", "CTripletLoss"])
def test_weights_are_drawn_where_they_lie(kind):
    first, second = ranks(2).run(jobs.drawn_where_it_lies, kind)
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(first.norm(dim=1), torch.ones(jobs.CLASSES))
    assert first.unique(dim=0).shape[0] == jobs.CLASSES


@pytest.mark.parametrize("kind", jobs.COPIED)
def test_a_copy_goes_on_as_the_head_does(kind):
    """As torch.optim.swa_utils.AveragedModel copies it."""
    assert ranks(2).run(jobs.copied, kind) == [(True, True)] * 2
