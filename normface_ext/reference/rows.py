"""Rows made unit, and cosines."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def widened(x: Tensor) -> Tensor:
    """16-bit values compute in float32, the others in themselves."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def norm_of(x: Tensor, dim: int, p: int, eps: float | Tensor) -> Tensor:
    if p == 1:
        return x.abs().sum(dim, keepdim=True) + eps
    return (x.square().sum(dim, keepdim=True) + eps).sqrt()


def _magnitude(x: Tensor, dim: int, p: int, eps: float) -> Tensor:
    """A power of two at the largest entry of each row (or at eps), a constant: the square of what is divided
    by it neither overflows nor vanishes, and no digit changes."""
    x = x.detach()
    if x.shape[dim] == 0:
        return x.new_ones(x.sum(dim, keepdim=True).shape)
    largest = x.abs().amax(dim, keepdim=True).clamp_min(eps if p == 1 else math.sqrt(eps))
    mantissa, _ = torch.frexp(largest)
    return torch.where(largest.isfinite() & (largest > 0), largest / (2 * mantissa), 1)


def unit_of(x: Tensor, dim: int, p: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y = x / n, n / m, m) with n = sqrt(sum x^2 + eps) or sum |x| + eps and the rows' magnitudes m."""
    size = _magnitude(x, dim, p, eps)
    scaled = x / size
    if p == 1:  # |x| by x's own sign, which an entry that vanishes beside the largest still has
        norm = (scaled * x.detach().sign()).sum(dim, keepdim=True) + eps / size
    else:
        norm = norm_of(scaled, dim, p, eps / size / size)
    return scaled / norm, norm, size


def normalize(
    x: Tensor, dim: int = 1, p: int = 2, eps: float = 1e-12, return_norm: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """y = x / n with n = sqrt(sum x^2 + eps) for p = 2, sum |x| + eps for p = 1 (paper section 3.1)."""
    unit, norm, size = unit_of(widened(x), dim, p, eps)
    y = unit.to(x.dtype)
    return (y, norm * size) if return_norm else y


def normalize_backward(
    grad_y: Tensor | None, grad_norm: Tensor | None, x: Tensor, dim: int, p: int, eps: float
) -> Tensor:
    """dx = (g - slope <y, g>) / n + g_n slope, slope = dn/dx: y for p = 2, sign(x) for p = 1."""
    wide = widened(x)
    y, norm, size = unit_of(wide, dim, p, eps)
    slope = y if p == 2 else wide.sign()
    dx = torch.zeros_like(wide)
    if grad_y is not None:
        g = widened(grad_y)
        dx = dx + (g - slope * (y * g).sum(dim, keepdim=True)) / norm / size
    if grad_norm is not None:
        dx = dx + grad_norm * slope
    return dx.to(x.dtype)


def cosine(x: Tensor, weight: Tensor, eps: float = 1e-12, normalize_input: bool = True) -> Tensor:
    """c_ij = <x_i, w_j> / (||x_i|| ||w_j||), [N, C]."""
    x, weight = widened(x), widened(weight)
    if normalize_input:
        x = unit_of(x, 1, 2, eps)[0]
    return x @ unit_of(weight, 1, 2, eps)[0].t()


def pooled_cosines(cosines: Tensor, sub_centers: int) -> Tensor:
    """Of a class the nearest of its centres, of equal ones the first: [N, C K] -> [N, C]."""
    by_class: Tensor = cosines.unflatten(1, (-1, sub_centers))
    return by_class.max(2).values


def column_of(scale: float | Tensor) -> float | Tensor:
    """A scale of every row, as a column."""
    return scale[:, None] if isinstance(scale, Tensor) and scale.dim() == 1 else scale


def norm_linear(
    x: Tensor,
    weight: Tensor,
    scale: float | Tensor = 1.0,
    *,
    normalize_input: bool = True,
    eps: float = 1e-12,
) -> Tensor:
    """s * cos, [N, C], in x's dtype."""
    return (scale * cosine(x, weight, eps, normalize_input)).to(x.dtype)


def norm_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, eps: float, normalize_input: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``norm_linear`` with respect to x, weight and scale, written out."""
    grad, wide_x, wide_w = widened(grad), widened(x), widened(weight)
    one = torch.ones_like(wide_x[:, :1])
    x_hat, norm_x, size_x = unit_of(wide_x, 1, 2, eps) if normalize_input else (wide_x, one, one)
    w_hat, norm_w, size_w = unit_of(wide_w, 1, 2, eps)
    dx, dw_hat = scale * (grad @ w_hat), scale * (grad.t() @ x_hat)
    if normalize_input:
        dx = (dx - x_hat * (x_hat * dx).sum(1, keepdim=True)) / norm_x / size_x
    dw = (dw_hat - w_hat * (w_hat * dw_hat).sum(1, keepdim=True)) / norm_w / size_w
    dscale = (grad * (x_hat @ w_hat.t())).sum()
    return dx.to(x.dtype), dw.to(weight.dtype), dscale.to(scale.dtype)
