"""The softmax head: defaults, checks and sentences. The kernels are behind ``ops``."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..cosine.functions import normalize
from ..engine import checks
from ..engine.calls import plan_device
from ..engine.options import takes
from ..engine.plan import plan
from . import ops
from .batch_margins import BatchMargin, Rows
from .margins import NO_MARGIN, Margin
from .options import HeadKeywords, HeadOptions
from .row_margin import RowMargin, fused, loss_of_psi  # stand-in

if TYPE_CHECKING:
    from typing_extensions import Unpack


@takes(HeadOptions)
def normface_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: float | Tensor,
    *,
    sample_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    **options: Unpack[HeadKeywords],
) -> Tensor:
    """loss_i = -log softmax_j(s psi(cos_ij))[y_i], fused: no N x C matrix beyond the workspace budget.

    Equals ``F.cross_entropy(s * F.linear(F.normalize(x), F.normalize(weight)), labels)`` up to the
    place of eps (paper section 3.2; Caffe Normalize + InnerProduct + Scale + SoftmaxWithLoss), at any
    scale and for cosines anywhere in [-1, 1], with the target column kept apart in float64 so that
    neither 1 - p nor a margin loses digits. Runs are bit-identical from one to the next.

    Args:
        x: [N, D] features.
        weight: [C, D], on x's device; float64 only together with float64.
        labels: [N] int64 or int32 in [0, C) or ``ignore_index``.
        scale: s, a float or a 0-d tensor with or without gradient.
        margin: psi on the target cosine: ``CosFace``, ``ArcFace``, ``CombinedMargin`` or ``None``.
        reduction: "mean" over the rows that are not ignored (0 when there is none, or their weights sum to
            0), "sum" or "none".
        ignore_index: rows with this label count neither in the loss nor in the mean, and get no
            gradient, whatever they and the weight hold: NaN in them reaches nothing. None: there are none.
        eps: inside both norms, see ``normalize``.
        sample_weight: [N] factors of the rows' losses, without gradient. A row of weight 0 is an ignored one.
        class_weight: [C] factors of the classes, without gradient, as in ``F.cross_entropy``: the mean
            divides by the sum of sample_weight_i * class_weight_(y_i) over the rows that count.
        label_smoothing: a in [0, 1): the target gets 1 - a, and a / C goes to every class, weighted by
            class_weight, as in ``F.cross_entropy``.
        workspace: bytes allowed beyond inputs and gradients; see ``normface_ext.plan``. Where they cannot be
            had, a smaller plan takes over, with a RuntimeWarning.
        check_finite: look for NaN and infinity first, in the rows that count, in the weight, in the
            scale and in sample_weight: one more reading of them, and on CUDA a wait of the host. Without it
            such a row makes the loss and the weight's gradient NaN; other rows' own gradients stay right.

    Returns:
        A 0-d tensor, or [N] for "none": float64 for float64 input, float32 otherwise. The gradient of
        the weight is accumulated in float32 and has the weight's dtype. Second derivatives raise.

    Raises:
        TypeError: dtypes, types.
        ValueError: shapes, devices, values; with ``check_finite`` rows that are not finite, by their numbers
            (RuntimeError without them in a compiled step).
        IndexError: a label out of range, naming the row (on CUDA the kernel prints the row and aborts,
            since a check here would stall the GPU).
    """
    op = "normface_loss"
    return head_loss(op, x, weight, labels, scale, sample_weight, class_weight, HeadOptions.of(op, options))


def head_loss(
    op: str,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: float | Tensor,
    sample_weight: Tensor | None,
    class_weight: Tensor | None,
    options: HeadOptions,
) -> Tensor:
    """``normface_loss`` with options that have been checked."""
    checks.features_and_weight(op, x, weight)
    if isinstance(options.margin, BatchMargin):
        return batch_loss(op, x, weight, labels, scale, sample_weight, class_weight, options, options.margin)
    classes, dim = weight.shape
    ignored = checks.ignored(options.ignore_index)
    labels = checks.labels(op, labels, x, classes, options.ignore_index)
    scale_tensor, scale_value = checks.scale(op, scale, x)
    row_weight = checks.weights(op, "sample_weight", sample_weight, x, x.shape[0])
    if options.check_finite:
        checks.finite_operands(op, x, weight, labels != ignored, scale_tensor, row_weight)
    precision = product_dtype(x, weight)
    given = ops.LossOptions(
        scale_value=scale_value,
        margin=options.margin or NO_MARGIN,
        reduction=checks.REDUCTIONS[options.reduction],
        ignore_index=ignored,
        eps=options.eps,
        smoothing=options.label_smoothing,
        plan=plan(x.shape[0], dim, classes, precision, plan_device(x), workspace=options.workspace),
        product_precision=precision,
        total_classes=classes,
    )
    return ops.normface_loss(
        x,
        weight,
        scale_tensor,
        labels,
        row_weight,
        checks.weights(op, "class_weight", class_weight, x, classes),
        given,
    )


def batch_loss(
    op: str,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: float | Tensor,
    sample_weight: Tensor | None,
    class_weight: Tensor | None,
    options: HeadOptions,
    margin: BatchMargin,
) -> Tensor:
    """``head_loss`` with a margin that looks at the batch first."""
    labels = checks.labels(op, labels, x, weight.shape[0], options.ignore_index)
    row_weight = checks.weights(op, "sample_weight", sample_weight, x, x.shape[0])
    counts = labels != checks.ignored(options.ignore_index)
    counts = counts if row_weight is None else counts & (row_weight != 0)
    norms = row_norms(x, counts, options.eps) if margin.uses_norms else None
    rows = Rows(labels, counts, norms, options.margin_gradient == "straight")
    found = margin.of(rows)
    if isinstance(found, Margin):
        given = replace(options, margin=found)
        if isinstance(found, RowMargin):
            m = found
            loss = loss_of_psi(
                x, weight, labels, scale, lambda c: fused(c, m), sample_weight, class_weight, options
            )
        else:
            loss = head_loss(op, x, weight, labels, scale, sample_weight, class_weight, given)
    else:
        loss = loss_of_psi(x, weight, labels, scale, found, sample_weight, class_weight, options)
    more = margin.regularizer(rows)
    if more is None:
        return loss
    return loss + reduced(more, counts, row_weight, options.reduction).to(loss.dtype)


def row_norms(x: Tensor, counts: Tensor, eps: float) -> Tensor:
    """|x| [N] float64, with gradient; 1 for rows that do not count, whatever they hold."""
    counted = torch.where(counts[:, None], x, 1)
    norms = normalize(counted, eps=eps, return_norm=True)[1].squeeze(1).double()
    return torch.where(counts, norms, 1)


def reduced(values: Tensor, counts: Tensor, row_weight: Tensor | None, reduction: str) -> Tensor:
    """Values [N] of rows as a loss has them, weighted by sample_weight alone."""
    weights = counts.to(values.dtype) if row_weight is None else torch.where(counts, row_weight, 0)
    weighted = torch.where(counts, values * weights, 0)
    if reduction == "none":
        return weighted
    if reduction == "sum":
        return weighted.sum()
    total = weights.sum()
    empty = total == 0
    return torch.where(empty, 0, weighted.sum() / torch.where(empty, 1, total))


def product_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """dtype of the matrix products' operands: the autocast dtype on CUDA inside autocast, else the
    narrower of the two inputs'. CPU kernels widen 16-bit operands to float32 whatever this says."""
    if x.is_cuda and x.dtype != torch.float64 and torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda")
    return x.dtype if x.dtype.itemsize <= weight.dtype.itemsize else weight.dtype
