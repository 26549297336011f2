"""The distances in plain torch: what their second derivatives are made of."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..engine.autograd import Again, Given, by_formula, no_third_derivative
from ..engine.dtypes import accumulator

#: Bytes of the differences x_i - w_j that are looked at at once, p = 1.
_DIFFERENCES = 1 << 26


def inner_distance_again(labels: Tensor | None, p: int) -> Again:
    """For the inputs (the gradient of the distances [N, C], x, weight)."""
    return _manhattan(labels) if p == 1 else by_formula(partial(_euclidean, labels))


def _own(grad: Tensor, labels: Tensor | None) -> Tensor:
    """The cells that the weight's gradient counts."""
    if labels is None:
        return grad
    columns = torch.arange(grad.shape[1], device=grad.device)
    return torch.where(labels[:, None] == columns, grad, 0)


def _euclidean(labels: Tensor | None, grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """dx_i = 2 sum_j g_ij (x_i - w_j) and dw_j = 2 sum_i g_ij (w_j - x_i), in float64, where less is lost as
    they cancel. With labels the other cells' w_j are constants."""
    g, a, b = grad.double(), x.double(), weight.double()
    own = _own(g, labels)
    towards = g @ b if labels is None else own @ b + (g - own) @ b.detach()
    dx = 2 * (a * g.sum(1, keepdim=True) - towards)
    dw = 2 * (b * own.sum(0)[:, None] - own.t() @ a)
    return dx.to(x.dtype), dw.to(weight.dtype)


def _manhattan(labels: Tensor | None) -> Again:
    """dx_i = sum_j g_ij sign(x_i - w_j), whose slopes in x and weight are 0."""

    def again(inputs: Given, along: Given, needed: tuple[bool, ...]) -> Given:
        grad, x, weight = inputs
        assert grad is not None and x is not None and weight is not None
        with torch.no_grad():
            given = _of_signs(grad, x, weight, along, labels) if needed[0] else None
            flat = (
                torch.zeros_like(t) if need else None for t, need in zip((x, weight), needed[1:], strict=True)
            )
        return no_third_derivative("inner_distance", (given, *flat), *inputs, *along)

    return again


def _of_signs(grad: Tensor, x: Tensor, weight: Tensor, along: Given, labels: Tensor | None) -> Tensor:
    (batch, dim), wide = x.shape, accumulator(x.dtype)
    of_x, of_weight = along
    found = torch.zeros_like(grad, dtype=wide)
    width = max(1, _DIFFERENCES // max(1, batch * dim * wide.itemsize))
    for classes in torch.arange(len(weight), device=x.device).split(width):
        signs = (x.to(wide)[:, None] - weight[classes].to(wide)).sign_()
        if of_x is not None:
            found[:, classes] += torch.einsum("nd,ncd->nc", of_x.to(wide), signs)
        if of_weight is not None:
            cells = torch.einsum("cd,ncd->nc", of_weight[classes].to(wide), signs)
            kept = cells if labels is None else torch.where(labels[:, None] == classes, cells, 0)
            found[:, classes] -= kept
    return found.to(grad.dtype)


def pair_distance(a: Tensor, b: Tensor, p: int) -> Tensor:
    wide = accumulator(a.dtype)
    difference = a.to(wide) - b.to(wide)
    return (difference.square() if p == 2 else difference.abs()).sum(1)


def pair_distance_again(p: int) -> Again:
    """For the inputs (the gradient of the distances [N], a, b)."""

    def formula(grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        wide = accumulator(a.dtype)
        difference = a.to(wide) - b.to(wide)
        slope = grad[:, None] * (2 * difference if p == 2 else difference.sign())
        return slope.to(a.dtype), (-slope).to(b.dtype)

    return by_formula(formula)
