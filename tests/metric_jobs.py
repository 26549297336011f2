"""What the processes of tests/ranks.py do for test_distributed_metric.py, and the problems they share."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

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


def shard_of(layout, rank, tensors):
    classes, rows = LAYOUTS[layout]
    x, weight, labels, upstream = tensors
    part, mine = slice(*classes[rank : rank + 2]), slice(*rows[rank : rank + 2])
    x, weight = x[mine].clone().requires_grad_(), weight[part].clone().requires_grad_()
    place = ClassShard(classes[-1], part.start, len(weight), dist.group.WORLD)
    return x, weight, labels[mine], upstream[mine], {"shard": place, "backbone_gradients": "sum"}


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


HALF = (torch.float16, torch.bfloat16)
WAYS = ({"active_limit": 0}, {"active_limit": 20}, {"hardest_only": True})


def padded_batch(dtype):
    """A zero row and a zero agent among the others, and an ignored row with NaN."""
    x, weight, labels, upstream = whole("ragged", dtype)
    x[0], weight[8], labels[1], x[6] = 0, 0, 8, torch.nan
    return x, weight, labels, upstream


def sixteen_bit(rank, world):
    found = {}
    for dtype, (i, options) in itertools.product(HALF, enumerate(WAYS)):
        x, weight, labels, upstream, place = shard_of("ragged", rank, padded_batch(dtype))
        loss = distributed.c_triplet_loss(x, weight, labels, margin=1.5, reduction="sum", **place, **options)
        assert loss.dtype == torch.float32
        found[dtype, i] = [t.float().numpy() for t in gradients(loss, x, weight, upstream)]
    return found


def corners(rank, world):
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
