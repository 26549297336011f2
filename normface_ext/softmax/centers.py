"""Classes of several centres (Deng et al., Sub-center ArcFace, 2020): the cosine of a class is that of its
nearest centre, c_j = max_k cos(x, w_jk), the label's class included, and the gradient is that centre's alone.

The weight is [C K, D], and row j K + k is centre k of class j. The kernels see rows: the label of a row of
features becomes the row of the weight that is nearest to it among those of its class, and the engine leaves
out, of every other class, all but the nearest (csrc/engine/head_arguments.h).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..engine import checks, row_state


def class_count(op: str, weight: Tensor, centers: int) -> int:
    """C of a weight [C centers, D]."""
    rows = weight.shape[0]
    if centers == 1:
        return rows
    if rows % centers:
        raise ValueError(
            f"{op}: expected `weight` to have sub_centers={centers} rows for each class, got shape"
            f" {list(weight.shape)}"
        )
    return rows // centers


def by_class(rows: Tensor, centers: int) -> Tensor:
    """[C centers, ...] -> [C, centers, ...], a view: what is spread over ranks, by its classes."""
    return rows.view(rows.shape[0] // centers, centers, *rows.shape[1:])


def as_rows(of_classes: Tensor) -> Tensor:
    """[C, centers, ...] -> [C centers, ...], a view where it can be one."""
    return of_classes.flatten(0, 1)


def ignored_row(centers: int, ignore_index: int | None) -> int:
    """What ``nearest_rows`` says of a row that is ignored."""
    return checks.ignored(ignore_index) if centers == 1 else row_state.IGNORED


def for_each_row(class_weight: Tensor | None, centers: int) -> Tensor | None:
    """A number per class [C] -> one per row of the weight."""
    if class_weight is None or centers == 1:
        return class_weight
    return class_weight.repeat_interleave(centers)


def pooled(cosines: Tensor, centers: int) -> Tensor:
    """[N, C centers] -> [N, C], differentiable; of equal ones the first has the gradient."""
    if centers == 1:
        return cosines
    return torch.max(cosines.unflatten(1, (-1, centers)), dim=2).values
