"""What the processes of tests/ranks.py do for test_compile.py."""

from __future__ import annotations

import torch
from distributed_jobs import mesh_of

import normface_ext as nf

HEADS = {
    "head": lambda: nf.NormFaceLoss(12, 7, margin=nf.ArcFace(0.3)),
    "C-contrastive": lambda: nf.CContrastiveLoss(12, 7),
    "SphereFace2": lambda: nf.SphereFace2Loss(12, 7),
    "learned scale": lambda: nf.NormFaceLoss(12, 7, learn_scale=True),
    "learned scale with a bound": lambda: nf.NormFaceLoss(12, 7, learn_scale=True, max_scale=64.0),
    "long features": lambda: nf.NormFaceLoss(12, 7, normalize_input=False, margin=nf.SphereFace()),
}


def step(rank, world, kind, equal_batches):
    """[loss, dx, dW] of this rank in eager mode and as one graph; or what is said instead of the graph."""
    torch.manual_seed(0)
    head = nf.distributed.shard_head(HEADS[kind](), mesh_of(world), equal_batches=equal_batches)
    x, labels = torch.randn(4, 12, generator=torch.Generator().manual_seed(rank)), torch.arange(4) + rank
    torch._dynamo.reset()
    found = []
    for call in (head, torch.compile(head, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        try:
            loss = call(leaf, labels)
        except RuntimeError as error:
            return str(error)
        dx, dw = torch.autograd.grad(loss, (leaf, head.weight))
        found.append([loss.detach(), dx, dw.to_local()])
    return found


def training(rank, world, kind, dynamic):
    """The losses of a head whose scale and batches change, in eager mode and compiled."""
    torch.manual_seed(0)
    head = nf.distributed.shard_head(HEADS[kind](), mesh_of(world), equal_batches=True)
    torch._dynamo.reset()
    step = torch.compile(head, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    found = []
    for call in (head, step):
        losses = []
        for rows, scale in ((4, 10.0), (3, 20.0), (6, 30.0)):
            if not head.learn_scale:
                head.scale = scale
            x = torch.randn(rows, 12, generator=torch.Generator().manual_seed(rank))
            losses.append(call(x, torch.arange(rows) + rank).detach())
        found.append(torch.stack(losses))
    return found
