"""What the processes of tests/ranks.py do for test_distributed_wrapping.py."""

from __future__ import annotations

import copy

import torch
from distributed_jobs import DIM, full, mesh_of, rows_of
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

import normface_ext as nf
from normface_ext import distributed as nfd

CLASSES, INPUTS, BATCH, STEPS = 7, 5, 12, 3
HEADS = {
    "softmax": lambda: nf.NormFaceLoss(DIM, CLASSES, scale=6.0),
    "learned": lambda: nf.NormFaceLoss(
        DIM,
        CLASSES,
        scale=6.0,
        learn_scale=True,
        margin=nf.CosFace(nn.Parameter(torch.linspace(0.1, 0.3, CLASSES))),
    ),
    "adaface": lambda: nf.NormFaceLoss(DIM, CLASSES, scale=6.0, margin=nf.AdaFace(t_alpha=0.5)),
    "contrastive": lambda: nf.CContrastiveLoss(DIM, CLASSES, add_intra_mae=True),
    "sphereface2": lambda: nf.SphereFace2Loss(DIM, CLASSES),
}


class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = (
            nn.Sequential(nn.Linear(INPUTS, 8), nn.Tanh(), nn.Linear(8, DIM)),
            HEADS[kind](),
        )

    def forward(self, x, labels):
        return self.head(self.body(x), labels)


def batches(inputs=INPUTS):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(STEPS, BATCH, inputs, generator=generator)
    return zip(x, torch.randint(CLASSES, (STEPS, BATCH), generator=generator), strict=True)


def steps(model, optimizers, mine, inputs=INPUTS, after=None):
    losses = []
    for x, labels in batches(inputs):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = model(x[mine], labels[mine])
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        if after is not None:
            after()
        losses.append(loss.item())
    return losses


def values(model):
    return {
        name: full(tensor.detach()).clone()
        for name, tensor in model.state_dict().items()
        if "extra" not in name
    }


def sgd(*modules):
    return [torch.optim.SGD(module.parameters(), lr=0.3, momentum=0.9) for module in modules]


def wrapped(rank, world, kind, how):
    """A model with a class-parallel head under a wrapper, and the model of one process: losses and values."""
    single = Net(kind)
    expected = steps(single, sgd(single), slice(None)), values(single)
    net, mesh = Net(kind), mesh_of(world)
    net.head = nfd.shard_head(net.head, mesh)
    model = net
    if how == "ddp":
        model = DistributedDataParallel(nfd.exclude_from_ddp(net))
    elif how == "fsdp2":
        fully_shard(net, mesh=mesh, ignored_params=set(nfd.class_parallel_weights(net).values()))
    elif how == "ddp beside":
        net.body = DistributedDataParallel(net.body)
    elif how == "fsdp2 beside":
        fully_shard(net.body, mesh=mesh)
    losses = steps(model, sgd(net.body, net.head), rows_of(rank, world, BATCH, ragged=False))
    found = {name.replace("body.module.", "body."): value for name, value in values(net).items()}
    return (losses, found), expected


def head_in_ddp(rank, world, kind):
    """A head that is itself what DistributedDataParallel gets; a sentence where nothing else is learned."""
    torch.manual_seed(0)
    single = HEADS[kind]()
    head = nfd.shard_head(copy.deepcopy(single), mesh_of(world))
    try:
        model = DistributedDataParallel(nfd.exclude_from_ddp(head))
    except RuntimeError as error:
        return str(error)
    found = steps(model, sgd(head), rows_of(rank, world, BATCH, ragged=False), DIM), values(head)
    return found, (steps(single, sgd(single), slice(None), DIM), values(single))


def averaged(rank, world, kind, whole):
    """Running averages of a head alone, or of a model that has one, over three steps: of ranks, of one."""
    found = []
    for ranked in (True, False):
        net = Net(kind)
        if ranked:
            net.head = nfd.shard_head(net.head, mesh_of(world))
        model = net if whole else net.head
        average = AveragedModel(model, avg_fn=get_ema_avg_fn(0.6), use_buffers=True)
        mine = rows_of(rank, world, BATCH, ragged=False) if ranked else slice(None)
        shared = nn.parallel.DistributedDataParallel(net.body) if ranked else net.body
        forward = lambda x, labels, body=shared, net=net: net.head(body(x), labels)  # noqa: E731
        steps(
            forward,
            sgd(net),
            mine,
            after=lambda average=average, model=model: average.update_parameters(model),
        )
        copied = copy.deepcopy(average)
        fresh = AveragedModel(copy.deepcopy(model), use_buffers=True)
        fresh.load_state_dict(average.state_dict())
        found.append([values(each) for each in (average, copied, fresh)])
        state = nfd.full_state_dict(average) if ranked else average.state_dict()
    return *found, list(state)


def names(rank, world):
    net = nn.ModuleDict(
        {"body": nn.Linear(INPUTS, DIM), "heads": nn.ModuleList(HEADS[kind]() for kind in HEADS)}
    )
    before = nfd.class_parallel_weights(net)
    for place in (0, 3):
        net["heads"][place] = nfd.shard_head(net["heads"][place], mesh_of(world))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, ["body.bias"])
    nfd.exclude_from_ddp(net)
    held = nfd.class_parallel_weights(net)
    said = []
    for call in (nfd.class_parallel_weights, nfd.exclude_from_ddp):
        try:
            call([net])
        except TypeError as error:
            said.append(str(error))
    alone = list(nfd.class_parallel_weights(net["heads"][0]))
    same = held["heads.0.weight"] is net["heads"][0].weight
    return before, list(held), alone, same, net._ddp_params_and_buffers_to_ignore, said
