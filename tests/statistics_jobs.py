"""What the processes of tests/ranks.py do for test_statistics.py."""

from __future__ import annotations

import copy

import torch
from distributed_jobs import DIM, mesh_of, recorded, rows_of

import normface_ext as nf
from normface_ext import distributed as nfd

ROWS, CLASSES = 11, 8
#: With a batch of all ranks some rows are hits and some are not.
HEADS = {
    "softmax": lambda: nf.NormFaceLoss(DIM, CLASSES, scale=9.0, margin=nf.ArcFace(0.2)),
    "smoothed": lambda: nf.NormFaceLoss(DIM, CLASSES, scale=9.0, label_smoothing=0.1),
    "beyond the window": lambda: nf.NormFaceLoss(DIM, CLASSES, scale=900.0),
    "weighted": lambda: nf.NormFaceLoss(
        DIM, CLASSES, scale=9.0, class_weight=torch.arange(1.0, CLASSES + 1).double(), reduction="none"
    ),
    "of norms": lambda: nf.NormFaceLoss(DIM, CLASSES, scale=9.0, margin=nf.MagFace()),
    "hard negatives": lambda: nf.NormFaceLoss(DIM, CLASSES, scale=9.0, margin=nf.MVSoftmax(0.3, 0.2)),
    "contrastive": lambda: nf.CContrastiveLoss(DIM, CLASSES, neg_margin=0.9, add_intra_mae=True),
    "contrastive, none": lambda: nf.CContrastiveLoss(DIM, CLASSES, max_positive_only=True, reduction="none"),
    "triplet": lambda: nf.CTripletLoss(DIM, CLASSES, margin=-0.3),
    "triplet, hardest": lambda: nf.CTripletLoss(DIM, CLASSES, margin=-0.3, hardest_only=True),
    "sigmoid": lambda: nf.SphereFace2Loss(DIM, CLASSES, r=20.0),
    "sigmoid, none": lambda: nf.SphereFace2Loss(DIM, CLASSES, r=20.0, reduction="none"),
}


def problem():
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(CLASSES, DIM, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (ROWS,), generator=generator)
    near = torch.linspace(0, 2, ROWS, dtype=torch.float64)[:, None]
    x = torch.randn(ROWS, DIM, generator=generator, dtype=torch.float64) + near * weight[labels]
    weight[6] = weight[1]  # equal classes of two ranks
    labels[5], x[5] = -100, torch.nan
    return x, weight, labels


def heads():
    for name, make in HEADS.items():
        head = make().double()
        with torch.no_grad():
            head.weight.copy_(problem()[1])
        yield name, head


def all_heads(rank, world):
    """(statistics of the class-parallel heads, of one process with all rows and classes, the losses with and
    without them)."""
    x, _, labels = problem()
    mine = rows_of(rank, world, ROWS, world == 3)
    got, wanted, with_them, without = {}, {}, [], []
    for name, head in heads():
        sharded = nfd.shard_head(copy.deepcopy(head), mesh_of(world))
        plain = nfd.shard_head(copy.deepcopy(head), mesh_of(world))
        loss, got[name] = sharded(x[mine], labels[mine], return_statistics=True)
        loss.sum().backward()
        with_them.append(loss.tolist())
        without.append(plain(x[mine], labels[mine]).tolist())
        wanted[name] = head(x, labels, return_statistics=True)[1]
    return got, wanted, (with_them, without)


def collectives_of_a_step(rank, world):
    """(those of a step, those of one with statistics)"""
    x, _, labels = problem()
    mine = rows_of(rank, world, ROWS, False)
    head = nf.NormFaceLoss(DIM, CLASSES, scale=9.0).double()
    sharded = nfd.shard_head(head, mesh_of(world))
    found = []
    for asked in (False, True):
        with recorded() as calls:
            sharded(x[mine], labels[mine], return_statistics=asked)
        found.append([name for name, _ in calls])
    return tuple(found)


def sampled(rank, world):
    """(statistics of a step with few of the other classes, with all)"""
    x, weight, labels = problem()
    mine = rows_of(rank, world, ROWS, False)
    head = nf.NormFaceLoss(DIM, CLASSES, scale=9.0).double()
    with torch.no_grad():
        head.weight.copy_(weight)
    few, every = (
        nfd.shard_head(copy.deepcopy(head), mesh_of(world), sample_rate=rate) for rate in (0.1, 1.0)
    )
    return tuple(h(x[mine], labels[mine], return_statistics=True)[1] for h in (few, every))
