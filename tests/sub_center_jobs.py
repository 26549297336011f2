"""What the processes of tests/ranks.py do for test_sub_center_shards.py."""

from __future__ import annotations

import copy

import torch
from distributed_jobs import DIM, full, mesh_of, problem, rows_of

import normface_ext as nf
from normface_ext import distributed as nfd

CLASSES, CENTERS, BATCH = 7, 3, 8
MARGINS = {
    "none": lambda: None,
    "arcface": lambda: nf.ArcFace(0.2),
    "classes": lambda: nf.CosFace(torch.linspace(0.1, 0.5, CLASSES)),
    "curricularface": lambda: nf.CurricularFace(),
    "magface": lambda: nf.MagFace(),
}


def make(name="none", dtype=torch.float64, **options):
    head = nf.NormFaceLoss(
        DIM, CLASSES, dtype=dtype, sub_centers=CENTERS, **{"scale": 9.0, "margin": MARGINS[name](), **options}
    )
    with torch.no_grad():
        head.weight.copy_(problem(CLASSES * CENTERS, 2, dtype)[1])
    return head


def rows():
    x, _, labels = problem(CLASSES, BATCH, torch.float64)
    labels[3] = -100
    return x, labels


def alone(name, options):
    head, (x, labels) = make(name, **options), rows()
    x.requires_grad_()
    loss = head(x, labels)
    dx, dw = torch.autograd.grad(loss.sum(), [x, head.weight])
    return loss.detach(), dx, dw.view(CLASSES, CENTERS, DIM)


def together(rank, world, name, options, ragged):
    """(loss, dx of this rank, dW in full) as one process has them."""
    head = nfd.shard_head(make(name, **options), mesh_of(world), backbone_gradients="sum")
    x, labels = rows()
    mine = rows_of(rank, world, BATCH, ragged)
    features = x[mine].clone().requires_grad_()
    loss = head(features, labels[mine])
    loss.sum().backward()
    assert head.weight.shape == (CLASSES, CENTERS, DIM) and full(head.weight).shape == head.weight.shape
    return loss.detach(), features.grad, full(head.weight.grad)


def asked(rank, world):
    """(logits, classes, shares of hits, centres, repr) of this rank's rows."""
    head = nfd.shard_head(make(), mesh_of(world))
    x, labels = rows()
    mine = rows_of(rank, world, BATCH, True)
    x, labels = x[mine], labels[mine]
    return head(x).detach(), head.predict(x), head._ranks(x, labels), head.centers_of(x, labels), repr(head)


def sampled(rank, world, steps):
    """Steps of Partial FC with sub-centres: the losses and the weight; the gradient is of whole classes."""
    head = nfd.shard_head(
        make(margin=nf.ArcFace(0.2)), mesh_of(world), sample_rate=0.4, seed=3, backbone_gradients="sum"
    )
    optimizer = nfd.RowSGD(head.parameters(), lr=0.5, momentum=0.9)
    x, labels = rows()
    mine, losses = rows_of(rank, world, BATCH, False), []
    for _ in range(steps):
        loss = head(x[mine], labels[mine])
        loss.backward()
        gradient = head.weight.grad
        assert gradient.is_sparse and gradient.dense_dim() == 2
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, full(head.weight).detach()


def from_meta(rank, world):
    """The drawn weight, and one after reset_parameters, in full."""
    single = nf.NormFaceLoss(DIM, CLASSES, sub_centers=CENTERS, scale=9.0, device="meta")
    head = nfd.shard_head(single, mesh_of(world), seed=11)
    first = full(head.weight).detach().clone()
    with torch.no_grad():
        head._local_weight().zero_()
    head.reset_parameters()
    state = copy.deepcopy(head.state_dict())
    head.load_state_dict(state)
    return first, full(head.weight).detach()


def refused(rank, world):
    head = nfd.shard_head(make(), mesh_of(world))
    x, labels = rows()
    flat = head.weight.to_local().flatten(0, 1)
    try:
        nfd.normface_loss(x, flat, labels, 9.0, head.shard, sub_centers=CENTERS)
    except ValueError as error:
        return str(error)
    return None


def not_finite(rank, world):
    """What check_finite says on this rank of a centre of class 6, which one rank has, of a class on the first
    rank, and of the scale."""
    x, labels = rows()
    said = []
    for broken in (6 * CENTERS + 1, 2 * CENTERS + 1, None):
        single = make(check_finite=True, learn_scale=True)
        with torch.no_grad():
            (single.scale if broken is None else single.weight[broken]).fill_(torch.nan)
        head = nfd.shard_head(single, mesh_of(world))
        for given in ({}, {"labels_b": labels, "lam": 0.5}):
            try:
                head(x, labels, **given)
            except ValueError as error:
                said.append(str(error))
    return said


def shared(rank, world):
    """The shapes of a head's weight in the state of one process, where a model has it under two names."""
    head = nfd.shard_head(make(), mesh_of(world))
    model = torch.nn.ModuleDict({"first": head, "second": head})
    return {name: list(value.shape) for name, value in nfd.full_state_dict(model).items()}
