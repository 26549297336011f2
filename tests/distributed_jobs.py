"""What the processes of tests/ranks.py do: importable functions (rank, world, ...) -> picklable results."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import torch
import torch.distributed as dist
from plan_sharded import sharded_plan
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import normface_ext as nf
from normface_ext import distributed as nfd
from normface_ext import testing
from normface_ext.distributed import collectives

DIM = 6


def mesh_of(world):
    return init_device_mesh("cpu", (world,))


def full(tensor):
    """The whole of a sharded tensor, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def rows_of(rank, world, batch, ragged):
    """The slice of a global batch that belongs to a rank; ragged: 0, 1, 2, ... shares."""
    shares = list(range(world)) if ragged else [1] * world
    bounds = [batch * sum(shares[:k]) // sum(shares) for k in range(world + 1)]
    return slice(bounds[rank], bounds[rank + 1])


def problem(classes, batch, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, DIM, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(classes, DIM, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(classes, (batch,), generator=generator)
    labels[0], labels[-1] = classes - 1, 0
    return x, weight, labels


def head_of(classes, weight, **options):
    head = nf.NormFaceLoss(DIM, classes, dtype=weight.dtype, **options)
    with torch.no_grad():
        head.weight.copy_(weight)
    return head


def loss_and_gradients(
    rank, world, classes, batch, dtype, ragged, options, upstream=None, sample_weight=False
):
    """The class-parallel head: (loss, dx of this rank, dweight in full, dscale)."""
    x, weight, labels = problem(classes, batch, dtype)
    options, every = {k: v for k, v in options.items() if k != "ignore_every"}, options.get("ignore_every")
    if every:
        labels[::every] = -100
    mine = rows_of(rank, world, batch, ragged)
    head = nfd.shard_head(head_of(classes, weight, **options), mesh_of(world), backbone_gradients="sum")
    features = x[mine].clone().requires_grad_()
    factors = torch.linspace(0.5, 2, batch, dtype=torch.float64).to(dtype)[mine] if sample_weight else None
    loss = head(features, labels[mine], factors)
    loss.backward(torch.ones_like(loss) if upstream is None else upstream[mine].to(loss.dtype))
    scale = head.scale.grad if isinstance(head.scale, nn.Parameter) else None
    assert isinstance(head.weight, DTensor) and isinstance(head.weight.grad, DTensor)
    return loss.detach(), features.grad, full(head.weight.grad), scale


@contextmanager
def recorded():
    """The collectives of torch.distributed that are called: (name, bytes this rank puts in)."""
    calls, saved = [], []

    def counting(name, original, argument):
        def call(*args, **options):
            calls.append((name, args[argument].numel() * args[argument].element_size()))
            return original(*args, **options)

        return call

    for owner, attribute, name, argument in (
        (dist, "all_reduce", "all-reduce", 0),
        (collectives, "_all_gather", "all-gather", 1),
        (collectives, "_reduce_scatter", "reduce-scatter", 1),
    ):
        original = getattr(owner, attribute)
        saved.append((owner, attribute, original))
        setattr(owner, attribute, counting(name, original, argument))
    try:
        yield calls
    finally:
        for owner, attribute, original in saved:
            setattr(owner, attribute, original)


def collectives_of_a_step(rank, world, classes, batch, dtype, equal, options):
    x, weight, labels = problem(classes, batch, dtype)
    head = nfd.shard_head(head_of(classes, weight, **options), mesh_of(world), equal_batches=equal)
    mine = rows_of(rank, world, batch, ragged=False)
    with recorded() as forward:
        loss = head(x[mine].requires_grad_(), labels[mine])
    with recorded() as backward:
        loss.backward(torch.ones_like(loss))
    return forward, backward


def twice(rank, world, classes, batch, dtype):
    return [loss_and_gradients(rank, world, classes, batch, dtype, True, {"scale": 16.0}) for _ in range(2)]


def initial_weight(rank, world, classes, seed):
    head = nfd.shard_head(nf.NormFaceLoss(DIM, classes, device="meta"), mesh_of(world), seed=seed)
    return full(head.weight.detach()), head.weight.to_local().shape


def gradients_of_one_rank(rank, world):
    """Rank 1 has 10 rows that need a gradient, rank 0 four that do not, rank 2 an empty batch of nowhere."""
    x, weight, labels = problem(10, 14, torch.float32)
    mine = {0: slice(10, 14), 1: slice(0, 10), 2: slice(0, 0)}[rank]
    sharded, found = nfd.shard_head(head_of(10, weight, scale=9.0), mesh_of(world)), []
    for loss in (
        lambda x: nfd.normface_loss(
            x, sharded.weight, labels[mine], 9.0, sharded.shard, backbone_gradients="sum"
        ),
        lambda x: nfd.c_triplet_loss(
            x, sharded.weight, labels[mine], sharded.shard, backbone_gradients="sum"
        ),
    ):
        features = x[mine].clone().requires_grad_(rank == 1)
        loss(features).backward()
        found.append((features.grad, full(sharded.weight.grad)))
        sharded.weight.grad = None
    return found


def meta_head_with_a_scale(rank, world):
    head = nf.NormFaceLoss(DIM, 9, learn_scale=True, scale=7.0, device="meta")
    assert "scale=7" in repr(head)
    sharded = nfd.shard_head(head, mesh_of(world), seed=3)
    first = full(sharded.weight.detach()).clone()
    sharded(torch.randn(2, DIM), torch.tensor([0, 8])).backward()
    with torch.no_grad():
        sharded.weight.add_(1.0), sharded.scale.add_(1.0)
    sharded.reset_parameters()
    same = torch.equal(first, full(sharded.weight.detach()))
    return float(sharded.scale.detach()), float(sharded.scale.grad), same


def described(rank, world, classes):
    head = nfd.shard_head(nf.NormFaceLoss(DIM, classes), mesh_of(world))
    head.renormalize_()
    copy.deepcopy(head.sampler)
    return repr(head), full(head.weight.detach()).norm(dim=1)


def refused(rank, world, kind):
    """The sentence of a bad call."""
    mesh = mesh_of(world)
    head = nf.NormFaceLoss(DIM, 5)
    sharded = nfd.shard_head(head, mesh)
    x, labels = torch.randn(2, DIM), torch.tensor([0, 4])
    calls = {
        "head": lambda: nfd.shard_head(sharded, mesh),
        "mesh": lambda: nfd.shard_head(head, "cpu"),
        "2-D": lambda: nfd.shard_head(head, init_device_mesh("cpu", (world, 1))),
        "rate": lambda: nfd.shard_head(head, mesh, sample_rate=0.0),
        "gradients": lambda: nfd.shard_head(head, mesh, backbone_gradients="both"),
        "seed": lambda: nfd.shard_head(head, mesh, seed=-1),
        "margin": lambda: nfd.normface_loss(x, sharded.weight, labels, 4.0, sharded.shard, margin=0.5),
        "labels": lambda: sharded(x, torch.tensor([0, 5])),
        "features": lambda: sharded(torch.randn(2, DIM + 1), labels),
        "dtype": lambda: sharded(x.double(), labels),
        "shard": lambda: nfd.normface_loss(x, torch.randn(9, DIM), labels, 4.0, sharded.shard),
        "smoothing": lambda: nfd.shard_head(
            nf.NormFaceLoss(DIM, 5, label_smoothing=0.1), mesh, sample_rate=0.5
        )(x, labels),
    }
    try:
        calls[kind]()
    except (TypeError, ValueError, IndexError) as error:
        return type(error).__name__, str(error)
    return None


def peak_and_plan(rank, world, classes, batch, dim, rate, workspace):
    """(bytes measured beyond the weight, planned ones) of a step of this rank."""
    head = nfd.shard_head(
        nf.NormFaceLoss(dim, classes, device="meta", workspace=workspace),
        mesh_of(world),
        sample_rate=rate,
        equal_batches=True,
    )
    x, labels = torch.randn(batch, dim), torch.randint(classes, (batch,))

    def step():
        leaf = x.detach().requires_grad_()
        head(leaf, labels).backward()

    step()  # whatever is made once
    head.weight.grad = None
    measured = testing.peak_bytes(step)
    plan = sharded_plan(batch, dim, classes, workspace=workspace, world_size=world, sample_rate=rate)
    return measured, plan.total_bytes - plan.parameter_bytes - plan.optimizer_bytes


# Training -------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A backbone and a head under one roof, so that every parameter has a name."""

    def __init__(self, backbone, head):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images, labels):
        return self.head(self.backbone(images), labels)


def make_net(classes, **options):
    generator = torch.Generator().manual_seed(1)
    backbone = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, DIM))
    head = nf.NormFaceLoss(DIM, classes, learn_scale=True, scale=6.0, **options)
    with torch.no_grad():
        for parameter in [*backbone.parameters(), head.weight]:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return backbone, head


