"""normalize and norm_linear: defaults, checks and sentences. The kernels are behind ``ops``."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor
from torch.fx import Proxy

from ..engine import checks, graphs
from ..engine.arguments import flag, integer
from ..engine.dtypes import autocast, full_precision
from ..engine.options import takes
from . import ops, plain
from .options import LinearKeywords, LinearOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


@overload
def normalize(
    x: Tensor, dim: int = 1, p: int = 2, eps: float = 1e-12, return_norm: Literal[False] = False
) -> Tensor: ...
@overload
def normalize(
    x: Tensor, dim: int = 1, p: int = 2, eps: float = 1e-12, *, return_norm: Literal[True]
) -> tuple[Tensor, Tensor]: ...
@graphs.refuse_scripting
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
    if isinstance(x, Proxy):
        return graphs.recorded(normalize, x, dim=dim, p=p, eps=eps, return_norm=return_norm)
    checks.floating(op, "x", x)
    p = checks.exponent(op, "p", p)
    if x.dim() == 0:
        raise ValueError(f"{op}: expected `x` to have at least one dimension, got a 0-d tensor")
    dim = integer(op, "dim", dim)
    if not -x.dim() <= dim < x.dim():
        raise IndexError(f"{op}: expected `dim` in [{-x.dim()}, {x.dim()}), got {dim}")
    eps = checks.eps(op, "eps", eps)
    both = flag(op, "return_norm", return_norm)
    dim %= x.dim()
    if graphs.leaving():
        y, norm = plain.normalize(x, dim, p, eps)
    else:
        y, norm = ops.normalize(ops.as_rows(x, dim), dim, p, eps)
    return (y, norm) if both else y


@graphs.refuse_scripting
@takes(LinearOptions)
def norm_linear(
    x: Tensor, weight: Tensor, scale: float | Tensor = 1.0, **options: Unpack[LinearKeywords]
) -> Tensor:
    """out_ij = s * <x_i, w_j> / (||x_i|| ||w_j||), the scaled cosine (paper section 3.2).

    Gradients flow to x, weight and scale, through both normalisations ("soft" normalisation). For the
    loss alone use ``normface_loss``, which never builds this N x C matrix.

    Args:
        x: [N, D].
        weight: [C, D], on x's device; float64 only together with float64.
        scale: s, a float or a tensor of one element (with or without gradient). The learned scale of a layer,
            ``head.scale``, is used within its bounds; a tensor computed from a learned scale is not bounded:
            use ``head.bounded_scale()``.
        normalize_input: ``False`` leaves x as it is: out = s <x_i, w_j> / ||w_j||.
        eps: inside both norms, see ``normalize``.

    Returns:
        [N, C] in x's dtype; under autocast in the autocast dtype, as ``F.linear`` (float64 stays).

    Raises:
        TypeError: dtypes, types.
        ValueError: shapes, devices, scale or eps that is not finite.
    """
    if isinstance(x, Proxy):
        return graphs.recorded(norm_linear, x, weight, scale, **options)
    return scaled_cosine("norm_linear", x, weight, scale, LinearOptions.of("norm_linear", options))


def scaled_cosine(
    op: str, x: Tensor, weight: Tensor, scale: float | Tensor, options: LinearOptions
) -> Tensor:
    """``norm_linear`` with options that have been checked."""
    checks.features_and_weight(op, x, weight)
    scale_tensor, scale_value = checks.scale(op, scale, x)
    x, normalize_input, eps = autocast(x), options.normalize_input, options.eps
    if graphs.leaving():
        cosine = plain_cosine(x, weight, normalize_input, eps)
        return (cosine * (scale_value if scale_tensor is None else scale_tensor)).to(x.dtype)
    return ops.norm_linear(x, weight, scale_tensor, scale_value, normalize_input, eps)


def plain_cosine(x: Tensor, weight: Tensor, normalize_input: bool, eps: float) -> Tensor:
    """The cosines [N, C] for a graph that leaves, in float32 at least; of arguments that were checked."""
    # Where there is no autocast the graph is not to hear of it.
    with full_precision(x) if torch.is_autocast_enabled(x.device.type) else nullcontext():
        return plain.cosine(x, weight, normalize_input, eps)
