"""The ops on shards of the classes: one process plays all of them, and what they return adds up."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from normface_ext import reference
from normface_ext.engine import sweep
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
        place = torch.where(here, y - first, sweep.ELSEWHERE).where(y != -100, -100)
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


def hinges(
    term: str, triplet: bool, margin: float, capacity: int, x: Tensor, weight: Tensor, y: Tensor
) -> Results:
    """Distance to the label's agent and sum of the hinges of every row, and the gradients of x and weight: by
    lists of so many active classes, or, with none, over all classes."""
    shards = parts(weight, y)
    given = [engine_ops.arguments(x, w, place, is_shard=True) for w, place in shards]
    cosine = torch.stack([engine_ops.call("target_cosine", one) for one in given]).sum(0)
    target = 2 - 2 * cosine
    options = {
        "term": sweep.TERMS[term],
        "threshold": target * triplet + margin,
        "sink": sweep.SINKS["active" if capacity else "none"],
        "capacity": capacity,
        "need_x": False,
        "class_chunk": 19,
    }
    given = [{**one, **options} for one in given]
    swept = [engine_ops.sweep(one) for one in given]
    value, active = (
        torch.stack([part.rows[field] for part, _, _ in swept]).sum(0)
        for field in (sweep.SUM, sweep.SECOND_SUM)
    )
    slope = active if term == "hinge" else value
    upstream = randn(len(x), dtype=torch.float64, seed=5).to(x.device)
    of_target = -2 * upstream * (1 + triplet * slope)
    gradients = []
    for one, (w, place), (part, classes, found) in zip(given, shards, swept, strict=True):
        if capacity:
            own = torch.where(place >= 0, place, len(w))
            factors = torch.cat([of_target[:, None], 2 * upstream[:, None] * found], 1).to(found.dtype)
            listed = torch.cat([own[:, None], classes], 1)
            gradients.append(engine_ops.pairs_backward(x, w, factors, listed, part, is_shard=True))
        else:
            slopes = torch.stack([2 * upstream, of_target, 0 * upstream, 0 * upstream])
            ones = torch.ones((), dtype=engine_ops.wide(x), device=x.device)
            gradients.append(engine_ops.backward(one, part, slopes, ones)[:2])
    dx, dw = zip(*gradients, strict=True)
    return [target, value, torch.stack(dx).sum(0), torch.cat(dw)]


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
        term = "exponential_hinge" if exponential else "hinge"
        for capacity in (CLASSES, 0):

            def truth(*given, margin=margin, is_triplet=is_triplet, exponential=exponential):
                return all_hinges(margin, is_triplet, exponential, *given)

            yield Case(
                f"{name} hinges on shards, capacity={capacity}",
                partial(hinges, term, is_triplet, margin, capacity),
                differentiated(truth, leaves=2),
                [*leaves, y],
            )
