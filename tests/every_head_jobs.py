"""What ranks do in the tests of every head (tests/ranks.py)."""

import torch
from dense_head import problem
from every_head import EVERY
from torch.distributed.device_mesh import init_device_mesh

from normface_ext import distributed as nfd


def step(rank, world, name, lengths, dtype=torch.float64):
    """The class-parallel head: (loss, dx, dweight) of rows of which rank 0 has four."""
    x, weight, labels = problem(dtype=dtype, lengths=lengths)
    head = EVERY[name].make(16, 7, dtype)
    with torch.no_grad():
        head.weight.copy_(weight)
    head = nfd.shard_head(head, init_device_mesh("cpu", (world,)), backbone_gradients="sum")
    mine = slice(0, 4) if rank == 0 else slice(4, None)
    features = x[mine].clone().requires_grad_()
    loss = head(features, labels[mine])
    loss.backward()
    return loss.detach(), features.grad, head.weight.grad.full_tensor()
