"""What the processes of tests/ranks.py do for test_ranking.py."""

from __future__ import annotations

import torch
from distributed_jobs import head_of, mesh_of, problem, rows_of

from normface_ext import distributed as nfd

CLASSES = 7


def answers(rank, world):
    """((predictions, hits) of the class-parallel head for this rank's rows, those of one process)."""
    x, weight, labels = problem(CLASSES, 9, torch.float64)
    labels = labels.clone()
    labels[4] = -100
    weight = weight.clone()
    weight[[1, 5]] = torch.eye(weight.shape[1], dtype=weight.dtype)[
        0
    ]  # equal classes of two ranks, no rounding
    x = x.clone()
    x[2] = weight[5]
    single = head_of(CLASSES, weight)
    head = nfd.shard_head(head_of(CLASSES, weight), mesh_of(world))
    mine = rows_of(rank, world, 9, False)
    x, labels = x[mine], labels[mine]
    got = head.predict(x), head.accuracy(x, labels, topk=(1, 2, 3))
    return got, (single.predict(x), single.accuracy(x, labels, topk=(1, 2, 3)))
