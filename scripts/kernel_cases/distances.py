"""inner_distance, and the distances and losses of pairs and triplets of rows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from normface_ext import functional, reference
from normface_ext.distances.ops import pair_distance

from .case import Case, case, labels, randn


def near(dtype: torch.dtype) -> list[Tensor]:
    """Rows beside their agents, where |x|^2 + |w|^2 - 2 <x, w> would cancel."""
    weight = randn(9, 50, dtype=dtype, seed=1)
    return [(weight[:5].double() + 0.05 * randn(5, 50, dtype=torch.float64)).to(dtype), weight]


def cases(dtype: torch.dtype) -> Iterator[Case]:
    for p in (2, 1):
        for batch, dim, classes in ((17, 40, 101), (5, 33, 7)):
            leaves = [randn(batch, dim, dtype=dtype), randn(classes, dim, dtype=dtype, seed=1)]
            y = labels(batch, classes, ignored=False)
            for normalize in (False, True):
                for own_only in (False, True):
                    options = {"p": p, "normalize": normalize, "update_center_only": own_only}

                    def distance(module, x, w, *y, options=options):
                        return module.inner_distance(x, w, labels=y[0] if y else None, **options)

                    yield case(
                        f"inner_distance {(batch, dim, classes)} {options}",
                        partial(distance, functional),
                        partial(distance, reference),
                        leaves,
                        *([y] if own_only else []),
                    )
        # An agent with more rows of its own than one warp adds up.
        leaves, y = (
            [randn(300, 9, dtype=dtype), randn(3, 9, dtype=dtype, seed=1)],
            labels(300, 3, ignored=False),
        )
        y[20:290] = 1
        yield case(
            f"inner_distance of one agent's rows p={p}",
            lambda x, w, y, p=p: functional.inner_distance(x, w, labels=y, update_center_only=True, p=p),
            lambda x, w, y, p=p: reference.inner_distance(x, w, labels=y, update_center_only=True, p=p),
            leaves,
            y,
        )
        yield case(
            f"inner_distance of near_rows p={p}",
            partial(functional.inner_distance, p=p),
            partial(reference.inner_distance, p=p),
            near(dtype),
        )
        yield case(
            f"pair_distance p={p}",
            partial(pair_distance, p=p),
            lambda a, b, p=p: (a - b).abs().pow(p).sum(1),
            [randn(9, 131, dtype=dtype), randn(9, 131, dtype=dtype, seed=1)],
        )
    rows = [randn(9, 33, dtype=dtype, seed=seed) for seed in range(3)]
    yield case(
        "pair_contrastive_loss",
        partial(functional.pair_contrastive_loss, margin=9.0),
        partial(reference.pair_contrastive_loss, margin=9.0),
        rows[:2],
        torch.tensor([True, False, False] * 3),
    )
    yield case(
        "triplet_loss",
        partial(functional.triplet_loss, margin=50.0),
        partial(reference.triplet_loss, margin=50.0),
        rows,
    )
