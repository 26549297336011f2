"""What the processes of tests/ranks.py do for test_distributed_conversion.py, and what one process does."""

from __future__ import annotations

import copy

import torch
from distributed_jobs import DIM, full, mesh_of, rows_of
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import normface_ext as nf
from normface_ext import distributed as nfd

CLASSES, INPUTS, BATCH = 8, 5, 12


def _moved_margins(**options):
    learned = nn.Parameter(torch.linspace(0.1, 0.4, CLASSES))
    return nf.NormFaceLoss(DIM, CLASSES, scale=7.0, learn_scale=True, margin=nf.CosFace(learned), **options)


#: Heads with a state of each kind, and how they are sharded.
HEADS = {
    "learned": (_moved_margins, {}),
    "weighted": (
        lambda: nf.NormFaceLoss(
            DIM, CLASSES, scale=9.0, margin=nf.ArcFace(0.2), class_weight=torch.arange(1.0, CLASSES + 1)
        ),
        {},
    ),
    "curricular": (
        lambda: nf.NormFaceLoss(DIM, CLASSES, scale=7.0, margin=nf.CurricularFace(alpha=0.5)),
        {},
    ),
    "adaface": (lambda: nf.NormFaceLoss(DIM, CLASSES, scale=7.0, margin=nf.AdaFace(t_alpha=0.5)), {}),
    "sampled": (lambda: nf.NormFaceLoss(DIM, CLASSES, scale=8.0), {"sample_rate": 0.5, "seed": 3}),
    "bfloat16": (lambda: nf.NormFaceLoss(DIM, CLASSES, scale=8.0, dtype=torch.bfloat16), {}),
    "sub-centres": (
        lambda: nf.NormFaceLoss(DIM, CLASSES, scale=7.0, sub_centers=3, margin=nf.ArcFace(0.2)),
        {},
    ),
    "contrastive": (lambda: nf.CContrastiveLoss(DIM, CLASSES, add_intra_mae=True), {}),
    "triplet": (lambda: nf.CTripletLoss(DIM, CLASSES), {}),
    "sphereface2": (lambda: nf.SphereFace2Loss(DIM, CLASSES), {}),
}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "row sgd": lambda p: nfd.RowSGD(p, lr=0.1, momentum=0.9),
    "row adamw": lambda p: nfd.RowAdamW(p, lr=0.01),
}


def net_of(kind, seed=0):
    torch.manual_seed(seed)
    return nn.ModuleDict({"body": nn.Linear(INPUTS, DIM), "head": HEADS[kind][0]()})


def train(net, optimizer, steps, rows=slice(None), body=None):
    """Losses of some steps over the given rows of each batch."""
    losses, body = [], body or net["body"]
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(BATCH, INPUTS, generator=generator)
        labels = torch.randint(CLASSES, (BATCH,), generator=generator)
        optimizer.zero_grad()
        loss = net["head"](body(x[rows]).to(net["head"].weight.dtype), labels[rows])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def sharded(net, kind, world):
    """The same with its head among the ranks."""
    net["head"] = nfd.shard_head(net["head"], mesh_of(world), **HEADS[kind][1])
    return net


