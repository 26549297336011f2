"""What ranks do in the tests of SphereFace2 (tests/ranks.py)."""

import torch
import torch.distributed as dist
from dense_head import problem
from torch.distributed.device_mesh import init_device_mesh

import normface_ext as nf
from normface_ext import distributed as nfd

ROWS = [slice(0, 4), slice(4, 9), slice(0, 0)]


def head_of(dtype, options, classes=7):
    head = nf.SphereFace2Loss(16, classes, first_bias=-1.5, dtype=dtype, **options)
    with torch.no_grad():
        head.weight.copy_(problem(classes=classes)[1])
    return head


def step(rank, world, options, weights=None, dtype=torch.float64, classes=7):
    """The class-parallel head: (loss, dx, dweight, dbias); each row's loss times 1, 2, 3, ... for "none"."""
    x, _, labels = problem(dtype=dtype, classes=classes)
    head = nfd.shard_head(
        head_of(dtype, options, classes), init_device_mesh("cpu", (world,)), backbone_gradients="sum"
    )
    mine = ROWS[rank]
    features = x[mine].clone().requires_grad_()
    loss = head(features, labels[mine], None if weights is None else weights[mine])
    loss.backward(torch.arange(1.0, 10)[mine].to(loss.dtype) if loss.dim() else None)
    return loss.detach(), features.grad, head.weight.grad.full_tensor(), head.bias.grad


def beside(rank, world):
    """What depends on ranks; each by its name."""
    found = {}
    mesh = init_device_mesh("cpu", (world,))
    drawn = nfd.shard_head(nf.SphereFace2Loss(16, 7, device="meta"), mesh, seed=3)
    found["meta"] = drawn.weight.full_tensor().detach(), drawn.bias.detach(), repr(drawn)
    whole = nfd.shard_head(head_of(torch.float64, {}), mesh)
    whole.load_state_dict(whole.state_dict())
    found["keys"] = list(whole.state_dict())
    try:
        nfd.shard_head(nf.SphereFace2Loss(16, 7), mesh, sample_rate=0.5)
    except ValueError as error:
        found["sampled"] = str(error)
    x, weight, labels = problem()
    shard = nfd.ClassShard.of(7, dist.group.WORLD)
    part = weight[shard.first : shard.first + shard.count].requires_grad_()
    loss = nfd.sphereface2_loss(x, part, labels, 0.25, shard, equal_batches=True)
    found["function"] = loss.detach()
    (dw,) = torch.autograd.grad(loss, part, create_graph=True)
    try:
        torch.autograd.grad(dw.sum(), part)
    except RuntimeError as error:
        found["second"] = str(error)
    return found
