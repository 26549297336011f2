"""Two labels per row in the class-parallel heads: values, gradients and states are those of one process."""

from __future__ import annotations

import mixed_jobs as jobs
import pytest
import torch
from ranks import ranks

from normface_ext.softmax import functions

CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def alone(kind, reduction):
    x, weight, *given = jobs.problem()
    head = jobs.made(kind, reduction, weight)
    loss, dx = jobs.run(head, x, *given, upstream=jobs.upstream())
    return loss, dx, head.weight.grad, jobs.others(head)


def compare(results, expected):
    loss, dx, dweight, others = expected
    torch.testing.assert_close(torch.cat([r[1] for r in results]), dx, **CLOSE)
    if loss.dim():
        torch.testing.assert_close(torch.cat([r[0] for r in results]), loss, **CLOSE)
    for got, _, got_weight, got_others in results:
        if loss.dim() == 0:
            torch.testing.assert_close(got, loss, **CLOSE)
        torch.testing.assert_close(got_weight, dweight, **CLOSE)
        assert got_others.keys() == others.keys()
        for name, value in others.items():
            torch.testing.assert_close(got_others[name], value, **CLOSE, msg=name)


@pytest.fixture(autouse=True)
def one_product(monkeypatch):
    """The shards have one product whatever the size; so has the head they are compared with."""
    monkeypatch.setattr(functions, "SMALL", 0)


@pytest.mark.parametrize("kind", jobs.HEADS)
def test_gradients_are_those_of_one_process(kind):
    compare(ranks(2).run(jobs.loss_and_gradients, kind, "mean", False), alone(kind, "mean"))


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["none", "sum", "batchmean"])
@pytest.mark.parametrize("kind", jobs.HEADS)
def test_ranks_of_different_batches(kind, reduction):
    compare(ranks(3).run(jobs.loss_and_gradients, kind, reduction, True), alone(kind, reduction))


def test_batchmean_divides_by_the_rows_of_all_ranks():
    results = ranks(2).run(jobs.loss_and_gradients, "arcface", "batchmean", True)
    compare(results, alone("arcface", "batchmean"))


def test_partial_fc_that_draws_every_class_is_all_classes():
    results = ranks(2).run(jobs.loss_and_gradients, "plain", "mean", False, 0.999999)
    whole = sum(dweight for _, _, dweight, _ in results)
    compare([(loss, dx, whole, moved) for loss, dx, _, moved in results], alone("plain", "mean"))


def test_both_labels_are_in_the_draw_of_partial_fc():
    _, _, labels, labels_b, lam, factor = jobs.problem()
    counted = torch.cat([labels[(lam > 0) & (factor > 0)], labels_b[(lam < 1) & (factor > 0)]])
    results = ranks(2).run(jobs.loss_and_gradients, "plain", "mean", False, 1e-6)
    drawn = sum(dweight for _, _, dweight, _ in results).any(1)
    assert set(counted[counted >= 0].tolist()) == set(drawn.nonzero()[:, 0].tolist())


def test_a_margin_is_drawn_once_for_a_row_with_two_labels():
    for once, twice in ranks(2).run(jobs.of_equal_labels):
        torch.testing.assert_close(twice, once, **CLOSE)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    ("kind", "sample_rate"),
    [
        ("plain", 0.4),
        ("CurricularFace", 1.0),
        ("AdaFace of two centres", 0.4),
        ("MagFace of two centres", 0.4),
    ],
)
def test_a_checkpoint_has_the_draw_and_the_state_it_had(kind, sample_rate, reentrant):
    for plain, again in ranks(2).run(jobs.checkpointed, kind, sample_rate, reentrant):
        for got, expected in zip(again, plain, strict=True):
            torch.testing.assert_close(got, expected, **CLOSE)


def test_labels_b_want_lam():
    for sentence in ranks(2).run(jobs.refused):
        assert "expected `lam` together with `labels_b`, got None" in sentence


def test_rows_that_are_not_finite_are_named_as_their_rank_knows_them():
    for sentence in ranks(2).run(jobs.rows_that_are_not_finite):
        assert "expected `x` to be finite, got NaN or infinity in row 1 of rank 1" in sentence
