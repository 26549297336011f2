"""What the processes of tests/ranks.py do: importable functions (rank, world, ...) -> picklable results."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import normface_ext as nf
from normface_ext import distributed as nfd

DIM = 6


def mesh_of(world):
    return init_device_mesh("cpu", (world,))


def full(tensor):
    """The whole of a sharded tensor, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def rows_of(rank, world, batch, ragged):
    """The slice of a global batch that belongs to a rank; ragged: 0, 1, 2, ... shares."""
    shares = list(range(world)) if ragged else [1] * world
    bounds = [batch * sum(shares[:k]) // sum(shares) for k in range(world + 1)]
    return slice(bounds[rank], bounds[rank + 1])


def problem(classes, batch, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, DIM, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(classes, DIM, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(classes, (batch,), generator=generator)
    labels[0], labels[-1] = classes - 1, 0
    return x, weight, labels


def head_of(classes, weight, **options):
    head = nf.NormFaceLoss(DIM, classes, dtype=weight.dtype, **options)
    with torch.no_grad():
        head.weight.copy_(weight)
    return head


def loss_and_gradients(
    rank, world, classes, batch, dtype, ragged, options, upstream=None, sample_weight=False
):
    """The class-parallel head: (loss, dx of this rank, dweight in full, dscale)."""
    x, weight, labels = problem(classes, batch, dtype)
    options, every = {k: v for k, v in options.items() if k != "ignore_every"}, options.get("ignore_every")
    if every:
        labels[::every] = -100
    mine = rows_of(rank, world, batch, ragged)
    head = nfd.shard_head(head_of(classes, weight, **options), mesh_of(world), backbone_gradients="sum")
    features = x[mine].clone().requires_grad_()
    factors = torch.linspace(0.5, 2, batch, dtype=torch.float64).to(dtype)[mine] if sample_weight else None
    loss = head(features, labels[mine], factors)
    loss.backward(torch.ones_like(loss) if upstream is None else upstream[mine].to(loss.dtype))
    scale = head.scale.grad if isinstance(head.scale, nn.Parameter) else None
    assert isinstance(head.weight, DTensor) and isinstance(head.weight.grad, DTensor)
    return loss.detach(), features.grad, full(head.weight.grad), scale


@contextmanager
def recorded():
    """The collectives of torch.distributed that are called: (name, bytes this rank puts in)."""
    calls, saved = [], {}

    def counting(name, original, argument):
        def call(*args, **options):
            calls.append((name, args[argument].numel() * args[argument].element_size()))
            return original(*args, **options)

        return call

    for name, argument in (("all_reduce", 0), ("all_gather_into_tensor", 1), ("reduce_scatter_tensor", 1)):
        saved[name] = getattr(dist, name)
        setattr(dist, name, counting(name, saved[name], argument))
    try:
        yield calls
    finally:
        for name, original in saved.items():
            setattr(dist, name, original)


def collectives_of_a_step(rank, world, classes, batch, dtype, equal, options):
    x, weight, labels = problem(classes, batch, dtype)
    head = nfd.shard_head(head_of(classes, weight, **options), mesh_of(world), equal_batches=equal)
    mine = rows_of(rank, world, batch, ragged=False)
    with recorded() as forward:
        loss = head(x[mine].requires_grad_(), labels[mine])
    with recorded() as backward:
        loss.backward(torch.ones_like(loss))
    return forward, backward


def twice(rank, world, classes, batch, dtype):
    return [loss_and_gradients(rank, world, classes, batch, dtype, True, {"scale": 16.0}) for _ in range(2)]


def initial_weight(rank, world, classes, seed):
    head = nfd.shard_head(nf.NormFaceLoss(DIM, classes, device="meta"), mesh_of(world), seed=seed)
    return full(head.weight.detach()), head.weight.to_local().shape


def described(rank, world, classes):
    head = nfd.shard_head(nf.NormFaceLoss(DIM, classes), mesh_of(world))
    head.renormalize_()
    copy.deepcopy(head.sampler)
    return repr(head), full(head.weight.detach()).norm(dim=1)


def refused(rank, world, kind):
    """The sentence of a bad call."""
    mesh = mesh_of(world)
    head = nf.NormFaceLoss(DIM, 5)
    sharded = nfd.shard_head(head, mesh)
    x, labels = torch.randn(2, DIM), torch.tensor([0, 4])
    calls = {
        "head": lambda: nfd.shard_head(sharded, mesh),
        "mesh": lambda: nfd.shard_head(head, "cpu"),
        "2-D": lambda: nfd.shard_head(head, init_device_mesh("cpu", (world, 1))),
        "rate": lambda: nfd.shard_head(head, mesh, sample_rate=0.0),
        "gradients": lambda: nfd.shard_head(head, mesh, backbone_gradients="both"),
        "labels": lambda: sharded(x, torch.tensor([0, 5])),
        "features": lambda: sharded(torch.randn(2, DIM + 1), labels),
        "dtype": lambda: sharded(x.double(), labels),
        "shard": lambda: nfd.normface_loss(x, torch.randn(9, DIM), labels, 4.0, sharded.shard),
        "smoothing": lambda: nfd.shard_head(
            nf.NormFaceLoss(DIM, 5, label_smoothing=0.1), mesh, sample_rate=0.5
        )(x, labels),
    }
    try:
        calls[kind]()
    except (TypeError, ValueError, IndexError) as error:
        return type(error).__name__, str(error)
    return None
