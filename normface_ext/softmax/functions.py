"""The softmax head: defaults, checks and sentences. The kernels are behind ``ops``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..engine import sweep
from ..engine.mixing import BothLabels, joined, twice
from ..engine.options import takes
from ..engine.reduce import over_rows, weighted
from ..reference import HeadParts, loss_of_parts
from . import mixed_op, ops
from .arguments import HeadInputs, checked_inputs, loss_options, margin_arguments, mixed_inputs, told_apart
from .batch_margins import BatchMargin, margin_of, regularizer_of, rows_weight, straightened, weighed
from .hard_negatives import HardNegatives
from .margins import Margin
from .mixed import Found, mixed_loss
from .options import HeadKeywords, HeadOptions, PartsKeywords, PartsOptions
from .parts import head_parts as parts_op
from .rows import rows_of, with_cosines

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
    labels_b: Tensor | None = None,
    lam: float | Tensor | None = None,
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
        scale: s, a float, or a tensor with or without gradient: 0-d or [1], or [N], a scale per row. The
            learned scale of a head, ``head.scale``, is used within its bounds; a tensor computed from a
            learned scale is not bounded: use ``head.bounded_scale()``.
        margin: psi on the target cosine: ``CosFace``, ``ArcFace``, ``CombinedMargin``, ``RowMargin``, whose
            numbers may be tensors with gradient; one that looks at the batch first, ``AdaFace``, ``MagFace``,
            ``ElasticArcFace``, ``ElasticCosFace`` or a ``BatchMargin`` of yours; one that changes the logits
            of other classes as well, ``CurricularFace`` or ``MVSoftmax``; or ``None``.
        margin_gradient: "exact" differentiates psi. "straight" takes d psi / d cos as 1, as arcface_torch and
            CVLface do: psi is a constant shift of the cosine, and the margin's tensors get no gradient. What
            a margin makes of other classes has its own slopes in either case.
        filter_threshold: the logit of another class whose cosine is past it, in [-1, 1], is 0 and pushes
            nothing: it may be the same person under a second label (arcface_torch's inter-class filter;
            0.4 there). Not together with a margin that changes others' logits itself.
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
            labels; hard negatives, a filter, and a margin that is a function of the cosine take two.
        lam: in [0, 1], a number or a tensor [] or [N] without gradient.
        label_smoothing: a in [0, 1): the target gets 1 - a, and a / C goes to every class, weighted by
            class_weight, as in ``F.cross_entropy``. 0 where other classes' logits are not s cos.
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
    chosen = HeadOptions.of(op, options)
    return head_loss(op, x, weight, labels, scale, sample_weight, class_weight, chosen, labels_b, lam)


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
) -> Tensor:
    """``normface_loss`` with options that have been checked."""
    if labels_b is not None or lam is not None:
        labelled = labels, labels_b, lam
        given, both = mixed_inputs(op, x, weight, labelled, scale, sample_weight, class_weight, options)
        return mixed_loss(op, x, weight, labels, given, both, options, _of_both)
    inputs = checked_inputs(op, x, weight, labels, scale, sample_weight, class_weight, options)
    if isinstance(options.margin, BatchMargin):
        return _of_batch(op, x, weight, labels, inputs, options, options.margin)
    return _fused(op, x, weight, inputs, options, options.margin)


def _fused(
    op: str,
    x: Tensor,
    weight: Tensor,
    inputs: HeadInputs,
    options: HeadOptions,
    found: Margin | HardNegatives | None,
) -> Tensor:
    straight = options.margin_gradient == "straight"
    target, term = told_apart(found, options, inputs.labels)
    margin, numbers = margin_arguments(op, target, inputs.labels, weight.shape[0], straight)
    given = loss_options(
        inputs.scale_value,
        options,
        x,
        weight,
        x.shape[0],
        weight.shape[0],
        numbers,
        term,
    )
    loss = ops.normface_loss(
        x,
        weight,
        inputs.scale,
        margin,
        inputs.labels,
        inputs.sample_weight,
        inputs.class_weight,
        given,
        term.inputs,
    )
    return over_rows(loss, x.shape[0]) if options.reduction == "batchmean" else loss


def _of_found(
    op: str,
    x: Tensor,
    weight: Tensor,
    inputs: HeadInputs,
    options: HeadOptions,
    found: Found,
) -> Tensor:
    """With what a margin has said of the rows."""
    if found is None or isinstance(found, (Margin, HardNegatives)):
        return _fused(op, x, weight, inputs, options, found)
    psi = straightened(found) if options.margin_gradient == "straight" else found
    scale = inputs.scale_value if inputs.scale is None else inputs.scale
    given = inputs.labels, scale, psi, inputs.sample_weight, inputs.class_weight
    return loss_of_psi(x, weight, *given, options, op=op)


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
    found: Found,
) -> Tensor:
    """Of rows with two labels, with what a margin has said. Where the margin changes the target alone, one
    product can serve both; where what other classes are depends on the label, each row is there twice."""
    scale, straight = given.scale, options.margin_gradient == "straight"
    rows, (classes, dim) = x.shape[0], weight.shape
    hard = options.filter_threshold is not None or not (found is None or isinstance(found, Margin))
    if hard or classes * dim <= SMALL:
        if scale is not None and scale.dim() == 1:
            given = given._replace(scale=scale.repeat(2))
        made = _of_found(op, twice(x, options.eps), weight, given, options, found)
        return joined(made, options.reduction)
    assert found is None or isinstance(found, Margin)
    margin, numbers = margin_arguments(op, found, both.labels, classes, straight)
    told = loss_options(given.scale_value, options, x, weight, rows, classes, numbers)
    loss = mixed_op.mixed_loss(
        x, weight, scale, margin, both.labels, both.counts, both.weight, given.class_weight, told
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
) -> Tensor:
    """With a margin that looks at the batch first."""
    rows = rows_of(op, x, inputs.labels, labels, inputs.sample_weight, options, margin)
    if margin.hard_negatives:
        rows = with_cosines(rows, x, weight, inputs.labels, options)
    loss = _of_found(op, x, weight, inputs, options, margin_of(op, margin, rows))
    more = regularizer_of(op, margin, rows)
    if more is None:
        return loss
    weights = rows_weight(rows, inputs.sample_weight)
    return loss + weighted(weighed(more, weights), weights.sum(), options.reduction).to(loss.dtype)


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
        scale: s, as in ``normface_loss``.
        ignore_index: rows with this label do not count: both numbers are 0 and have no gradient, whatever
            the row holds. None: there are none.
        eps: inside both norms, see ``normalize``.
        workspace: as in ``normface_loss``.

    Returns:
        ``HeadParts(target_cosine [N], log_sum_others [N], counts [N])``, float64, float64 and bool: which
        rows count. log_sum_others is -inf, without gradient, where there is one class. Second derivatives
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
        HeadOptions(ignore_index=given.ignore_index, eps=given.eps, workspace=given.workspace),
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


def parts(
    op: str,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: float | Tensor,
    sample_weight: Tensor | None,
    class_weight: Tensor | None,
    options: HeadOptions,
) -> Parts:
    """The parts of ``normface_loss`` with these options, whatever the margin; checks what it is given."""
    inputs = checked_inputs(op, x, weight, labels, scale, sample_weight, class_weight, options)
    classes = weight.shape[0]
    term = told_apart(None, options, inputs.labels)[1]
    given = loss_options(inputs.scale_value, options, x, weight, x.shape[0], classes, term=term)
    cosine, log_sum, with_sum, state = parts_op(
        x, weight, inputs.scale, inputs.labels, inputs.sample_weight, inputs.class_weight, given, term.inputs
    )
    row_weight = state[sweep.ROW_WEIGHT]
    return Parts(
        cosine,
        log_sum,
        row_weight != 0,
        inputs.scale_value if inputs.scale is None else inputs.scale,
        row_weight,
        state[sweep.TARGET_WEIGHT],
        with_sum if options.label_smoothing > 0 else None,
        float(classes) if inputs.class_weight is None else inputs.class_weight.double().sum(),
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
) -> Tensor:
    """``normface_loss`` with options that have been checked, and with a psi made in torch instead of a
    margin: of the target cosines [N] (float64, with gradient; 0 where the row does not count)."""
    made = parts(op, x, weight, labels, scale, sample_weight, class_weight, options)
    loss = loss_of_parts(
        made.target_cosine,
        made.log_sum_others,
        psi(made.target_cosine),
        made.scale,
        made.row_weight,
        made.target_weight,
        classes=weight.shape[0],
        reduction=options.reduction,
        label_smoothing=options.label_smoothing,
        weight_sum=made.weight_sum,
        cosine_with_sum=made.cosine_with_sum,
    )
    return loss if x.dtype == torch.float64 else loss.float()
