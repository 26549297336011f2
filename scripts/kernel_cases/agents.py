"""The losses over agents on all classes: lists of active classes, sweeps, and every slope."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from normface_ext import functional, reference

from .case import Case, case, labels, number, randn

CONTRASTIVE: dict[str, dict[str, Any]] = {
    "plain": {},
    "exponential": {"exp_negative_weight": True},
    "hardest": {"hardest_only": True},
    "hardest exponential": {"hardest_only": True, "exp_negative_weight": True},
}
TRIPLET: dict[str, dict[str, Any]] = {
    "plain": {},
    "hardest": {"hardest_only": True},
    "centre": {"add_center_loss": True, "pos_weight": 0.3},
}
#: Active classes listed per row: as many as there are, fewer than are active, none.
LIMITS = (101, 3, 0)


def in_a_gap(values: Tensor, near: float) -> float:
    """A threshold that no value is close to: rounding in 16 bits must not decide what is active."""
    inside = values[(values - near).abs() < 0.25].sort().values
    widest = int(inside.diff().argmax())
    return float(inside[widest] + inside[widest + 1]) / 2


def problem(dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
    """x near their agents and the agents; labels; distances in float64."""
    weight = randn(101, 40, dtype=dtype, seed=1)
    y = labels(17, 101)
    x = (weight[y.clamp_min(0)].double() + randn(17, 40, dtype=torch.float64)).to(dtype)
    return [x, weight], y, 2 - 2 * reference.cosine(x.double(), weight.double())


def thresholds(distances: Tensor, y: Tensor) -> tuple[float, float]:
    """Margins of C-contrastive and C-triplet."""
    own = distances.gather(1, y.clamp_min(0)[:, None])
    return in_a_gap(distances.flatten(), 2.0), in_a_gap((distances - own).flatten(), 1.0)


def cases(dtype: torch.dtype) -> Iterator[Case]:
    leaves, y, distances = problem(dtype)
    contrastive, triplet = thresholds(distances, y)
    tables = {
        "c_contrastive_loss": (CONTRASTIVE, {"neg_margin": contrastive}),
        "c_triplet_loss": (TRIPLET, {"margin": triplet}),
    }
    for loss, (table, margin) in tables.items():
        ours, truth = getattr(functional, loss), getattr(reference, loss)
        for name, extra in table.items():
            options = {**margin, **extra, "reduction": "none"}
            for limit in LIMITS:
                yield case(
                    f"{loss} {name} limit={limit}",
                    partial(ours, **options, active_limit=limit),
                    partial(truth, **options),
                    leaves,
                    y,
                )
    # Rows so few and so long that blocks share them.
    long = [randn(2, 8, dtype=dtype), randn(1500, 8, dtype=dtype, seed=1)]
    own = torch.tensor([0, 1400])
    margin = in_a_gap((2 - 2 * reference.cosine(*(t.double() for t in long))).flatten(), 1.0)
    for name, extra in (("listed", {"active_limit": 1500}), ("hardest", {"hardest_only": True})):
        yield case(
            f"c_contrastive_loss of long rows, {name}",
            lambda x, w, y, given=extra: functional.c_contrastive_loss(x, w, y, neg_margin=margin, **given),
            lambda x, w, y, hard="hardest_only" in extra: reference.c_contrastive_loss(
                x, w, y, neg_margin=margin, hardest_only=hard
            ),
            long,
            own,
        )
    yield case(
        "c_contrastive_loss, the margin a tensor",
        lambda x, w, y, m: functional.c_contrastive_loss(x, w, y, neg_margin=m),
        lambda x, w, y, m: reference.c_contrastive_loss(x, w, y, neg_margin=m),
        leaves,
        y,
        number(contrastive, dtype),
    )