def make_batches(classes, steps, batch):
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(steps, batch, 5, generator=generator)
    return images, torch.randint(classes, (steps, batch), generator=generator)


@contextmanager
def maybe_autocast(on):
    with torch.autocast("cpu", torch.bfloat16, enabled=on):
        yield


def train_alone(classes, steps, batch, accumulate, autocast, clip, make_optimizer):
    backbone, head = make_net(classes)
    optimizer = make_optimizer([*backbone.parameters(), *head.parameters()])
    images, labels = make_batches(classes, steps * accumulate, batch)
    losses = []
    for step in range(steps):
        for part in range(step * accumulate, (step + 1) * accumulate):
            with maybe_autocast(autocast):
                loss = head(backbone(images[part]), labels[part]) / accumulate
            loss.backward()
            losses.append(float(loss))
        if clip:
            torch.nn.utils.clip_grad_norm_([*backbone.parameters(), *head.parameters()], clip)
        optimizer.step()
        optimizer.zero_grad()
    return losses, [p.detach() for p in [*backbone.parameters(), head.weight, head.scale]]


def train_sharded(rank, world, classes, steps, batch, accumulate, autocast, clip, scaled, make_optimizer):
    backbone, head = make_net(classes)
    head = nfd.shard_head(head, mesh_of(world))
    ddp = nn.parallel.DistributedDataParallel(backbone)
    optimizers = [make_optimizer(ddp.parameters()), make_optimizer(head.parameters())]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
    images, labels = make_batches(classes, steps * accumulate, batch)
    mine = rows_of(rank, world, batch, ragged=False)
    losses = []
    for step in range(steps):
        for part in range(step * accumulate, (step + 1) * accumulate):
            with maybe_autocast(autocast):
                loss = head(ddp(images[part, mine]), labels[part, mine]) / accumulate
            scaler.scale(loss).backward()
            losses.append(float(loss))
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        if clip:
            nfd.clip_grad_norm_([*ddp.parameters(), *head.parameters()], clip)
        for optimizer in optimizers:
            scaler.step(optimizer)
            optimizer.zero_grad()
        scaler.update()
    return losses, [full(p.detach()) for p in [*backbone.parameters(), head.weight, head.scale]]


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.2, momentum=0.9, weight_decay=1e-3)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.02)


