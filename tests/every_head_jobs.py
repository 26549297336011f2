"""What ranks do in the tests of every head (tests/ranks.py)."""

import torch
from dense_head import problem
from every_head import EVERY
from torch.distributed.device_mesh import init_device_mesh

import normface_ext as nf
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


def long_features(rank, world, scale, reduction, sample_rate):
    """Features as long as they are and a learned scale: (loss, dx, dweight, dscale, logits)."""
    x, weight, labels = problem()
    head = nf.NormFaceLoss(
        16, 7, scale=scale, learn_scale=True, normalize_input=False, reduction=reduction, dtype=x.dtype
    )
    with torch.no_grad():
        head.weight.copy_(weight)
    mesh = init_device_mesh("cpu", (world,))
    head = nfd.shard_head(head, mesh, backbone_gradients="sum", sample_rate=sample_rate)
    mine = slice(0, 4) if rank == 0 else slice(4, None) if rank == 1 else slice(0, 0)
    features = x[mine].clone().requires_grad_()
    loss = head(features, labels[mine])
    loss.sum().backward()
    dw = head.weight.grad
    dw = dw.full_tensor() if sample_rate == 1 else dw.to_dense()
    return loss.detach(), features.grad, dw, head.scale.grad, head.logits(x[mine]).detach()
