"""Layers of the cosine: parameters and state only; every formula is in ``functions``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..engine.arguments import size
from ..engine.options import HoldsOptions, holds, takes
from ..engine.scale import MIN_SCALE
from . import functions
from .head import ScaledHead
from .options import LinearKeywords, LinearOptions, NormalizeOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


@holds(NormalizeOptions)
class NormalizeLayer(HoldsOptions):
    """Normalises along one axis: y = x / n (Caffe ``Normalize``; paper section 3.1).

    Args are those of ``functional.normalize``; so are shapes, dtypes and errors.
    """

    options: NormalizeOptions

    def __init__(self, dim: int = 1, p: int = 2, eps: float = 1e-12, return_norm: bool = False) -> None:
        super().__init__()
        given = {"dim": dim, "p": p, "eps": eps, "return_norm": return_norm}
        self.keep_options(NormalizeOptions.of(type(self).__name__, given))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        chosen = self.options
        if chosen.return_norm:
            return functions.normalize(x, chosen.dim, chosen.p, chosen.eps, return_norm=True)
        return functions.normalize(x, chosen.dim, chosen.p, chosen.eps)

    def extra_repr(self) -> str:
        return ", ".join(self.options.shown())


@holds(LinearOptions)
class NormLinear(HoldsOptions, ScaledHead):
    """s * cos(x, w_j) for every class: [N, in_features] -> [N, out_features], no bias.

    Caffe's Normalize + InnerProduct + Scale with the gradient through both norms (paper section 3.2).

    Args:
        in_features: D.
        out_features: C; the weight is [C, D], rows uniform on the unit sphere.
        scale: s, a number or a tensor of one; ``learn_scale`` makes it a parameter [1], used within
            [min_scale, max_scale]. ``layer.scale = 30.0`` sets either.
        normalize_input: ``False`` normalises the weight only.
        eps: inside both norms.
        device, dtype: of the parameters.

    Under autocast the output has the autocast dtype, as that of ``nn.Linear``. A fixed scale is saved in the
    ``state_dict`` and restored from it; where it replaces another, a UserWarning says so.

    Raises:
        TypeError, ValueError: an argument, here or when it is set as an attribute.
    """

    options: LinearOptions

    @takes(LinearOptions)
    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        scale: float | Tensor = 1.0,
        learn_scale: bool = False,
        min_scale: float = MIN_SCALE,
        max_scale: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[LinearKeywords],
    ) -> None:
        owner = type(self).__name__
        in_features = size(owner, "in_features", in_features)
        out_features = size(owner, "out_features", out_features)
        chosen = LinearOptions.of(owner, options)
        super().__init__(out_features, in_features, scale, learn_scale, min_scale, max_scale, device, dtype)
        self.in_features: int = in_features
        self.out_features: int = out_features
        self.keep_options(chosen)

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled_cosine(x)

    def linear_options(self) -> LinearOptions:
        return self.options

    def extra_repr(self) -> str:
        sizes = [str(self.in_features), str(self.out_features)]
        return ", ".join(sizes + self.scale_repr() + self.options.shown())
