"""Rows of a weight on the unit sphere: drawn there, or moved there."""

from __future__ import annotations

import torch
from torch import Tensor

from ..engine import checks
from .functions import normalize


def gaussian_unitball_(
    weight: Tensor, eps: float = 1e-12, generator: torch.Generator | None = None
) -> Tensor:
    """Rows drawn from N(0, 1) and divided by sqrt(sum w^2 + eps): uniform on the unit sphere.

    In place. Caffe's ``gaussian_unitball`` filler.
    """
    with torch.no_grad():  # by torch's own ops, which know what a DTensor's rows are
        weight.normal_(generator=generator)
        wide = torch.promote_types(weight.dtype, torch.float32)
        squares = torch.linalg.vector_norm(weight, dim=1, keepdim=True, dtype=wide).square()
        return weight.div_((squares + eps).sqrt())


def unit_rows_(weight: Tensor, eps: float, owner: str) -> Tensor:
    """Divides the rows by sqrt(sum w^2 + eps), in place and outside autograd; a zero row stays zero.

    A row with NaN or infinity raises ValueError on the CPU, with nothing changed, and stays as it is on
    CUDA, where looking would stall the GPU at every step.
    """
    with torch.no_grad():
        finite = torch.isfinite(weight).all(dim=1, keepdim=True)
        if checks.readable(weight) and not finite.all():
            row = int((~finite).nonzero()[0, 0])
            raise ValueError(f"{owner}: expected finite weights, got row {row} that is not")
        return weight.copy_(torch.where(finite, normalize(weight, dim=1, eps=eps), weight))
