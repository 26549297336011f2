"""What the processes of tests/ranks.py do for test_distributed_margins.py, and the problem they share."""

from __future__ import annotations

import torch
from distributed_jobs import DIM, full, head_of, mesh_of, problem, rows_of

import normface_ext as nf
import normface_ext.distributed as nfd

CLASSES, BATCH = 10, 14
KINDS = ("number", "0-d", "per class", "per row", "mixed")


def tensors(kind):
    """The margin's three numbers over all rows, as leaves where they are tensors."""
    counts = {"0-d": (), "per class": (CLASSES,), "per row": (BATCH,)}
    if kind == "number":
        return [0.9, 0.3, 0.1]
    if kind == "mixed":
        return [0.9, tensors("per class")[1], tensors("0-d")[2]]
    generator = torch.Generator().manual_seed(7)
    return [
        (v + 0.1 * torch.rand(counts[kind], generator=generator, dtype=torch.float64)).requires_grad_()
        for v in (0.9, 0.3, 0.1)
    ]


def own(m, mine):
    return m.detach()[mine].requires_grad_() if isinstance(m, torch.Tensor) else m


def margin_of(kind, numbers, **options):
    return (nf.RowMargin if kind == "per row" else nf.CombinedMargin)(*numbers, **options)


def loss_and_gradients(rank, world, kind, ragged, backbone_gradients, reduction, gradient="exact"):
    """(loss, dx of this rank, dweight in full, the margin's gradients of this rank)."""
    x, weight, labels = problem(CLASSES, BATCH, torch.float64)
    labels[3] = -100
    mine = rows_of(rank, world, BATCH, ragged)
    numbers = tensors(kind)
    if kind == "per row":
        numbers = [own(m, mine) for m in numbers]
    sharded = nfd.shard_head(head_of(CLASSES, weight), mesh_of(world))
    features = x[mine].clone().requires_grad_()
    loss = nfd.normface_loss(
        features,
        sharded.weight,
        labels[mine],
        9.0,
        sharded.shard,
        margin=margin_of(kind, numbers),
        margin_gradient=gradient,
        backbone_gradients=backbone_gradients,
        reduction=reduction,
    )
    loss.backward(torch.arange(BATCH, dtype=torch.float64)[mine] if reduction == "none" else None)
    of_margin = [m.grad for m in numbers if isinstance(m, torch.Tensor)]
    return loss.detach(), features.grad, full(sharded.weight.grad), of_margin


def refused(rank, world, kind):
    """The sentence of a call that is refused on every rank before any of them waits for another."""
    x, weight, labels = problem(CLASSES, BATCH, torch.float64)
    sharded = nfd.shard_head(head_of(CLASSES, weight), mesh_of(world))
    calls = {
        "rows": lambda: nfd.normface_loss(
            x, sharded.weight, labels, 4.0, sharded.shard, margin=nf.RowMargin(m2=torch.zeros(BATCH + 1))
        ),
        "classes": lambda: nfd.normface_loss(
            x, sharded.weight, labels, 4.0, sharded.shard, margin=nf.CosFace(torch.zeros(DIM))
        ),
        "scales": lambda: nfd.normface_loss(x, sharded.weight, labels, torch.ones(BATCH), sharded.shard),
    }
    try:
        calls[kind]()
    except ValueError as error:
        return str(error)
    return None
