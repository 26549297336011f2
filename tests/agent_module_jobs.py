"""What the processes of tests/ranks.py do for test_distributed_agent_modules.py."""

from __future__ import annotations

import torch
from distributed_jobs import DIM, full, mesh_of, problem, rows_of
from torch.distributed.tensor import DTensor

import normface_ext as nf
from normface_ext import distributed as nfd

#: name -> (layer, options): what a step makes of the rows of all ranks, in every way.
KINDS = {
    "contrastive": (nf.CContrastiveLoss, {"neg_margin": 2.1}),
    "contrastive hardest": (nf.CContrastiveLoss, {"neg_margin": 2.5, "hardest_only": True}),
    "contrastive none": (nf.CContrastiveLoss, {"neg_margin": 1.9, "reduction": "none"}),
    "contrastive exponential": (nf.CContrastiveLoss, {"neg_margin": 1.9, "exp_negative_weight": True}),
    "contrastive mean": (nf.CContrastiveLoss, {"neg_margin": 1.5, "add_intra_mae": True}),
    "contrastive none mean": (
        nf.CContrastiveLoss,
        {"neg_margin": 1.5, "add_intra_mae": True, "max_negative_margin": 0.02, "reduction": "none"},
    ),
    "triplet": (nf.CTripletLoss, {"margin": 0.9}),
    "triplet hardest": (nf.CTripletLoss, {"margin": 0.9, "hardest_only": True, "reduction": "sum"}),
}
CLASSES, BATCH, STEPS = 11, 12, 3


def batches(name):
    """Of every step: features, labels with an ignored row, weights of the rows or None."""
    for step in range(STEPS):
        x, _, labels = problem(CLASSES, BATCH, torch.float64, seed=step)
        labels[3] = -100
        weighted = name == "triplet" or name.startswith("contrastive none")
        yield x, labels, torch.linspace(0.0, 2.0, BATCH, dtype=torch.float64) if weighted else None


def layer_of(name, **where):
    kind, options = KINDS[name]
    torch.manual_seed(0)
    return kind(DIM, CLASSES, dtype=torch.float64, **options, **where)


def train(layer, name, mine=slice(None), upstream=1.0):
    """(losses, gradients of x, statistics) of the steps."""
    optimizer, found = torch.optim.SGD([layer.weight], 0.1, momentum=0.9), []
    for x, labels, factor in batches(name):
        x = x[mine].clone().requires_grad_()
        given = x, labels[mine], None if factor is None else factor[mine]
        layer.eval()
        before = layer(*given)
        layer.train()
        loss = layer(*given)
        assert torch.equal(loss, before)
        optimizer.zero_grad()
        loss.backward(torch.full_like(loss, upstream))
        optimizer.step()
        found.append((loss.detach(), x.grad, layer.stats(*given)))
    return found


def state_of(layer):
    return {key: full(value.detach()).clone() for key, value in layer.state_dict().items()}


def trained(rank, world, name, ragged):
    """({what ``train`` finds}, {the state in full})"""
    head = nfd.shard_head(layer_of(name), mesh_of(world), backbone_gradients="sum")
    assert isinstance(head.weight, DTensor) and head.training
    return train(head, name, rows_of(rank, world, BATCH, ragged)), state_of(head)


def from_meta(rank, world, name, seed):
    """Drawn and drawn again; the state of a head without memory that is trained a step; what it says."""
    head = nfd.shard_head(layer_of(name, device="meta"), mesh_of(world), seed=seed, equal_batches=True)
    first = state_of(head)
    train(head, name, rows_of(rank, world, BATCH, False))
    moved = state_of(head)
    head.reset_parameters()
    again = state_of(head)
    with torch.no_grad():
        head.weight.to_local().mul_(3.0)
    head.renormalize_()
    return first, moved, again, state_of(head), repr(head), head.weight.to_local().shape


def saved(rank, world, name, folder):
    head = nfd.shard_head(layer_of(name), mesh_of(world))
    optimizer = torch.optim.SGD([head.weight], 0.1, momentum=0.9)
    train(head, name, rows_of(rank, world, BATCH, False))
    nfd.save_checkpoint(folder, 1, head, [optimizer])
    return state_of(head)


def loaded(rank, world, name, folder):
    head = nfd.shard_head(layer_of(name, device="meta"), mesh_of(world), seed=7)
    nfd.load_checkpoint(folder, head, [torch.optim.SGD([head.weight], 0.1, momentum=0.9)])
    plain = layer_of(name)
    plain.load_state_dict(state_of(head))
    return state_of(head), state_of(plain)


def refused(rank, world):
    said = []
    sharded = nfd.shard_head(layer_of("triplet"), mesh_of(world))
    for head, options in (
        (layer_of("triplet"), {"sample_rate": 0.5}),
        (layer_of("contrastive"), {"sample_rate": 0.5}),
        (layer_of("triplet"), {"backbone_gradients": "none"}),
        (sharded, {}),
        (nf.InnerDistance(DIM, CLASSES), {}),
    ):
        try:
            nfd.shard_head(head, mesh_of(world), **options)
        except (TypeError, ValueError) as error:
            said.append(f"{type(error).__name__}: {error}")
    x, labels, _ = next(batches("triplet"))
    try:
        sharded(x, torch.full_like(labels, 17))
    except IndexError as error:
        said.append(str(error))
    return said