def overflow_on_one_rank(rank, world):
    """Whether a step is skipped everywhere when one rank's gradient overflows."""
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    moved = []
    for rate in (1.0, 0.5):
        head = nfd.shard_head(make_net(20)[1], mesh_of(world), sample_rate=rate)
        optimizer = nfd.RowSGD([head.weight], lr=1.0)
        scaler = ShardedGradScaler("cpu", init_scale=1.0)
        x, labels = torch.randn(4, DIM), torch.arange(4)
        scaler.scale(head(x, labels)).backward()
        gradient = head.weight.grad
        values = gradient._values() if gradient.is_sparse else gradient.to_local()
        if rank == world - 1:
            values[0, 0] = float("inf")
        before = full(head.weight.detach()).clone()
        scaler.step(optimizer)
        scaler.update()
        moved.append(not torch.equal(before, full(head.weight.detach())))
    return moved


def clipped(rank, world, sample_rate):
    """(norm, gradients after clipping) with a plain and a sharded parameter."""
    backbone, head = make_net(7)
    head = nfd.shard_head(head, mesh_of(world), sample_rate=sample_rate, backbone_gradients="sum")
    images, labels = make_batches(7, 1, 6)
    head(
        backbone(images[0]) if rank == 0 else backbone(images[0])[:0],
        labels[0] if rank == 0 else labels[0, :0],
    ).backward()
    for parameter in backbone.parameters():
        dist.all_reduce(parameter.grad)
    parameters = [*backbone.parameters(), head.weight, head.scale]
    before = [dense_gradient(p).clone() for p in parameters]
    norm = nfd.clip_grad_norm_(parameters, 0.01)
    return norm, before, [dense_gradient(p) for p in parameters]


def clipped_with_copies(rank, world):
    """(norm of a parameter that every rank has in full as a DTensor and of a sharded one, of one tensor)."""
    mesh = mesh_of(world)
    copies = nn.Parameter(distribute_tensor(torch.zeros(4), mesh, [Replicate()]))
    parts = nn.Parameter(distribute_tensor(torch.zeros(4), mesh, [Shard(0)]))
    for parameter, value in ((copies, 3.0), (parts, 4.0)):
        parameter.grad = torch.full_like(parameter, value / 2)
    both = nfd.clip_grad_norm_([copies, parts], 10.0)
    return float(both), float(nfd.clip_grad_norm_(parts, 1.0)), full(parts.grad)


