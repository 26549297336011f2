"""normalize and the cosine in torch's own operations, for graphs that are read without this package.

Every operation here has a counterpart in ONNX, and TorchScript can read the functions: hence ``torch.where``
instead of a branch, ``amax`` instead of ``frexp``, and plain types.
"""

import math
from typing import Final, Tuple, Union  # noqa: UP035  (what TorchScript reads)

import torch
from torch import Tensor, nn


def wide(x: Tensor) -> Tensor:
    """16-bit values compute in float32, the others in themselves."""
    return x.float() if x.dtype == torch.float16 or x.dtype == torch.bfloat16 else x


def unit(x: Tensor, dim: int, p: int, eps: float) -> Tuple[Tensor, Tensor]:  # noqa: UP006
    """(x / n, n), both in float32 at least: n = sqrt(sum x^2 + eps) for p = 2, sum |x| + eps for p = 1.

    Rows are divided by their largest entry first, a constant, so that no square overflows or vanishes."""
    x = wide(x)
    least = eps if p == 1 else math.sqrt(eps)
    largest = x.detach().abs().amax(dim, keepdim=True).clamp_min(least)
    size = torch.where((largest > 0) & (largest < math.inf), largest, 1.0)
    # A quotient of tensors: that of a number is a product with the inverse, which may overflow.
    scaled, floor = x / size, torch.full_like(size, least) / size
    if p == 1:
        norm = scaled.abs().sum(dim, keepdim=True) + floor
    else:
        norm = (scaled.square().sum(dim, keepdim=True) + floor.square()).sqrt()
    # Below this float32 may hold no eps, and a row of zeros has no norm.
    divisor = norm if least > 1e-30 else norm.masked_fill(norm == 0, 1.0)
    return scaled / divisor, norm * size


def normalize(x: Tensor, dim: int, p: int, eps: float) -> Tuple[Tensor, Tensor]:  # noqa: UP006
    """(y, n): dtypes as those of ``functional.normalize``."""
    y, norm = unit(x, dim, p, eps)
    return y.to(x.dtype), norm


def cosine(x: Tensor, weight: Tensor, normalize_input: bool, eps: float) -> Tensor:
    """[N, C], in float32 at least."""
    rows = unit(x, 1, 2, eps)[0] if normalize_input else wide(x)
    return rows @ unit(weight, 1, 2, eps)[0].t()


class PlainNormalize(nn.Module):
    """``NormalizeLayer``."""

    return_norm: Final[bool]

    def __init__(self, dim: int, p: int, eps: float, return_norm: bool) -> None:
        super().__init__()
        self.dim: int = dim
        self.p: int = p
        self.eps: float = eps
        self.return_norm = return_norm

    def forward(self, x: Tensor) -> Union[Tensor, Tuple[Tensor, Tensor]]:  # noqa: UP006, UP007
        y, norm = normalize(x, self.dim, self.p, self.eps)
        if self.return_norm:
            return y, norm
        return y

    def extra_repr(self) -> str:
        return f"dim={self.dim}, p={self.p}, eps={self.eps}, return_norm={self.return_norm}"


class PlainNormLinear(nn.Module):
    """``NormLinear``, with the scale a number; of a head's classes of several sub-centres the largest."""

    def __init__(
        self, weight: nn.Parameter, scale: float, normalize_input: bool, eps: float, sub_centers: int = 1
    ) -> None:
        super().__init__()
        self.weight: nn.Parameter = weight
        self.scale: float = scale
        self.normalize_input: bool = normalize_input
        self.eps: float = eps
        self.sub_centers = sub_centers

    def forward(self, x: Tensor) -> Tensor:
        scaled = (cosine(x, self.weight, self.normalize_input, self.eps) * self.scale).to(x.dtype)
        if self.sub_centers > 1:
            scaled = scaled.reshape(x.shape[0], -1, self.sub_centers).max(2)[0]
        return scaled

    def extra_repr(self) -> str:
        rows, features = self.weight.shape
        shown = f"scale={self.scale:g}, normalize_input={self.normalize_input}, eps={self.eps}"
        if self.sub_centers > 1:
            shown += f", sub_centers={self.sub_centers}"
        return f"{features}, {rows // self.sub_centers}, {shown}"
