"""The losses over agents: defaults, checks and sentences. The kernels are behind ``ops``."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal, NamedTuple, overload

import torch
from torch import Tensor

from ..cosine.functions import normalize
from ..engine import checks
from ..engine.arguments import flag
from ..engine.calls import plan_device, product_dtype
from ..engine.lists import list_bytes, list_limits
from ..engine.mixing import both_labels, check_finite, joined, no_statistics, twice
from ..engine.options import takes
from ..engine.plan import products
from ..engine.row_state import COSINE, LARGEST, TERMS
from ..engine.statistics import Statistics
from . import losses, ops
from .losses import AgentRows, Losses
from .ops import AgentSweepOptions
from .options import ContrastiveKeywords, ContrastiveOptions, TripletKeywords, TripletOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


@overload
def c_contrastive_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    sample_weight: Tensor | None = None,
    return_statistics: Literal[False] = False,
    labels_b: Tensor | None = None,
    lam: float | Tensor | None = None,
    **options: Unpack[ContrastiveKeywords],
) -> Tensor: ...
@overload
def c_contrastive_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    sample_weight: Tensor | None = None,
    return_statistics: Literal[True],
    labels_b: Tensor | None = None,
    lam: float | Tensor | None = None,
    **options: Unpack[ContrastiveKeywords],
) -> tuple[Tensor, Statistics]: ...
@takes(ContrastiveOptions)
def c_contrastive_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    sample_weight: Tensor | None = None,
    return_statistics: bool = False,
    labels_b: Tensor | None = None,
    lam: float | Tensor | None = None,
    **options: Unpack[ContrastiveKeywords],
) -> Tensor | tuple[Tensor, Statistics]:
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
            0), "sum", "none", or "batchmean": the sum divided by N, ignored rows and all.
        sample_weight: [N] factors of the rows' losses, without gradient; the mean divides by their sum over
            the rows that count. A row of weight 0 is an ignored one.
        labels_b, lam: second labels [N], and the first ones' share, as in ``functional.normface_loss``. Each
            row stands in the batch twice for it, with its share as its weight: twice the products.
        active_limit: active classes listed per row, chosen by default, 0 for always dense; the lists are a
            part of the workspace, and are left out where nothing else would fit beside them. A list
            costs one number read back from the device per step; it is off in traced and captured steps.
        return_statistics, eps, workspace, check_finite: see ``functional.normface_loss``.

    Inside autocast on CUDA the products' operands are in its dtype, unless they are float64; gradients have
    the dtypes of x and weight.

    Returns:
        A 0-d tensor, or [N] for "none": float64 for float64 input, float32 otherwise. Third derivatives
        raise. With ``return_statistics`` (loss, Statistics).

    Raises:
        TypeError: dtypes, types.
        ValueError: shapes, devices, values; with ``check_finite`` rows that are not finite, by their numbers.
        IndexError: a label out of range.
    """
    chosen = ContrastiveOptions.of("c_contrastive_loss", options)
    op, statistics = "c_contrastive_loss", flag("c_contrastive_loss", "return_statistics", return_statistics)
    labelled = labels, sample_weight, chosen, None, labels_b, lam
    found = rows_and_loss(op, x, weight, *labelled, need_largest=statistics)
    return losses.with_statistics(chosen, *found, statistics)


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


@overload
def c_triplet_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    sample_weight: Tensor | None = None,
    return_statistics: Literal[False] = False,
    labels_b: Tensor | None = None,
    lam: float | Tensor | None = None,
    **options: Unpack[TripletKeywords],
) -> Tensor: ...
@overload
def c_triplet_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    sample_weight: Tensor | None = None,
    return_statistics: Literal[True],
    labels_b: Tensor | None = None,
    lam: float | Tensor | None = None,
    **options: Unpack[TripletKeywords],
) -> tuple[Tensor, Statistics]: ...
@takes(TripletOptions)
def c_triplet_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    sample_weight: Tensor | None = None,
    return_statistics: bool = False,
    labels_b: Tensor | None = None,
    lam: float | Tensor | None = None,
    **options: Unpack[TripletKeywords],
) -> Tensor | tuple[Tensor, Statistics]:
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
    op, statistics = "c_triplet_loss", flag("c_triplet_loss", "return_statistics", return_statistics)
    labelled = labels, sample_weight, chosen, None, labels_b, lam
    found = rows_and_loss(op, x, weight, *labelled, need_largest=statistics)
    return losses.with_statistics(chosen, *found, statistics)


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


