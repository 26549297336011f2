"""States of one process and of several: head and optimizer go from one to the other and back."""

from __future__ import annotations

import copy

import conversion_jobs as jobs
import pytest
import torch
from ranks import ranks
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import normface_ext as nf
from normface_ext import distributed as nfd


def trained(kind, optimizer="sgd", steps=range(3)):
    net = jobs.net_of(kind)
    chosen = jobs.OPTIMIZERS[optimizer](net.parameters())
    losses = jobs.train(net, chosen, steps)
    return net, chosen, losses


def same(found, state):
    assert found.keys() == state.keys()
    for key, value in state.items():
        assert not isinstance(found[key], nfd.conversion.DTensor)
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key


@pytest.mark.parametrize("kind", jobs.HEADS)
@pytest.mark.covering(1)
def test_a_state_of_one_process_goes_to_ranks_and_back(kind):
    net, _, _ = trained(kind)
    state = net.state_dict()
    extra = {"head.sampler.seed", "head.sampler.step"} if kind == "sampled" else set()
    for world, assign in ((2, False), (3, False), (3, True)):
        found = ranks(world).run(jobs.through, kind, copy.deepcopy(state), assign)
        for missing, unexpected, own, unchanged, _ in found:
            assert not missing and not unexpected and own and unchanged
        (*_, back), *others = found
        assert not any(of_rank[-1] for of_rank in others)
        assert back.keys() - state.keys() == extra
        same({key: back[key] for key in state}, state)
        # From these ranks to others, and to one process.
        (*_, again), *_ = ranks(5 - world).run(jobs.through, kind, back, assign)
        same(again, back)
        single = jobs.net_of(kind, seed=2)
        loaded = single.load_state_dict(again)
        assert not loaded.missing_keys and not loaded.unexpected_keys
        same(single.state_dict(), state)


def test_what_does_not_fit_is_said_as_torch_says_it():
    state = trained("learned")[0].state_dict()
    for said in ranks(2).run(jobs.troubles, state):
        assert "size mismatch for head.weight" in said["classes"]
        assert "torch.Size([16, 6])" in said["classes"] and "torch.Size([8, 6])" in said["classes"]
        assert "size mismatch for head.weight" in said["features"] and "[8, 5]" in said["features"]
        assert 'Missing key(s) in state_dict: "head.weight"' in said["missing"]
        assert 'Unexpected key(s) in state_dict: "head.bias"' in said["unexpected"]
        assert "Missing key(s)" in said["nothing"] and said["lenient"] == ["head.weight"]
        assert "distributed.full_state_dict gives it whole" in said["spread"]
        assert "mixed torch.Tensor and DTensor" not in said["spread"]
        assert [said[f"{name} left"] for name in ("classes", "features", "missing", "unexpected")] == [
            True,
            True,
            True,
            False,
        ]


def test_states_that_only_the_first_rank_has():
    net, chosen, _ = trained("learned", "adam")
    named = get_optimizer_state_dict(net, chosen)
    (state, ours, theirs, by_name), *_ = ranks(2).run(jobs.by_torchs_own_way, net.state_dict(), named)
    same(state, net.state_dict()), same(theirs, net.state_dict())
    torch.testing.assert_close(ours, chosen.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(by_name["state"], named["state"], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kind", "optimizer"),
    [
        *(("learned", name) for name in jobs.OPTIMIZERS),
        ("sphereface2", "adam"),
        ("contrastive", "momentum"),
        ("sub-centres", "adam"),
        ("sub-centres", "row adamw"),
    ],
)
@pytest.mark.covering(1)
def test_training_goes_on_through_ranks_as_without(kind, optimizer):
    """Three steps in one process, three on two ranks, three on three, three in one process again."""
    whole, its, losses = trained(kind, optimizer, range(12))
    net, chosen, found = trained(kind, optimizer, range(3))
    states = copy.deepcopy((net.state_dict(), chosen.state_dict()))
    for world, steps in ((2, range(3, 6)), (3, range(6, 9))):
        (of_first, states), *_ = ranks(world).run(jobs.goes_on, kind, optimizer, states, steps)
        found += of_first
    net = jobs.net_of(kind, seed=2)
    chosen = jobs.OPTIMIZERS[optimizer](net.parameters())
    net.load_state_dict(states[0])
    jobs.load_optimizer(optimizer, chosen, states[1])
    found += jobs.train(net, chosen, range(9, 12))
    torch.testing.assert_close(found, losses, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dict(net.state_dict()), dict(whole.state_dict()), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(chosen.state_dict(), its.state_dict(), rtol=1e-3, atol=1e-5)


def test_layouts_of_sub_centres_and_of_convolutions():
    shapes, _ = ranks(2).run(jobs.with_a_convolution)
    for name, rows in (("body.weight", (4, 3, 2)), ("head.weight", (3 * jobs.CLASSES, jobs.DIM))):
        assert shapes[name] == (rows, {"exp_avg": rows, "exp_avg_sq": rows, "row_step": rows[:1]})


def test_a_sampled_head_draws_on_where_it_was():
    """Over a state in host memory, on other ranks."""
    net, chosen, _ = trained("sampled", "row sgd")
    states = net.state_dict(), chosen.state_dict()
    (_, states), *_ = ranks(2).run(jobs.goes_on, "sampled", "row sgd", states, range(3))
    assert states[0]["head.sampler.step"] == 3
    (found, _), *_ = ranks(3).run(jobs.goes_on, "sampled", "row sgd", states, range(3, 6))
    (expected, _), *_ = ranks(2).run(jobs.goes_on, "sampled", "row sgd", states, range(3, 6))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_states_of_optimizers_that_do_not_fit():
    _, chosen, _ = trained("learned", "adam")
    for said, steps in ranks(2).run(jobs.optimizer_troubles, chosen.state_dict()):
        assert [text.split(": expected")[0] for text in said] == [
            "TypeError: load_optimizer_state",
            "TypeError: load_optimizer_state",
            "ValueError: load_optimizer_state",
            "TypeError: load_optimizer_state",
        ]
        assert (
            "on every rank, got {}" in said[0] and "got NoneType" in said[1] and "got ModuleDict" in said[3]
        )
        assert "to have the 8 rows of its parameter, got 3" in said[2] and steps == 0


def test_in_one_process_a_full_state_is_the_state():
    net, chosen, _ = trained("learned", "adam")
    found = nfd.full_state_dict(net)
    same(found, net.state_dict())
    assert all(
        found[key].data_ptr() != value.data_ptr()
        for key, value in net.state_dict().items()
        if "extra" not in key
    )
    torch.testing.assert_close(nfd.full_state_dict(chosen), chosen.state_dict(), rtol=0, atol=0)
    other = jobs.OPTIMIZERS["adam"](jobs.net_of("learned").parameters())
    nfd.load_optimizer_state(other, chosen.state_dict())
    assert str(other.state_dict()) == str(chosen.state_dict())
    with pytest.raises(TypeError, match="full_state_dict: expected `owner` to be a Module or an Optimizer"):
        nfd.full_state_dict(net.state_dict())
    assert nf.NormFaceLoss(jobs.DIM, 3).state_dict().keys() == {"weight", "_extra_state"}
