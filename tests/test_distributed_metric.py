"""The class-parallel metric losses: real processes, against one process with all rows and all agents."""

import itertools

import pytest
import torch
from metric_jobs import (
    CASES,
    HALF,
    LAYOUTS,
    WAYS,
    corners,
    every_case,
    gradients,
    padded_batch,
    sixteen_bit,
    whole,
)
from ranks import ranks

import normface_ext as nf


def in_one_process(layout, name, options, dtype):
    x, weight, labels, upstream = whole(layout, dtype)
    x.requires_grad_(), weight.requires_grad_()
    loss = getattr(nf.functional, name)(x, weight, labels, **options)
    return gradients(loss, x, weight, upstream)


@pytest.mark.covering(0)
@pytest.mark.parametrize("world", [2, 3])
def test_equals_one_process(world):
    found_by = ranks(world).run(every_case)
    for layout, case, dtype in found_by[0]:
        (classes, rows), (name, options) = LAYOUTS[layout], CASES[case]
        expected = in_one_process(layout, name, options, dtype)
        assert all(part.abs().max() > 0 for part in expected), f"{layout}, {case} shows nothing"
        for rank, found in enumerate(found_by):
            mine, part = slice(*rows[rank : rank + 2]), slice(*classes[rank : rank + 2])
            places = mine if expected[0].dim() else ..., mine, part
            for got, all_of_it, place in zip(found[layout, case, dtype], expected, places, strict=True):
                here = all_of_it[place]
                assert got.shape == here.shape and torch.from_numpy(got).dtype == dtype
                error = (torch.from_numpy(got) - here).abs().flatten() / all_of_it.abs().max()
                allowed = 32 * torch.finfo(dtype).eps
                assert (error <= allowed).all(), f"{layout}, {case}, {dtype}, rank {rank}: {error.max():.2g}"


@pytest.mark.slow
def test_sixteen_bit():
    """The shards' parts of dx are added before they are rounded; float16 holds a zero row's finite."""
    found_by = ranks(3).run(sixteen_bit)
    for dtype, (i, options) in itertools.product(HALF, enumerate(WAYS)):
        x, weight, labels, upstream = padded_batch(dtype)
        x.requires_grad_(), weight.requires_grad_()
        loss = nf.functional.c_triplet_loss(x, weight, labels, margin=1.5, reduction="sum", **options)
        loss, dx, dw = gradients(loss, x, weight, upstream)
        found = [[torch.from_numpy(array) for array in rank[dtype, i]] for rank in found_by]
        got_x, got_w = (torch.cat([rank[k] for rank in found]) for k in (1, 2))
        assert all(float(rank[0]) == pytest.approx(float(loss), rel=1e-6) for rank in found)
        assert got_x.isfinite().all() and got_w.isfinite().all() and got_x[0].abs().max() > 1e4
        assert (got_x[0].abs().max() == 65504) == (dtype == torch.float16)
        assert torch.allclose(got_x, dx.float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
        assert torch.allclose(got_w, dw.float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.slow
def test_corners():
    found_by = ranks(3).run(corners)
    # The negatives and the label's agent are all at d = 2: one hinge of 1, between classes 0 and 1.
    assert [rank["ties"][0] for rank in found_by] == [1.0, 1.0, 1.0]
    moved = [[size > 0 for size in rank["ties"][1]] for rank in found_by]
    assert moved == [[True, True], [False, False], [False, False]]
    for key in [key for key in found_by[0] if key[0] == "nan"]:
        assert [rank[key] for rank in found_by] == [[False] * 2, [i == 3 for i in range(7)], [False] * 4]
    for rank in found_by:
        assert rank["mean"]
        assert rank["second"].startswith("c_triplet_loss: second derivatives are not available")
        starts = [
            "IndexError: distributed.c_triplet_loss: expected `labels` in [0, 17) or ignore_index (-100)",
            "ValueError: distributed.c_triplet_loss: expected `labels` to have shape [4], got [0]",
            "ValueError: distributed.c_triplet_loss: expected `weight` to have this rank's",
            "ValueError: distributed.c_triplet_loss: expected `weight` to be [",
            "ValueError: distributed.c_triplet_loss: expected `margin` to be finite, got nan",
            "ValueError: distributed.c_triplet_loss: expected `backbone_gradients` to be one of mean, sum",
        ]
        for said, start in zip(rank["errors"], starts, strict=True):
            assert said.startswith(start)
