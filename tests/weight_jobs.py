"""What the processes of tests/ranks.py do for test_agent_weights.py."""

from __future__ import annotations

import torch
import torch.distributed as dist

from normface_ext import distributed
from normface_ext.distributed import ClassShard

CASES = {
    "mean": ("c_contrastive_loss", {"neg_margin": 1.9}),
    "none": ("c_contrastive_loss", {"neg_margin": 1.9, "reduction": "none", "active_limit": 20}),
    "batch": (
        "c_contrastive_loss",
        {"neg_margin": 2.2, "max_positive_only": True, "normalize_negative": 0.3, "positive_first": True},
    ),
    "triplet": ("c_triplet_loss", {"margin": 0.3, "add_center_loss": True}),
    "hardest": ("c_triplet_loss", {"margin": 0.3, "hardest_only": True, "reduction": "sum"}),
}
ROWS, CLASSES = 11, 17


def problem_of():
    """(x, weight, labels, factors, upstream): an ignored row and one that weighs nothing, both with NaN."""
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(CLASSES, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (ROWS,), generator=generator)
    x = weight[labels] + 1.5 * torch.randn(ROWS, 7, generator=generator, dtype=torch.float64)
    factors = 0.25 + torch.rand(ROWS, generator=generator, dtype=torch.float64)
    upstream = torch.randn(ROWS, generator=generator, dtype=torch.float64)
    labels[3], factors[8], x[3], x[8] = -100, 0.0, torch.nan, torch.nan
    return x.requires_grad_(), weight.requires_grad_(), labels, factors, upstream


def every_case(rank, world):
    """{case: (loss, dx, dweight)} of this rank's rows and classes."""
    found = {}
    for case, (name, options) in CASES.items():
        x, weight, labels, factors, upstream = (t.detach() for t in problem_of())
        rows, classes = (
            slice(count * rank // world, count * (rank + 1) // world) for count in (ROWS, CLASSES)
        )
        x, weight = x[rows].clone().requires_grad_(), weight[classes].clone().requires_grad_()
        shard = ClassShard(CLASSES, classes.start, len(weight), dist.group.WORLD)
        loss = getattr(distributed, name)(
            x, weight, labels[rows], shard, sample_weight=factors[rows], backbone_gradients="sum", **options
        )
        led = upstream[rows] if loss.dim() else torch.ones(())
        slopes = torch.autograd.grad(loss, (x, weight), led.to(loss))
        found[case] = [t.numpy() for t in (loss.detach(), *slopes)]
    return found
