"""Layers of the cosine: parameters and state only; every formula is in ``functions``."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..engine import checks
from ..engine.arguments import POSITIVE, flag, integer, number, size
from . import functions
from .rows import gaussian_unitball_, unit_rows_


class ScaledHead(nn.Module):
    """A weight [classes, features] and a scale s, fixed (a float) or learned (a 0-d parameter)."""

    weight: nn.Parameter
    scale: float | nn.Parameter
    eps: float

    def __init__(
        self,
        classes: int,
        features: int,
        scale: float,
        learn_scale: bool,
        min_scale: float,
        max_scale: float | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        scale = number(owner, "scale", scale, POSITIVE)
        self.min_scale = number(owner, "min_scale", min_scale, POSITIVE)
        self.max_scale = math.inf if max_scale is None else number(owner, "max_scale", max_scale, POSITIVE)
        if not self.min_scale <= scale <= self.max_scale:
            raise ValueError(
                f"{owner}: expected `scale` in [{self.min_scale:g}, {self.max_scale:g}], got {scale:g}"
            )
        self.weight = nn.Parameter(torch.empty(classes, features, device=device, dtype=dtype))
        self.learn_scale = flag(owner, "learn_scale", learn_scale)
        if self.learn_scale:
            self.scale = nn.Parameter(torch.tensor(scale, device=device, dtype=torch.float32))
        else:
            self.scale = scale
        self._initial_scale = scale
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight rows uniform on the unit sphere; a learned scale back to its first value."""
        self._reset_weight()
        if isinstance(self.scale, nn.Parameter):
            with torch.no_grad():
                self.scale.fill_(self._initial_scale)

    def _reset_weight(self) -> None:
        gaussian_unitball_(self.weight)

    def bounded_scale(self) -> float | Tensor:
        """The scale after a learned one was moved into [min_scale, max_scale] in place.

        As in Caffe's Scale layer the gradient is not masked, so a scale at a bound can come back. The
        move does not count as a modification for autograd: it can change the value only right after an
        optimizer step, when no graph holds it.
        """
        if isinstance(self.scale, nn.Parameter):
            self.scale.data.clamp_(self.min_scale, self.max_scale)
        return self.scale

    def renormalize_(self) -> None:
        """Overwrites the weight by its unit rows: Caffe's ``normalize: true``, when it is asked for.

        Not needed for the output, which depends on the directions only; see
        ``caffe.renormalize_after_step``. A row with NaN or infinity raises ValueError on the CPU, with
        nothing changed, and is left alone on CUDA.
        """
        unit_rows_(self.weight, self.eps, type(self).__name__)

    def scale_value(self) -> float:
        if not isinstance(self.scale, Tensor):
            return self.scale
        return self._initial_scale if self.scale.is_meta else float(self.scale.detach())

    def scale_repr(self) -> str:
        return f"scale={self.scale_value():g}" + (", learn_scale=True" if self.learn_scale else "")


class NormalizeLayer(nn.Module):
    """Normalises along one axis: y = x / n (Caffe ``Normalize``; paper section 3.1).

    Args are those of ``functional.normalize``; so are shapes, dtypes and errors.
    """

    def __init__(self, dim: int = 1, p: int = 2, eps: float = 1e-12, return_norm: bool = False) -> None:
        super().__init__()
        owner = type(self).__name__
        self.dim, self.p = integer(owner, "dim", dim), checks.exponent(owner, "p", p)
        self.eps, self.return_norm = checks.eps(owner, "eps", eps), flag(owner, "return_norm", return_norm)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if self.return_norm:
            return functions.normalize(x, self.dim, self.p, self.eps, return_norm=True)
        return functions.normalize(x, self.dim, self.p, self.eps)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, p={self.p}, eps={self.eps:g}, return_norm={self.return_norm}"


class NormLinear(ScaledHead):
    """s * cos(x, w_j) for every class: [N, in_features] -> [N, out_features], no bias.

    Caffe's Normalize + InnerProduct + Scale with the gradient through both norms (paper section 3.2).

    Args:
        in_features: D.
        out_features: C; the weight is [C, D], rows uniform on the unit sphere.
        scale: s; ``learn_scale`` makes it a parameter kept within [min_scale, max_scale].
        normalize_input: ``False`` normalises the weight only.
        eps: inside both norms.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        scale: float = 1.0,
        learn_scale: bool = False,
        min_scale: float = 0.01,
        max_scale: float | None = None,
        normalize_input: bool = True,
        eps: float = 1e-12,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        owner = type(self).__name__
        in_features = size(owner, "in_features", in_features)
        out_features = size(owner, "out_features", out_features)
        super().__init__(
            out_features, in_features, scale, learn_scale, min_scale, max_scale, device, dtype
        )
        self.in_features, self.out_features = in_features, out_features
        self.eps = checks.eps(owner, "eps", eps)
        self.normalize_input = flag(owner, "normalize_input", normalize_input)

    def forward(self, x: Tensor) -> Tensor:
        return functions.norm_linear(
            x, self.weight, self.bounded_scale(), self.eps, normalize_input=self.normalize_input
        )

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.scale_repr()}, eps={self.eps:g}"
