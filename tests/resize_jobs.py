"""What the processes of tests/ranks.py do for test_distributed_resize.py."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import torch
import torch.distributed as dist
from distributed_jobs import DIM, full, mesh_of, rows_of
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

import normface_ext as nf
from normface_ext import distributed as nfd
from normface_ext import testing
from normface_ext.distributed import resize

CLASSES, BATCH = 10, 12
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.5),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.01),
    "row sgd": lambda p: nfd.RowSGD(p, lr=0.1, momentum=0.9),
    "row adamw": lambda p: nfd.RowAdamW(p, lr=0.01),
}
#: (n, keep): more and fewer classes than ranks, in any order and more than once.
KEEPS = {
    "grow": (13, None),
    "shrink": (4, None),
    "fewer than ranks": (2, [7, 1]),
    "drop": (7, [0, 1, 3, 4, 6, 8, 9]),
    "reorder": (CLASSES, list(range(CLASSES))[::-1]),
    "replace": (CLASSES, [0, None, 2, 3, -1, 5, 6, 7, 8, None]),
    "all at once": (12, torch.tensor([9, -1, 0, 1, -1, 2, 3, 5, 8, 7, -1, 6])),
    "twice": (14, [3, 3, 3, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9]),
    "all new": (5, [None] * 5),
    "as it is": (CLASSES, None),
}


@contextmanager
def small_blocks(rows, drawn):
    """As with many more classes: the rows go in several blocks."""
    kept = resize.BLOCK, resize._DRAWN
    resize.BLOCK, resize._DRAWN = rows, drawn
    try:
        yield
    finally:
        resize.BLOCK, resize._DRAWN = kept


def batch(seed, classes):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, DIM, generator=generator), torch.randint(classes, (BATCH,), generator=generator)


def step(head, optimizer, seed, rows=slice(None)):
    x, labels = batch(seed, head.num_classes)
    optimizer.zero_grad()
    head(x[rows], labels[rows]).backward()
    optimizer.step()


def single_head(**options):
    torch.manual_seed(0)
    learned = nn.Parameter(torch.linspace(0.1, 0.4, CLASSES))
    factors = torch.linspace(0.5, 1.5, CLASSES)
    return nf.NormFaceLoss(
        DIM,
        CLASSES,
        **{
            "scale": 6.0,
            "learn_scale": True,
            "class_weight": factors,
            "margin": nf.CosFace(learned),
            **options,
        },
    )


def both(world, optimizer="momentum", **options):
    """A head of one process after some steps, and the same among the ranks, with their optimizers."""
    single = single_head(**options)
    its = OPTIMIZERS[optimizer](single.parameters())
    for seed in range(3):
        step(single, its, seed)
    head = nfd.shard_head(single_head(**options), mesh_of(world))
    ours = OPTIMIZERS[optimizer](head.parameters())
    head.load_state_dict(single.state_dict())
    nfd.load_optimizer_state(ours, copy.deepcopy(its.state_dict()))
    return single, its, head, ours


def rows_of_all(tensor):
    """Whole, and sub-centres as the rows that they are in one process."""
    whole = full(tensor.detach()).clone()
    return whole.flatten(0, 1) if whole.dim() == 3 else whole


def numbers(head, optimizer):
    """All there is of a head and its optimizer, whole."""
    found = {name: rows_of_all(value) for name, value in head.named_parameters()}
    found["class_weight"], found["classes"] = head.class_weight, torch.tensor(head.num_classes)
    for index, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        for name, value in optimizer.state.get(parameter, {}).items():
            found[f"{index} {name}"] = rows_of_all(value) if isinstance(value, torch.Tensor) else value
    return found


def resized(rank, world, optimizer, keep, blocks, centers=1):
    """(head, optimizer) of the ranks and of one process right after, and after two more steps."""
    n, source = KEEPS[keep]
    single, its, head, ours = both(world, optimizer, sub_centers=centers)
    its.zero_grad(), ours.zero_grad()
    single.resize_classes(n, source, its, generator=torch.Generator().manual_seed(5))
    with small_blocks(*blocks):
        head.resize_classes(n, source, ours, generator=torch.Generator().manual_seed(5))
    pairs = [(numbers(head, ours), numbers(single, its))]
    assert (
        head.weight.shape == ((n, DIM) if centers == 1 else (n, centers, DIM)) and head.shard.num_classes == n
    )
    assert head.weight.to_local().shape[0] == head.shard.count
    for seed in (7, 8):
        step(single, its, seed)
        step(head, ours, seed, rows_of(rank, world, BATCH, ragged=True))
    return [*pairs, (numbers(head, ours), numbers(single, its))]


def drawn(rank, world, count, dtype, apart):
    """New rows by the default generator, and where it goes on. `apart`: other ranks' is elsewhere."""
    single = nf.NormFaceLoss(DIM, CLASSES, dtype=dtype)
    head = nfd.shard_head(copy.deepcopy(single), mesh_of(world))
    found = []
    for layer in (single, head):
        torch.manual_seed(3 + rank * apart * (layer is head))
        with small_blocks(3, 16):
            layer.resize_classes(CLASSES + count)
        found += [full(layer.weight.detach())[CLASSES:], torch.rand(3)]
    return found


