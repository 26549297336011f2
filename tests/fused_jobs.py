"""What the processes of tests/ranks.py do with optimizers that move a class-parallel weight in backward."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import init_device_mesh

import normface_ext as nf
from normface_ext import distributed as nfd
from normface_ext.optim import FusedAdamW, FusedSGD, accumulate_in_place

DIM, BATCH, STEPS = 7, 8, 3
HEADS = {
    "normface": (nf.NormFaceLoss, {"scale": 12.0, "learn_scale": True, "margin": nf.CosFace(0.2)}),
    "sub-centres": (nf.NormFaceLoss, {"scale": 12.0, "sub_centers": 2}),
    "sphereface2": (nf.SphereFace2Loss, {}),
}
OPTIMIZERS = {
    "sgd": (FusedSGD, torch.optim.SGD, {"lr": 0.2, "momentum": 0.9, "weight_decay": 0.01}),
    "adamw": (FusedAdamW, torch.optim.AdamW, {"lr": 0.01}),
}


def spread(rank, world, name, classes):
    kind, options = HEADS[name]
    torch.manual_seed(3)
    head = kind(DIM, classes, dtype=torch.float64, **options)
    return nfd.shard_head(head, init_device_mesh("cpu", (world,)))


def batch_of(rank, k, classes):
    generator = torch.Generator().manual_seed(100 * rank + k)
    x = torch.randn(BATCH, DIM, dtype=torch.float64, generator=generator)
    return x.requires_grad_(), torch.randint(classes, (BATCH,), generator=generator)


def trained(rank, world, name, optimizer, classes, fused):
    """The whole weight, the learned scale or bias and this rank's last feature gradient."""
    head = spread(rank, world, name, classes)
    ours, theirs, options = OPTIMIZERS[optimizer]
    made = ours(head, **options) if fused else theirs(head.parameters(), **options)
    for k in range(STEPS):
        x, labels = batch_of(rank, k, classes)
        made.zero_grad()
        head(x, labels).backward()
        if fused:
            try:
                torch.nn.utils.get_total_norm([head.weight.grad])
                return "a gradient that can be used"
            except RuntimeError as error:
                assert "clipping by the global norm" in str(error), error
        made.step()
    others = [p.detach() for n, p in head.named_parameters() if n != "weight"]
    state = nfd.full_state_dict(made).get("state", {})  # the first rank has it
    return head.weight.full_tensor().detach(), others, x.grad, state


def accumulated(rank, world, name, classes, in_place):
    head = spread(rank, world, name, classes)
    handle = accumulate_in_place(head) if in_place else None
    places = set()
    for k in range(STEPS):
        x, labels = batch_of(rank, k, classes)
        head(x, labels).backward()
        places.add(head.weight.grad.to_local().data_ptr())
    if handle is not None:
        assert len(places) == 1 or head.weight.to_local().numel() == 0
        (asked,) = torch.autograd.grad(head(x, labels), head.weight)
        assert asked.shape == head.weight.shape
    return head.weight.grad.full_tensor()


def refused(rank, world):
    """Sentences."""
    found = []
    head = nfd.shard_head(nf.NormFaceLoss(DIM, 9), init_device_mesh("cpu", (world,)), sample_rate=0.5)
    agents = nfd.shard_head(nf.CTripletLoss(DIM, 9), init_device_mesh("cpu", (world,)))
    plain = nf.NormFaceLoss(DIM, 9)
    wrapped = torch.nn.parallel.DistributedDataParallel(plain)
    for module in (head, agents, wrapped):
        try:
            FusedSGD(module)
        except ValueError as error:
            found.append(str(error))
    optimizer = FusedSGD(plain)
    try:
        x, labels = batch_of(rank, 0, 9)
        wrapped(x.float(), labels)
    except ValueError as error:
        found.append(str(error))
    del optimizer
    return found
