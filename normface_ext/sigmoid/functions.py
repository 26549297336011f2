"""The sigmoid heads: defaults, checks and sentences. The kernels are behind ``ops``."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..engine import checks
from ..engine.arguments import number
from ..engine.calls import plan_device, product_dtype
from ..engine.mixing import both_labels, check_finite, joined, twice
from ..engine.options import takes
from ..engine.plan import products
from ..engine.sweep import TERMS
from . import losses, ops
from .losses import SigmoidRows
from .options import SphereFace2Keywords, SphereFace2Options

if TYPE_CHECKING:
    from typing_extensions import Unpack


@takes(SphereFace2Options)
def sphereface2_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: float | Tensor,
    *,
    sample_weight: Tensor | None = None,
    labels_b: Tensor | None = None,
    lam: float | Tensor | None = None,
    **options: Unpack[SphereFace2Keywords],
) -> Tensor:
    """loss_i = W [alpha softplus(-z_iy) + (1 - alpha) sum_{j != y} softplus(z_ij)], every class a yes or no.

    z_iy = r (g(c_iy) - m) + b, z_ij = r (g(c_ij) + m) + b, g(c) = 2 ((c + 1) / 2)^t - 1: SphereFace2 in its
    form C (Wen et al., *SphereFace2: Binary Classification is All You Need for Deep Face Recognition*, ICLR
    2022). Fused as ``normface_loss`` is: no N x C matrix beyond the workspace. No z is too large for it, and
    no cosine from -1 to 1 is a corner. Runs are bit-identical from one to the next.

    Args:
        x: [N, D] features.
        weight: [C, D], on x's device; float64 only together with float64.
        labels: [N] int64 or int32 in [0, C) or ``ignore_index``.
        bias: b, a number, or a floating tensor of one element, with or without gradient, on x's device.
        sample_weight: [N] factors of the rows' losses, without gradient; the mean divides by their sum over
            the rows that count. A row of weight 0 is an ignored one.
        alpha: in (0, 1), the target's share of the loss.
        r: above 0, the scale.
        m: at least 0, the margin.
        t: how strongly g bends, a whole number from 1 on: 1 is no bend, g(c) = c.
        loss_weight: W. None: 50 / r, as in OpenSphere; wespeaker has 1.
        margin_gradient: "exact" differentiates g, as wespeaker does. "straight" takes its slope as 1, for the
            target and for the others, as OpenSphere does.
        labels_b, lam: second labels [N], and the first ones' share, as in ``functional.normface_loss``. Each
            row stands in the batch twice for it: twice the products.
        reduction: "mean" over the rows that are not ignored (0 when there is none, or their weights sum to
            0), "sum", "none", or "batchmean": the sum divided by N, ignored rows and all.
        ignore_index, eps, workspace, check_finite: see ``functional.normface_loss``.

    Inside autocast on CUDA the products' operands are in its dtype, unless they are float64; gradients have
    the dtypes of x, weight and bias.

    Returns:
        A 0-d tensor, or [N] for "none": float64 for float64 input, float32 otherwise. Second derivatives
        raise.

    Raises:
        TypeError: dtypes, types.
        ValueError: shapes, devices, values; with ``check_finite`` rows that are not finite, by their numbers.
        IndexError: a label out of range.
    """
    chosen = SphereFace2Options.of(ops.OP, options)
    return head_loss(x, weight, labels, bias, sample_weight, chosen, labels_b, lam)


def head_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: float | Tensor,
    sample_weight: Tensor | None,
    options: SphereFace2Options,
    labels_b: Tensor | None = None,
    lam: float | Tensor | None = None,
) -> Tensor:
    """The loss with options that have been checked."""
    op = ops.OP
    checks.features_and_weight(op, x, weight)
    if labels_b is not None or lam is not None:
        classes, ignored = weight.shape[0], options.ignore_index
        both = both_labels(op, x, labels, labels_b, lam, sample_weight, classes, ignored)
        if options.check_finite:
            check_finite(op, x, weight, both, sample_weight)
            checks.finite_rows(op, "bias", bias_of(op, bias, x))
        made = head_loss(
            twice(x, options.eps),
            weight,
            both.labels,
            bias,
            both.weight,
            replace(options, check_finite=False),
        )
        return joined(made, options.reduction)
    labels = checks.labels(op, labels, x, weight.shape[0], options.ignore_index)
    factor = checks.weights(op, "sample_weight", sample_weight, x, x.shape[0])
    b = bias_of(op, bias, x)
    if options.check_finite:
        kept = labels != checks.ignored(options.ignore_index)
        checks.finite_operands(op, x, weight, kept, sample_weight=factor)
        checks.finite_rows(op, "bias", b)
    given = sweep_options(x, weight, x.shape[0], weight.shape[0], options)
    cosine, others, row_weight = ops.sigmoid_rows(x, weight, offset_of(b, options), labels, factor, given)
    return rounded(losses.loss(options, SigmoidRows(row_weight, cosine, others), b), x)


def bias_of(op: str, value: object, x: Tensor) -> Tensor:
    """b as a 0-d float64 tensor on x's device."""
    if not isinstance(value, Tensor):
        made = number(op, "bias", value, kind="a number or a tensor of one element")
        return x.new_full((), made, dtype=torch.float64)
    given = checks.floating(op, "bias", value)
    if given.dim() > 1 or given.numel() != 1:
        raise ValueError(
            f"{op}: expected `bias` to be a number or a tensor of one element, got shape {list(given.shape)}"
        )
    checks.same_device(op, "bias", given, "x", x)
    return given.reshape(()).double()


def offset_of(bias: Tensor, options: SphereFace2Options) -> Tensor:
    """What the others' logits are beside r g(c)."""
    return bias + options.r * options.m


def rounded(loss: Tensor, x: Tensor) -> Tensor:
    return loss if x.dtype == torch.float64 else loss.float()


def sweep_options(
    x: Tensor, weight: Tensor, batch: int, classes: int, options: SphereFace2Options
) -> ops.SigmoidOptions:
    """What the kernels are told, for `batch` rows as those of x [N, D] and `classes`."""
    precision = product_dtype(x, weight)
    dim, classes = max(1, x.shape[1]), max(1, classes)
    made = products(batch, dim, classes, precision, plan_device(x), options.workspace, softmax=False)
    return ops.SigmoidOptions(
        1.0,
        options.eps,
        classes,
        *made,
        precision,
        checks.ignored(options.ignore_index),
        term=TERMS["sigmoid"],
        r=options.r,
        power=options.t,
        straight=options.margin_gradient == "straight",
    )
