"""Two labels of a row in a class-parallel head: every rank has those of its own rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ..engine import checks
from ..engine.mixing import BothLabels, both_labels
from .collectives import gather_rows
from .shard import ClassShard, local_rows


def both_labels_of_all(
    op: str,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    labels_b: Tensor | None,
    lam: float | Tensor | None,
    sample_weight: Tensor | None,
    shard: ClassShard,
    ignore_index: int | None,
    check_finite: bool,
    equal_batches: bool,
    scale: Tensor | None = None,
    centers: int = 1,
) -> BothLabels:
    """Checked, of this rank's rows. To `check_finite` the rows of all ranks are gathered for it."""
    local = local_rows(op, weight, centers)
    checks.features_and_shard(op, x, local, shard.count * centers)
    both = both_labels(op, x, labels, labels_b, lam, sample_weight, shard.num_classes, ignore_index)
    if check_finite:
        ignored = checks.ignored(ignore_index)
        other = ignored + 1 if ignored < 0 else ignored - 1  # any label of a row that counts
        counted = torch.where(both.any_counts(), other, ignored)
        given = checks.weights(op, "sample_weight", sample_weight, x, x.shape[0])
        rows = gather_rows(
            x.detach(),
            counted,
            shard.group,
            ignore_index=ignored,
            sample_weight=given,
            equal_batches=equal_batches,
        )
        rows.check_finite(op, local, shard, ignored, scale)
    return both
