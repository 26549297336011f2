"""What users call: defaults, checks and sentences. The kernels are behind ``ops``.

Every function takes float64, float32, float16 or bfloat16 and accumulates in at least float32
(float64 for float64). Bad input raises ValueError (shapes, values), TypeError (types, dtypes) or
IndexError (labels) with a sentence "op: expected `argument` to ..., got ...".
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from . import _checks, ops
from ._arguments import flag, integer
from ._metric_functional import (
    c_contrastive_loss,
    c_triplet_loss,
    inner_distance,
    pair_contrastive_loss,
    triplet_loss,
)
from .margins import Margin
from .plan import plan

__all__ = [
    "c_contrastive_loss",
    "c_triplet_loss",
    "inner_distance",
    "norm_linear",
    "normalize",
    "normface_loss",
    "pair_contrastive_loss",
    "triplet_loss",
]


@overload
def normalize(
    x: Tensor, dim: int = 1, p: int = 2, eps: float = 1e-12, return_norm: Literal[False] = False
) -> Tensor: ...
@overload
def normalize(
    x: Tensor, dim: int = 1, p: int = 2, eps: float = 1e-12, *, return_norm: Literal[True]
) -> tuple[Tensor, Tensor]: ...
def normalize(
    x: Tensor, dim: int = 1, p: int = 2, eps: float = 1e-12, return_norm: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """y = x / n along ``dim``: n = sqrt(sum x^2 + eps) for p = 2, n = sum |x| + eps for p = 1.

    ``eps`` sits inside, as in NormFace (section 3.1; Caffe ``Normalize`` layer), unlike
    ``torch.nn.functional.normalize``, which clamps. A zero row gives y = 0 and the finite gradient
    g / n(0); in float16, where that may have no value, it saturates at +-65504. With eps = 0 it still gives
    y = 0, and its own gradient is infinite where g is not 0. Rows of any magnitude, denormal ones too, keep
    their direction: nothing overflows on the way. Differentiable any number of times; the first gradient is
    the same with ``create_graph`` and without.

    Args:
        x: any shape; rows (``dim`` last) and the channel axis of NCHW, contiguous or channels_last, are
            read as they lie, other layouts are copied first.
        dim: the axis to normalise.
        p: 1 or 2.
        eps: at least 0.
        return_norm: also return n.

    Returns:
        y, of x's shape, dtype and memory format; with ``return_norm`` also n, of x's shape with ``dim``
        of size 1, in float32 for 16-bit x (a float16 norm would overflow at 65504) and in x's dtype
        otherwise. Its gradient flows too (Caffe: ``bp_norm``).

    Raises:
        TypeError: x is not a floating tensor; dim, eps or return_norm of another type.
        ValueError: p, eps.
        IndexError: dim out of range.
    """
    op = "normalize"
    _checks.floating(op, "x", x)
    p = _checks.exponent(op, p)
    if x.dim() == 0:
        raise ValueError(f"{op}: expected `x` to have at least one dimension, got a 0-d tensor")
    dim = integer(op, "dim", dim)
    if not -x.dim() <= dim < x.dim():
        raise IndexError(f"{op}: expected `dim` in [{-x.dim()}, {x.dim()}), got {dim}")
    eps = _checks.eps(op, eps)
    both = flag(op, "return_norm", return_norm)
    y, norm = ops.normalize(ops.as_rows(x, dim % x.dim()), dim % x.dim(), p, eps)
    return (y, norm) if both else y


def norm_linear(
    x: Tensor,
    weight: Tensor,
    scale: float | Tensor = 1.0,
    eps: float = 1e-12,
    *,
    normalize_input: bool = True,
) -> Tensor:
    """out_ij = s * <x_i, w_j> / (||x_i|| ||w_j||), the scaled cosine (paper section 3.2).

    Gradients flow to x, weight and scale, through both normalisations ("soft" normalisation). For the
    loss alone use ``normface_loss``, which never builds this N x C matrix.

    Args:
        x: [N, D].
        weight: [C, D], on x's device; float64 only together with float64.
        scale: s, a float or a 0-d tensor (with or without gradient).
        eps: inside both norms, see ``normalize``.
        normalize_input: ``False`` leaves x as it is: out = s <x_i, w_j> / ||w_j||.

    Returns:
        [N, C] in x's dtype.

    Raises:
        TypeError: dtypes, types.
        ValueError: shapes, devices, scale or eps that is not finite.
    """
    op = "norm_linear"
    _checks.features_and_weight(op, x, weight)
    scale_tensor, scale_value = _checks.scale(op, scale, x)
    eps = _checks.eps(op, eps)
    normalize_input = flag(op, "normalize_input", normalize_input)
    return ops.norm_linear(x, weight, scale_tensor, scale_value, normalize_input, eps)


def normface_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: float | Tensor,
    *,
    margin: Margin | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    eps: float = 1e-12,
    sample_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    workspace: int | None = None,
    check_finite: bool = False,
) -> Tensor:
    """loss_i = -log softmax_j(s psi(cos_ij))[y_i], fused: no N x C matrix beyond the workspace budget.

    Equals ``F.cross_entropy(s * F.linear(F.normalize(x), F.normalize(weight)), labels)`` up to the
    place of eps (paper section 3.2; Caffe Normalize + InnerProduct + Scale + SoftmaxWithLoss), at any
    scale and for cosines anywhere in [-1, 1], with the target column kept apart in float64 so that
    neither 1 - p nor a margin loses digits. Runs are bit-identical from one to the next.

    Args:
        x: [N, D] features.
        weight: [C, D], on x's device; float64 only together with float64.
        labels: [N] int64 in [0, C) or ``ignore_index``.
        scale: s, a float or a 0-d tensor with or without gradient.
        margin: psi on the target cosine: ``CosFace``, ``ArcFace``, ``CombinedMargin`` or ``None``.
        reduction: "mean" over the rows that are not ignored (0 when there is none, or their weights sum to
            0), "sum" or "none".
        ignore_index: rows with this label count neither in the loss nor in the mean, and get no
            gradient, whatever they and the weight hold: NaN in them reaches nothing.
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
    _checks.features_and_weight(op, x, weight)
    classes, dim = weight.shape
    ignore_index = _checks.ignore_index(op, ignore_index)
    _checks.labels(op, labels, x, classes, ignore_index)
    scale_tensor, scale_value = _checks.scale(op, scale, x)
    code = _checks.reduction(op, reduction)
    eps = _checks.eps(op, eps)
    workspace = _checks.workspace(op, workspace)
    row_weight = _checks.weights(op, "sample_weight", sample_weight, x, x.shape[0])
    if flag(op, "check_finite", check_finite):
        _checks.finite_operands(op, x, weight, labels != ignore_index, scale_tensor, row_weight)
    operand = operand_dtype(x, weight)
    options = ops.LossOptions(
        scale_value=scale_value,
        margin=_checks.margin(op, margin),
        reduction=code,
        ignore_index=ignore_index,
        eps=eps,
        smoothing=_checks.smoothing(op, label_smoothing),
        plan=plan(x.shape[0], dim, classes, operand, ops.plan_device(x), workspace=workspace),
        operand=operand,
        classes_in_all=classes,
    )
    return ops.normface_loss(
        x,
        weight,
        scale_tensor,
        labels,
        row_weight,
        _checks.weights(op, "class_weight", class_weight, x, classes),
        options,
    )


def operand_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """dtype of the matrix products' operands: the autocast dtype on CUDA inside autocast, else the
    narrower of the two inputs'. CPU kernels widen 16-bit operands to float32 whatever this says."""
    if x.is_cuda and x.dtype != torch.float64 and torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda")
    return x.dtype if x.dtype.itemsize <= weight.dtype.itemsize else weight.dtype
