"""The class-parallel losses over agents as modules: real processes, against one process."""

import agent_module_jobs as jobs
import pytest
import torch
from ranks import ranks

import normface_ext as nf


@pytest.mark.covering(1)
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("name", jobs.KINDS)
def test_a_sharded_run_is_the_run_of_one_process(name, ragged, world):
    layer = jobs.layer_of(name)
    start = jobs.state_of(layer)
    expected, state = jobs.train(layer, name), jobs.state_of(layer)
    assert not torch.equal(state["weight"], start["weight"])
    moved = {"contrastive mean": 0.01, "contrastive none mean": 0.0199}  # the latter is at its bound
    assert ("intra_mae" in state) == (name in moved)
    assert float(state.get("intra_mae", 0.0)) >= moved.get(name, 0.0)
    found_by = ranks(world).run(jobs.trained, name, ragged)
    for step, (loss, dx, stats) in enumerate(expected):
        found = [steps[step] for steps, _ in found_by]
        whole = torch.cat([part[0] for part in found]) if loss.dim() else found[0][0]
        torch.testing.assert_close(whole, loss, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(torch.cat([part[1] for part in found]), dx, rtol=1e-10, atol=1e-12)
        for part in found:
            torch.testing.assert_close(part[2], stats, rtol=1e-12, atol=1e-13)
            assert loss.dim() or torch.equal(part[0], found[0][0])
    for _, got in found_by:
        assert got.keys() == state.keys()
        for key, value in state.items():
            torch.testing.assert_close(
                got[key], value, rtol=1e-7 if key == "intra_mae" else 1e-10, atol=1e-12
            )


@pytest.mark.parametrize("name", ["contrastive mean", "triplet"])
def test_heads_without_memory(name):
    """The same start on any number of ranks; a reset gives it again."""
    results = {world: ranks(world).run(jobs.from_meta, name, 5) for world in (2, 3)}
    start = results[2][0][0]
    other = ranks(2).run(jobs.from_meta, name, 6)[0][0]
    assert not torch.equal(other["weight"], start["weight"])
    for world, found_by in results.items():
        for rank, (first, moved, again, unit, shown, local) in enumerate(found_by):
            for key, value in start.items():
                assert torch.equal(first[key], value) and torch.equal(again[key], value)
                assert not torch.equal(moved[key], value)
            torch.testing.assert_close(start["weight"].norm(dim=1), torch.ones(11, dtype=torch.float64))
            torch.testing.assert_close(unit["weight"], start["weight"])
            each = -(-11 // world)
            assert local == (min(each, 11 - rank * each), 6)
            kind = "CContrastiveLoss" if "contrastive" in name else "CTripletLoss"
            assert shown.startswith(f"Sharded{kind}(6, 11, ")
            assert f"classes {rank * each}..{rank * each + local[0] - 1} here" in shown


@pytest.mark.parametrize("name", ["contrastive mean", "triplet hardest"])
def test_checkpoints_fit_any_number_of_ranks(name, tmp_path):
    states = ranks(2).run(jobs.saved, name, str(tmp_path))
    for sharded, plain in ranks(3).run(jobs.loaded, name, str(tmp_path)):
        for state in (sharded, plain):
            assert state.keys() == states[0].keys()
            assert all(torch.equal(state[key], value) for key, value in states[0].items())


def test_what_is_refused():
    heads = "a NormFaceLoss, a CContrastiveLoss, a CTripletLoss or a SphereFace2Loss"
    starts = [
        "ValueError: shard_head: expected `sample_rate` to be 1 for a CTripletLoss, got 0.5",
        "ValueError: shard_head: expected `sample_rate` to be 1 for a CContrastiveLoss, got 0.5",
        "ValueError: shard_head: expected `backbone_gradients` to be one of mean, sum",
        f"TypeError: shard_head: expected `head` to be {heads}, got ShardedCTripletLoss",
        f"TypeError: shard_head: expected `head` to be {heads}, got InnerDistance",
        "distributed.c_triplet_loss: expected `labels` in [0, 11) or ignore_index (-100), got 17",
    ]
    for said in ranks(2).run(jobs.refused):
        assert len(said) == len(starts)
        assert all(sentence.startswith(start) for sentence, start in zip(said, starts, strict=True))


def test_a_sharded_loss_is_a_loss_over_agents():
    for kind in ("CContrastiveLoss", "CTripletLoss"):
        assert issubclass(getattr(nf.distributed, f"Sharded{kind}"), getattr(nf, kind))
