"""What the layers with a scaled cosine share: the weight, the scale, and what of them a state_dict holds."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from ..engine import checks, graphs
from ..engine.arguments import POSITIVE, flag, number
from ..engine.extra_state import pack, unpack
from ..engine.scale import MIN_SCALE, HoldsScale, bounds_of, in_dtype, one_number, one_parameter
from ..engine.state import explain_spread
from .functions import norm_linear, scaled_cosine
from .options import LinearOptions
from .rows import draw_weight_, renormalize_weight_


class ScaledHead(HoldsScale):
    """A weight [classes, features] and a scale s: ``scale`` is a float, or, learned, a parameter [1].

    ``head.scale = 30.0`` sets either. A learned scale is used within [min_scale, max_scale]: forward changes
    no parameter, so the parameter itself may stand outside after a step of the optimizer.
    """

    weight: nn.Parameter
    scale: float | nn.Parameter
    eps: float
    #: Whether a state_dict is being loaded.
    _loading: bool = False

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
        device = checks.device_or_none(owner, device)
        dtype = None if dtype is None else checks.floating_dtype(owner, dtype)
        least = number(owner, "min_scale", min_scale, POSITIVE)
        self._bounds = self._ordered(least, self._most(max_scale))
        first = self._within(one_number(owner, "scale", scale))
        self.first_scale: float = first
        self.weight = nn.Parameter(torch.empty(classes, features, device=device, dtype=dtype))
        if flag(owner, "learn_scale", learn_scale):
            in_dtype(owner, first, self.weight.dtype)
            # [1] and not 0-d, which fully_shard refuses.
            learned = torch.full((1,), first, device=device, dtype=self.weight.dtype)
            self.register_parameter("scale", nn.Parameter(learned))
        else:
            self.scale = first
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight rows uniform on the unit sphere; a learned scale back to its first value."""
        self._reset_weight()
        if self.learn_scale:
            self.scale = self.first_scale

    def _reset_weight(self) -> None:
        draw_weight_(self)

    # The scale ----------------------------------------------------------------------------------------

    @property
    def learn_scale(self) -> bool:
        return isinstance(getattr(self, "scale", None), Tensor)

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
        before, self._bounds = self._bounds, self._ordered(low, high)
        if not self.learn_scale:
            try:
                self._within(self.scale)  # type: ignore[arg-type]
            except ValueError:
                self._bounds = before
                raise
        self.first_scale = min(max(self.first_scale, low), high)
        self.mark_scale()

    def _ordered(self, low: float, high: float) -> tuple[float, float]:
        if low > high:
            owner = type(self).__name__
            raise ValueError(f"{owner}: expected `min_scale` <= `max_scale`, got {low:g} and {high:g}")
        return low, high

    def _within(self, scale: float, dtype: torch.dtype = torch.float64) -> float:
        """The scale; ValueError for one that is out of the bounds, which its dtype may have rounded."""
        low, high = self._bounds
        rounding = 0.0 if dtype == torch.float64 else torch.finfo(dtype).eps
        if not low * (1 - rounding) <= scale <= high * (1 + rounding):
            raise ValueError(f"{type(self).__name__}: expected `scale` in [{low:g}, {high:g}], got {scale:g}")
        return scale

    def scale_bounds(self) -> tuple[float, float]:
        return self._bounds

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "scale" or self.__dict__.get("_is_replica"):  # of nn.DataParallel
            super().__setattr__(name, value)
            return
        owner = type(self).__name__
        if isinstance(value, nn.Parameter):
            one_parameter(owner, name, value)
            if self._looks_at(value):
                self._within(one_number(owner, name, value), value.dtype)
            super().__setattr__(name, value)
            return
        number_in_bounds = self._within(one_number(owner, name, value))
        if not self.learn_scale:
            if "scale" in self.__dict__:
                self.scale_was_set = True
            super().__setattr__(name, number_in_bounds)  # type: ignore[arg-type]
            return
        learned, own = self.scale, self._parameters.get("scale")
        assert isinstance(learned, Tensor)
        in_dtype(owner, number_in_bounds, learned.dtype)
        with torch.no_grad():
            if own is None:  # parametrized: torch asks its right_inverse
                super().__setattr__(name, torch.full_like(learned, number_in_bounds))
            else:
                own.fill_(number_in_bounds)

    def _looks_at(self, value: nn.Parameter) -> bool:
        """Whether a parameter that becomes the scale is new. One that is a scale already, one of a state_dict
        and one that fully_shard puts in the place of its own may stand outside the bounds, as any may
        that is learned."""
        own = self._parameters.get("scale")
        sharded = checks.is_dtensor(value) or (own is not None and checks.is_dtensor(own))
        known = sharded or self._loading or hasattr(value, "scale_bounds")
        return not known and checks.has_values(value)

    def linear_options(self) -> LinearOptions:
        """Those of ``norm_linear``, with which this makes its logits."""
        raise NotImplementedError

    def scaled_cosine(self, x: Tensor) -> Tensor:
        """s cos(x_i, w_j), [N, C]."""
        options = self.linear_options()
        if isinstance(x, Proxy):
            scale = self.scale  # a Proxy, too, where it is learned
            if not isinstance(scale, float):
                scale = graphs.recorded(checks.bounded, scale, *self.scale_bounds())
            return norm_linear(x, self.weight, scale, **vars(options))
        return scaled_cosine("norm_linear", x, self.weight, self.bounded_scale(), options)

    # State --------------------------------------------------------------------------------------------

    def _plain_state(self) -> dict[str, Any]:
        """What the state_dict holds besides parameters and buffers."""
        if not self.learn_scale:
            return {"scale": self.scale}
        return {"bounds": [self.min_scale, None if self.max_scale == math.inf else self.max_scale]}

    def _take_plain_state(self, values: dict[str, Any]) -> list[str]:
        """Sets it. Returns what another value was replaced by, in words."""
        if self.learn_scale and "bounds" in values:
            return self._take_bounds(*bounds_of(type(self).__name__, values["bounds"]))
        if "scale" not in values or values["scale"] == self.scale_value():
            return []
        before, self.scale = self.scale_value(), values["scale"]
        return [f"scale {values['scale']:g} replaces {before:g}"]

    def _take_bounds(self, low: float, high: float) -> list[str]:
        if (low, high) == self._bounds:
            return []
        before = self._bounds
        self._set_bounds(low, high)
        return [f"scale bounds [{low:g}, {high:g}] replace [{before[0]:g}, {before[1]:g}]"]

    def get_extra_state(self) -> Tensor:
        return pack(self._plain_state())

    def set_extra_state(self, state: object) -> None:
        """A fixed scale, or a learned one's bounds, and what the options say that is not in parameters, as
        saved. A UserWarning says so where the layer was made with something else.

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
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        explain_spread(self, state_dict, prefix, local_metadata, error_msgs)
        given = state_dict.get(f"{prefix}scale")
        if isinstance(given, Tensor) and given.dim() == 0:  # one number, however it was saved
            state_dict[f"{prefix}scale"] = given.reshape(1)
        self._loading = True
        try:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
        finally:
            del self._loading
        if f"{prefix}_extra_state" in missing_keys:  # then there is nothing to restore
            missing_keys.remove(f"{prefix}_extra_state")

    # --------------------------------------------------------------------------------------------------

    def renormalize_(self) -> None:
        """Overwrites the weight by its unit rows: Caffe's ``normalize: true``, when it is asked for.

        Not needed for the output, which depends on the directions only; see
        ``caffe.renormalize_after_step``. A row with NaN or infinity raises ValueError on the CPU, with
        nothing changed, and is left alone on CUDA. A parametrized weight is set through its parametrization;
        ValueError where that cannot give unit rows.
        """
        renormalize_weight_(self, self.eps, type(self).__name__)

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
        shown += [f"min_scale={self.min_scale:g}"] * (self.min_scale != MIN_SCALE)
        return shown + [f"max_scale={self.max_scale:g}"] * (self.max_scale != math.inf)