def rows_and_loss(
    op: str,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    sample_weight: Tensor | None,
    options: Losses,
    margin: Tensor | None = None,
    labels_b: Tensor | None = None,
    lam: float | Tensor | None = None,
    *,
    need_largest: bool = False,
) -> tuple[AgentRows, Tensor]:
    """(the rows, the loss) with options that have been checked; a ``margin`` stands in for theirs. With two
    labels the rows stand there twice."""
    if labels_b is None and lam is None:
        rows = swept_rows(op, x, weight, labels, sample_weight, options, margin, need_largest=need_largest)
        return rows, losses.loss(options, rows)
    no_statistics(op, need_largest)
    checks.features_and_weight(op, x, weight)
    both = both_labels(op, x, labels, labels_b, lam, sample_weight, weight.shape[0], options.ignore_index)
    if options.check_finite:
        check_finite(op, x, weight, both, sample_weight)
        options = replace(options, check_finite=False)
    rows = swept_rows(op, twice(x, options.eps), weight, both.labels, both.weight, options, margin)
    return rows, joined(losses.loss(options, rows), options.reduction)


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
    given, options = checked_inputs(op, x, weight, labels, sample_weight, options), plain(options)
    rows, class_sum = sweep_rows(op, given, options, margin, need_class_sum=needs_class_sum(options))
    return losses.stats(options, rows, negatives(options, x, weight.shape[0], rows, class_sum))


