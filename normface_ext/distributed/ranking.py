"""Ranks and nearest classes of the rows of all ranks over the classes of all ranks."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..engine import checks
from ..engine.sweep import target_cosine
from ..softmax.ranking import hardest, nearer, ranking_options
from .collectives import add_over_shards, gather_rows, key_of_largest
from .shard import IGNORED, ClassShard


@torch.no_grad()
def nearest_class(
    op: str, x: Tensor, weight: Tensor, shard: ClassShard, eps: float, workspace: int | None
) -> Tensor:
    """``functional.nearest_class`` of this rank's rows, int64 [N]; called by all ranks together."""
    checks.features_and_shard(op, x, weight, shard.count)
    none = torch.full([x.shape[0]], IGNORED, dtype=torch.int64, device=x.device)
    batch = gather_rows(x.detach(), none, shard.group, ignore_index=IGNORED)
    classes, cosines = hardest(batch.x, weight, ranking_options(batch.x, weight, eps, None, workspace))
    # A rank without classes has -inf, which is nowhere the largest.
    return batch.own(key_of_largest(cosines, classes + shard.first, shard.group)).long()


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
) -> Tensor:
    """``functional.target_rank`` of this rank's rows, int64 [N]; called by all ranks together."""
    checks.features_and_shard(op, x, weight, shard.count)
    ignored = checks.ignored(ignore_index)
    labels = checks.labels(op, labels, x, shard.num_classes, ignore_index)
    batch = gather_rows(x.detach(), labels, shard.group, ignore_index=ignored)
    places, weight = shard.places(batch.labels, ignored), weight.contiguous()
    told = ranking_options(batch.x, weight, eps, IGNORED, workspace)
    told = replace(told, is_shard=True)
    (cosine,) = add_over_shards([target_cosine(batch.x, weight, places, told)], shard.group)
    local = nearer(batch.x, weight, places, cosine, told).double()
    (counts,) = add_over_shards([local], shard.group)
    return batch.own(torch.where(places == IGNORED, -1.0, counts)).long()
