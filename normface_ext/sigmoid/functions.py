"""The sigmoid heads: defaults, checks and sentences. The kernels are behind ``ops``."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from ..engine import checks
from ..engine.arguments import flag, number
from ..engine.calls import plan_device, product_dtype
from ..engine.mixing import both_labels, check_finite, joined, no_statistics, twice
from ..engine.options import takes
from ..engine.plan import products
from ..engine.row_state import TERMS
from ..engine.statistics import Found, Statistics, given_back
from . import losses, ops
from .losses import SigmoidRows
from .options import SphereFace2Keywords, SphereFace2Options

if TYPE_CHECKING:
    from typing_extensions import Unpack


@overload
def sphereface2_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: float | Tensor,
    *,
    sample_weight: Tensor | None = None,
    return_statistics: Literal[False] = False,
    labels_b: Tensor | None = None,
    lam: float | Tensor | None = None,
    **options: Unpack[SphereFace2Keywords],
) -> Tensor: ...
@overload
def sphereface2_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: float | Tensor,
    *,
    sample_weight: Tensor | None = None,
    return_statistics: Literal[True],
    labels_b: Tensor | None = None,
    lam: float | Tensor | None = None,
    **options: Unpack[SphereFace2Keywords],
) -> tuple[Tensor, Statistics]: ...
@takes(SphereFace2Options)
def sphereface2_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: float | Tensor,
    *,
    sample_weight: Tensor | None = None,
    return_statistics: bool = False,
    labels_b: Tensor | None = None,
    lam: float | Tensor | None = None,
    **options: Unpack[SphereFace2Keywords],
) -> Tensor | tuple[Tensor, Statistics]:
    """loss_i = W [alpha softplus(-z_iy) + (1 - alpha) sum_{j != y} softplus(z_ij)], every class a yes or no.

    z_iy = r (g(c_iy) - m) + b, z_ij = r (g(c_ij) + m) + b, g(c) = 2 ((c + 1) / 2)^t - 1: SphereFace2 in its
    form C (Wen et al., *SphereFace2: Binary Classification is All You Need for Deep Face Recognition*, ICLR
    2022). In form A the margin is an angle: z_iy = r g(cos(theta_iy + m)) + b and z_ij = r g(cos(theta_ij -
    m)) + b; past theta + m = pi the target's cosine goes on as c - 1 + cos m. Fused as ``normface_loss`` is:
    no N x C matrix beyond the workspace. No z is too large for it, and no cosine from -1 to 1 is a corner.
    Runs are bit-identical from one to the next.

    Args:
        x: [N, D] features.
        weight: [C, D], on x's device; float64 only together with float64.
        labels: [N] int64 or int32 in [0, C) or ``ignore_index``.
        bias: b, a number, or a floating tensor of one element, with or without gradient, on x's device.
        sample_weight: [N] factors of the rows' losses, without gradient; the mean divides by their sum over
            the rows that count. A row of weight 0 is an ignored one.
        alpha: in (0, 1), the target's share of the loss.
        r: above 0, the scale.
        m: at least 0, the margin; in form A in [0, pi).
        t: how strongly g bends, a whole number from 1 on: 1 is no bend, g(c) = c.
        form: "C", a margin of the similarity, or "A", one of the angle.
        loss_weight: W. None: 50 / r, as in OpenSphere; wespeaker has 1.
        margin_gradient: "exact" differentiates g and form A's angles, as wespeaker does. "straight" takes the
            slopes of z in the cosines as r, for the target and for the others, as OpenSphere does.
        labels_b, lam: second labels [N], and the first ones' share, as in ``functional.normface_loss``. Each
            row stands in the batch twice for it: twice the products.
        reduction: "mean" over the rows that are not ignored (0 when there is none, or their weights sum to
            0), "sum", "none", or "batchmean": the sum divided by N, ignored rows and all.
        return_statistics, ignore_index, eps, workspace, check_finite: see ``functional.normface_loss``.

    Inside autocast on CUDA the products' operands are in its dtype, unless they are float64; gradients have
    the dtypes of x, weight and bias.

    Returns:
        A 0-d tensor, or [N] for "none": float64 for float64 input, float32 otherwise. Third derivatives
        raise. With ``return_statistics`` (loss, Statistics).

    Raises:
        TypeError: dtypes, types.
        ValueError: shapes, devices, values; with ``check_finite`` rows that are not finite, by their numbers.
        IndexError: a label out of range.
    """
    statistics = flag(ops.OP, "return_statistics", return_statistics)
    chosen = SphereFace2Options.of(ops.OP, options)
    labelled = labels, bias, sample_weight, chosen, labels_b, lam
    return given_back(head_loss(x, weight, *labelled, statistics=statistics))


def head_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: float | Tensor,
    sample_weight: Tensor | None,
    options: SphereFace2Options,
    labels_b: Tensor | None = None,
    lam: float | Tensor | None = None,
    *,
    statistics: bool,
) -> Found:
    """The loss with options that have been checked."""
    op = ops.OP
    checks.features_and_weight(op, x, weight)
    if labels_b is not None or lam is not None:
        classes, ignored = weight.shape[0], options.ignore_index
        both = both_labels(op, x, labels, labels_b, lam, sample_weight, classes, ignored)
        if options.check_finite:
            check_finite(op, x, weight, both, sample_weight)
            checks.finite_rows(op, "bias", bias_of(op, bias, x))
        no_statistics(op, statistics)
        told = both.labels, bias, both.weight, replace(options, check_finite=False)
        made, _ = head_loss(twice(x, options.eps), weight, *told, statistics=False)
        return joined(made, options.reduction), None
    labels = checks.labels(op, labels, x, weight.shape[0], options.ignore_index)
    factor = checks.weights(op, "sample_weight", sample_weight, x, x.shape[0])
    b = bias_of(op, bias, x)
    if options.check_finite:
        kept = labels != checks.ignored(options.ignore_index)
        checks.finite_operands(op, x, weight, kept, sample_weight=factor)
        checks.finite_rows(op, "bias", b)
    given = sweep_options(x, weight, x.shape[0], weight.shape[0], options)
    cosine, others, row_weight, *state = ops.sigmoid_rows(
        x, weight, offset_of(b, options), labels, factor, given, need_largest=statistics
    )
    rows = SigmoidRows(row_weight, cosine, others)
    loss = rounded(losses.loss(options, rows, b), x)
    return loss, losses.statistics(options, rows, b, state[0], x.dtype) if statistics else None


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
    """What the others' logits are beside r g."""
    return bias + options.r * options.m if options.form == "C" else bias


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
        term=TERMS["sigmoid" if options.form == "C" else "angular_sigmoid"],
        r=options.r,
        power=options.t,
        straight=options.margin_gradient == "straight",
        angle=None if options.form == "C" else options.m,
    )
