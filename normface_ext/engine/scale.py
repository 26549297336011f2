"""The scale s: a number, or a parameter of one element that is used within bounds and never changed by it.

A learned scale carries its bounds as an attribute, so that a function which is given the parameter alone
uses the number that its layer does. An attribute and not a subclass: torch makes a plain Parameter of a new
kind in ``to_empty``, ``fully_shard`` and elsewhere, and Dynamo, DTensor and pickle know what that is.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from . import checks, graphs
from .arguments import POSITIVE, number, shown

#: The least that a learned scale is used as, where nothing says otherwise.
MIN_SCALE = 0.01


def one_number(op: str, name: str, value: object) -> float:
    """A scale that is to be kept as a number: one, or a tensor of one element that holds one."""
    if isinstance(value, Tensor):
        if value.requires_grad and not isinstance(value, nn.Parameter):
            raise ValueError(f"{op}: expected `{name}` not to require a gradient, got one that would be lost")
        if value.numel() != 1 or value.dim() > 1 or not checks.has_values(value):
            raise TypeError(
                f"{op}: expected `{name}` to be a number or a tensor of one, got {value.device.type} tensor"
                f" of shape {list(value.shape)}"
            )
        value = value.item()
    return number(op, name, value, POSITIVE)


def in_dtype(op: str, scale: float, dtype: torch.dtype) -> float:
    """The same number, which a parameter of this dtype can hold."""
    held = torch.tensor(scale, dtype=dtype, device="cpu").item()
    if not 0 < held < math.inf:
        raise ValueError(f"{op}: expected `scale` to be a number that {dtype} can hold, got {scale:g}")
    return scale


def one_parameter(op: str, name: str, value: nn.Parameter) -> nn.Parameter:
    """A parameter that is to be the scale; of its values nothing is looked at."""
    if value.dtype not in checks.FLOATING:
        raise TypeError(
            f"{op}: expected `{name}` to be float64, float32, float16 or bfloat16, got {value.dtype}"
        )
    if value.dim() > 1 or value.numel() != 1:
        raise ValueError(f"{op}: expected `{name}` of one element, got shape {list(value.shape)}")
    return value


def bounds_of(op: str, state: object) -> tuple[float, float]:
    """Of a state_dict: [low, high], or None for no upper one."""
    if not isinstance(state, list) or len(state) != 2:
        raise ValueError(f"{op}: expected the bounds of a scale in the state_dict, got {shown(state)}")
    try:
        low = number(op, "min_scale", state[0], POSITIVE)
        high = math.inf if state[1] is None else number(op, "max_scale", state[1], POSITIVE)
    except TypeError as error:
        raise ValueError(f"{error} in the state_dict") from None
    return low, high


class HoldsScale(nn.Module):
    """A layer whose parameter ``scale``, where it has one, carries the layer's bounds wherever it goes."""

    weight: nn.Parameter
    #: Whether a fixed scale was given another value than the constructor's.
    scale_was_set: bool = False

    def scale_bounds(self) -> tuple[float, float]:
        raise NotImplementedError

    def mark_scale(self) -> None:
        scale = self._parameters.get("scale")
        if scale is not None:
            scale.scale_bounds = self.scale_bounds()  # type: ignore[attr-defined]

    def bounded_scale(self) -> float | Tensor:
        """The scale as forward uses it."""
        # Not a parameter of the layer where it is parametrized, and in a replica of nn.DataParallel.
        scale: float | Tensor = self._parameters.get("scale")  # type: ignore[assignment]
        if scale is None:
            scale = self.scale
        if isinstance(scale, Tensor):
            return checks.bounded(scale, *self.scale_bounds())
        if self.scale_was_set and torch.compiler.is_compiling() and not graphs.exporting():
            # Ops take a number as a constant: each value of a schedule would be compiled anew.
            weight: Tensor = self.weight
            if not checks.is_dtensor(weight):  # of several ranks, which want to know it beforehand
                return weight.new_ones((), dtype=torch.float64) * scale
        return scale

    def scale_value(self) -> float:
        """The same as a number (host sync on CUDA)."""
        scale: float | Tensor = self.scale  # type: ignore[assignment]
        if not isinstance(scale, Tensor):
            return scale
        whole: Tensor = scale.full_tensor() if checks.is_dtensor(scale) else scale  # type: ignore[attr-defined]
        low, high = self.scale_bounds()
        return min(max(float(whole.detach()), low), high)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        if name == "scale":
            self.mark_scale()

    # Where torch puts parameters of its own making in the place of those that were here.

    def _apply(self, fn: Any, recurse: bool = True) -> HoldsScale:
        super()._apply(fn, recurse)
        self.mark_scale()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.mark_scale()
