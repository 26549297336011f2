"""What the processes of tests/ranks.py do for test_head_shards.py."""

from __future__ import annotations

import copy
import warnings

import torch
from distributed_jobs import DIM, full, head_of, mesh_of, problem, rows_of
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import normface_ext as nf
from normface_ext import distributed as nfd

CLASSES = 9
#: Heads that are copied, with a state of each kind.
COPIED = {
    "softmax": lambda: nf.NormFaceLoss(DIM, CLASSES, learn_scale=True, scale=7.0),
    "curricular": lambda: nf.NormFaceLoss(DIM, CLASSES, scale=7.0, margin=nf.CurricularFace(alpha=0.5)),
    "contrastive": lambda: nf.CContrastiveLoss(DIM, CLASSES, add_intra_mae=True),
    "triplet": lambda: nf.CTripletLoss(DIM, CLASSES),
}


def logits_and_gradients(rank, world):
    """Of each rank's rows: (logits, classes, dx, dweight in full, dscale)."""
    x, weight, _ = problem(CLASSES, 7, torch.float64)
    head = nfd.shard_head(head_of(CLASSES, weight, scale=4.0, learn_scale=True), mesh_of(world))
    features = x[rows_of(rank, world, 7, False)].clone().requires_grad_()
    logits = head(features)
    logits.sin().sum().backward()
    return logits.detach(), head.predict(features), features.grad, full(head.weight.grad), head.scale.grad


def options_of_a_sharded_head(rank, world, device):
    factors = torch.arange(1.0, CLASSES + 1)
    single = nf.NormFaceLoss(
        DIM, CLASSES, margin=nf.ArcFace(0.2), scale=40.0, class_weight=factors, device=device
    )
    head = nfd.shard_head(single, mesh_of(world))
    state = copy.deepcopy(head.state_dict())
    found = [repr(head), head.class_weight.tolist(), sorted(state)]
    head.margin, head.scale = nf.CosFace(0.3), 5.0
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        head.load_state_dict(state)
    return [*found, [str(w.message) for w in said], head.scale, repr(head.margin)]


def mode_and_margin(rank, world, device, learned):
    """(training, names of parameters, the margin's tensor, loss) of a head that was in eval mode."""
    x, weight, labels = problem(CLASSES, 6, torch.float32)
    numbers = torch.arange(1.0, CLASSES + 1) / 16
    margin = nf.ArcFace(nn.Parameter(numbers) if learned else numbers)
    single = nf.NormFaceLoss(DIM, CLASSES, margin=margin, scale=4.0, device=device).eval()
    if device == "cpu":
        single.weight = nn.Parameter(weight.detach().float())
    head = nfd.shard_head(single, mesh_of(world))
    rows = rows_of(rank, world, 6, False)
    loss = head(x[rows].float(), labels[rows])
    names = [name for name, _ in head.named_parameters()]
    return head.training, names, head.margin.m.tolist(), numbers.tolist(), loss.isfinite().item()


def kept_scale(rank, world, start):
    """Bounds of a sharded head: what forward uses, and what the parameter is afterwards."""
    x, weight, labels = problem(CLASSES, 6, torch.float32)
    single = head_of(CLASSES, weight, scale=5.0, learn_scale=True, min_scale=2.0, max_scale=8.0)
    with torch.no_grad():
        single.scale.fill_(start)
    head = nfd.shard_head(single, mesh_of(world), backbone_gradients="sum")
    mine = rows_of(rank, world, 6, False)
    head(x[mine], labels[mine]).backward()
    expected = copy.deepcopy(single)
    expected.zero_grad()
    expected(x, labels).backward()
    return head.scale.item(), head.scale.grad, expected.scale.grad


def through_a_checkpoint(rank, world, folder, drop):
    """A run saved with one recipe and loaded into a head of another; `drop`: one without the extra state."""

    def run(**options):
        torch.manual_seed(0)
        head = nfd.shard_head(nf.NormFaceLoss(DIM, CLASSES, **options), mesh_of(world))
        model = nn.ModuleDict({"body": nn.Linear(DIM, DIM), "head": head})
        return model, nfd.RowSGD(model.parameters(), lr=0.1)

    model, optimizer = run(scale=64.0, margin=nf.ArcFace(0.5))
    if drop:
        nf.NormFaceLoss.get_extra_state, kept = nn.Module.get_extra_state, nf.NormFaceLoss.get_extra_state
    try:
        nfd.save_checkpoint(folder, 1, model, optimizer)
    finally:
        if drop:
            nf.NormFaceLoss.get_extra_state = kept
    other, optimizer = run(scale=10.0, margin=nf.CombinedMargin(1.0, 0.25, 0.125))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        nfd.load_checkpoint(folder, other, optimizer)
    head = other["head"]
    told = [str(w.message) for w in said if "of the state_dict" in str(w.message)]
    return told, head.scale, repr(head.margin)


def trained(rank, world, wrap):
    """Three steps under DDP or FSDP2, and of one process: the parameters."""
    torch.manual_seed(0)
    x, labels, found = torch.randn(4 * world, DIM), torch.randint(CLASSES, (4 * world,)), []
    for mine in (slice(4 * rank, 4 * rank + 4), slice(None)):
        torch.manual_seed(0)
        head = nf.NormFaceLoss(DIM, CLASSES, scale=8.0, learn_scale=True, max_scale=8.05)
        model = head
        if mine != slice(None):
            if wrap == "ddp":
                model = DistributedDataParallel(head)
            else:
                fully_shard(head, mesh=mesh_of(world))
        optimizer = torch.optim.SGD(head.parameters(), 0.5)
        for _ in range(3):
            optimizer.zero_grad()
            model(x[mine], labels[mine]).backward()
            optimizer.step()
        repr(head)
        found.append({name: full(p.detach()) for name, p in head.named_parameters()})
        found.append(head.scale_value())
    return found


def drawn_where_it_lies(rank, world, kind):
    """A head made on the meta device, sharded, and then drawn: the whole weight, and the scale."""
    torch.manual_seed(rank)
    head = getattr(nf, kind)(16, CLASSES, device="meta")
    fully_shard(head, mesh=mesh_of(world))
    head.to_empty(device="cpu")
    head.reset_parameters()
    return full(head.weight.detach())


def copied(rank, world, kind):
    """Whether a copy of a trained head goes on as the head does, and leaves it alone."""
    torch.manual_seed(0)
    head = nfd.shard_head(COPIED[kind](), mesh_of(world))
    x, _, labels = problem(CLASSES, 12, torch.float32)
    mine = rows_of(rank, world, 12, True)

    def step(layer):
        optimizer = torch.optim.SGD(layer.parameters(), 0.1)
        losses = []
        for _ in range(2):
            optimizer.zero_grad()
            loss = layer(x[mine], labels[mine])
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    step(head)
    before = {key: full(value.detach()).clone() for key, value in head.state_dict().items()}
    other = step(copy.deepcopy(head))
    after = {key: full(value.detach()) for key, value in head.state_dict().items()}
    kept = all(torch.equal(after[key], value) for key, value in before.items())
    return kept, torch.equal(step(head), other)