def dense_gradient(parameter):
    gradient = parameter.grad
    if gradient.is_sparse:  # the rows of all ranks, by their global names
        gradient = gradient.to_dense()
        dist.all_reduce(gradient)
        return gradient
    return full(gradient)


# Sampling -------------------------------------------------------------------------------------------


def sampled_steps(rank, world, classes, batch, rate, steps, seed):
    """Per step: (loss, the classes drawn by all ranks, dweight in full, dx)."""
    x, weight, labels = problem(classes, batch, torch.float32)
    labels[1] = -100
    head = nfd.shard_head(
        head_of(classes, weight, scale=8.0, margin=nf.CosFace(0.1)),
        mesh_of(world),
        sample_rate=rate,
        seed=seed,
        backbone_gradients="sum",
    )
    mine, result = rows_of(rank, world, batch, ragged=True), []
    for _ in range(steps):
        features = x[mine].clone().requires_grad_()
        loss = head(features, labels[mine])
        loss.backward()
        gradient = head.weight.grad
        assert gradient.is_sparse and gradient.shape == (classes, DIM)
        drawn = torch.zeros(classes, dtype=torch.int64)
        drawn[gradient._indices()[0]] = 1
        dist.all_reduce(drawn)
        assert drawn.max() == 1
        everyone = [None] * world
        dist.all_gather_object(everyone, features.grad)
        result.append((loss.detach(), drawn.bool(), dense_gradient(head.weight), torch.cat(everyone)))
        head.weight.grad = None
    head.eval()
    result.append(head(x[mine], labels[mine]).detach())
    return result


# Checkpoints ----------------------------------------------------------------------------------------


def trained_and_saved(rank, world, folder, classes, batch, start, stop, save_at, sample_rate):
    """Losses of the steps [start, stop); loads what the folder has first, saves before step `save_at`."""
    backbone, head = make_net(classes)
    if start:  # what is loaded must matter
        with torch.no_grad():
            for parameter in [*backbone.parameters(), *head.parameters()]:
                parameter.add_(1.0)
    head = nfd.shard_head(head, mesh_of(world), sample_rate=sample_rate, seed=5)
    ddp = nn.parallel.DistributedDataParallel(backbone)
    net = Net(backbone, head)
    optimizers = [
        nfd.RowAdamW(backbone.parameters(), lr=0.02),
        nfd.RowSGD(head.parameters(), lr=0.3, momentum=0.9),
    ]
    extra = {"seen": 0}
    step = nfd.load_checkpoint(folder, net, optimizers, extra=extra)
    assert (step or 0) == start and extra["seen"] == start * batch
    images, labels = make_batches(classes, stop, batch)
    mine, losses = rows_of(rank, world, batch, ragged=False), []
    for step in range(start, stop):
        if step == save_at:
            nfd.save_checkpoint(folder, step, net, optimizers, extra={"seen": step * batch})
        loss = head(ddp(images[step, mine]), labels[step, mine])
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss))
    return losses, [full(p.detach()) for p in net.parameters()]


def first_steps(rank, world, folder, how):
    """Weights after two steps; `how`: "through", "saved" before the first one, or "loaded" from that."""
    backbone, head = make_net(7)
    net = Net(backbone, nfd.shard_head(head, mesh_of(world)))
    optimizers = [
        nfd.RowAdamW(backbone.parameters(), lr=0.02),
        nfd.RowSGD(net.head.parameters(), lr=0.3, momentum=0.9, weight_decay=0.1),
    ]
    if how == "saved":
        nfd.save_checkpoint(folder, 0, net, optimizers)
    if how == "loaded":
        assert nfd.load_checkpoint(folder, net, optimizers) == 0
    images, labels = make_batches(7, 2, 6)
    for step in range(2):
        net(images[step], labels[step]).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return [full(p.detach()) for p in net.parameters()]


def loaded_from(rank, world, folders):
    """What a rank hears that looks for checkpoints in a folder of its own."""
    net = nn.Linear(2, 2)
    try:
        return nfd.load_checkpoint(folders[rank], net, torch.optim.SGD(net.parameters(), lr=0.1))
    except FileNotFoundError as error:
        return str(error)


