"""The class-parallel metric losses: real processes, against one process with all rows and all agents."""

import functools
import itertools

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import normface_ext as nf
from normface_ext import distributed
from normface_ext.distributed import ClassShard

IGNORE = -100
DIM = 7
#: First classes of the shards and first rows of the ranks, with the ends.
LAYOUTS = {
    "even": ([0, 8, 16], [0, 6, 12]),
    "ragged": ([0, 7, 11, 17], [0, 2, 9, 13]),
    "empty shard": ([0, 9, 9, 17], [0, 5, 8, 12]),
    "thirds": ([0, 6, 12, 17], [0, 4, 8, 12]),
    "no rows": ([0, 5, 17], [0, 0, 9]),
    "one class each": ([0, 1, 2, 3], [0, 3, 9, 15]),
}
CASES = {
    "contrastive": ("c_contrastive_loss", {"neg_margin": 1.9, "pos_margin": 0.1}),
    "contrastive listed": ("c_contrastive_loss", {"neg_margin": 1.9, "active_limit": 20}),
    "contrastive swept": ("c_contrastive_loss", {"neg_margin": 1.9, "active_limit": 0}),
    "contrastive none": ("c_contrastive_loss", {"neg_margin": 1.9, "reduction": "none"}),
    "contrastive hardest": ("c_contrastive_loss", {"neg_margin": 2.5, "hardest_only": True}),
    "contrastive exponential": ("c_contrastive_loss", {"neg_margin": 1.9, "exp_negative_weight": True}),
    "contrastive exponential listed": (
        "c_contrastive_loss",
        {"neg_margin": 1.9, "exp_negative_weight": True, "active_limit": 20, "reduction": "sum"},
    ),
    "contrastive batch": (
        "c_contrastive_loss",
        {"neg_margin": 2.2, "max_positive_only": True, "normalize_negative": 0.3, "positive_first": True},
    ),
    "triplet": ("c_triplet_loss", {"margin": 0.3}),
    "triplet sum": ("c_triplet_loss", {"margin": 0.3, "reduction": "sum", "add_center_loss": True}),
    "triplet none": ("c_triplet_loss", {"margin": 0.3, "reduction": "none", "active_limit": 0}),
    "triplet hardest": ("c_triplet_loss", {"margin": 0.3, "hardest_only": True}),
    "triplet hardest none": (
        "c_triplet_loss",
        {"margin": 0.3, "hardest_only": True, "reduction": "none", "positive_first": True},
    ),
}


