"""The class-parallel softmax head as a function of one shard of the classes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..engine import checks, transforms, updates
from ..engine.arguments import choice, flag, number
from ..engine.autograd import detach_without_grad
from ..engine.mixing import no_statistics
from ..engine.options import takes
from ..engine.reduce import over_rows
from ..engine.statistics import Found, Statistics, given_back, statistics_of
from ..softmax.arguments import loss_options, told_apart
from ..softmax.batch_margins import BatchMargin
from ..softmax.centers import for_each_row
from ..softmax.hard_negatives import HardNegatives
from ..softmax.margins import Margin
from ..softmax.options import HeadKeywords, HeadOptions
from ..softmax.rows import counted, nearest_rows, norms_of, rows_of
from .batch_margins import margin_of_rows, rows_of_all, with_regularizer
from .collectives import gather_row_gradients, gather_rows
from .mixed import Step, mixed_loss
from .sampling import ClassSampler
from .shard import IGNORED, ClassShard, local_rows
from .softmax_op import OP, ClassParallelLoss, RowsOfAll, margin_of_all

if TYPE_CHECKING:
    from typing_extensions import Unpack


def check_backbone_gradients(op: str, value: str) -> None:
    choice(op, "backbone_gradients", value, ("mean", "sum"))


@overload
def normface_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: float | Tensor,
    shard: ClassShard,
    *,
    sample_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    largest_scale: float | None = None,
    sample: ClassSampler | None = None,
    backbone_gradients: str = "mean",
    equal_batches: bool = False,
    return_statistics: Literal[False] = False,
    labels_b: Tensor | None = None,
    lam: float | Tensor | None = None,
    **options: Unpack[HeadKeywords],
) -> Tensor: ...
@overload
def normface_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: float | Tensor,
    shard: ClassShard,
    *,
    sample_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    largest_scale: float | None = None,
    sample: ClassSampler | None = None,
    backbone_gradients: str = "mean",
    equal_batches: bool = False,
    return_statistics: Literal[True],
    labels_b: Tensor | None = None,
    lam: float | Tensor | None = None,
    **options: Unpack[HeadKeywords],
) -> tuple[Tensor, Statistics]: ...
@takes(HeadOptions)
def normface_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: float | Tensor,
    shard: ClassShard,
    *,
    sample_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    largest_scale: float | None = None,
    sample: ClassSampler | None = None,
    backbone_gradients: str = "mean",
    equal_batches: bool = False,
    return_statistics: bool = False,
    labels_b: Tensor | None = None,
    lam: float | Tensor | None = None,
    **options: Unpack[HeadKeywords],
) -> Tensor | tuple[Tensor, Statistics]:
    """``functional.normface_loss`` of the rows of all ranks over the classes of all ranks.

    Every rank of ``shard.group`` calls it with its own rows and its own classes, and the same options.
    Per step the features travel once to every rank (all-gather), three float64 sums per row are added
    (one all-reduce), and the features' gradient travels back (reduce-scatter). A margin with hard negatives
    needs the target cosines before that: one more all-reduce, of a float64 per row.

    Args:
        x: [N, D] this rank's features, N as it likes.
        weight: [shard.count, D] its classes, or a DTensor ``Shard(0)`` of [num_classes, D]. With
            ``sub_centers`` K [shard.count, K, D] or a DTensor of [num_classes, K, D]: a class is on one rank.
        labels: [N] int64 or int32, global, in [0, num_classes) or ``ignore_index``.
        class_weight: [num_classes], the same on all ranks.
        check_finite: look for NaN and infinity first, in the rows of all ranks that count, in sample_weight,
            in the weight and in the scale; raised on all ranks. One more collective, of 8 bytes.
        largest_scale: a bound on a scale tensor: with it the host need not read the tensor to see whether
            the fixed shift serves. Not used without ``normalize_input``.
        sample: a ``ClassSampler``, to train on the rows' own classes and a random part of the others. The
            weight's gradient is then sparse.
        backbone_gradients: "mean" if the backbone's gradients are averaged over the ranks afterwards, as
            DistributedDataParallel and FSDP do: the features' gradient is multiplied by the number of ranks,
            so that the average is the gradient of the loss. "sum" if they are added, or if the gradient of
            the features themselves is wanted.
        labels_b, lam: second labels [N] of this rank's rows, and the first ones' share; on all ranks or on
            none. Features travel once for both, and one all-reduce more has the target cosines.
        equal_batches: every rank has the same N, and x needs a gradient on all of them or on none; saves a
            collective of 16 bytes and its wait.
        return_statistics: also return the ``Statistics`` of the rows of all ranks, the same on each; one more
            all-reduce, of a float64 per row. With ``sample`` the accuracy is among the classes drawn.

    The others are those of ``functional.normface_loss``, but a scale per row, [N], is refused: here it is a
    float or a tensor of one element.

    Returns:
        For "mean" and "sum" the loss over the rows of all ranks, the same bits on every rank; backward has
        to be called on all of them, with the same upstream gradient. For "none" [N], of this rank's rows.
        With ``return_statistics`` (loss, Statistics).

    Raises:
        TypeError, ValueError, IndexError: as ``functional.normface_loss``.
        RuntimeError: a rank died or came too late.
    """
    check_backbone_gradients(OP, backbone_gradients)
    flag(OP, "equal_batches", equal_batches)
    found = sharded_loss(
        x,
        weight,
        labels,
        scale,
        shard,
        sample_weight,
        class_weight,
        HeadOptions.of(OP, options),
        labels_b=labels_b,
        lam=lam,
        largest_scale=largest_scale,
        sample=sample,
        backbone_gradients=backbone_gradients,
        equal_batches=equal_batches,
        statistics=flag(OP, "return_statistics", return_statistics),
    )
    return given_back(found)


def sharded_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: float | Tensor,
    shard: ClassShard,
    sample_weight: Tensor | None,
    class_weight: Tensor | None,
    options: HeadOptions,
    *,
    labels_b: Tensor | None = None,
    lam: float | Tensor | None = None,
    share: Tensor | None = None,
    given_labels: Tensor | None = None,
    largest_scale: float | None,
    sample: ClassSampler | None,
    backbone_gradients: str,
    equal_batches: bool,
    statistics: bool,
) -> Found:
    """``normface_loss`` with options that have been checked. With a `share` [N] the rows stand there twice,
    once for each label (``engine.mixing``); `given_labels`: the first ones then, as their caller has them."""
    transforms.refuse(OP)
    if labels_b is not None or lam is not None:
        no_statistics(OP, statistics)
        step = Step(largest_scale, sample, backbone_gradients, equal_batches)
        return mixed_loss(
            x,
            weight,
            labels,
            labels_b,
            lam,
            scale,
            shard,
            sample_weight,
            class_weight,
            options,
            step,
            sharded_loss,
        ), None
    local, centers = local_rows(OP, weight, options.sub_centers), options.sub_centers
    checks.features_and_shard(OP, x, local, shard.count * centers)
    ignored = checks.ignored(options.ignore_index)
    given_labels = labels if given_labels is None else given_labels
    labels = checks.labels(OP, labels, x, shard.num_classes, options.ignore_index)
    scale_tensor, scale_value = checks.scale(OP, scale, x)
    if largest_scale is not None:
        largest_scale = number(OP, "largest_scale", largest_scale, kind="a number or None")
    if sample is not None and options.label_smoothing > 0:
        raise ValueError(
            f"{OP}: expected `label_smoothing` 0 with sampled classes, got {options.label_smoothing}"
        )
    row_weight = checks.weights(OP, "sample_weight", sample_weight, x, x.shape[0])
    factors = checks.weights(OP, "class_weight", class_weight, x, shard.num_classes)
    if factors is not None:
        factors = factors[shard.first : shard.first + shard.count]

    batch = gather_rows(
        x,
        labels,
        shard.group,
        ignore_index=ignored,
        sample_weight=row_weight,
        equal_batches=equal_batches,
        counted=options.reduction == "batchmean",
    )
    if options.check_finite:
        batch.check_finite(OP, local, shard, ignored, scale_tensor)
    places = shard.places(batch.labels, ignored)
    nearest = nearest_rows(batch.x, local, places, centers, IGNORED, options.eps, is_shard=True)
    of_batch = options.margin if isinstance(options.margin, BatchMargin) else None
    found: Margin | HardNegatives | None = options.margin
    told = None
    if of_batch is not None:
        if of_batch.hard_negatives:
            told = rows_of_all(OP, of_batch, batch, local, nearest, shard, given_labels, options)
            if share is not None:
                share = gather_row_gradients(share, batch, shard.group, "the rows' shares")
        else:
            told = rows_of(OP, x, labels, given_labels, row_weight, options, of_batch, shard.group)
        told = told._replace(share=share)
        found = margin_of_rows(OP, of_batch, told)
    target, term = told_apart(found, options, batch.labels)
    rows = None
    if sample is not None:
        rows, places = sample.draw(places, shard, given_labels)
        factors = None if factors is None else factors[rows]
        if centers > 1:
            drawn = places * centers + nearest % centers
            nearest = torch.where(places >= 0, drawn, places)
        else:
            nearest = places
    elif isinstance(weight, DTensor) and not updates.takes(weight):
        weight = weight.to_local()  # differentiable; what is no gradient of all its rows goes past it
    classes = shard.count if rows is None else rows.shape[0]
    replicas = dist.get_world_size(shard.group) if backbone_gradients == "mean" else 1
    of_all = told is not None and told.of_all
    margin, numbers = margin_of_all(
        target, labels, batch.labels, batch, options, replicas, shard, of_all=of_all
    )
    if not options.normalize_input:
        mine = norms_of(x, counted(labels, row_weight, options), options.eps)
        lengths = RowsOfAll.apply(mine, batch, replicas, shard)
        scale_tensor = lengths * (scale_value if scale_tensor is None else scale_tensor.double())
        largest_scale = None  # how long features are nobody knows before
    given = loss_options(scale_value, options, x, local, batch.x.shape[0], max(1, classes), numbers, term)
    given = replace(given, ignore_index=IGNORED, total_classes=shard.num_classes, is_shard=True)
    x, weight = detach_without_grad(x, weight)
    result = updates.apply(
        ClassParallelLoss,
        x,
        weight,
        scale_tensor,
        *margin,
        batch,
        nearest,
        None if factors is None else for_each_row(factors.contiguous(), centers),
        rows,
        *term.inputs,
        given,
        largest_scale,
        replicas,
        shard,
        statistics,
    )
    loss, *means = result if statistics else (result,)
    if batch.count is not None:
        loss = over_rows(loss, batch.count)
    given_statistics = statistics_of((means[0], means[1])) if statistics else None
    if of_batch is None or told is None:
        return loss, given_statistics
    return with_regularizer(
        OP,
        (loss, given_statistics),
        of_batch,
        told,
        row_weight,
        options.reduction,
        replicas,
        batch,
        shard.group,
    )
