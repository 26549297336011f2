"""resize_classes and weight_for of a class-parallel head: what the head of one process gives."""

from __future__ import annotations

import pytest
import resize_jobs as jobs
import torch
from ranks import ranks

BLOCKS = {"one block": (1 << 14, 1 << 12), "many": (2, 16)}


def close(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(
    ("optimizer", "keep"),
    [*(("momentum", keep) for keep in jobs.KEEPS), *((each, "all at once") for each in jobs.OPTIMIZERS)],
)
@pytest.mark.covering(1)
def test_a_resized_head_is_that_of_one_process(world, optimizer, keep):
    """Bit for bit what the ranks had bit for bit; and it trains on, with its margins and class weights."""
    blocks = BLOCKS["many" if world == 3 else "one block"]
    for (found, expected), (trained, whole) in ranks(world).run(jobs.resized, optimizer, keep, blocks):
        close(found, expected, rtol=0, atol=1e-7)
        close(trained, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("keep", ["grow", "all at once", "fewer than ranks"])
def test_a_resized_head_of_sub_centres_is_that_of_one_process(keep):
    found = ranks(2).run(jobs.resized, "adamw", keep, BLOCKS["many"], 3)
    for (right_after, expected), (trained, whole) in found:
        close(right_after, expected, rtol=0, atol=1e-7)
        close(trained, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 3, 16, 37, 50])
@pytest.mark.covering(1)
def test_new_rows_are_those_of_one_process(count, dtype):
    """By the default generator too, which goes on from the same place; not where it was elsewhere before."""
    found = [ranks(world).run(jobs.drawn, count, dtype, apart) for world in (2, 3) for apart in (False, True)]
    for of_ranks, apart in zip(found, (False, True, False, True), strict=True):
        for rank, (rows, after, spread, after_spread) in enumerate(of_ranks):
            torch.testing.assert_close(spread, rows)
            torch.testing.assert_close(
                spread.double().norm(dim=1), torch.ones(count).double(), rtol=0.01, atol=0
            )
            assert torch.equal(after, after_spread) == (rank == 0 or not apart)


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("world", [2, 3])
def test_features_of_all_ranks_are_imprinted(world, empty):
    for found, expected in ranks(world).run(jobs.imprinted, empty):
        close(found, expected, rtol=1e-6, atol=1e-7)


def test_a_gradient_that_waits_follows():
    for found, expected in ranks(2).run(jobs.a_gradient_waits):
        torch.testing.assert_close(found, expected)


def test_every_rank_hears_what_one_does_wrong():
    for said, unchanged in ranks(2).run(jobs.refused):
        assert unchanged
        for name, text in {
            "n": "ValueError: resize_classes: expected the same `n`, `keep` and `init` on every rank",
            "keep": "ValueError: resize_classes: expected the same `n`, `keep` and `init` on every rank",
            "type": "TypeError: resize_classes: expected `n` to be an int, got float (rank 1)",
            "class": "ValueError: resize_classes: expected `keep[1]` in [-1, 9], got 10 (rank 1)",
            "optimizer": "ValueError: resize_classes: expected `optimizer` to have the head's weight",
            "one optimizer": "ValueError: resize_classes: expected the same `optimizer` on every rank",
            "no state": "ValueError: resize_classes: expected the same `optimizer` on every rank",
            "gradient": "ValueError: resize_classes: expected the same `optimizer` on every rank",
            "init": "ValueError: resize_classes: expected `init` to be one of",
            "features": "ValueError: resize_classes: expected `features` and `labels`",
            "finite": "ValueError: resize_classes: expected `features` to be finite",
            "label": "IndexError: resize_classes: expected `labels`",
            "none": "ValueError: resize_classes: expected features of every new class, got none for 12",
            "cancel": "ValueError: resize_classes: expected features of one direction",
            "weight_for": "IndexError: weight_for: expected `labels`",
            "float": "TypeError: weight_for: expected `labels` to be int64 or int32",
        }.items():
            assert said[name].startswith(text), said[name]


@pytest.mark.parametrize("world", [2, 3])
def test_rows_for_labels(world):
    for rows, expected, gradient, whole in ranks(world).run(jobs.rows_for):
        torch.testing.assert_close(rows, expected)
        torch.testing.assert_close(gradient, whole)


def test_a_sampled_head_grows():
    for said, counts, after, finite in ranks(2).run(jobs.sampled):
        assert "expected no sparse gradient" in said and finite
        assert torch.equal(after[:10], counts.flip(0)) and not after[10:].any() and counts.any()


def test_a_head_of_a_part_of_the_ranks():
    _, (state, whole, *rows), (nothing, _, *others) = ranks(3).run(jobs.among_a_part)
    assert nothing == {}
    for found, expected in ((state, whole), rows, others):
        torch.testing.assert_close(found, expected)


def test_no_rank_has_the_whole_weight():
    for peak, own in ranks(3).run(jobs.grown_where_nothing_is_whole, 30_000, 128):
        # Its new rows, blocks on their way, the order of the classes. The whole weight is three times own.
        assert own < peak < 2 * own