def whole(layout, dtype, ignore=IGNORE):
    """Features near their agents, all agents, labels with an ignored row; the upstream gradient of a row."""
    classes, batch = LAYOUTS[layout][0][-1], LAYOUTS[layout][1][-1]
    generator = torch.Generator().manual_seed(classes)
    weight = torch.randn(classes, DIM, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (batch,), generator=generator)
    x = weight[labels] + 1.5 * torch.randn(batch, DIM, generator=generator, dtype=torch.float64)
    upstream = torch.randn(batch, generator=generator, dtype=torch.float64)
    labels[batch // 2] = ignore
    return x.to(dtype), weight.to(dtype), labels, upstream


def gradients(loss, x, weight, upstream):
    g = upstream.to(loss.dtype) if loss.dim() else torch.tensor(1.7, dtype=loss.dtype)
    return loss.detach(), *torch.autograd.grad(loss, (x, weight), g)


def in_one_process(layout, name, options, dtype):
    x, weight, labels, upstream = whole(layout, dtype)
    x.requires_grad_(), weight.requires_grad_()
    loss = getattr(nf.functional, name)(x, weight, labels, **options)
    return gradients(loss, x, weight, upstream)


def shard_of(layout, rank, tensors):
    classes, rows = LAYOUTS[layout]
    x, weight, labels, upstream = tensors
    part, mine = slice(*classes[rank : rank + 2]), slice(*rows[rank : rank + 2])
    x, weight = x[mine].clone().requires_grad_(), weight[part].clone().requires_grad_()
    place = ClassShard(classes[-1], part.start, len(weight), dist.group.WORLD)
    return x, weight, labels[mine], upstream[mine], {"shard": place, "backbone_gradients": "sum"}


def everything(rank, world):
    """One start of the processes serves all tests: that is what takes long."""
    found = {"cases": every_case(rank, world)}
    if world == 3:
        found |= {"sixteen bit": sixteen_bit(rank), "corners": corners(rank)}
    return found


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    return functools.cache(lambda world: on_ranks(world, tmp_path_factory.mktemp("ranks"), everything, world))


def layouts_of(world):
    return [name for name, (classes, _) in LAYOUTS.items() if len(classes) == world + 1]


def every_case(rank, world):
    """{(layout, case, dtype): (loss, dx, dweight)} on this rank."""
    found = {}
    for layout, (case, (name, options)), dtype in itertools.product(
        layouts_of(world), CASES.items(), (torch.float32, torch.float64)
    ):
        x, weight, labels, upstream, place = shard_of(layout, rank, whole(layout, dtype))
        loss = getattr(distributed, name)(x, weight, labels, **place, **options)
        found[layout, case, dtype] = [t.numpy() for t in gradients(loss, x, weight, upstream)]
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_equals_one_process(world, ran):
    ranks = [found["cases"] for found in ran(world)]
    for layout, case, dtype in ranks[0]:
        (classes, rows), (name, options) = LAYOUTS[layout], CASES[case]
        expected = in_one_process(layout, name, options, dtype)
        assert all(part.abs().max() > 0 for part in expected), f"{layout}, {case} shows nothing"
        for rank, found in enumerate(ranks):
            mine, part = slice(*rows[rank : rank + 2]), slice(*classes[rank : rank + 2])
            places = mine if expected[0].dim() else ..., mine, part
            for got, all_of_it, place in zip(found[layout, case, dtype], expected, places, strict=True):
                here = all_of_it[place]
                assert got.shape == here.shape and torch.from_numpy(got).dtype == dtype
                error = (torch.from_numpy(got) - here).abs().flatten() / all_of_it.abs().max()
                allowed = 32 * torch.finfo(dtype).eps
                assert (error <= allowed).all(), f"{layout}, {case}, {dtype}, rank {rank}: {error.max():.2g}"


HALF = (torch.float16, torch.bfloat16)
WAYS = ({"active_limit": 0}, {"active_limit": 20}, {"hardest_only": True})


def padded_batch(dtype):
    """A zero row and a zero agent among the others, and an ignored row with NaN."""
    x, weight, labels, upstream = whole("ragged", dtype)
    x[0], weight[8], labels[1], x[6] = 0, 0, 8, torch.nan
    return x, weight, labels, upstream


def sixteen_bit(rank):
    found = {}
    for dtype, (i, options) in itertools.product(HALF, enumerate(WAYS)):
        x, weight, labels, upstream, place = shard_of("ragged", rank, padded_batch(dtype))
        loss = distributed.c_triplet_loss(x, weight, labels, margin=1.5, reduction="sum", **place, **options)
        assert loss.dtype == torch.float32
        found[dtype, i] = [t.float().numpy() for t in gradients(loss, x, weight, upstream)]
    return found


def test_sixteen_bit(ran):
    """The shards' parts of dx are added before they are rounded; float16 holds a zero row's finite."""
    ranks = [found["sixteen bit"] for found in ran(3)]
    for dtype, (i, options) in itertools.product(HALF, enumerate(WAYS)):
        x, weight, labels, upstream = padded_batch(dtype)
        x.requires_grad_(), weight.requires_grad_()
        loss = nf.functional.c_triplet_loss(x, weight, labels, margin=1.5, reduction="sum", **options)
        loss, dx, dw = gradients(loss, x, weight, upstream)
        found = [[torch.from_numpy(array) for array in rank[dtype, i]] for rank in ranks]
        got_x, got_w = (torch.cat([rank[k] for rank in found]) for k in (1, 2))
        assert all(float(rank[0]) == pytest.approx(float(loss), rel=1e-6) for rank in found)
        assert got_x.isfinite().all() and got_w.isfinite().all() and got_x[0].abs().max() > 1e4
        assert (got_x[0].abs().max() == 65504) == (dtype == torch.float16)
        assert torch.allclose(got_x, dx.float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
        assert torch.allclose(got_w, dw.float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


def corners(rank):
    """What depends on ranks, errors among it; each by its name."""
    found = {}
    # A negative of every shard at the same distance: the first shard's class counts.
    place = ClassShard(6, 2 * rank, 2, dist.group.WORLD)
    agents = torch.eye(8)[[7, 1, 2, 3, 4, 5]][2 * rank : 2 * rank + 2].requires_grad_()
    x = torch.eye(8)[: rank == 1].requires_grad_()
    loss = distributed.c_triplet_loss(
        x, agents, torch.zeros(len(x), dtype=torch.int64), place, margin=1.0, hardest_only=True
    )
    found["ties"] = loss.item(), torch.autograd.grad(loss, agents)[0].abs().sum(1).tolist()

    x, weight, labels, _, place = shard_of("ragged", rank, whole("ragged", torch.float32))
    for name, hardest in itertools.product(("c_contrastive_loss", "c_triplet_loss"), (False, True)):
        with torch.no_grad():
            poisoned = x.clone()
            if rank == 1:
                poisoned[3] = torch.nan
            losses = getattr(distributed, name)(
                poisoned, weight, labels, hardest_only=hardest, reduction="none", **place
            )
        found["nan", name, hardest] = losses.isnan().tolist()

    # What DistributedDataParallel will average; batches of one size, and the agents as a DTensor.
    everything = whole("thirds", torch.float32)
    x, weight, labels, upstream, place = shard_of("thirds", rank, everything)
    loss = distributed.c_triplet_loss(x, weight, labels, **place)
    _, dx, dw = gradients(loss, x, weight, upstream)
    agents = distribute_tensor(everything[1], init_device_mesh("cpu", (3,)), [Shard(0)]).requires_grad_()
    loss = distributed.c_triplet_loss(
        x, agents, labels, place["shard"], backbone_gradients="mean", equal_batches=True
    )
    _, dx_mean, dw_sharded = gradients(loss, x, agents, upstream)
    assert isinstance(dw_sharded, DTensor)
    found["mean"] = bool(torch.equal(dx_mean, 3 * dx) and torch.equal(dw_sharded.to_local(), dw))

    loss = distributed.c_triplet_loss(x, weight, labels, **place)
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    try:
        dx.sum().backward()
    except RuntimeError as error:
        found["second"] = str(error)

    def said(**changed):
        arguments = {"x": x, "weight": weight, "labels": labels, **place, **changed}
        with pytest.raises((ValueError, IndexError, TypeError)) as raised:
            distributed.c_triplet_loss(**arguments)
        return f"{raised.type.__name__}: {raised.value}"

    found["errors"] = [
        said(labels=torch.full_like(labels, 17)),
        said(labels=labels[:0]),
        said(weight=weight[:2]),
        said(weight=weight[:, :3]),
        said(margin=torch.nan),
        said(backbone_gradients="none"),
    ]
    return found


def test_corners(ran):
    ranks = [found["corners"] for found in ran(3)]
    # The negatives and the label's agent are all at d = 2: one hinge of 1, between classes 0 and 1.
    assert [rank["ties"][0] for rank in ranks] == [1.0, 1.0, 1.0]
    moved = [[size > 0 for size in rank["ties"][1]] for rank in ranks]
    assert moved == [[True, True], [False, False], [False, False]]
    for key in [key for key in ranks[0] if key[0] == "nan"]:
        assert [rank[key] for rank in ranks] == [[False] * 2, [i == 3 for i in range(7)], [False] * 4]
    for rank in ranks:
        assert rank["mean"]
        assert rank["second"].startswith("c_triplet_loss: second derivatives are not available")
        starts = [
            "IndexError: distributed.c_triplet_loss: expected `labels` in [0, 17) or ignore_index (-100)",
            "ValueError: distributed.c_triplet_loss: expected `labels` to have shape [4], got [0]",
            "ValueError: distributed.c_triplet_loss: expected `weight` to have this rank's",
            "ValueError: distributed.c_triplet_loss: expected `weight` to be [",
            "ValueError: distributed.c_triplet_loss: expected `margin` to be finite, got nan",
            "ValueError: distributed.c_triplet_loss: expected `backbone_gradients` to be mean or sum",
        ]
        for said, start in zip(rank["errors"], starts, strict=True):
            assert said.startswith(start)