def through(rank, world, kind, state, assign):
    """A state of one process that a head among ranks loads: what comes back, and what each rank has of it."""
    net = sharded(net_of(kind, seed=1), kind, world)
    kept = {key: value.clone() for key, value in state.items()}
    found = net.load_state_dict(state, assign=assign)
    weight = net["head"].weight
    assert isinstance(weight, DTensor) and isinstance(weight, nn.Parameter) and weight.requires_grad
    # No more than its own rows, and nothing of what was given is changed by it.
    share = -(-CLASSES // world) * weight.shape[1:].numel() * weight.element_size()
    own = weight.to_local().detach().untyped_storage().nbytes() <= share
    with torch.no_grad():
        weight.mul_(1)
    unchanged = all(torch.equal(kept[key], state[key]) for key in kept)
    return list(found.missing_keys), list(found.unexpected_keys), own, unchanged, nfd.full_state_dict(net)


def troubles(rank, world, state):
    """What torch says on this rank of states that do not fit, and of one that is spread."""
    net = sharded(net_of("learned"), "learned", world)
    before = full(net["head"].weight.detach()).clone()
    weight = state["head.weight"]
    states = {
        "classes": {**state, "head.weight": torch.cat([weight, weight])},
        "features": {**state, "head.weight": weight[:, 1:]},
        "missing": {key: value for key, value in state.items() if key != "head.weight"},
        "unexpected": {**state, "head.bias": torch.zeros(CLASSES)},
        "nothing": {},
    }
    said = {}
    for name, given in states.items():
        try:
            net.load_state_dict(given)
        except RuntimeError as error:
            said[name] = str(error)
            # torch loads what fits all the same.
            said[f"{name} left"] = torch.equal(before, full(net["head"].weight.detach()))
    lenient = net.load_state_dict(states["missing"], strict=False)
    said["lenient"] = list(lenient.missing_keys)
    single = net_of("learned")
    try:
        single.load_state_dict(net.state_dict())
    except RuntimeError as error:
        said["spread"] = str(error)
    return said


def by_torchs_own_way(rank, world, state, optimizer_state):
    """What torch.distributed.checkpoint makes of states that only the first rank has, whole again by us and
    by it."""
    net = sharded(net_of("learned", seed=1), "learned", world)
    optimizer = OPTIMIZERS["adam"](net.parameters())
    given = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(net, dict(state) if rank == 0 else {}, options=given)
    set_optimizer_state_dict(net, optimizer, dict(optimizer_state) if rank == 0 else {}, options=given)
    wanted = StateDictOptions(full_state_dict=True, cpu_offload=True)
    theirs = (
        get_model_state_dict(net, options=wanted),
        get_optimizer_state_dict(net, optimizer, options=wanted),
    )
    return nfd.full_state_dict(net), nfd.full_state_dict(optimizer), *theirs


def with_a_convolution(rank, world):
    """Shapes of whole states of a model that FSDP2 spreads, whose weight [O, I, k] is none of sub-centres."""
    torch.manual_seed(0)
    net = nn.ModuleDict({"body": nn.Conv1d(3, 4, 2), "head": HEADS["sub-centres"][0]()})
    net["head"] = nfd.shard_head(net["head"], mesh_of(world))
    fully_shard(net["body"], mesh=mesh_of(world))
    optimizer = nfd.RowAdamW(net.parameters())
    optimizer.prepare()
    state, its = nfd.full_state_dict(net), nfd.full_state_dict(optimizer)
    single = nn.ModuleDict({"body": nn.Conv1d(3, 4, 2), "head": HEADS["sub-centres"][0]()})
    back = nfd.RowAdamW(single.parameters())
    if rank == 0:
        single.load_state_dict(state)
        back.load_state_dict(its)
    shapes = {
        name: (p.shape, {k: v.shape for k, v in back.state[p].items()})
        for name, p in single.named_parameters()
    }
    return shapes if rank == 0 else None


def load_optimizer(name, optimizer, state):
    if name.startswith("row"):
        optimizer.load_state_dict(state)
    else:
        nfd.load_optimizer_state(optimizer, state)


def goes_on(rank, world, kind, optimizer, states, steps):
    """Steps of the ranks from states of one process: (losses, states to go on from)."""
    states = copy.deepcopy(states)  # the ranks share the memory of what they are given, and torch keeps it
    net = sharded(net_of(kind, seed=1), kind, world)
    chosen = OPTIMIZERS[optimizer](net.parameters())
    net.load_state_dict(states[0])
    load_optimizer(optimizer, chosen, states[1])
    body = DistributedDataParallel(net["body"])
    losses = train(net, chosen, steps, rows_of(rank, world, BATCH, ragged=False), body)
    return losses, (nfd.full_state_dict(net), nfd.full_state_dict(chosen))


def optimizer_troubles(rank, world, state):
    net = sharded(net_of("learned"), "learned", world)
    optimizer, said = torch.optim.Adam(net.parameters()), []
    short = {
        **state,
        "state": {k: {n: v[:3] if v.dim() else v for n, v in s.items()} for k, s in state["state"].items()},
    }
    for chosen, given in ((optimizer, {}), (optimizer, None), (optimizer, short), (net, state)):
        try:
            nfd.load_optimizer_state(chosen, given)
        except (TypeError, ValueError) as error:
            said.append(f"{type(error).__name__}: {error}")
    return said, len(optimizer.state)
