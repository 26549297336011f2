"""Ranks and nearest classes of the rows of all ranks over the classes of all ranks."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..engine import checks
from ..engine.sweep import target_cosine
from ..softmax.ranking import hardest, nearer, ranking_options
from ..softmax.rows import nearest_rows
from .collectives import add_over_shards, gather_rows, key_of_largest
from .shard import IGNORED, ClassShard


@torch.no_grad()
def nearest_class(
    op: str,
    x: Tensor,
    weight: Tensor,
    shard: ClassShard,
    eps: float,
    workspace: int | None,
    centers: int = 1,
) -> Tensor:
    """``functional.nearest_class`` of this rank's rows, int64 [N]; called by all ranks together. `weight` is
    [shard.count centers, D]."""
    checks.features_and_shard(op, x, weight, shard.count * centers)
    none = torch.full([x.shape[0]], IGNORED, dtype=torch.int64, device=x.device)
    batch = gather_rows(x.detach(), none, shard.group, ignore_index=IGNORED)
    rows, cosines = hardest(batch.x, weight, ranking_options(batch.x, weight, eps, None, workspace))
    classes = rows if centers == 1 else rows // centers
    # A rank without classes has -inf, which is nowhere the largest.
    return batch.own(key_of_largest(cosines, classes + shard.first, shard.group)).long()


@torch.no_grad()
def nearest_center(
    op: str,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    shard: ClassShard,
    centers: int,
    ignore_index: int | None,
    eps: float,
) -> Tensor:
    """Which of the `centers` of its class each of this rank's rows is nearest to, int64 [N], -1 where it is
    ignored; called by all ranks together."""
    checks.features_and_shard(op, x, weight, shard.count * centers)
    ignored = checks.ignored(ignore_index)
    labels = checks.labels(op, labels, x, shard.num_classes, ignore_index)
    batch = gather_rows(x.detach(), labels, shard.group, ignore_index=ignored)
    of_classes = shard.places(batch.labels, ignored)
    places = nearest_rows(batch.x, weight, of_classes, centers, IGNORED, eps, is_shard=True)
    mine = torch.where(places >= 0, places % centers, 0).double()
    (found,) = add_over_shards([mine], shard.group)
    return batch.own(torch.where(of_classes == IGNORED, -1.0, found)).long()


@torch.no_grad()
def target_rank(
    op: str,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    shard: ClassShard,
    ignore_index: int | None,
    eps: float,
    workspace: int | None,
    centers: int = 1,
) -> Tensor:
    """``functional.target_rank`` of this rank's rows, int64 [N]; called by all ranks together."""
    checks.features_and_shard(op, x, weight, shard.count * centers)
    ignored = checks.ignored(ignore_index)
    labels = checks.labels(op, labels, x, shard.num_classes, ignore_index)
    batch = gather_rows(x.detach(), labels, shard.group, ignore_index=ignored)
    weight = weight.contiguous()
    of_classes = shard.places(batch.labels, ignored)
    places = nearest_rows(batch.x, weight, of_classes, centers, IGNORED, eps, is_shard=True)
    told = ranking_options(batch.x, weight, eps, IGNORED, workspace, centers)
    told = replace(told, is_shard=True)
    (cosine,) = add_over_shards([target_cosine(batch.x, weight, places, told)], shard.group)
    local = nearer(batch.x, weight, places, cosine, told).double()
    (counts,) = add_over_shards([local], shard.group)
    return batch.own(torch.where(places == IGNORED, -1.0, counts)).long()
