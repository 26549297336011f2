"""Which class is nearest, and where the target stands: without a matrix of all cosines."""

import pytest
import ranking_jobs
import torch
from lanes import DTYPES
from ranks import ranks

import normface_ext as nf
from normface_ext import reference
from normface_ext.engine.dtypes import accumulator

F = nf.functional


def problem(lane, dtype, batch=23, dim=24, classes=137):
    x, weight = lane.randn(batch, dim, dtype=dtype), lane.randn(classes, dim, dtype=dtype, seed=1)
    labels = lane.labels(batch, classes)
    x += (0.5 * weight[labels]).to(dtype)  # some hits, some misses
    return x, weight, labels


def within_rounding(x, weight, labels, ranks, dtype):
    """A rank may be any between those of the cosines a rounding away."""
    cosines = reference.cosine(x.double(), weight.double())
    own = cosines.gather(1, labels[:, None])
    room = {torch.float64: 1e-13, torch.float32: 1e-6}.get(dtype, 2e-3)
    least, most = (cosines > own + room).sum(1), (cosines > own - room).sum(1) - 1
    return bool(((least <= ranks) & (ranks <= most.clamp_min(least))).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("workspace", [None, 200_000])
def test_ranks(lane, dtype, workspace):
    x, weight, labels = problem(lane, dtype)
    ranks = F.target_rank(x, weight, labels, workspace=workspace)
    assert ranks.dtype == torch.int64 and within_rounding(x, weight, labels, ranks, dtype)
    assert 0 < (ranks == 0).sum() < len(ranks)
    if dtype == torch.float64:
        assert torch.equal(ranks, reference.target_rank(x, weight, labels))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("workspace", [None, 200_000])
def test_nearest(lane, dtype, workspace):
    x, weight, _ = problem(lane, dtype)
    classes, cosines = F.nearest_class(x, weight, workspace=workspace)
    assert classes.dtype == torch.int64 and cosines.dtype == accumulator(dtype)
    all_of_them = reference.cosine(x.double(), weight.double())
    room = {torch.float64: 1e-13, torch.float32: 1e-6}.get(dtype, 2e-3)
    assert (all_of_them.gather(1, classes[:, None])[:, 0] >= all_of_them.amax(1) - room).all()
    assert (cosines.double() - all_of_them.amax(1)).abs().max() <= room


def test_of_equal_classes_the_first(lane):
    weight = lane.randn(6, 8).repeat(3, 1)
    classes, _ = F.nearest_class(weight[[13, 5, 6]], weight)
    assert classes.tolist() == [1, 5, 0]


def test_rows_that_do_not_count_and_nan(lane):
    x, weight, labels = problem(lane, torch.float32)
    plain = F.target_rank(x, weight, labels)
    labels[3], x[3] = -100, float("nan")
    x[5] = float("nan")
    ranks = F.target_rank(x, weight, labels)
    assert ranks[3] == -1 and ranks[5] == len(weight) - 1
    rest = torch.arange(len(x), device=x.device)
    rest = (rest != 3) & (rest != 5)
    assert torch.equal(ranks[rest], plain[rest])
    assert F.nearest_class(x, weight)[1][5].isnan()


def test_the_head_knows_its_hits(lane):
    x, weight, labels = problem(lane, torch.float32)
    head = nf.NormFaceLoss(x.shape[1], len(weight), margin=nf.ArcFace(0.3)).to(lane.device)
    head.weight.data.copy_(weight)
    logits = head.logits(x)
    assert torch.equal(head.predict(x), logits.argmax(1))
    labels[4] = -100
    kept = labels >= 0
    own = logits.gather(1, labels.clamp_min(0)[:, None])
    places = (logits > own).sum(1)[kept]
    wanted = torch.stack([(places < k).double().mean() for k in (1, 3, 10)])
    assert torch.equal(head.accuracy(x, labels, topk=(1, 3, 10)), wanted)
    assert head.accuracy(x, torch.full_like(labels, -100)).tolist() == [0.0, 0.0]


def test_nothing_of_the_size_of_all_cosines():
    """On the CPU's kernels; what those for CUDA hold is the plan's to say."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, 16, generator=generator) for rows in (64, 20_000))
    labels, matrix = torch.randint(20_000, (64,), generator=generator), 64 * 20_000 * 4
    for call in (lambda: F.target_rank(x, weight, labels), lambda: F.nearest_class(x, weight)):
        assert nf.testing.peak_bytes(call) < matrix / 2
    assert nf.testing.peak_bytes(lambda: F.norm_linear(x, weight).argmax(1)) >= matrix  # the meter can say no


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"topk": (0,)}, ValueError, "`topk` to be ints of at least 1, such as"),
        ({"topk": ()}, ValueError, "`topk` to be ints of at least 1, such as"),
        ({"topk": 5}, ValueError, "`topk` to be ints of at least 1, such as"),
        ({"labels": torch.tensor([7])}, IndexError, r"labels` in \[0, 7\)"),
    ],
)
def test_bad_arguments(change, error, sentence):
    head, given = nf.NormFaceLoss(4, 7), {"x": torch.ones(1, 4), "labels": torch.zeros(1, dtype=torch.int64)}
    with pytest.raises(error, match=sentence):
        head.accuracy(**{**given, **change})


@pytest.mark.parametrize("world", [2, 3])
def test_class_parallel_heads_answer_as_one(world):
    for rank, (got, wanted) in enumerate(ranks(world).run(ranking_jobs.answers)):
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True)), rank
