"""What ranks do in the tests of the recipes (tests/ranks.py)."""

import torch
from dense_head import problem
from torch.distributed.device_mesh import init_device_mesh

import normface_ext as nf
from normface_ext import distributed as nfd

COUNTS = [4, 30, 5, 60, 8, 11, 200]


def margins(rank, world, sync):
    """KappaFace's after an epoch in which each rank had its own rows, of which rank 0 had none."""
    x, _, labels = problem(rows=60)
    mine = slice(0, 0) if rank == 0 else slice(rank - 1, None, world - 1)
    margin = nf.recipes.KappaFace(COUNTS, 16, sync=sync).double()
    margin.collect(x[mine], labels[mine])
    margin.update()
    return margin.margins


def step(rank, world):
    """A class-parallel head with such margins: (loss, dweight)."""
    x, weight, labels = problem()
    margin = nf.recipes.KappaFace(COUNTS, 16).double()
    margin.margins.copy_(torch.linspace(0.1, 0.7, 7))
    head = nf.NormFaceLoss(16, 7, scale=16.0, margin=margin, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(weight)
    head = nfd.shard_head(head, init_device_mesh("cpu", (world,)))
    loss = head(x[rank::world], labels[rank::world])
    loss.backward()
    return loss.detach(), head.weight.grad.full_tensor()
