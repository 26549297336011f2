"""The losses over agents: defaults, checks and sentences. The kernels are behind ``ops``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

from torch import Tensor

from .. import reference
from ..cosine.ops import normalize
from ..distances.functions import inner_distance
from ..distances.ops import with_gradient
from ..engine import checks
from ..engine.arguments import choice, flag
from ..engine.calls import accumulator
from . import ops
from .ops import EXCESS_SUM, HINGE_COSINE, HINGE_SLOPE
from .options import (
    AgentOptions,
    AgentRows,
    ContrastiveArguments,
    ContrastiveOptions,
    TripletArguments,
    TripletOptions,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

MODES = ("math", "caffe")


def check_mode(op: str, mode: object, reduction: str) -> None:
    choice(op, "mode", mode, MODES)
    if mode == "caffe" and reduction != "mean":
        raise ValueError(f"{op}: expected `reduction` to be mean in mode 'caffe', got {reduction!r}")


def _agents(
    op: str, x: object, weight: object, labels: object, ignore_index: int
) -> tuple[Tensor, Tensor | None]:
    """x [N, D] and weight [C, D], or distances [N, C] and no weight; labels checked."""
    if weight is None:
        distances = checks.matrix(op, "x", x, "[N, C] distances where `weight` is None")
        if distances.shape[1] == 0:
            raise ValueError(
                f"{op}: expected `x` to have at least one class, got shape {list(distances.shape)}"
            )
        checks.labels(op, labels, distances, distances.shape[1], ignore_index)
        return distances, None
    features, agents = checks.features_and_weight(op, x, weight)
    checks.labels(op, labels, features, agents.shape[0], ignore_index)
    return features, agents


def _caffe_distances(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """What the released nets put in front of the loss: Normalize, then InnerDistance with normalize."""
    if weight is None:
        return x.to(accumulator(x.dtype))
    unit = normalize(x.to(accumulator(x.dtype)).contiguous(), 1, 2, eps)[0]
    return inner_distance(unit, weight, normalize=True, eps=eps)


def _loss(
    op: str,
    x: Tensor,
    weight: Tensor | None,
    labels: Tensor,
    options: AgentOptions,
    ignore_index: int,
    reduction: str,
    mode: str,
    return_stats: bool,
    eps: float,
    workspace: int | None,
    active_limit: int | None,
    check_finite: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    checks.reduction(op, "reduction", reduction)
    check_mode(op, mode, reduction)
    options = options.checked(op, mode)
    return_stats = flag(op, "return_stats", return_stats)
    ignore_index = checks.ignored(checks.ignore_index(op, "ignore_index", ignore_index))
    eps = checks.eps(op, "eps", eps)
    workspace = checks.workspace(op, "workspace", workspace)
    active_limit = checks.active_limit(op, "active_limit", active_limit)
    x, weight = _agents(op, x, weight, labels, 0 if mode == "caffe" else ignore_index)
    options.check_device(op, x)
    if flag(op, "check_finite", check_finite):
        checks.finite_operands(op, x, weight, None if mode == "caffe" else labels != ignore_index)
    if mode == "caffe":
        distances = _caffe_distances(x, weight, eps)
        value, gradient, stats = options.of_caffe(distances.detach(), labels)
        loss = with_gradient(op, distances, value, gradient)
        return (loss, stats) if return_stats else loss
    if weight is None:
        loss, stats = options.of_distances(x, labels, ignore_index, reduction)
        return (loss, stats) if return_stats else loss
    margin, given = options.sweep_options(x, weight.shape[0], ignore_index, eps, workspace, active_limit)
    target, hinges, state = ops.agent_hinge(x, weight, labels, margin, given)
    rows = AgentRows(labels != ignore_index, target, hinges, state[HINGE_SLOPE].to(target.dtype))
    loss = reference._reduce(options.losses(rows), rows.kept, reduction)
    if not return_stats:
        return loss
    classes = weight.shape[0]
    distance_sum = 2.0 * (classes - 1) - 2.0 * state[HINGE_COSINE]
    return loss, options.stats(rows.kept, target, state[EXCESS_SUM], distance_sum, classes)


@overload
def c_contrastive_loss(
    x: Tensor,
    weight: Tensor | None,
    labels: Tensor,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[ContrastiveArguments],
) -> Tensor: ...
@overload
def c_contrastive_loss(
    x: Tensor,
    weight: Tensor | None,
    labels: Tensor,
    *,
    return_stats: Literal[True],
    **options: Unpack[ContrastiveArguments],
) -> tuple[Tensor, Tensor]: ...
def c_contrastive_loss(
    x: Tensor,
    weight: Tensor | None,
    labels: Tensor,
    *,
    pos_margin: float = 0.0,
    neg_margin: float | Tensor = 1.0,
    pos_weight: float = 1.0,
    neg_weight: float = 1.0,
    hardest_only: bool = False,
    max_positive_only: bool = False,
    positive_outlier_thresh: float = 4.0,
    positive_first: bool = False,
    positive_upper_bound: float = 1.0,
    exp_negative_weight: bool = False,
    normalize_negative: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    mode: str = "math",
    return_stats: bool = False,
    eps: float = 1e-12,
    workspace: int | None = None,
    active_limit: int | None = None,
    check_finite: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """loss_i = w+ min(T, (d_iy - m+)_+) + w- sum_{j != y} (m- - d_ij)_+, d_ij = |x_i/|x_i| - w_j/|w_j||^2.

    The contrastive loss against class agents (paper section 4; Caffe GeneralContrastiveLoss on top of
    Normalize and InnerDistance). Distances are squared and without a factor 1/2, as in the paper:
    d = 2 - 2 cos, in [0, 4]. It is never stored as a matrix: one sweep over the classes,
    in chunks within the workspace, finds every row's hinges and lists what is active. The gradient of
    the rest is exactly zero, so backward follows the lists; where a row has more active classes than its
    list holds, it sweeps again, with the same result. Runs are bit-identical from one to the next.

    Args:
        x: [N, D] features.
        weight: [C, D] agents, on x's device; float64 only together with float64. Both are normalised
            inside. With ``weight=None`` x is the [N, C] matrix of distances itself, plain torch takes over,
            and nothing below needs ``eps`` or ``workspace``.
        labels: [N] int64 in [0, C) or ``ignore_index``.
        pos_margin: m+.
        neg_margin: m-; it may be a 0-d tensor (without gradient).
        pos_weight: w+.
        neg_weight: w-.
        hardest_only: of each row only the largest negative term, the first of equal ones (Caffe:
            max_negative_only).
        max_positive_only: of the batch only the largest positive term.
        positive_outlier_thresh: T.
        positive_first: rows with d_iy > positive_upper_bound have no negative terms.
        exp_negative_weight: active negatives cost exp(-d_ij) instead of their hinge.
        normalize_negative: r; where the mean of a row's negative gradient magnitudes, divided by r,
            exceeds w+ and 0, the negative terms are divided by it (it counts as a constant).
        ignore_index: rows with this label count nowhere and get no gradient, whatever they and the weight
            hold.
        reduction: "mean" over the rows that are not ignored, "sum" or "none".
        mode: "math", the gradient of this loss; "caffe", value and gradient of the released layer with
            its deviations, listed in ``released_losses``: a plain path on the full N x C matrix, which
            knows only reduction "mean" and no ignored rows.
        return_stats: also return [mean positive hinge, mean negative hinge], detached: Caffe's second
            output, which never belongs to the loss.
        active_limit: active classes listed per row, chosen from C by default, 0 for always dense. A list
            costs one number read back from the device per step; it is off in traced and captured steps.
        check_finite: look for NaN and infinity in x and weight first; see ``functional.normface_loss``.

    Returns:
        A 0-d tensor, or [N] for "none": float64 for float64 input, float32 otherwise. Second derivatives
        raise (where ``weight`` is given).

    Raises:
        TypeError: dtypes, types.
        ValueError: shapes, devices, values; with ``check_finite`` rows that are not finite, by their numbers.
        IndexError: a label out of range.
    """
    options = ContrastiveOptions(
        pos_margin,
        neg_margin,
        pos_weight,
        neg_weight,
        hardest_only,
        max_positive_only,
        positive_outlier_thresh,
        positive_first,
        positive_upper_bound,
        exp_negative_weight,
        normalize_negative,
    )
    return _loss(
        "c_contrastive_loss",
        x,
        weight,
        labels,
        options,
        ignore_index,
        reduction,
        mode,
        return_stats,
        eps,
        workspace,
        active_limit,
        check_finite,
    )


@overload
def c_triplet_loss(
    x: Tensor,
    weight: Tensor | None,
    labels: Tensor,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[TripletArguments],
) -> Tensor: ...
@overload
def c_triplet_loss(
    x: Tensor,
    weight: Tensor | None,
    labels: Tensor,
    *,
    return_stats: Literal[True],
    **options: Unpack[TripletArguments],
) -> tuple[Tensor, Tensor]: ...
def c_triplet_loss(
    x: Tensor,
    weight: Tensor | None,
    labels: Tensor,
    *,
    margin: float = 0.8,
    pos_weight: float = 1.0,
    neg_weight: float = 1.0,
    hardest_only: bool = False,
    add_center_loss: bool = False,
    positive_first: bool = False,
    positive_upper_bound: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    mode: str = "math",
    return_stats: bool = False,
    eps: float = 1e-12,
    workspace: int | None = None,
    active_limit: int | None = None,
    check_finite: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
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
        mode: "caffe" is the released layer, whose gradient is not that of its loss: the positive is
            pulled once per row, not once per active negative. See ``released_losses``.
        return_stats: also return [mean distance to the label's agent, mean distance to the others].

    It returns and raises what ``c_contrastive_loss`` does.
    """
    options = TripletOptions(
        margin,
        pos_weight,
        neg_weight,
        hardest_only,
        add_center_loss,
        positive_first,
        positive_upper_bound,
    )
    return _loss(
        "c_triplet_loss",
        x,
        weight,
        labels,
        options,
        ignore_index,
        reduction,
        mode,
        return_stats,
        eps,
        workspace,
        active_limit,
        check_finite,
    )
