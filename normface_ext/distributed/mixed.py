"""The class-parallel softmax head for rows with two labels, as ``softmax.mixed`` in one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..engine import checks
from ..engine.arguments import number
from ..engine.autograd import detach_without_grad
from ..engine.mixing import BothLabels, joined, twice
from ..engine.reduce import over_rows
from ..engine.statistics import Found
from ..softmax.arguments import loss_options
from ..softmax.batch_margins import BatchMargin
from ..softmax.margins import Margin
from ..softmax.mixed import of_doubled
from ..softmax.options import HeadOptions
from ..softmax.rows import rows_of_both
from .batch_margins import margin_of_rows, with_regularizer
from .collectives import Batch, gather_rows
from .mixed_op import ClassParallelMixedLoss
from .mixing import both_labels_of_all
from .sampling import ClassSampler
from .shard import IGNORED, ClassShard
from .softmax_op import OP, margin_of_all


class Step(NamedTuple):
    """How the ranks go about it: see ``distributed.normface_loss``."""

    largest_scale: float | None
    sample: ClassSampler | None
    backbone_gradients: str
    equal_batches: bool


def mixed_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    labels_b: Tensor | None,
    lam: float | Tensor | None,
    scale: float | Tensor,
    shard: ClassShard,
    sample_weight: Tensor | None,
    class_weight: Tensor | None,
    options: HeadOptions,
    step: Step,
    one_label: Callable[..., Found],
) -> Tensor:
    """``normface_loss`` of two labels per row, with options that have been checked. Where one product does
    not serve, `one_label` is the loss of rows that stand there twice."""
    scale_tensor, scale_value = checks.scale(OP, scale, x)
    given = options.ignore_index, options.check_finite, step.equal_batches, scale_tensor, options.sub_centers
    both = both_labels_of_all(OP, x, weight, labels, labels_b, lam, sample_weight, shard, *given)
    margin = options.margin
    if not isinstance(margin, BatchMargin) and margin is not None:
        margin = of_doubled(OP, margin, both, shard.num_classes)
    hard = isinstance(margin, BatchMargin) and margin.hard_negatives
    apart = options.filter_threshold is not None or options.sub_centers > 1 or not options.normalize_input
    if hard or apart:
        doubled = replace(options, margin=margin, check_finite=False)
        rows = twice(x, options.eps), weight, both.labels, scale, shard, both.weight, class_weight, doubled
        told_apart = {"share": both.share, "given_labels": labels, "statistics": False}
        made, _ = one_label(*rows, **told_apart, **step._asdict())
        return joined(made, options.reduction)
    if step.sample is not None and options.label_smoothing > 0:
        raise ValueError(
            f"{OP}: expected `label_smoothing` 0 with sampled classes, got {options.label_smoothing}"
        )
    told = None
    found: Margin | None = margin
    if isinstance(margin, BatchMargin):
        told = rows_of_both(OP, x, both, labels, options, margin, shard.group)
        numbers_of_rows = margin_of_rows(OP, margin, told)
        assert isinstance(numbers_of_rows, Margin)
        found = numbers_of_rows
    factors = checks.weights(OP, "class_weight", class_weight, x, shard.num_classes)
    if factors is not None:
        factors = factors[shard.first : shard.first + shard.count]
    batch = gather_rows(
        x,
        both.labels.view(2, -1).t(),
        shard.group,
        ignore_index=checks.ignored(options.ignore_index),
        sample_weight=both.weight.view(2, -1).t(),
        equal_batches=step.equal_batches,
        counted=options.reduction == "batchmean",
    )
    of_all = _of_all(batch, options)
    places, rows_drawn = shard.places(of_all.labels, checks.ignored(options.ignore_index)), None
    local = weight.to_local() if isinstance(weight, DTensor) else weight
    if step.sample is not None:
        rows_drawn, places = step.sample.draw(places, shard, labels)
        factors = None if factors is None else factors[rows_drawn]
    elif isinstance(weight, DTensor):
        weight = local  # differentiable; a sparse gradient goes past it
    classes = shard.count if rows_drawn is None else rows_drawn.shape[0]
    replicas = dist.get_world_size(shard.group) if step.backbone_gradients == "mean" else 1
    tensors, numbers = margin_of_all(
        found, both.labels, of_all.labels, batch, options, replicas, shard, parts=2
    )
    sent = loss_options(scale_value, options, x, local, batch.x.shape[0], max(1, classes), numbers)
    sent = replace(sent, ignore_index=IGNORED, total_classes=shard.num_classes, is_shard=True)
    largest = step.largest_scale
    if largest is not None:
        largest = number(OP, "largest_scale", largest, kind="a number or None")
    x, weight = detach_without_grad(x, weight)
    loss: Tensor = ClassParallelMixedLoss.apply(
        x,
        weight,
        scale_tensor,
        *tensors,
        batch,
        of_all,
        places,
        None if factors is None else factors.contiguous(),
        rows_drawn,
        sent,
        largest,
        replicas,
        shard,
    )
    if batch.count is not None:
        loss = over_rows(loss, batch.count)
    if told is None or not isinstance(margin, BatchMargin):
        return loss
    more = both.weight, options.reduction, replicas, batch, shard.group
    return with_regularizer(OP, (loss, None), margin, told, *more)[0]


def _of_all(batch: Batch, options: HeadOptions) -> BothLabels:
    """Of the rows of all ranks, whose batch has two columns of labels and weights."""
    assert batch.sample_weight is not None
    labels, weight = batch.labels.t().reshape(-1), batch.sample_weight.t().reshape(-1)
    counts = checks.weighed(labels != checks.ignored(options.ignore_index), weight)
    return BothLabels(labels, weight, weight, counts)
