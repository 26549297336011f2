"""The losses over agents: defaults, checks and sentences. The kernels are behind ``ops``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..engine import checks
from ..engine.calls import accumulator, autocast_dtype, plan_device
from ..engine.options import takes
from ..engine.plan import products
from ..engine.sweep import SUM, TERMS
from . import losses, ops
from .losses import AgentRows, Losses
from .ops import AgentSweepOptions
from .options import ContrastiveKeywords, ContrastiveOptions, TripletKeywords, TripletOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


@takes(ContrastiveOptions)
def c_contrastive_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    sample_weight: Tensor | None = None,
    **options: Unpack[ContrastiveKeywords],
) -> Tensor:
    """loss_i = w+ min(T, (d_iy - m+)_+) + w- sum_{j != y} (m- - d_ij)_+, d_ij = |x_i/|x_i| - w_j/|w_j||^2.

    The contrastive loss against class agents (paper section 4; Caffe GeneralContrastiveLoss on top of
    Normalize and InnerDistance). Distances are squared and without a factor 1/2, as in the paper:
    d = 2 - 2 cos, in [0, 4]. It is never stored as a matrix: one sweep over the classes,
    in chunks within the workspace, finds every row's hinges and lists what is active. The gradient of
    the rest is exactly zero, so backward follows the lists; where a row has more active classes than its
    list holds, it sweeps again, with the same result. Runs are bit-identical from one to the next.

    A matrix of distances that is already there goes to ``reference.contrastive_of_distances``. What the
    released Caffe layer does instead of this formula is ``caffe.general_contrastive_loss``.

    Args:
        x: [N, D] features.
        weight: [C, D] agents, on x's device; float64 only together with float64. Both are normalised
            inside.
        labels: [N] int64 or int32 in [0, C) or ``ignore_index``.
        pos_margin: m+.
        neg_margin: m-; it may be a 0-d tensor (without gradient).
        pos_weight: w+.
        neg_weight: w-.
        hardest_only: of each row only the largest negative term, the first of equal ones (Caffe:
            max_negative_only).
        max_positive_only: of the batch only the largest positive term, the first of equal ones. The largest
            is found before sample_weight.
        positive_outlier_thresh: T.
        positive_first: rows with d_iy > positive_upper_bound have no negative terms.
        exp_negative_weight: active negatives cost exp(-d_ij) instead of their hinge.
        normalize_negative: r; where the mean of a row's negative gradient magnitudes, divided by r,
            exceeds w+ and 0, the negative terms are divided by it (it counts as a constant). The mean is
            weighted by sample_weight.
        ignore_index: rows with this label count nowhere and get no gradient, whatever they and the weight
            hold. None: there are none.
        reduction: "mean" over the rows that are not ignored (0 when there is none, or their weights sum to
            0), "sum" or "none".
        sample_weight: [N] factors of the rows' losses, without gradient; the mean divides by their sum over
            the rows that count. A row of weight 0 is an ignored one.
        active_limit: active classes listed per row, chosen from C by default, 0 for always dense. A list
            costs one number read back from the device per step; it is off in traced and captured steps.
        eps, workspace, check_finite: see ``functional.normface_loss``.

    Inside autocast on CUDA the products' operands are in its dtype, unless they are float64; gradients have
    the dtypes of x and weight.

    Returns:
        A 0-d tensor, or [N] for "none": float64 for float64 input, float32 otherwise. Second derivatives
        raise.

    Raises:
        TypeError: dtypes, types.
        ValueError: shapes, devices, values; with ``check_finite`` rows that are not finite, by their numbers.
        IndexError: a label out of range.
    """
    chosen = ContrastiveOptions.of("c_contrastive_loss", options)
    return agent_loss("c_contrastive_loss", x, weight, labels, sample_weight, chosen)


@takes(ContrastiveOptions)
def c_contrastive_stats(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    sample_weight: Tensor | None = None,
    **options: Unpack[ContrastiveKeywords],
) -> Tensor:
    """[mean positive hinge, mean negative hinge] of :func:`c_contrastive_loss`, without a gradient.

    The positive hinge of a row is min(T, (d_iy - m+)_+), its negative one the mean of (m- - d_ij)_+ over the
    other agents; the means are over the rows that count, weighted by ``sample_weight``, whatever the
    reduction. Caffe's layer has them as its second top. Arguments and errors are those of the loss; what
    chooses or weighs terms (hardest_only, pos_weight, ...) has no effect here.
    """
    chosen = ContrastiveOptions.of("c_contrastive_stats", options)
    return agent_stats("c_contrastive_stats", x, weight, labels, sample_weight, chosen)


@takes(TripletOptions)
def c_triplet_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    sample_weight: Tensor | None = None,
    **options: Unpack[TripletKeywords],
) -> Tensor:
    """loss_i = w- sum_{j != y} (m + d_iy - d_ij)_+, d_ij = |x_i/|x_i| - w_j/|w_j||^2.

    The triplet loss against class agents (paper section 4; Caffe GeneralTripletLoss), with distances that are
    squared and without a factor 1/2, as in the paper: d = 2 - 2 cos, in [0, 4]. Fused as
    :func:`c_contrastive_loss` is, whose arguments these are, but for:

    Args:
        margin: m, 0.8 as in the paper (the Caffe layer's own default is 0.2).
        pos_weight: w+, of the centre term alone.
        hardest_only: of each row only the largest term, the first of equal ones.
        add_center_loss: adds w+ d_iy to the loss. (Caffe, where it is the default, adds its gradient and
            not its value.)
        positive_first: rows with d_iy > positive_upper_bound keep only the centre term.

    ``reference.triplet_of_distances`` takes a matrix of distances; the released Caffe layer, whose gradient
    is not that of its loss (the positive is pulled once per row, not once per active negative), is
    ``caffe.general_triplet_loss``. It returns and raises what ``c_contrastive_loss`` does.
    """
    chosen = TripletOptions.of("c_triplet_loss", options)
    return agent_loss("c_triplet_loss", x, weight, labels, sample_weight, chosen)


@takes(TripletOptions)
def c_triplet_stats(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    sample_weight: Tensor | None = None,
    **options: Unpack[TripletKeywords],
) -> Tensor:
    """[mean distance to the label's agent, mean distance to the others], as :func:`c_contrastive_stats`."""
    chosen = TripletOptions.of("c_triplet_stats", options)
    return agent_stats("c_triplet_stats", x, weight, labels, sample_weight, chosen)


def agent_loss(
    op: str, x: Tensor, weight: Tensor, labels: Tensor, sample_weight: Tensor | None, options: Losses
) -> Tensor:
    """The loss with options that have been checked."""
    return losses.loss(options, swept_rows(op, x, weight, labels, sample_weight, options)[0])


@torch.no_grad()
def agent_stats(
    op: str,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    sample_weight: Tensor | None,
    options: Losses,
    margin: Tensor | None = None,
) -> Tensor:
    rows, state = swept_rows(op, x, weight, labels, sample_weight, options, margin)
    return losses.stats(options, rows, _negatives(options, state, weight.shape[0]))


def agent_loss_and_stats(
    op: str, x: Tensor, weight: Tensor, labels: Tensor, options: Losses, margin: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Both from one sweep."""
    rows, state = swept_rows(op, x, weight, labels, None, options, margin)
    negatives = _negatives(options, state, weight.shape[0])
    return losses.loss(options, rows), losses.stats(options, rows, negatives)


def swept_rows(
    op: str,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    sample_weight: Tensor | None,
    options: Losses,
    margin: Tensor | None = None,
) -> tuple[AgentRows, Tensor]:
    """(the rows, the state [HINGE_FIELDS, N] of the sweep). A ``margin`` stands in for the options'."""
    checks.features_and_weight(op, x, weight)
    classes, ignored = weight.shape[0], checks.ignored(options.ignore_index)
    labels = checks.labels(op, labels, x, classes, options.ignore_index)
    factor = checks.weights(op, "sample_weight", sample_weight, x, x.shape[0])
    if options.check_finite:
        checks.finite_operands(op, x, weight, labels != ignored, sample_weight=factor)
    if factor is not None:
        labels = torch.where(factor == 0, ignored, labels)
    needed = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    x, weight = product_operands(x, weight)
    tensor, given = sweep_options(op, x, classes, ignored, options, needed, margin)
    target, hinges, state = ops.agent_hinge(x, weight, labels, tensor, given)
    return AgentRows(labels != ignored, factor, target, hinges, ops.hinge_slope(state, given)), state


def product_operands(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Features and agents as their products are made of them: in autocast's dtype on CUDA."""
    dtype = autocast_dtype(x)
    return (x, weight) if dtype is None else (x.to(dtype), weight.to(dtype))


def sweep_options(
    op: str,
    x: Tensor,
    classes: int,
    ignored: int,
    options: Losses,
    needed: bool,
    margin: float | Tensor | None = None,
    is_shard: bool = False,
) -> tuple[Tensor | None, AgentSweepOptions]:
    """(the margin where it is a tensor, the other arguments of the sweep) for x [N, D] and `classes`;
    `needed`: a gradient will be wanted."""
    batch, dim = x.shape
    wide, classes = accumulator(x.dtype), max(1, classes)
    made = products(batch, max(1, dim), classes, wide, plan_device(x), options.workspace, softmax=False)
    triplet = isinstance(options, TripletOptions)
    if margin is None:
        margin = options.margin if isinstance(options, TripletOptions) else options.neg_margin
    if isinstance(margin, Tensor):  # it is read where x lies
        checks.same_device(op, "neg_margin", margin, "x", x)
    exponential = not isinstance(options, TripletOptions) and options.exp_negative_weight
    return margin if isinstance(margin, Tensor) else None, AgentSweepOptions(
        1.0,
        options.eps,
        classes,
        *made,
        wide,
        ignored,
        term=TERMS["exponential_hinge" if exponential else "hinge"],
        is_shard=is_shard,
        margin_value=0.0 if isinstance(margin, Tensor) else margin,
        triplet=triplet,
    )


def _negatives(options: Losses, state: Tensor, classes: int) -> Tensor:
    """[N], means over the other agents: of the distances, or of the hinges."""
    others = classes - 1
    if isinstance(options, TripletOptions):
        raise NotImplementedError
    return state[SUM] / max(1, others)
