"""The softmax head: defaults, checks and sentences. The kernels are behind ``ops``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple, overload

import torch
from torch import Tensor

from ..engine import row_state, transforms
from ..engine.arguments import flag
from ..engine.mixing import BothLabels, joined, no_statistics, twice
from ..engine.options import takes
from ..engine.reduce import over_rows, weighted
from ..engine.statistics import Found, Statistics, given_back, statistics_of, with_more
from ..reference import HeadParts, loss_of_parts
from . import mixed_op, ops
from .arguments import HeadInputs, checked_inputs, loss_options, margin_arguments, mixed_inputs, told_apart
from .batch_margins import BatchMargin, margin_of, regularizer_of, rows_weight, straightened, weighed
from .hard_negatives import HardNegatives
from .margins import Margin
from .mixed import OfMargin, mixed_loss
from .options import HeadKeywords, HeadOptions, PartsKeywords, PartsOptions
from .parts import head_parts as parts_op
from .rows import counted, norms_of, rows_of, with_cosines

if TYPE_CHECKING:
    from typing_extensions import Unpack


@overload
def normface_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: float | Tensor,
    *,
    sample_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
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
    *,
    sample_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
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
    *,
    sample_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    return_statistics: bool = False,
    labels_b: Tensor | None = None,
    lam: float | Tensor | None = None,
    **options: Unpack[HeadKeywords],
) -> Tensor | tuple[Tensor, Statistics]:
    """loss_i = -log softmax_j(s psi(cos_ij))[y_i], fused: no N x C matrix beyond the workspace budget.

    Equals ``F.cross_entropy(s * F.linear(F.normalize(x), F.normalize(weight)), labels)`` up to the
    place of eps (paper section 3.2; Caffe Normalize + InnerProduct + Scale + SoftmaxWithLoss), at any
    scale up to 1e9 (float64: 1e17; beyond, the last digit of a logit is more than exp has room for) and for
    cosines anywhere in [-1, 1], with the target column kept apart in float64 so that neither 1 - p nor a
    margin loses digits. Runs are bit-identical from one to the next.

    Args:
        x: [N, D] features.
        weight: [C, D], on x's device; float64 only together with float64. [C * sub_centers, D] with
            ``sub_centers``.
        labels: [N] int64 or int32 in [0, C) or ``ignore_index``.
        scale: s, a float, or a tensor with or without gradient: 0-d or [1], or [N], a scale per row. The
            learned scale of a head, ``head.scale``, is used within its bounds; a tensor computed from a
            learned scale is not bounded: use ``head.bounded_scale()``.
        margin: psi on the target cosine: ``CosFace``, ``ArcFace``, ``CombinedMargin``, ``RowMargin``, whose
            numbers may be tensors with gradient; one that looks at the batch first, ``AdaFace``, ``MagFace``,
            ``ElasticArcFace``, ``ElasticCosFace``, ``SphereFace`` or a ``BatchMargin`` of yours; one that
            changes the logits of other classes as well, ``CurricularFace``, ``MVSoftmax`` or
            ``CircleSoftmax``; or ``None``.
        margin_gradient: "exact" differentiates psi. "straight" takes d psi / d cos as 1, as arcface_torch and
            CVLface do: psi is a constant shift of the cosine, and the margin's tensors get no gradient. What
            a margin makes of other classes has its own slopes in either case.
        filter_threshold: the logit of another class whose cosine is past it, in [-1, 1], is 0 and pushes
            nothing: it may be the same person under a second label (arcface_torch's inter-class filter;
            0.4 there). Not together with a margin that changes others' logits itself.
        sub_centers: K rows of the weight for each class, row j K + k being centre k of class j (Sub-center
            ArcFace, Deng et al. 2020; arcface_torch, pytorch-metric-learning). cos_ij is the largest of the
            class's K, the label's included, and its gradient is the nearest centre's alone, of equal ones the
            first's. Margins, thresholds and weights act on that cosine. Not together with label_smoothing.
        reduction: "mean" over the rows that are not ignored (0 when there is none, or their weights sum to
            0), "sum", "none", or "batchmean": the sum divided by N, ignored rows and all.
        ignore_index: rows with this label count neither in the loss nor in the mean, and get no
            gradient, whatever they and the weight hold: NaN in them reaches nothing. None: there are none.
        eps: inside both norms, see ``normalize``.
        sample_weight: [N] factors of the rows' losses, without gradient. A row of weight 0 is an ignored one.
        class_weight: [C] factors of the classes, without gradient, as in ``F.cross_entropy``: the mean
            divides by the sum of sample_weight_i * class_weight_(y_i) over the rows that count.
        labels_b: [N] second labels, as mixup and cutmix make them, together with ``lam``: the loss is
            lam_i loss(x_i, labels_i) + (1 - lam_i) loss(x_i, labels_b_i). A label that is ignored takes its
            share along: the mean divides by the sum of the weights of what counts. One product serves both
            labels; hard negatives, a filter, sub-centres, a margin that is a function of the cosine, and
            small weights take two.
        lam: in [0, 1], a number or a tensor [] or [N] without gradient.
        label_smoothing: a in [0, 1): the target gets 1 - a, and a / C goes to every class, weighted by
            class_weight, as in ``F.cross_entropy``. 0 where other classes' logits are not s cos.
        return_statistics: also return the ``Statistics`` of the step, from the same sweep over the classes.
        workspace: bytes allowed beyond inputs and gradients; see ``normface_ext.plan``. Where they cannot be
            had, a smaller plan takes over, with a RuntimeWarning.
        check_finite: look for NaN and infinity first, in the rows that count, in the weight, in the
            scale and in sample_weight: one more reading of them, and on CUDA a wait of the host. Without it
            such a row makes the loss and the weight's gradient NaN; other rows' own gradients stay right.
        normalize_input: False leaves the features as long as they are: the logits are s |x_i| cos_ij, with
            s |x_i| psi for the label (SphereFace), and the gradient goes through the length too. The
            regular place for s is 1 then.

    Returns:
        A 0-d tensor, or [N] for "none": float64 for float64 input, float32 otherwise. The gradient of
        the weight is accumulated in float32 and has the weight's dtype. Third derivatives raise. With
        ``return_statistics`` (loss, Statistics).

    Raises:
        TypeError: dtypes, types.
        ValueError: shapes, devices, values; with ``check_finite`` rows that are not finite, by their numbers
            (RuntimeError without them in a compiled step).
        IndexError: a label out of range, naming the row (on CUDA the kernel prints the row and aborts,
            since a check here would stall the GPU).
    """
    op, statistics = "normface_loss", flag("normface_loss", "return_statistics", return_statistics)
    labelled = labels, scale, sample_weight, class_weight, HeadOptions.of(op, options), labels_b, lam
    return given_back(head_loss(op, x, weight, *labelled, statistics=statistics))


def head_loss(
    op: str,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: float | Tensor,
    sample_weight: Tensor | None,
    class_weight: Tensor | None,
    options: HeadOptions,
    labels_b: Tensor | None = None,
    lam: float | Tensor | None = None,
    *,
    statistics: bool,
) -> Found:
    """``normface_loss`` with options that have been checked."""
    if labels_b is not None or lam is not None:
        no_statistics(op, statistics)
        labelled = labels, labels_b, lam
        given, both = mixed_inputs(op, x, weight, labelled, scale, sample_weight, class_weight, options)
        if not options.normalize_input:
            given = given._replace(scale=_scale_of_rows(x, given, both.any_counts(), options.eps))

        def loss_of(margin: OfMargin) -> Tensor:
            return _of_both(op, x, weight, given, both, options, margin)

        return mixed_loss(op, x, weight, labels, given, both, options, loss_of), None
    inputs = checked_inputs(op, x, weight, labels, scale, sample_weight, class_weight, options)
    if not options.normalize_input:
        counts = counted(inputs.labels, inputs.sample_weight, options)
        inputs = inputs._replace(scale=_scale_of_rows(x, inputs, counts, options.eps))
    if isinstance(options.margin, BatchMargin):
        return _of_batch(op, x, weight, labels, inputs, options, options.margin, statistics)
    return _fused(op, x, weight, inputs, options, options.margin, statistics)


def _scale_of_rows(x: Tensor, inputs: HeadInputs, counts: Tensor, eps: float) -> Tensor:
    """s |x_i| [N] float64: the scales of cosines that make the logits those of features as they are."""
    scale = inputs.scale_value if inputs.scale is None else inputs.scale.double()
    return torch.where(counts, scale * norms_of(x, counts, eps), 0)


def _fused(
    op: str,
    x: Tensor,
    weight: Tensor,
    inputs: HeadInputs,
    options: HeadOptions,
    found: Margin | HardNegatives | None,
    statistics: bool,
) -> Found:
    straight = options.margin_gradient == "straight"
    target, term = told_apart(found, options, inputs.labels)
    margin, numbers = margin_arguments(op, target, inputs.labels, inputs.classes, straight)
    given = loss_options(
        inputs.scale_value,
        options,
        x,
        weight,
        x.shape[0],
        inputs.classes,
        numbers,
        term,
    )
    loss, told = ops.normface_loss(
        x,
        weight,
        inputs.scale,
        margin,
        inputs.places,
        inputs.sample_weight,
        inputs.class_weight,
        given,
        term.inputs,
        statistics=statistics,
    )
    return over_rows(loss, x.shape[0]) if options.reduction == "batchmean" else loss, told


def _of_margin(
    op: str,
    x: Tensor,
    weight: Tensor,
    inputs: HeadInputs,
    options: HeadOptions,
    margin: OfMargin,
    statistics: bool,
) -> Found:
    """With what a margin has said of the rows."""
    if margin is None or isinstance(margin, (Margin, HardNegatives)):
        return _fused(op, x, weight, inputs, options, margin, statistics)
    psi = straightened(margin) if options.margin_gradient == "straight" else margin
    return _of_psi(x, weight, inputs, psi, options, statistics)


#: Up to so many numbers in the weight a second product costs less than what one product has to tell apart:
#: some forty operations on [N] and [N, D]. Measured on the CPU with 64 rows; with more of them it is less.
SMALL = 1 << 16


def _of_both(
    op: str,
    x: Tensor,
    weight: Tensor,
    given: HeadInputs,
    both: BothLabels,
    options: HeadOptions,
    margin: OfMargin,
) -> Tensor:
    """Of rows with two labels, with what a margin has said. Where the margin changes the target alone, one
    product can serve both; where what other classes are depends on the label, each row is there twice."""
    scale, rows = given.scale, x.shape[0]
    apart = options.filter_threshold is not None or options.sub_centers > 1 or transforms.watched()
    if apart or weight.numel() <= SMALL or not (margin is None or isinstance(margin, Margin)):
        if scale is not None and scale.dim() == 1:
            given = given._replace(scale=scale.repeat(2))
        made, _ = _of_margin(op, twice(x, options.eps), weight, given, options, margin, False)
        return joined(made, options.reduction)
    tensors, numbers = margin_arguments(
        op, margin, both.labels, given.classes, options.margin_gradient == "straight"
    )
    told = loss_options(given.scale_value, options, x, weight, rows, given.classes, numbers)
    loss = mixed_op.mixed_loss(
        x, weight, scale, tensors, both.labels, both.counts, both.weight, given.class_weight, told
    )
    return over_rows(loss, rows) if options.reduction == "batchmean" else loss


def _of_batch(
    op: str,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    inputs: HeadInputs,
    options: HeadOptions,
    margin: BatchMargin,
    statistics: bool,
) -> Found:
    """With a margin that looks at the batch first."""
    rows = rows_of(op, x, inputs.labels, labels, inputs.sample_weight, options, margin)
    if margin.hard_negatives and margin.uses_cosines:
        rows = with_cosines(rows, x, weight, inputs.places, options)
    loss, told = _of_margin(op, x, weight, inputs, options, margin_of(op, margin, rows), statistics)
    more = regularizer_of(op, margin, rows)
    if more is None:
        return loss, told
    weights = rows_weight(rows, inputs.sample_weight)
    loss = loss + weighted(weighed(more, weights), weights.sum(), options.reduction).to(loss.dtype)
    return loss, told and with_more(told, torch.where(rows.counts, more.detach(), 0).sum())


@takes(PartsOptions)
def head_parts(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: float | Tensor,
    **options: Unpack[PartsKeywords],
) -> HeadParts:
    """The two numbers of a row that a softmax loss on cosines is made of, by the kernels of
    ``normface_loss``: c_y and ln sum_{j != y} exp(s c_j).

    ``softplus(log_sum_others - s psi(target_cosine))`` is the loss of any head that changes the target only,
    with psi a few lines of torch on [N]. Both are float64 and differentiable in x, weight and scale, so that
    1 - p = sigmoid(log_sum_others - s psi) keeps its digits; ``torch.logaddexp(t, 0)`` is the softplus that
    does.

    Args:
        x: [N, D] features.
        weight: [C, D], on x's device; float64 only together with float64.
        labels: [N] int64 or int32 in [0, C) or ``ignore_index``.
        sub_centers: as in ``normface_loss``; c_j is the largest of a class's.
        scale: s, as in ``normface_loss``.
        ignore_index: rows with this label do not count: both numbers are 0 and have no gradient, whatever
            the row holds. None: there are none.
        eps: inside both norms, see ``normalize``.
        workspace: as in ``normface_loss``.

    Returns:
        ``HeadParts(target_cosine [N], log_sum_others [N], counts [N])``, float64, float64 and bool: which
        rows count. log_sum_others is -inf, without gradient, where there is one class. Third derivatives
        raise.

    Raises:
        TypeError, ValueError, IndexError: as ``normface_loss``.
    """
    op = "head_parts"
    given = PartsOptions.of(op, options)
    made = parts(
        op,
        x,
        weight,
        labels,
        scale,
        None,
        None,
        HeadOptions(
            sub_centers=given.sub_centers,
            ignore_index=given.ignore_index,
            eps=given.eps,
            workspace=given.workspace,
        ),
    )
    return HeadParts(made.target_cosine, made.log_sum_others, made.counts)


class Parts(NamedTuple):
    """``HeadParts``, and what weights and label smoothing need besides: [N] and [], float64."""

    target_cosine: Tensor
    log_sum_others: Tensor
    counts: Tensor
    scale: float | Tensor
    row_weight: Tensor  # of the loss: the sample weight, 0 where the row does not count
    target_weight: Tensor  # the class weight of the label, without smoothing and class weights 1
    cosine_with_sum: Tensor | None  # <x_hat, sum_j u_j w_hat_j>, with smoothing
    weight_sum: Tensor | float  # sum u
    state: Tensor  # of the rows: engine.row_state.ROW_FIELDS


def parts(
    op: str,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: float | Tensor,
    sample_weight: Tensor | None,
    class_weight: Tensor | None,
    options: HeadOptions,
    *,
    need_largest: bool = False,
) -> Parts:
    """The parts of ``normface_loss`` with these options, whatever the margin; checks what it is given."""
    inputs = checked_inputs(op, x, weight, labels, scale, sample_weight, class_weight, options)
    return _parts(x, weight, inputs, options, need_largest=need_largest)


def _parts(
    x: Tensor, weight: Tensor, inputs: HeadInputs, options: HeadOptions, *, need_largest: bool
) -> Parts:
    term = told_apart(None, options, inputs.labels)[1]
    given = loss_options(inputs.scale_value, options, x, weight, x.shape[0], inputs.classes, term=term)
    cosine, log_sum, with_sum, state = parts_op(
        x,
        weight,
        inputs.scale,
        inputs.places,
        inputs.sample_weight,
        inputs.class_weight,
        given,
        term.inputs,
        need_largest=need_largest,
    )
    row_weight = state[row_state.ROW_WEIGHT]
    return Parts(
        cosine,
        log_sum,
        row_weight != 0,
        inputs.scale_value if inputs.scale is None else inputs.scale,
        row_weight,
        state[row_state.TARGET_WEIGHT],
        with_sum if options.label_smoothing > 0 else None,
        float(inputs.classes) if inputs.class_weight is None else inputs.class_weight.double().sum(),
        state,
    )


def loss_of_psi(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: float | Tensor,
    psi: Callable[[Tensor], Tensor],
    sample_weight: Tensor | None,
    class_weight: Tensor | None,
    options: HeadOptions,
    *,
    op: str = "normface_loss",
    statistics: bool = False,
) -> Found:
    """``normface_loss`` with options that have been checked, and with a psi made in torch instead of a
    margin: of the target cosines [N] (float64, with gradient; 0 where the row does not count)."""
    inputs = checked_inputs(op, x, weight, labels, scale, sample_weight, class_weight, options)
    return _of_psi(x, weight, inputs, psi, options, statistics)


def _of_psi(
    x: Tensor,
    weight: Tensor,
    inputs: HeadInputs,
    psi: Callable[[Tensor], Tensor],
    options: HeadOptions,
    statistics: bool,
) -> Found:
    made = _parts(x, weight, inputs, options, need_largest=statistics)
    of_target = psi(made.target_cosine)

    def loss_of_rows(
        row_weight: Tensor, target_weight: Tensor, reduction: str, smoothing: float = options.label_smoothing
    ) -> Tensor:
        return loss_of_parts(
            made.target_cosine,
            made.log_sum_others,
            of_target,
            made.scale,
            row_weight,
            target_weight,
            classes=inputs.classes,
            reduction=reduction,
            label_smoothing=smoothing,
            weight_sum=made.weight_sum,
            cosine_with_sum=made.cosine_with_sum,
        )

    loss = loss_of_rows(made.row_weight, made.target_weight, options.reduction)
    loss = loss if x.dtype == torch.float64 else loss.float()
    if not statistics:
        return loss, None
    with torch.no_grad():
        each = made.counts.double()
        losses = loss_of_rows(each, made.target_weight, "none")
        surprise = loss_of_rows(each, each, "none", 0.0)
        return loss, statistics_of(ops.means_of_losses(made.counts, losses, surprise, made.state, x.dtype))
