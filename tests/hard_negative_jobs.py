"""What ranks do in the tests of heads with hard negatives (tests/ranks.py)."""

import torch
from batch_margin_jobs import Says
from dense_head import problem
from torch.distributed.device_mesh import init_device_mesh

import normface_ext as nf
from normface_ext import distributed as nfd

ROWS = [slice(0, 4), slice(4, 9), slice(0, 0)]


def state(rank, world, sync):
    """t after two batches on every rank, the last of which has no rows."""
    margin = nf.CurricularFace(alpha=0.25, sync=sync)
    for seed in (0, 1):
        x, weight, labels = problem(seed=seed)
        nf.functional.normface_loss(x[ROWS[rank]], weight, labels[ROWS[rank]], 16.0, margin=margin)
    return float(margin.t)


def step(rank, world, make, scale, options, dtype=torch.float64):
    """The class-parallel head: (loss, dx, dweight, dscale, state)."""
    x, weight, labels = problem(dtype=dtype)
    margin = make() if make else None
    head = nf.NormFaceLoss(
        16, 7, scale=scale, learn_scale=True, max_scale=1e4, margin=margin, dtype=dtype, **options
    )
    with torch.no_grad():
        head.weight.copy_(weight)
    head = nfd.shard_head(head, init_device_mesh("cpu", (world,)), backbone_gradients="sum")
    features = x[ROWS[rank]].clone().requires_grad_()
    loss = head(features, labels[ROWS[rank]])
    loss.backward()
    buffers = [] if margin is None else [float(b) for b in head.margin.buffers()]
    return loss.detach(), features.grad, head.weight.grad.full_tensor(), head.scale.grad, buffers


def sampled(rank, world, make):
    """All classes by the sampler's way: a rate at which none is left out."""
    x, weight, labels = problem()
    found = []
    for rate in (1.0, 0.999):
        head = nf.NormFaceLoss(16, 7, scale=16.0, margin=make(), dtype=torch.float64)
        with torch.no_grad():
            head.weight.copy_(weight)
        head = nfd.shard_head(
            head, init_device_mesh("cpu", (world,)), sample_rate=rate, backbone_gradients="sum"
        )
        features = x[ROWS[rank]].clone().requires_grad_()
        head(features, labels[ROWS[rank]]).backward()
        found.append(features.grad)
    return found


class Both(Says):
    uses_norms = hard_negatives = True


class Pulled(nf.BatchMargin):
    """Hard negatives, and a term of the rows."""

    hard_negatives = True

    def of(self, rows):
        return nf.HardNegatives(nf.CosFace(0.3), rows.cosine - 0.3, (0.0, 1.5, 0.0), (0.0, 1.5), highest=1.5)

    def regularizer(self, rows):
        return 1 + rows.labels.double()


def pulled(rank, world, reduction):
    x, weight, labels = problem()
    head = nf.NormFaceLoss(16, 7, scale=16.0, margin=Pulled(), reduction=reduction, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(weight)
    head = nfd.shard_head(head, init_device_mesh("cpu", (world,)))
    return head(x[ROWS[rank]], labels[ROWS[rank]]).detach()


def refused(rank, world):
    x, _, labels = problem()
    head = nf.NormFaceLoss(16, 7, margin=Both(None), dtype=torch.float64)
    head = nfd.shard_head(head, init_device_mesh("cpu", (world,)))
    try:
        head(x, labels)
    except ValueError as error:
        return str(error)