def dies_while_saving(rank, world, *arguments):
    """Rank 1 ends when part of its files is written; the others say what they heard."""
    import os

    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    def write_data(writer, *_):
        (writer.path / "__1_0.distcp").write_bytes(b"half of it")
        os._exit(9)

    if rank == 1:
        FileSystemWriter.write_data = write_data
    try:
        trained_and_saved(rank, world, *arguments)
    except RuntimeError as error:
        return str(error)
    return None


def not_finite(rank, world):
    """What every rank hears of a row, and of a class, that is not finite on rank 1 alone."""
    heard = []
    x, weight, labels = problem(9, 8, torch.float32)
    mine = rows_of(rank, world, 8, ragged=False)
    for loss in (nfd.normface_loss, nfd.c_contrastive_loss, nfd.c_triplet_loss):
        softmax = loss is nfd.normface_loss
        for kind in ("row", "ignored", "weight", *("scale", "weightless") * softmax):
            scale = (torch.tensor(float("nan") if kind == "scale" and rank == 1 else 9.0),) * softmax
            options = {"sample_weight": torch.ones(len(labels[mine]))} if softmax else {}
            features, head = x[mine].clone(), nfd.shard_head(head_of(9, weight, scale=9.0), mesh_of(world))
            if rank == 1 and kind in ("row", "ignored", "weightless"):
                features[2, 1] = float("nan")
            if rank == 1 and kind == "weight":
                head.weight.to_local().detach()[1, 0] = float("inf")
            places = labels[mine].clone()
            if kind == "ignored":
                places[2] = -100
            if kind == "weightless":
                options["sample_weight"][2] = 0
            try:
                found = loss(features, head.weight, places, *scale, head.shard, check_finite=True, **options)
                heard.append(bool(found.isfinite()))
            except ValueError as error:
                heard.append(str(error))
    return heard


def checkpoint_troubles(rank, world, folder):
    """What every rank hears of a full disk, a NaN and a damaged file that only rank 1 has."""
    from errno import ENOSPC
    from pathlib import Path

    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    backbone, head = make_net(7)
    net = Net(backbone, nfd.shard_head(head, mesh_of(world)))
    optimizer = nfd.RowSGD(net.parameters(), lr=0.1, momentum=0.9)
    path = nfd.save_checkpoint(folder, 1, net, optimizer)
    said, weight = {}, net.head.weight.to_local()
    raw = weight.detach().numpy().tobytes()

    def heard(call, *arguments):
        try:
            call(folder, *arguments, net, optimizer)
        except (OSError, ValueError) as error:
            return str(error)

    def write_data(*_):
        raise OSError(ENOSPC, "No space left on device")

    original = FileSystemWriter.write_data
    if rank == 1:
        FileSystemWriter.write_data = write_data
    said["disk"] = heard(nfd.save_checkpoint, 2)
    FileSystemWriter.write_data = original

    if rank == 1:
        weight.detach()[0, 0] = float("nan")
    said["nan"] = heard(nfd.save_checkpoint, 2)

    with torch.no_grad():
        weight.fill_(0.25)
    dist.barrier()
    if rank == 1:
        shard = Path(path) / "__1_0.distcp"
        data = bytearray(shard.read_bytes())
        data[data.index(raw)] ^= 1
        shard.write_bytes(data)
    dist.barrier()
    said["damage"] = heard(nfd.load_checkpoint)
    said["unchanged"] = bool((weight == 0.25).all())
    said["steps"] = [step for step, _ in nfd.checkpoints(folder)]
    return said


# Failures -------------------------------------------------------------------------------------------


def loss_while_a_rank(rank, world, does):
    """Rank 1 dies or stalls before the collective; the others report the error and how long it took."""
    import os
    import time
    from datetime import timedelta

    group = dist.new_group(timeout=timedelta(seconds=4))
    shard = nfd.ClassShard.of(5, group)
    x, weight, labels = problem(5, 4, torch.float32)
    mine = weight[shard.first : shard.first + shard.count]
    nfd.normface_loss(x, mine, labels, 4.0, shard)  # connections are made at the first call
    if rank == 1:
        if does == "dies":
            os._exit(3)
        time.sleep(8)
        return None
    start = time.monotonic()
    try:
        nfd.normface_loss(x, mine, labels, 4.0, shard)
    except RuntimeError as error:
        return str(error), time.monotonic() - start
    return None