def agent_loss_and_stats(
    op: str, x: Tensor, weight: Tensor, labels: Tensor, options: Losses, margin: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Both, from one sweep where the loss is one of all plain hinges, or the statistics are of distances."""
    given, needed = checked_inputs(op, x, weight, labels, None, options), needs_class_sum(options)
    rows, class_sum = sweep_rows(op, given, options, margin, need_class_sum=needed)
    loss = losses.loss(options, rows)
    with torch.no_grad():
        if not needed and plain(options) != options:
            rows, _ = sweep_rows(op, given, plain(options), margin)
        return loss, losses.stats(options, rows, negatives(options, x, weight.shape[0], rows, class_sum))


def swept_rows(
    op: str,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    sample_weight: Tensor | None,
    options: Losses,
    margin: Tensor | None = None,
    *,
    need_largest: bool = False,
) -> AgentRows:
    """What is known of the rows. A ``margin`` stands in for the options'."""
    given = checked_inputs(op, x, weight, labels, sample_weight, options)
    return sweep_rows(op, given, options, margin, need_largest=need_largest)[0]


class AgentInputs(NamedTuple):
    """The tensors of a loss, checked."""

    x: Tensor
    weight: Tensor
    labels: Tensor  # int64; rows of weight 0 have the ignored one
    factor: Tensor | None  # sample_weight


def checked_inputs(
    op: str, x: Tensor, weight: Tensor, labels: Tensor, sample_weight: Tensor | None, options: Losses
) -> AgentInputs:
    checks.features_and_weight(op, x, weight)
    ignored = checks.ignored(options.ignore_index)
    labels = checks.labels(op, labels, x, weight.shape[0], options.ignore_index)
    factor = checks.weights(op, "sample_weight", sample_weight, x, x.shape[0])
    if options.check_finite:
        checks.finite_operands(op, x, weight, labels != ignored, sample_weight=factor)
    if factor is not None:
        labels = torch.where(factor == 0, ignored, labels)
    return AgentInputs(x, weight, labels, factor)


def sweep_rows(
    op: str,
    given: AgentInputs,
    options: Losses,
    margin: Tensor | None = None,
    *,
    need_class_sum: bool = False,
    need_largest: bool = False,
) -> tuple[AgentRows, Tensor | None]:
    """(the rows, the sum of the unit agents if it is needed)"""
    x, weight, labels, factor = given
    ignored = checks.ignored(options.ignore_index)
    needed = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    tensor, swept = sweep_options(
        op, x, weight, x.shape[0], weight.shape[0], ignored, options, needed, margin
    )
    target, hinges, state, *class_sum = ops.agent_hinge(
        x, weight, labels, tensor, swept, need_class_sum=need_class_sum, need_largest=need_largest
    )
    rows = AgentRows(labels != ignored, factor, target, hinges, ops.hinge_slope(state, swept), x.shape[0])
    if need_largest:
        rows = rows._replace(cosine=state[COSINE], largest=state[LARGEST])
    return rows, class_sum[0] if need_class_sum else None


def sweep_options(
    op: str,
    x: Tensor,
    weight: Tensor,
    batch: int,
    classes: int,
    ignored: int,
    options: Losses,
    needed: bool,
    margin: float | Tensor | None = None,
    is_shard: bool = False,
) -> tuple[Tensor | None, AgentSweepOptions]:
    """(the margin where it is a tensor, the other arguments of the sweep) for `batch` rows as those of x
    [N, D] and `classes`; `needed`: a gradient will be wanted."""
    dim, classes, precision = max(1, x.shape[1]), max(1, classes), product_dtype(x, weight)
    device = plan_device(x)
    made = products(batch, dim, classes, precision, device, options.workspace, softmax=False)
    triplet = isinstance(options, TripletOptions)
    exponential = not isinstance(options, TripletOptions) and options.exp_negative_weight
    if margin is None:
        margin = options.margin if isinstance(options, TripletOptions) else options.neg_margin
    if isinstance(margin, Tensor):  # it is read where x lies
        checks.same_device(op, "neg_margin", margin, "x", x)
    capacity = most_listed = 0
    # Following a list needs its length on the host.
    if needed and not options.hardest_only and checks.has_values(x):
        shape = batch, dim, classes
        capacity, most_listed = list_limits(
            *shape, device.type, precision, made.workspace, options.active_limit
        )
        if capacity > 0:
            left = made.workspace - list_bytes(batch, capacity)
            try:
                made = products(*shape, precision, device, left, softmax=False)
            except ValueError:  # nothing fits beside the lists: a dense backward is as exact
                capacity = most_listed = 0
    return margin if isinstance(margin, Tensor) else None, AgentSweepOptions(
        1.0,
        options.eps,
        classes,
        *made,
        precision,
        ignored,
        term=TERMS["exponential_hinge" if exponential else "hinge"],
        is_shard=is_shard,
        margin_value=0.0 if isinstance(margin, Tensor) else margin,
        triplet=triplet,
        hardest=options.hardest_only,
        capacity=capacity,
        most_listed=most_listed,
    )


# Statistics ------------------------------------------------------------------------------------------


def plain(options: Losses) -> Losses:
    """Without what chooses or weighs terms: it has no effect on the statistics."""
    if isinstance(options, TripletOptions):
        return replace(options, hardest_only=False)
    return replace(options, hardest_only=False, exp_negative_weight=False)


def needs_class_sum(options: Losses) -> bool:
    """Whether the statistics are of distances to the others, and not of their hinges."""
    return isinstance(options, TripletOptions)


def negatives(options: Losses, x: Tensor, classes: int, rows: AgentRows, class_sum: Tensor | None) -> Tensor:
    """[N], means over the other agents, without a gradient: of the distances, or of the plain hinges."""
    if class_sum is None:
        return rows.hinges.detach() / max(1, classes - 1)
    # d = 2 - 2 c, and the cosines of all agents add up to that with their sum.
    unit = normalize(x.detach().to(rows.target.dtype), eps=options.eps)
    distances = 2.0 * classes - 2.0 * (unit.double() @ class_sum[:-1].double())
    return (distances - rows.target.detach()) / max(1, classes - 1)
