"""What the processes of tests/ranks.py do for test_compile.py."""

from __future__ import annotations

import torch
from distributed_jobs import mesh_of

import normface_ext as nf

HEADS = {
    "head": lambda: nf.NormFaceLoss(12, 7, margin=nf.ArcFace(0.3)),
    "C-contrastive": lambda: nf.CContrastiveLoss(12, 7),
    "SphereFace2": lambda: nf.SphereFace2Loss(12, 7),
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
