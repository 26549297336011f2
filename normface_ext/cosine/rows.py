"""Rows of a weight on the unit sphere: drawn there, or moved there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

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
        weight = _own_rows(weight, owner)
        finite = torch.isfinite(weight).all(dim=1, keepdim=True)
        if checks.readable(weight) and not finite.all():
            row = int((~finite).nonzero()[0, 0])
            raise ValueError(f"{owner}: expected finite weights, got row {row} that is not")
        return weight.copy_(torch.where(finite, normalize(weight, dim=1, eps=eps), weight))


def _own_rows(weight: Any, owner: str) -> Tensor:
    """Of a DTensor, as fully_shard makes one, what this rank has of it: whole rows."""
    if checks.is_dtensor(weight):
        if not all(placed.is_replicate() or placed.is_shard(0) for placed in weight.placements):
            raise ValueError(f"{owner}: expected `weight` to have whole rows here, got {weight.placements}")
        weight = weight.to_local()
    own: Tensor = weight
    return own


def draw_weight_(layer: nn.Module) -> None:
    """Draws a layer's weight, uniform on the unit sphere. A parametrization may make something else of it."""
    _overwrite_(layer, gaussian_unitball_, type(layer).__name__)


def renormalize_weight_(layer: nn.Module, eps: float, owner: str) -> None:
    """Overwrites a layer's weight by its unit rows. ValueError, with nothing changed, where it cannot have
    such."""

    def unit_(weight: Tensor) -> Tensor:
        return unit_rows_(weight, eps, owner)

    before = _overwrite_(layer, unit_, owner)
    made: Any = layer.weight
    if before is None or not checks.has_values(made):
        return
    made = made.detach()
    if not torch.allclose(made, unit_(made.clone()), rtol=0.0, atol=32 * torch.finfo(made.dtype).eps):
        _parametrizations(layer).load_state_dict(before)
        raise ValueError(f"{owner}: expected a parametrization of `weight` that gives unit rows, got another")


def _parametrizations(layer: nn.Module) -> Any:
    held: Any = layer.parametrizations
    return held["weight"]


def _overwrite_(
    layer: nn.Module, change_: Callable[[Tensor], Tensor], owner: str
) -> dict[str, Tensor] | None:
    """Changes a layer's weight in place. A parametrized one is assigned, since a change of what it gives out
    would be lost; the state that the parametrization had is returned."""
    own = layer._parameters.get("weight")
    if own is not None:
        change_(own)
        return None
    if not parametrize.is_parametrized(layer, "weight"):
        raise ValueError(
            f"{owner}: expected `weight` to be a parameter of the layer, got one that is made of others, as"
            " torch.nn.utils.weight_norm, spectral_norm and prune do; what"
            " torch.nn.utils.parametrizations.weight_norm makes can be set"
        )
    held = _parametrizations(layer)
    if not all(hasattr(each, "right_inverse") for each in held):
        raise ValueError(
            f"{owner}: expected the parametrization of `weight` to have a right_inverse, got one without"
        )
    before = {name: value.clone() for name, value in held.state_dict().items()}
    made: Any = layer.weight
    with torch.no_grad():
        layer.weight = change_(made.clone())
    return before
