"""What the processes of tests/ranks.py do for test_distributed_mixed.py, and the problem they share."""

from __future__ import annotations

import torch
from distributed_jobs import full, head_of, mesh_of, rows_of
from distributed_jobs import problem as plain_problem
from torch.utils.checkpoint import checkpoint

import normface_ext as nf
import normface_ext.distributed as nfd

CLASSES, BATCH = 10, 14

#: head -> (class, options). Margins are made anew for every head: some have a state.
HEADS = {
    "plain": (nf.NormFaceLoss, lambda: {"scale": 9.0}),
    "arcface": (nf.NormFaceLoss, lambda: {"scale": 9.0, "margin": nf.ArcFace(0.5)}),
    "beyond the window": (nf.NormFaceLoss, lambda: {"scale": 300.0}),
    "learned scale": (nf.NormFaceLoss, lambda: {"scale": 9.0, "learn_scale": True}),
    "smoothing": (
        nf.NormFaceLoss,
        lambda: {
            "scale": 9.0,
            "label_smoothing": 0.1,
            "class_weight": torch.linspace(0.1, 3, CLASSES, dtype=torch.float64),
        },
    ),
    "per class": (
        nf.NormFaceLoss,
        lambda: {
            "scale": 9.0,
            "margin": nf.CosFace(torch.nn.Parameter(torch.linspace(0, 0.4, CLASSES, dtype=torch.float64))),
        },
    ),
    "AdaFace": (nf.NormFaceLoss, lambda: {"scale": 9.0, "margin": nf.AdaFace(t_alpha=0.5)}),
    "MagFace": (nf.NormFaceLoss, lambda: {"scale": 9.0, "margin": nf.MagFace(l_a=1, u_a=9)}),
    "CurricularFace": (nf.NormFaceLoss, lambda: {"scale": 9.0, "margin": nf.CurricularFace(alpha=0.5)}),
    "AdaFace of two centres": (
        nf.NormFaceLoss,
        lambda: {"scale": 9.0, "margin": nf.AdaFace(t_alpha=0.5), "sub_centers": 2},
    ),
    "MagFace of two centres": (
        nf.NormFaceLoss,
        lambda: {"scale": 9.0, "margin": nf.MagFace(l_a=1, u_a=9), "sub_centers": 2},
    ),
    "CurricularFace of two centres": (
        nf.NormFaceLoss,
        lambda: {"scale": 9.0, "margin": nf.CurricularFace(alpha=0.5), "sub_centers": 2},
    ),
    "filter": (nf.NormFaceLoss, lambda: {"scale": 9.0, "filter_threshold": 0.2}),
    "SphereFace2": (nf.SphereFace2Loss, lambda: {"r": 9.0}),
    "CContrastive": (nf.CContrastiveLoss, lambda: {"neg_margin": 1.9}),
    "CTriplet": (nf.CTripletLoss, lambda: {"add_center_loss": True}),
}


def problem():
    """(x, weight, labels, labels_b, lam, sample_weight): of some one is ignored, or both are."""
    x, weight, labels = plain_problem(CLASSES, BATCH, torch.float64)
    generator = torch.Generator().manual_seed(3)
    labels_b = torch.randint(CLASSES, (BATCH,), generator=generator)
    lam, factor = torch.rand(2, BATCH, generator=generator, dtype=torch.float64)
    labels_b[0] = labels[0]
    labels[1], labels_b[2], labels[3], labels_b[3] = -100, -100, -100, -100
    lam[4], lam[5], factor[6] = 1, 0, 0
    with torch.no_grad():  # near the second label, and near the first
        x[7] = weight[labels_b[7]] + 0.1 * x[7]
        x[8] = weight[labels[8]] + 0.1 * x[8]
    return x, weight, labels, labels_b, lam, factor


def made(kind, reduction, weight):
    cls, options = HEADS[kind]
    if cls is nf.NormFaceLoss:
        given = options()
        if "sub_centers" in given:  # the class's own direction, and another's
            weight = torch.stack([weight, weight.roll(1, 1)], dim=1).flatten(0, 1)
        return head_of(CLASSES, weight, reduction=reduction, **given)
    head = cls(weight.shape[1], CLASSES, dtype=torch.float64, reduction=reduction, **options())
    head.load_state_dict({"weight": weight}, strict=False)
    return head


