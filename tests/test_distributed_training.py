"""Training with the class-parallel head: steps, clipping, AMP, sampling, checkpoints, failures."""

from __future__ import annotations

import distributed_jobs as jobs
import pytest
import torch
from ranks import ranks

import normface_ext as nf
from normface_ext.distributed import checkpoints
from normface_ext.distributed.sampling import ClassSampler, chosen

CLASSES, BATCH = 11, 12


@pytest.mark.covering(0)
@pytest.mark.parametrize(
    ("world", "accumulate", "autocast", "clip", "scaled"),
    [
        (2, 1, False, None, False),
        (3, 2, False, 0.5, False),
        (2, 2, True, 0.5, True),
        (4, 1, False, None, True),
    ],
)
@pytest.mark.parametrize("optimizer", [jobs.sgd, jobs.adamw])
def test_a_sharded_run_is_the_run_of_one_process(world, accumulate, autocast, clip, scaled, optimizer):
    expected, weights = jobs.train_alone(CLASSES, 4, BATCH, accumulate, autocast, clip, optimizer)
    for losses, got in ranks(world).run(
        jobs.train_sharded, CLASSES, 4, BATCH, accumulate, autocast, clip, scaled, optimizer
    ):
        tolerance = 3e-2 if autocast else 2e-4  # bfloat16 rounds a batch's and a share's gradients apart
        torch.testing.assert_close(losses, expected, rtol=tolerance, atol=tolerance)
        for a, b in zip(got, weights, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("sample_rate", [1.0, 0.4])
def test_clipping_counts_every_gradient_once(sample_rate):
    for norm, before, after in ranks(3).run(jobs.clipped, sample_rate):
        expected = torch.cat([g.flatten() for g in before]).double().norm()
        torch.testing.assert_close(norm.double(), expected, rtol=1e-5, atol=0)
        for a, b in zip(after, before, strict=True):
            torch.testing.assert_close(a, b * float(0.01 / (expected + 1e-6)), rtol=1e-5, atol=1e-9)


def test_clipping_knows_copies_from_parts():
    for both, one, gradient in ranks(2).run(jobs.clipped_with_copies):
        assert both == pytest.approx(5.0) and one == pytest.approx(4.0)
        torch.testing.assert_close(gradient, torch.full((4,), 0.5), rtol=1e-5, atol=0)


def test_an_overflow_on_one_rank_skips_the_step_on_all():
    assert ranks(2).run(jobs.overflow_on_one_rank) == [[False, False]] * 2


# Sampling -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sampled_step_is_a_head_over_the_drawn_classes():
    classes, batch, rate = 40, 9, 0.3
    x, weight, labels = jobs.problem(classes, batch, torch.float32)
    labels[1] = -100
    positives = labels[labels >= 0].unique()
    by_world = {world: ranks(world).run(jobs.sampled_steps, classes, batch, rate, 3, 7) for world in (2, 3)}
    draws = []
    for results in by_world.values():
        for rank_result in results:
            *steps, in_eval = rank_result
            for step, (loss, drawn, dweight, dx) in enumerate(steps):
                assert drawn[positives].all()
                assert torch.equal(drawn, by_world[2][0][step][1]), "the draw depends on the ranks"
                kept = drawn.nonzero()[:, 0]
                a, b = x.clone().requires_grad_(), weight[kept].clone().requires_grad_()
                places = torch.where(labels >= 0, drawn.cumsum(0)[labels.clamp(min=0)] - 1, -100)
                expected = nf.functional.normface_loss(a, b, places, 8.0, margin=nf.CosFace(0.1))
                expected.backward()
                torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(dx, a.grad, rtol=1e-4, atol=1e-6)
                torch.testing.assert_close(dweight[kept], b.grad, rtol=1e-4, atol=1e-6)
                assert not dweight[~drawn].any()
                draws.append(drawn)
            full = nf.functional.normface_loss(x, weight, labels, 8.0, margin=nf.CosFace(0.1))
            torch.testing.assert_close(in_eval, full, rtol=1e-5, atol=1e-6)
    assert not torch.equal(draws[0], draws[1]), "every step draws anew"


def test_draws_are_fair_and_independent():
    classes = torch.arange(20_000)
    seed = torch.tensor(3)
    draws = torch.stack([chosen(seed, torch.tensor(step), classes, 0.1) for step in range(50)]).double()
    # Binomial: 5 standard deviations of the mean of n draws are 5 * sqrt(0.09 / n).
    assert abs(float(draws.mean()) - 0.1) < 5 * (0.09 / draws.numel()) ** 0.5
    assert float((draws.mean(1) - 0.1).abs().max()) < 5 * (0.09 / 20_000) ** 0.5
    assert abs(float((draws[0] * draws[1]).mean()) - 0.01) < 5 * (0.01 / 20_000) ** 0.5
    assert abs(float((draws[:, 1:] * draws[:, :-1]).mean()) - 0.01) < 5 * (0.01 / draws.numel()) ** 0.5
    other = chosen(torch.tensor(4), torch.tensor(0), classes, 0.1).double()
    assert abs(float((draws[0] * other).mean()) - 0.01) < 5 * (0.01 / 20_000) ** 0.5


def test_a_state_dict_resumes_the_draws():
    sampler = ClassSampler(0.5, seed=9)
    sampler.step += 4
    other = ClassSampler(0.5)
    other.load_state_dict(sampler.state_dict())
    assert int(other.seed) == 9 and int(other.step) == 4
    with pytest.raises(ValueError, match=r"ClassSampler: expected `rate` in \(0, 1\), got 1"):
        ClassSampler(1)


# Checkpoints ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("sample_rate", [1.0, 0.5])
def test_a_checkpoint_resumes_on_any_number_of_ranks(tmp_path, sample_rate):
    def go(world, start, stop, save_at):
        return ranks(world).run(
            jobs.trained_and_saved, str(tmp_path), CLASSES, BATCH, start, stop, save_at, sample_rate
        )[0]

    expected, weights = go(4, 0, 6, 3)
    assert [step for step, _ in checkpoints(tmp_path)] == [3]
    for world in (1, 2, 3, 8):
        losses, got = go(world, 3, 6, None)
        torch.testing.assert_close(losses, expected[3:], rtol=1e-4, atol=1e-5)
        for a, b in zip(got, weights, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    ranks(8).stop()  # nobody else asks for so many


@pytest.mark.slow
def test_a_crash_while_saving_leaves_the_checkpoint_before(tmp_path):
    arguments = (str(tmp_path), CLASSES, BATCH)
    ranks(2).run(jobs.trained_and_saved, *arguments, 0, 3, 2, 1.0)
    said = ranks(2).run(jobs.dies_while_saving, *arguments, 2, 5, 4, 1.0, dying=1)[0]
    assert said.startswith(f"normface_ext.distributed: saving {tmp_path / 'saving-4'} failed on rank 0 of 2")
    assert "a process of the group died" in said
    assert [step for step, _ in checkpoints(tmp_path)] == [2]
    assert list(tmp_path.glob("saving-*")), "the crash came too early to leave anything"
    losses, _ = ranks(3).run(jobs.trained_and_saved, *arguments, 2, 4, 3, 1.0)[0]
    assert len(losses) == 2
    assert [step for step, _ in checkpoints(tmp_path)] == [2, 3]
    assert not list(tmp_path.glob("saving-*"))


def test_saving_before_the_first_step_changes_nothing(tmp_path):
    ways = [ranks(2).run(jobs.first_steps, str(tmp_path), how) for how in ("through", "saved", "loaded")]
    for results in zip(*ways, strict=True):
        for through, saved, loaded in zip(*results, strict=True):
            assert torch.equal(saved, through) and torch.equal(loaded, through)


def saved(folder, step, value, **options):
    net = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(net.weight, value)
    return nf.distributed.save_checkpoint(folder, step, net, torch.optim.SGD(net.parameters()), **options)


def test_what_was_just_saved_is_kept(tmp_path):
    for step in (5, 6, 7):
        saved(tmp_path, step, 0.0)
    assert saved(tmp_path, 3, 0.0).exists()
    assert [step for step, _ in checkpoints(tmp_path)] == [3, 7]
    with pytest.raises(ValueError, match="save_checkpoint: expected `keep` >= 1, got 0"):
        saved(tmp_path, 4, 0.0, keep=0)
    for name, value in (("keep", "2"), ("keep", True), ("keep", 1.5)):
        with pytest.raises(TypeError, match=f"save_checkpoint: expected `{name}` to be an int or None, got"):
            saved(tmp_path, 4, 0.0, **{name: value})
    for step in ("4", True, 4.0, torch.tensor(4.5)):
        with pytest.raises(TypeError, match="save_checkpoint: expected `step` to be an int, got"):
            saved(tmp_path, step, 0.0)
    net = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match="load_checkpoint: expected `step` to be an int or None, got str"):
        nf.distributed.load_checkpoint(tmp_path, net, torch.optim.SGD(net.parameters()), step="7")


def test_what_is_not_of_a_checkpoint_is_left_alone(tmp_path):
    mine = [tmp_path / name for name in ("saving-notes", "saving-1-of-2", "saving-removed-by-hand", "step-x")]
    for path in mine:
        path.mkdir()
    (tmp_path / "saving-plan.txt").write_text("mine")
    theirs = [
        tmp_path / name for name in ("saving-3", "saving-removed-step-2", "saving-removed-saving-over-step-1")
    ]
    for path in theirs:
        path.mkdir()
    saved(tmp_path, 1, 0.0)
    assert all(path.exists() for path in (*mine, tmp_path / "saving-plan.txt"))
    assert not any(path.exists() for path in theirs)


def test_a_crash_while_deleting_leaves_no_half_of_a_checkpoint(tmp_path, monkeypatch):
    def crash(path):
        next(path.glob("*.distcp")).unlink()
        raise KeyboardInterrupt

    for step in (1, 2):
        saved(tmp_path, step, float(step))
    for step, complete in ((2, [1, 2]), (3, [2, 3])):  # one that replaces, one that makes room
        with monkeypatch.context() as patch:
            patch.setattr("normface_ext.distributed.checkpoint.shutil.rmtree", crash)
            with pytest.raises(KeyboardInterrupt):
                saved(tmp_path, step, 10.0 + step)
        assert [step for step, _ in checkpoints(tmp_path)] == complete
        net = torch.nn.Linear(2, 2)
        optimizer = torch.optim.SGD(net.parameters())
        assert nf.distributed.load_checkpoint(tmp_path, net, optimizer) == step
        assert (net.weight == 10.0 + step).all()
        saved(tmp_path, step, 10.0 + step)
        assert not list(tmp_path.glob("saving-*"))


def test_ranks_that_see_different_checkpoints_say_so(tmp_path):
    saved(tmp_path / "mine", 4, 0.0)
    folders = [str(tmp_path / "mine"), str(tmp_path / "empty")]
    for heard in ranks(2).run(jobs.loaded_from, folders):
        assert "on storage that all ranks share" in heard and "[4, None]" in heard


# Failures -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("does", ["dies", "stalls"])
def test_the_others_hear_of_a_rank_that(does):
    heard = ranks(3).run(jobs.loss_while_a_rank, does, dying=1 if does == "dies" else None)
    assert heard[1] is None
    for sentence, seconds in heard[::2]:
        assert "normface_ext.distributed: the all-" in sentence and "a process of the group died" in sentence
        assert "torchrun --max-restarts" in sentence
        assert seconds < 60
