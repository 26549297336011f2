"""The softmax head for rows with two labels.

Where the margin changes the target alone, both labels share one product (``mixed_op``). Where what other
classes are depends on the label (hard negatives), or psi is a function in torch, each row stands in the
batch twice.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..engine import checks
from ..engine.mixing import BothLabels, both_labels, check_finite, joined
from ..engine.reduce import over_rows, weighted
from . import mixed_op
from .arguments import HeadInputs, loss_options, margin_arguments
from .batch_margins import BatchMargin, Psi, margin_of, regularizer_of, weighed
from .hard_negatives import HardNegatives
from .margins import Margin, of_rows
from .options import HeadOptions
from .rows import rows_of_both, with_cosines
from .state import tensor_fields, with_tensors

#: Up to so many numbers in the weight a second product costs less than what one product has to tell apart:
#: some forty operations on [N] and [N, D]. Measured on the CPU with 64 rows; with more of them it is less.
SMALL = 1 << 16

Found = Margin | HardNegatives | Psi | None
#: (op, x, weight, inputs, options, what the margin is) -> the loss of rows with one label.
OneLabel = Callable[[str, Tensor, Tensor, HeadInputs, HeadOptions, Found], Tensor]


def mixed_loss(
    op: str,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    labels_b: Tensor | None,
    lam: float | Tensor | None,
    scale: float | Tensor,
    sample_weight: Tensor | None,
    class_weight: Tensor | None,
    options: HeadOptions,
    one_label: OneLabel,
) -> Tensor:
    """``normface_loss`` of two labels per row, with options that have been checked."""
    checks.features_and_weight(op, x, weight)
    classes, margin = weight.shape[0], options.margin
    both = both_labels(op, x, labels, labels_b, lam, sample_weight, classes, options.ignore_index)
    scale_tensor, scale_value = checks.scale(op, scale, x, per_row=True)
    of_class = checks.weights(op, "class_weight", class_weight, x, classes)
    if options.check_finite:
        check_finite(op, x, weight, both, sample_weight, scale_tensor)
    if scale_tensor is not None and scale_tensor.dim() == 1:  # a row that does not count may hold anything
        scale_tensor = torch.where(both.counts.view(2, -1).any(0), scale_tensor, 0)
    given = HeadInputs(scale_tensor, scale_value, both.labels, both.weight, of_class)
    if not isinstance(margin, BatchMargin):
        found = None if margin is None else of_doubled(op, margin, both, classes)
        return _of_found(op, x, weight, given, both, options, found, one_label)
    rows = rows_of_both(op, x, both, labels, options, margin)
    if margin.hard_negatives:
        rows = with_cosines(rows, torch.cat([x, x]), weight, both.labels, options)
    loss = _of_found(op, x, weight, given, both, options, margin_of(op, margin, rows), one_label)
    more = regularizer_of(op, margin, rows)
    if more is None:
        return loss
    weights = torch.where(both.counts, both.weight.double(), 0)
    added = weighted(weighed(more, weights), weights.sum(), options.reduction)
    return loss + joined(added, options.reduction).to(loss.dtype)


def of_doubled(op: str, margin: Margin, both: BothLabels, classes: int) -> Margin:
    """A margin for rows that stand there twice: numbers of each row are those of both its labels."""
    if not margin.per_row:
        return margin
    one = both.labels[: both.labels.shape[0] // 2]
    doubled = {}
    for name in tensor_fields(margin):
        value = of_rows(op, name, getattr(margin, name), True, one, classes)
        doubled[name] = value.repeat(2) if value.dim() == 1 else value
    return with_tensors(margin, doubled)


def _of_found(
    op: str,
    x: Tensor,
    weight: Tensor,
    given: HeadInputs,
    both: BothLabels,
    options: HeadOptions,
    found: Found,
    one_label: OneLabel,
) -> Tensor:
    if (
        options.filter_threshold is None
        and (found is None or isinstance(found, Margin))
        and weight.shape[0] * weight.shape[1] > SMALL
    ):
        return _one_product(op, x, weight, given, both, options, found)
    scale = given.scale
    if scale is not None and scale.dim() == 1:
        given = given._replace(scale=scale.repeat(2))
    made = one_label(op, torch.cat([x, x]), weight, given, options, found)
    return joined(made, options.reduction)


def _one_product(
    op: str,
    x: Tensor,
    weight: Tensor,
    given: HeadInputs,
    both: BothLabels,
    options: HeadOptions,
    found: Margin | None,
) -> Tensor:
    rows, classes = x.shape[0], weight.shape[0]
    straight = options.margin_gradient == "straight"
    margin, numbers = margin_arguments(op, found, both.labels, classes, straight)
    told = loss_options(given.scale_value, options, x, weight, rows, classes, numbers)
    loss = mixed_op.mixed_loss(
        x,
        weight,
        given.scale,
        margin,
        both.labels,
        both.counts,
        both.weight,
        given.class_weight,
        told,
    )
    return over_rows(loss, rows) if options.reduction == "batchmean" else loss
