"""Caffe's layers of a NormFace head, one module each: constructed from their `Spec`, called with bottoms.
Here Normalize under its names, and Parameter; ``agents``, ``sphere``, ``scale``, ``margins``, ``losses``,
``pairs`` and ``shapes`` have the others.

The constructor refuses what it does not support; forward takes the bottom blobs and returns the tuple of
tops. Parameters are named as torch names them; ``BLOBS`` lists them in Caffe's order. ``math`` and
``caffe`` are the two modes of ``normface_ext.caffe.load_head``.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import functional
from ..engine import checks
from ..engine.files import quoted
from .fillers import check_filler
from .layer import LateLayer, Layer
from .spec import Context, Spec

#: Caffe's L1 normalisation uses this on both devices.
CAFFE_L1_EPS = 1e-6


class _ScaleGradient(torch.autograd.Function):
    """x, with its gradient multiplied by a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return (grad * factor).to(grad.dtype), None


class Normalize(Layer):
    """y = x / n along axis 1; a second top is n, with a gradient only where ``bp_norm`` asks for it."""

    TOPS: ClassVar[tuple[int, int]] = (1, 2)
    BLOCKS: ClassVar[tuple[str, ...]] = ("normalize_param",)

    def __init__(self, spec: Spec, context: Context) -> None:
        super().__init__(spec, context)
        kind = spec.get("normalize_param.normalize_type")
        if kind not in ("L1", "L2"):
            spec.refuse(
                f"expected `normalize_type` to be 'L1' or 'L2', got {quoted(kind)}",
                "normalize_param.normalize_type",
            )
        self.p = 1 if kind == "L1" else 2
        self.eps: float = CAFFE_L1_EPS if self.p == 1 and context.caffe else context.eps
        self.return_norm: bool = len(spec.tops) == 2
        self.bp_norm: bool = bool(spec.get("normalize_param.bp_norm"))
        self.fix_gradient: bool = bool(spec.get("normalize_param.fix_gradient"))
        if self.fix_gradient and not context.caffe:
            spec.refuse(
                "`fix_gradient: true` drops 1/n from the gradient, which then is no gradient;"
                " mode='caffe' does as Caffe's GPU layer does",
                "normalize_param.fix_gradient",
            )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.fix_gradient:
            norm = functional.normalize(x.detach(), 1, self.p, self.eps, return_norm=True)[1]
            x = _ScaleGradient.apply(x, norm)
        if not self.return_norm:
            return (functional.normalize(x, 1, self.p, self.eps),)
        y, norm = functional.normalize(x, 1, self.p, self.eps, return_norm=True)
        return y, norm if self.bp_norm else norm.detach()

    def width(self, width: int | None) -> int | None:
        return width


def row_of_features(x: Tensor) -> Tensor:
    """A bottom of one vector per row: forks differ in what they do with a map."""
    checked = checks.floating("forward", "bottom 0", x)
    if checked.dim() < 2 or checked[:1, :1].numel() > 1:
        raise ValueError(f"expected bottom 0 to be [N, D] or [N, D, 1, 1], got shape {list(checked.shape)}")
    return checked


class NormalizeRows(Normalize):
    """L2 normalisation under another name that a fork of Caffe gave it: no options, and one vector per row.

    The forks agree on such vectors but for their eps: none, 1e-7 or 1e-6.
    """

    TOPS: ClassVar[tuple[int, int]] = (1, 1)
    BLOCKS: ClassVar[tuple[str, ...]] = ()

    def __init__(self, spec: Spec, context: Context) -> None:
        super().__init__(spec, context)
        spec.note(f"read as the L2 normalisation of each row, as the forks with a layer {spec.type} have it")

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return super().forward(row_of_features(x))


class ScaledNormalize(LateLayer):
    """The Normalize layer of the SSD fork: x / sqrt(sum x^2 + eps) times a blob, one number or one per
    channel; its eps is the file's."""

    BLOCKS: ClassVar[tuple[str, ...]] = ("norm_param",)
    BLOBS: ClassVar[tuple[str, ...]] = ("scale",)

    def __init__(self, spec: Spec, context: Context) -> None:
        super().__init__(spec, context)
        self.scale: nn.Parameter | None
        self.eps: float = checks.eps(str(spec), "eps", spec.get("norm_param.eps"))
        self.across_spatial: bool = bool(spec.get("norm_param.across_spatial"))
        self.per_channel: bool = not spec.get("norm_param.channel_shared")
        filler = check_filler(spec, "norm_param.scale_filler", context)
        if not spec.has("norm_param.scale_filler"):
            filler = filler._replace(type="constant", value=1.0)
        self.declare("scale", filler, None if self.per_channel else [])

    def late_shape(self, size: int) -> list[int]:
        return [size]

    def is_late(self, name: str) -> bool:
        return self.per_channel

    def width(self, width: int | None) -> int | None:
        return width

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.across_spatial:
            x = row_of_features(x)
        y = functional.normalize(x, 1, 2, self.eps)
        self.materialize(x.shape[1], x)
        assert self.scale is not None
        scale = self.scale.to(y.dtype)
        return (y * (scale.reshape(-1, *[1] * (x.dim() - 2)) if self.per_channel else scale),)


class Parameter(Layer):
    """A blob of its own, such as the agents of a two-bottom InnerProduct."""

    BOTTOMS: ClassVar[tuple[int, int]] = (0, 0)
    SIZE: ClassVar[str] = "parameter_param.shape"
    BLOCKS: ClassVar[tuple[str, ...]] = ("parameter_param",)
    BLOBS: ClassVar[tuple[str, ...]] = ("weight",)

    def __init__(self, spec: Spec, context: Context) -> None:
        super().__init__(spec, context)
        self.weight: nn.Parameter
        shape = [int(n) for n in spec.get("parameter_param.shape.dim")]
        if not shape or min(shape) < 1:
            spec.refuse(f"expected `shape` of sizes >= 1, got {shape}", "parameter_param.shape")
        self.declare("weight", check_filler(spec, "parameter_param.blob_filler", context), shape)

    def forward(self) -> tuple[Tensor]:
        return (self.weight,)

    def extra_repr(self) -> str:
        return f"{self.wiring}, {list(self.weight.shape)}"