def imprinted(rank, world, empty):
    """Of features that lie on all ranks, or on none but the last."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, DIM, generator=generator, dtype=torch.float64).to(torch.float32)
    labels = torch.randint(14, (40,), generator=generator)
    labels[:14], labels[20] = torch.arange(14), -100
    rows = (slice(0, 40) if rank == world - 1 else slice(0, 0)) if empty else rows_of(rank, world, 40, True)
    single, its, head, ours = both(world)
    its.zero_grad(), ours.zero_grad()
    keep = [0, -1, 2, 3, 4, None, 6, 7, 8, 9, None, None, 1, None]
    single.resize_classes(14, keep, its, "imprint", x, labels)
    head.resize_classes(14, keep, ours, "imprint", x[rows], labels[rows])
    return numbers(head, ours), numbers(single, its)


def a_gradient_waits(rank, world):
    single, its, head, ours = both(world)
    rows = rows_of(rank, world, BATCH, ragged=False)
    for layer, mine in ((single, slice(None)), (head, rows)):
        x, labels = batch(9, CLASSES)
        layer.zero_grad()
        layer(x[mine], labels[mine]).backward()
        layer.weight.mark = "mine"
        kept = layer.weight
        layer.resize_classes(CLASSES, list(range(CLASSES))[::-1], its if layer is single else ours)
        assert layer.weight is kept
        layer.resize_classes(12, [3, None, *range(10)], its if layer is single else ours)
        assert layer.weight is not kept and layer.weight.mark == "mine"
    return full(head.weight.grad), single.weight.grad


def refused(rank, world):
    """What every rank hears of what only rank 1, or only one of them, does wrong; nothing changes."""
    _, _, head, ours = both(world)
    ours.zero_grad()
    before = numbers(head, ours)
    mine = rank == 1
    x, labels = torch.randn(4, DIM), torch.tensor([10, 10, 11, 11])
    poisoned = x.clone()
    poisoned[2, 0] = float("nan")
    opposite = (1 - 2 * mine) * torch.ones(4, DIM)
    other = torch.optim.SGD([torch.ones(1, requires_grad=True)])
    fresh = OPTIMIZERS["momentum"](head.parameters())
    calls = {
        "n": lambda: head.resize_classes(12 + mine),
        "keep": lambda: head.resize_classes(CLASSES, [9 * mine, *range(1, 10)]),
        "type": lambda: head.resize_classes(12.0 if mine else 12),
        "class": lambda: head.resize_classes(2, [0, 10 if mine else 1]),
        "optimizer": lambda: head.resize_classes(12, optimizer=other if mine else ours),
        "one optimizer": lambda: head.resize_classes(12, optimizer=None if mine else ours),
        "no state": lambda: head.resize_classes(12, optimizer=fresh if mine else ours),
        "init": lambda: head.resize_classes(12, init="zeros"),
        "features": lambda: head.resize_classes(12, None, ours, "imprint", None if mine else x, labels),
        "finite": lambda: head.resize_classes(12, None, ours, "imprint", poisoned if mine else x, labels),
        "label": lambda: head.resize_classes(12, None, ours, "imprint", x, labels + mine),
        "none": lambda: head.resize_classes(13, None, ours, "imprint", x, labels),
        "cancel": lambda: head.resize_classes(12, None, ours, "imprint", opposite, labels),
        "weight_for": lambda: head.weight_for(torch.tensor([0, 10 if mine else 1])),
        "float": lambda: head.weight_for(torch.tensor([0.5]) if mine else torch.tensor([0])),
    }  # fmt: skip
    said = {}
    for name, call in calls.items():
        try:
            call()
        except (TypeError, ValueError, IndexError) as error:
            said[name] = f"{type(error).__name__}: {error}"
    if mine:
        head.weight.grad = torch.zeros_like(head.weight)
    try:
        head.resize_classes(12, optimizer=ours)
    except ValueError as error:
        said["gradient"] = f"{type(error).__name__}: {error}"
    after = numbers(head, ours)
    return said, all(torch.equal(torch.as_tensor(after[k]), torch.as_tensor(v)) for k, v in before.items())


def rows_for(rank, world):
    """weight_for of labels that differ from rank to rank in number, one has none; and its gradient."""
    single, _, head, _ = both(world)
    single.zero_grad(), head.zero_grad()
    labels = [
        torch.tensor([9, 0, 3, 3], dtype=torch.int32),
        torch.tensor([], dtype=torch.int64),
        torch.arange(10),
    ]
    labels = labels[:world]
    factors = torch.linspace(-1, 1, DIM)
    rows = head.weight_for(labels[rank])
    (rows * factors).square().sum().backward()
    expected = [single.weight_for(each) for each in labels]
    sum((each * factors).square().sum() for each in expected).backward()
    return rows.detach(), expected[rank].detach(), full(head.weight.grad), single.weight.grad


def sampled(rank, world):
    """A head that draws its classes grows and trains on."""
    head = nfd.shard_head(nf.NormFaceLoss(DIM, CLASSES, scale=6.0), mesh_of(world), sample_rate=0.5, seed=1)
    optimizer = nfd.RowAdamW(head.parameters(), lr=0.01)
    x, labels = batch(0, CLASSES)
    mine = rows_of(rank, world, BATCH, ragged=False)
    head(x[mine], labels[mine]).backward()
    optimizer.step()
    said = None
    try:
        head.resize_classes(13, optimizer=optimizer)
    except ValueError as error:
        said = str(error)
    counts = full(optimizer.state[head.weight]["row_step"]).clone()
    optimizer.zero_grad()
    head.resize_classes(13, [*range(9, -1, -1), None, None, None], optimizer=optimizer)
    after = full(optimizer.state[head.weight]["row_step"]).clone()
    x, labels = batch(1, 13)
    head(x[mine], labels[mine]).backward()
    optimizer.step()
    return said, counts, after, full(head.weight.detach()).isfinite().all().item()


def among_a_part(rank, world):
    """Ranks 1 and 2 share a head, rank 0 has none of it: its state, after it grew, and rows of it."""
    mesh = DeviceMesh("cpu", torch.arange(1, world))
    if rank == 0:
        return None
    single = single_head()
    head = nfd.shard_head(copy.deepcopy(single), mesh)
    for layer in (single, head):
        layer.resize_classes(13, generator=torch.Generator().manual_seed(1))
    rows = head.weight_for(torch.tensor([0, 12])[:rank])
    return (
        nfd.full_state_dict(head),
        dict(single.state_dict()),
        rows.detach(),
        single.weight_for(torch.tensor([0, 12])[:rank]).detach(),
    )


def grown_where_nothing_is_whole(rank, world, classes, dim):
    """Bytes at the peak of a resize beyond what was there, and those of this rank's new rows."""
    head = nfd.shard_head(nf.NormFaceLoss(dim, classes, device="meta"), mesh_of(world))
    keep = torch.arange(classes).flip(0)
    with small_blocks(256, 256):
        head.weight_for(torch.tensor([0]))  # whatever is made once
        peak = testing.peak_bytes(lambda: head.resize_classes(classes, keep))
    dist.barrier()
    return peak, head.weight.to_local().nbytes