def others(head):
    """Gradients of what else is learned, and the buffers."""
    learned = {n: p.grad for n, p in head.named_parameters() if n != "weight"}
    return {**learned, **{n: b for n, b in head.named_buffers() if n not in ("class_weight",)}}


def run(head, x, *given, upstream):
    x = x.clone().requires_grad_()
    labels, labels_b, lam, factor = given
    loss = head(x, labels, factor, labels_b=labels_b, lam=lam)
    loss.backward(upstream if loss.dim() else None)
    return loss.detach(), x.grad


def upstream():
    return torch.linspace(0.5, 1.5, BATCH, dtype=torch.float64)


def loss_and_gradients(rank, world, kind, reduction, ragged, sample_rate=1.0):
    """(loss, dx of this rank, dweight in full, what else is learned and moved); with sampled classes dweight
    is that of the classes of this rank."""
    x, weight, *given = problem()
    mine = rows_of(rank, world, BATCH, ragged)
    head = nfd.shard_head(
        made(kind, reduction, weight), mesh_of(world), backbone_gradients="sum", sample_rate=sample_rate
    )
    loss, dx = run(head, x[mine], *[value[mine] for value in given], upstream=upstream()[mine])
    dweight = full(head.weight.grad)
    if dweight.is_sparse:
        dweight = dweight.to_dense()
    dweight = dweight.flatten(0, -2)  # classes of several centres, too
    moved = {name: value for name, value in others(head).items() if not name.startswith("sampler.")}
    return loss, dx, dweight, moved


def of_equal_labels(rank, world):
    """(loss of one label, loss of the same label twice) of this rank's rows, whose margins are drawn."""
    x, weight, labels, _, lam, _ = problem()
    mine = rows_of(rank, world, BATCH, True)
    options = {"scale": 9.0, "margin": nf.ElasticArcFace(std=0.2), "sub_centers": 2, "reduction": "none"}
    head = nfd.shard_head(
        head_of(CLASSES, torch.cat([weight, -weight]), **options), mesh_of(world), backbone_gradients="sum"
    )
    x, labels, lam = x[mine], labels[mine], lam[mine]
    torch.manual_seed(5)
    once = head(x, labels)
    torch.manual_seed(5)
    return once.detach(), head(x, labels, labels_b=labels, lam=lam).detach()


def checkpointed(rank, world, kind, sample_rate, reentrant):
    """Gradients and buffers of a step, and of one whose forward pass runs again in its backward pass."""
    x, weight, *given = problem()
    mine = rows_of(rank, world, BATCH, True)
    labels, labels_b, lam, factor = (value[mine] for value in given)
    results = []
    for again in (False, True):
        head = nfd.shard_head(
            made(kind, "mean", weight), mesh_of(world), backbone_gradients="sum", sample_rate=sample_rate
        )
        rows = x[mine].clone().requires_grad_()

        def step(rows, head=head):
            return head(rows, labels, factor, labels_b=labels_b, lam=lam)

        (checkpoint(step, rows, use_reentrant=reentrant) if again else step(rows)).backward()
        dweight = full(head.weight.grad)
        dweight = dweight.to_dense() if dweight.is_sparse else dweight
        results.append([rows.grad, dweight, *head.buffers()])
    return results


def refused(rank, world):
    """What a call without lam says on every rank."""
    x, weight, labels, labels_b, _, _ = problem()
    head = nfd.shard_head(made("plain", "mean", weight), mesh_of(world))
    try:
        head(x, labels, labels_b=labels_b)
    except ValueError as error:
        return str(error)
    return None


def rows_that_are_not_finite(rank, world):
    """What check_finite says where a row of the last rank holds NaN, and one that does not count on the
    first."""
    x, weight, *given = problem()
    mine = rows_of(rank, world, BATCH, False)
    labels, labels_b, lam, factor = (value[mine] for value in given)
    x = x[mine].clone()
    if rank == 0:
        x[3] = torch.nan  # ignored twice
    if rank == world - 1:
        x[1] = torch.nan
    head = nfd.shard_head(made("arcface", "mean", weight), mesh_of(world))
    head.check_finite = True
    try:
        head(x, labels, factor, labels_b=labels_b, lam=lam)
    except ValueError as error:
        return str(error)
    return None
