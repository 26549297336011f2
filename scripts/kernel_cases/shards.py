"""The ops on shards of the classes: one process plays all of them, and what they return adds up."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from normface_ext import reference
from normface_ext.agents import ops as agent_ops
from normface_ext.agents.functions import sweep_options
from normface_ext.agents.losses import Losses
from normface_ext.agents.options import ContrastiveOptions, TripletOptions
from normface_ext.engine import row_state, sweep
from normface_ext.engine.calls import plan_device
from normface_ext.engine.plan import products
from normface_ext.softmax import ops
from normface_ext.softmax.margins import ArcFace

from . import engine_ops
from .agents import problem, thresholds
from .case import Case, Results, differentiated, labels, number, randn

CLASSES = 101
#: First classes of the shards; the third is empty.
BOUNDS = [0, 37, 64, 64, CLASSES]
MARGIN = ArcFace(0.3)


def parts(weight: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Of every shard: its classes, and each row's label there."""
    made = []
    for first, last in itertools.pairwise(BOUNDS):
        here = (y >= first) & (y < last)
        place = torch.where(here, y - first, row_state.ELSEWHERE).where(y != -100, -100)
        made.append((weight[first:last].contiguous(), place))
    return made


def softmax(x: Tensor, weight: Tensor, scale: Tensor, y: Tensor) -> Results:
    """Loss and gradients of x, weight and scale; kappa is shared as distributed heads share it."""
    device = plan_device(x)
    made = products(x.shape[0], x.shape[1], CLASSES, x.dtype, device, None)
    options = ops.LossOptions(
        scale_value=0.0,
        m2_value=MARGIN.m,
        reduction=1,
        ignore_index=-100,
        eps=1e-12,
        smoothing=0.0,
        **made._asdict(),
        product_precision=x.dtype,
        total_classes=CLASSES,
        is_shard=True,
    )
    shards = parts(weight, y)
    shift = torch.stack([sweep.head_shift(x, w, place, scale, options) for w, place in shards]).amax(0)
    swept = [
        sweep.head_sweep(x, w, place, scale, None, None, options, need_x=True, need_weight=True, shift=shift)
        for w, place in shards
    ]
    rows = swept[0].rows.clone()
    rows[:3] = torch.stack([part.rows[:3] for part in swept]).sum(0)
    loss, slopes = ops.softmax_finish(rows, x, swept[0].class_sum, scale, ops.NUMBERS, options)
    upstream = randn(dtype=torch.float64, seed=5).to(loss)  # what the truth gets
    gradients = [
        sweep.head_backward(
            upstream, slopes, x, w, place, scale, None, part._replace(rows=rows), options, (True,) * 3
        )
        for (w, place), part in zip(shards, swept, strict=True)
    ]
    dx, dw, ds = zip(*gradients, strict=True)
    return [loss, torch.stack(dx).sum(0), torch.cat(dw), ds[0]]


def hinges(chosen: Losses, x: Tensor, weight: Tensor, y: Tensor) -> Results:
    """Distance to the label's agent and sum of the hinges of every row, and the gradients of x and weight."""
    _, options = sweep_options("", x, weight, len(x), CLASSES, -100, chosen, True, is_shard=True)
    shards = parts(weight, y)
    one = engine_ops.arguments(x, shards[0][0], shards[0][1], class_chunk=19)  # several chunks a shard
    options = replace(options, **engine_ops.budget(one))
    cosine = torch.stack([sweep.target_cosine(x, w, place, options) for w, place in shards]).sum(0)
    target, threshold = agent_ops.hinge_threshold(x, *shards[0], cosine, None, options)
    swept = [
        agent_ops.sweep_hinges(x, w, place, threshold, options, need_gradient=True) for w, place in shards
    ]
    rows = swept[0][0].rows.clone()
    rows[:2] = torch.stack([part.rows[:2] for part, _, _ in swept]).sum(0)
    upstream = randn(len(x), dtype=torch.float64, seed=5).to(target)
    slopes = agent_ops.hinge_slopes(rows, upstream, upstream, options)
    gradients = [
        agent_ops.hinge_gradients(slopes, x, w, place, threshold, *part, (True, True))
        for (w, place), part in zip(shards, swept, strict=True)
    ]
    dx, dw = zip(*gradients, strict=True)
    return [target, rows[row_state.SUM].to(target.dtype), torch.stack(dx).sum(0), torch.cat(dw)]


def all_hinges(
    margin: float, triplet: bool, exponential: bool, x: Tensor, weight: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """What ``hinges`` should add up to."""
    d = 2 - 2 * reference.cosine(x, weight)
    own = torch.nn.functional.one_hot(y, CLASSES).bool()
    target = d[own]
    threshold = margin + target[:, None] if triplet else torch.full_like(d[:, :1], margin)
    hinge = (-d).exp() * (d < threshold) if exponential else (threshold - d).clamp_min(0)
    return target, hinge.masked_fill(own, 0).sum(1)


def cases(dtype: torch.dtype) -> Iterator[Case]:
    y = labels(17, CLASSES)
    x, weight = randn(17, 40, dtype=dtype), randn(CLASSES, 40, dtype=dtype, seed=1)
    for s in (12.0, 1000.0 if dtype == torch.float64 else 100.0):
        truth = differentiated(
            lambda x, w, s, y: reference.normface_loss(x, w, y, s, margin=MARGIN), leaves=3
        )
        yield Case(f"normface_loss on shards, s={s:g}", softmax, truth, [x, weight, number(s, dtype), y])

    leaves, y, distances = problem(dtype)
    y = y.clamp_min(0)
    contrastive, triplet = thresholds(distances, y)
    for name, exponential in (("contrastive", False), ("triplet", False), ("exponential", True)):
        is_triplet = name == "triplet"
        margin = triplet if is_triplet else contrastive
        for capacity in (CLASSES, 0):
            chosen: Losses = TripletOptions(margin=margin, active_limit=capacity)
            if not is_triplet:
                chosen = ContrastiveOptions(
                    neg_margin=margin, exp_negative_weight=exponential, active_limit=capacity
                )

            def ours(*given, chosen=chosen):
                return hinges(chosen, *given)

            def truth(*given, margin=margin, is_triplet=is_triplet, exponential=exponential):
                return all_hinges(margin, is_triplet, exponential, *given)

            yield Case(
                f"{name} hinges on shards, capacity={capacity}",
                ours,
                differentiated(truth, leaves=2),
                [*leaves, y],
            )
