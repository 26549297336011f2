"""Layers that multiply scores by a number: Scale, ChannelScale, Power."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..engine import checks
from .fillers import check_filler
from .layer import LateLayer, Layer
from .spec import Context, Spec


class Scale(LateLayer):
    """s times the bottom, where s is the blob within [min_value, max_value]; no gradient is masked. Caffe
    moves the blob itself in forward; here that is ``clamp_``, since a forward changes no parameter.

    ``num_axes: 0`` has one number, ``num_axes: 1`` (Caffe's default) one per class. Those are one number
    here, too, where the file fixes all of them to a constant. With ``bias_term`` a bias of the same shape is
    added. With a second bottom that is the scale.
    """

    BOTTOMS: ClassVar[tuple[int, int]] = (1, 2)
    BLOCKS: ClassVar[tuple[str, ...]] = ("scale_param",)

    def __init__(self, spec: Spec, context: Context) -> None:
        super().__init__(spec, context)
        self.own: bool = len(spec.bottoms) == 1
        self.axis: int = int(spec.get("scale_param.axis"))
        num_axes = int(spec.get("scale_param.num_axes"))
        if self.own and (num_axes not in (0, 1) or (num_axes == 1 and self.axis != 1)):
            spec.refuse(
                "expected `num_axes: 0`, one scale for all, or the defaults `axis: 1 num_axes: 1`, one per"
                f" class, got axis {self.axis} and num_axes {num_axes}",
                "scale_param.num_axes" if num_axes not in (0, 1) else "scale_param.axis",
            )
        if not self.own and self.axis < 0:
            spec.refuse(
                f"expected `axis` >= 0 beside a scale that is a bottom, got {self.axis}", "scale_param.axis"
            )
        self.has_bias: bool = self.own and bool(spec.get("scale_param.bias_term"))
        if not self.own:
            spec.only("scale_param.bias_term", False)
        self.min_value: float = (
            spec.get("scale_param.min_value") if spec.has("scale_param.min_value") else -math.inf
        )
        self.max_value: float = (
            spec.get("scale_param.max_value") if spec.has("scale_param.max_value") else math.inf
        )
        if self.min_value > self.max_value:
            spec.refuse(
                f"expected `min_value` <= `max_value`, got {self.min_value:g} and {self.max_value:g}",
                "scale_param.min_value",
            )
        self.scale: nn.Parameter | None
        filler = check_filler(spec, "scale_param.filler", context)
        if not spec.has("scale_param.filler"):
            filler = filler._replace(type="constant", value=1.0)
        params = spec.message.param
        self.fixed = len(params) > 0 and params[0].lr_mult == 0
        constant = self.fixed and filler.type == "constant" and not params[0].name
        self.per_class: bool = num_axes == 1  # in the file
        self.one_number: bool = not self.per_class or (constant and not self.has_bias)
        shape = [] if self.one_number else None if spec.width is None else [spec.width]
        self.bias: nn.Parameter | None
        self.register_parameter("bias", None)
        self.declare("scale", filler, shape if self.own else None)
        if self.has_bias:
            self.declare("bias", check_filler(spec, "scale_param.bias_filler", context), shape)

    @property
    def BLOBS(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("scale", "bias")[: int(self.own) + int(self.has_bias)]

    @property
    def ONE_NUMBER(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("scale",) if self.per_class and self.one_number else ()

    def late_shape(self, size: int) -> list[int]:
        return [size]

    def is_late(self, name: str) -> bool:
        return self.own and not self.one_number

    def width(self, width: int | None) -> int | None:
        return width

    def bounded_scale(self) -> Tensor:
        assert self.scale is not None
        if self.one_number:
            return checks.bounded(self.scale, self.min_value, self.max_value)
        plain = self.scale.detach()
        return self.scale + (plain.clamp(self.min_value, self.max_value) - plain)

    @torch.no_grad()
    def clamp_(self) -> None:
        if self.scale is not None:
            self.scale.clamp_(self.min_value, self.max_value)

    def forward(self, x: Tensor, *scale: Tensor) -> tuple[Tensor]:
        x = checks.floating("forward", "bottom 0", x)
        if not self.own:
            return (x * _spread(x, checks.floating("forward", "bottom 1", scale[0]), self.axis).to(x.dtype),)
        if not self.one_number:
            if x.dim() < 2:
                raise ValueError(f"expected bottom 0 to be [N, C, ...], got shape {list(x.shape)}")
            self.materialize(x.shape[1], x)
        y = x * _spread(x, self.bounded_scale(), 1).to(x.dtype)
        return (y if self.bias is None else y + _spread(x, self.bias, 1).to(x.dtype),)

    def extra_repr(self) -> str:
        known = self.scale is not None and self.one_number
        return self.wiring + (f", scale={float(self.bounded_scale().detach()):g}" if known else "")


def _spread(x: Tensor, scale: Tensor, axis: int) -> Tensor:
    """A scale whose axes are those of x from `axis` on, in a shape that broadcasts."""
    end = axis + scale.dim()
    if end > x.dim() or scale.shape != x.shape[axis:end]:
        raise ValueError(
            f"expected a scale like the axes {axis} to {max(axis, end - 1)} of {list(x.shape)}, got shape"
            f" {list(scale.shape)}"
        )
    return scale.reshape(*scale.shape, *[1] * (x.dim() - end))


class ChannelScale(Layer):
    """Each row (and place of a map) of the first bottom times its number in the second: AM-Softmax with the
    features' own norms. Bottoms: scores [N, C, ...], numbers [N, 1, ...]."""

    BOTTOMS: ClassVar[tuple[int, int]] = (2, 2)
    BOTTOM_NAMES: ClassVar[str] = "scores, a number per row"
    BLOCKS: ClassVar[tuple[str, ...]] = ("channel_scale_param",)

    def __init__(self, spec: Spec, context: Context) -> None:
        super().__init__(spec, context)
        for name in ("do_forward", "do_backward_feature", "do_backward_scale"):
            spec.only(f"channel_scale_param.{name}", True, "the gradient would be none")
        spec.only("channel_scale_param.global_scale", False, "it follows the mean of the norms")

    def width(self, width: int | None) -> int | None:
        return width

    def forward(self, x: Tensor, numbers: Tensor) -> tuple[Tensor]:
        x = checks.floating("forward", "bottom 0", x)
        numbers = checks.floating("forward", "bottom 1", numbers)
        if x.dim() < 2 or numbers.numel() != x[:, :1].numel() or numbers.shape[:1] != x.shape[:1]:
            raise ValueError(
                f"expected bottom 1 to have a number for each row of bottom 0, {list(x.shape)}, got shape"
                f" {list(numbers.shape)}"
            )
        return (x * numbers.reshape(x[:, :1].shape).to(x.dtype),)


class Power(Layer):
    """(shift + scale x)^power: with a power of 1 a fixed scale."""

    BLOCKS: ClassVar[tuple[str, ...]] = ("power_param",)

    factor: float
    shift: float
    power: float

    def __init__(self, spec: Spec, context: Context) -> None:
        super().__init__(spec, context)
        names = ("scale", "shift", "power")
        self.factor, self.shift, self.power = (float(spec.get(f"power_param.{name}")) for name in names)

    def width(self, width: int | None) -> int | None:
        return width

    def forward(self, x: Tensor) -> tuple[Tensor]:
        y = checks.floating("forward", "bottom 0", x) * self.factor + self.shift
        return (y if self.power == 1 else y**self.power,)
