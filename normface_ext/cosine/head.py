"""What the layers with a scaled cosine share: the weight, the scale, and what of them a state_dict holds."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..engine import checks
from ..engine.arguments import POSITIVE, flag, number
from ..engine.extra_state import pack, unpack
from ..engine.scale import HoldsScale, one_number
from .rows import gaussian_unitball_, unit_rows_


class ScaledHead(HoldsScale):
    """A weight [classes, features] and a scale s: ``scale`` is a float, or, learned, a parameter [1].

    ``head.scale = 30.0`` sets either. A learned scale is used within [min_scale, max_scale]: forward changes
    no parameter, so the parameter itself may stand outside after a step of the optimizer.
    """

    weight: nn.Parameter
    scale: float | nn.Parameter
    eps: float

    def __init__(
        self,
        classes: int,
        features: int,
        scale: float | Tensor,
        learn_scale: bool,
        min_scale: float,
        max_scale: float | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        device = None if device is None else checks.device(owner, device)
        dtype = None if dtype is None else checks.floating_dtype(owner, dtype)
        least = number(owner, "min_scale", min_scale, POSITIVE)
        self._bounds = least, self._most(max_scale)
        self.first_scale = first = self._within(one_number(owner, "scale", scale))
        self.weight = nn.Parameter(torch.empty(classes, features, device=device, dtype=dtype))
        if flag(owner, "learn_scale", learn_scale):
            # [1] and not 0-d, which fully_shard refuses.
            self.scale = nn.Parameter(torch.empty(1, device=device, dtype=self.weight.dtype))
        else:
            self.scale = first
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight rows uniform on the unit sphere; a learned scale back to its first value."""
        self._reset_weight()
        if self.learn_scale:
            self.scale = self.first_scale

    def _reset_weight(self) -> None:
        gaussian_unitball_(self.weight)

    # The scale ----------------------------------------------------------------------------------------

    @property
    def learn_scale(self) -> bool:
        return "scale" in self._parameters

    @property
    def min_scale(self) -> float:
        return self._bounds[0]

    @min_scale.setter
    def min_scale(self, value: float) -> None:
        self._set_bounds(number(type(self).__name__, "min_scale", value, POSITIVE), self.max_scale)

    @property
    def max_scale(self) -> float:
        """Infinity where there is none."""
        return self._bounds[1]

    @max_scale.setter
    def max_scale(self, value: float | None) -> None:
        self._set_bounds(self.min_scale, self._most(value))

    def _most(self, value: float | None) -> float:
        return math.inf if value is None else number(type(self).__name__, "max_scale", value, POSITIVE)

    def _set_bounds(self, low: float, high: float) -> None:
        """A learned scale is moved by nothing but its optimizer, so it may stand outside; a fixed one not."""
        before, self._bounds = self._bounds, (low, high)
        try:
            if low > high or not isinstance(self.scale, Tensor):
                self._within(high if isinstance(self.scale, Tensor) else self.scale)
        except ValueError:
            self._bounds = before
            raise
        self.mark_scale()

    def _within(self, scale: float) -> float:
        low, high = self._bounds
        if not low <= scale <= high:
            raise ValueError(f"{type(self).__name__}: expected `scale` in [{low:g}, {high:g}], got {scale:g}")
        return scale

    def scale_bounds(self) -> tuple[float, float]:
        return self._bounds

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "scale" or isinstance(value, nn.Parameter):
            if name == "scale" and value.numel() != 1:
                raise ValueError(
                    f"{type(self).__name__}: expected `scale` of one element, got shape {list(value.shape)}"
                )
            super().__setattr__(name, value)
            return
        number_in_bounds = self._within(one_number(type(self).__name__, name, value))
        if self.learn_scale:
            with torch.no_grad():
                self._parameters["scale"].fill_(number_in_bounds)  # type: ignore[union-attr]
        else:
            super().__setattr__(name, number_in_bounds)  # type: ignore[arg-type]

    # State --------------------------------------------------------------------------------------------

    def _plain_state(self) -> dict[str, Any]:
        """What the state_dict holds besides parameters and buffers."""
        return {} if self.learn_scale else {"scale": self.scale}

    def _take_plain_state(self, values: dict[str, Any]) -> list[str]:
        """Sets it. Returns what another value was replaced by, in words."""
        if "scale" not in values or values["scale"] == self.scale_value():
            return []
        before, self.scale = self.scale_value(), values["scale"]
        return [f"scale {values['scale']:g} replaces {before:g}"]

    def get_extra_state(self) -> Tensor:
        return pack(self._plain_state())

    def set_extra_state(self, state: object) -> None:
        """A fixed scale, and what the options say that is not in parameters, as saved. A UserWarning says so
        where the layer was made with something else.

        Raises:
            ValueError: not the extra state of such a layer.
        """
        owner = type(self).__name__
        replaced = self._take_plain_state(unpack(owner, state))
        if replaced:
            warnings.warn(f"{owner}: of the state_dict, {' and '.join(replaced)}", UserWarning, stacklevel=2)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        *args: Any,
    ) -> None:
        given = state_dict.get(f"{prefix}scale")
        if isinstance(given, Tensor) and given.dim() == 0:  # one number, however it was saved
            state_dict[f"{prefix}scale"] = given.reshape(1)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *args)
        if f"{prefix}_extra_state" in missing_keys:  # then there is nothing to restore
            missing_keys.remove(f"{prefix}_extra_state")

    # --------------------------------------------------------------------------------------------------

    def renormalize_(self) -> None:
        """Overwrites the weight by its unit rows: Caffe's ``normalize: true``, when it is asked for.

        Not needed for the output, which depends on the directions only; see
        ``caffe.renormalize_after_step``. A row with NaN or infinity raises ValueError on the CPU, with
        nothing changed, and is left alone on CUDA.
        """
        unit_rows_(self.weight, self.eps, type(self).__name__)

    def scale_repr(self) -> list[str]:
        """Without a word to other ranks, who may not be printing."""
        scale = self.scale
        if isinstance(scale, Tensor) and scale.is_meta:
            shown = [f"scale={self.first_scale:g}"]
        elif isinstance(scale, Tensor) and checks.is_dtensor(scale):
            shown = ["scale=DTensor"]
        else:
            shown = [f"scale={self.scale_value():g}"]
        shown += ["learn_scale=True"] * self.learn_scale
        shown += [f"min_scale={self.min_scale:g}"] * (self.min_scale != 0.01)
        return shown + [f"max_scale={self.max_scale:g}"] * (self.max_scale != math.inf)
