"""Tensors of a head that are its loss's and not what is learned, and those of its margin."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..cosine.head import ScaledHead
from ..engine import checks
from ..engine.arguments import shown
from ..engine.options import HoldsOptions
from .margins import Margin
from .options import HeadOptions
from .state import tensor_fields, with_tensors

#: What a class-parallel head has in its state_dict that draws its classes.
_DRAWS = ("sampler.seed", "sampler.step")


class HoldsTensors(HoldsOptions, ScaledHead):
    """A head whose ``class_weight`` is a buffer that no state_dict has, as is a tensor of its margin that is
    no Parameter; one that is, is the head's. What no state_dict has must not be lost on the way: a head
    comes from the meta device, or out of ``to_empty``, with it.
    """

    options: HeadOptions
    num_classes: int
    class_weight: Tensor | None
    #: The fields of the margin that are tensors: parameters and buffers of the head, "margin_" before them.
    _margin_fields: tuple[str, ...] = ()

    def keep_tensors(self, options: HeadOptions, class_weight: Tensor | None) -> None:
        """The constructor's last step."""
        #: By name the values of the buffers that are no state, where these are on the meta device.
        self._given: dict[str, Tensor] = {}
        self.keep_options(options)
        self.register_buffer("class_weight", None, persistent=False)
        self.class_weight = class_weight

    def __setattr__(self, name: str, value: Any) -> None:
        if not self.__dict__.get("_is_replica"):  # of nn.DataParallel, which has this checked already
            if name == "class_weight" and value is not None:
                self.check_class_weight(value, self.num_classes)
                value = self._kept(name, value)
            elif name == "margin" and isinstance(value, Margin):
                self.check_margin(value, self.num_classes)
            elif name == "sub_centers" and value != self.options.sub_centers:
                raise ValueError(
                    f"{type(self).__name__}: expected `sub_centers` to stay {self.options.sub_centers}, by"
                    f" which the rows of the weight belong to classes, got {shown(value)}"
                )
        super().__setattr__(name, value)
        if name.removeprefix("margin_") in self._margin_fields:
            self._follow_margin()

    # What is no state ---------------------------------------------------------------------------------

    def check_class_weight(self, value: object, classes: int) -> None:
        owner = type(self).__name__
        self._check_values("class_weight", checks.factors(owner, "class_weight", value, classes))

    def _check_values(self, name: str, value: Tensor) -> None:
        if value.is_meta:
            raise ValueError(
                f"{type(self).__name__}: expected `{name}` to have values, got a tensor on the meta device"
            )

    def check_margin(self, margin: Margin | None, classes: int) -> None:
        if margin is None:
            return
        for name in tensor_fields(margin):
            value = getattr(margin, name)
            if not isinstance(value, nn.Parameter):
                self._check_values(f"margin.{name}", value)
            if value.dim() == 1 and value.shape[0] != classes and not margin.per_row:
                raise ValueError(
                    f"{type(self).__name__}: expected `margin.{name}` to have shape [{classes}], a number per"
                    f" class, got {list(value.shape)}"
                )

    def _kept(self, name: str, value: Tensor) -> Tensor:
        """A buffer of this name, where the weight is."""
        device = self.weight.device
        self._given.pop(name, None)
        if device.type == "meta":
            self._given[name] = value
        return value.to(device)

    def _refill(self, before: dict[str, Tensor]) -> None:
        """What torch put in the place of the buffers `before`, with their values, which it may have lost."""
        for name, old in before.items():
            new = self._buffers[name]
            assert new is not None
            if new is old and not (old.is_meta and not self.weight.is_meta):
                continue
            values = self._given.get(name, old)
            device = self.weight.device if new is old else new.device
            # A margin stays float32 or wider, as in ``BatchMargin``.
            narrow = name.startswith("margin_") and new.dtype.itemsize < 4
            if device.type == "meta":
                self._given[name] = values
            elif not values.is_meta:
                self._given.pop(name, None)
                self._buffers[name] = values.to(device, None if narrow else new.dtype)

    def _constants(self) -> dict[str, Tensor]:
        names = "class_weight", *(f"margin_{name}" for name in self._margin_fields)
        return {name: value for name in names if (value := self._buffers.get(name)) is not None}

    def _apply(self, fn: Any, recurse: bool = True) -> HoldsTensors:
        before = self._constants()
        super()._apply(fn, recurse)
        self._refill(before)
        self._follow_margin()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(f"{prefix}class_weight", None)  # earlier versions had it there
        if "sampler" not in self._modules:  # a head that takes all classes draws none
            for name in _DRAWS:
                state_dict.pop(f"{prefix}{name}", None)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._refill(self._constants())
        self._follow_margin()

    def given_class_weight(self) -> Tensor | None:
        """The class_weight with its values, also where the buffer has none."""
        return self._given.get("class_weight", self.class_weight)

    def given_margin(self) -> Margin | None:
        """The margin, likewise."""
        margin = self.options.margin
        given = {name: self._given.get(f"margin_{name}") for name in self._margin_fields}
        found = {name: value for name, value in given.items() if value is not None}
        return with_tensors(margin, found) if margin is not None and found else margin

    # The margin's tensors ------------------------------------------------------------------------------

    def _follow(self, name: str, value: object) -> None:
        super()._follow(name, value)
        if name != "margin":
            return
        for old in self._margin_fields:
            delattr(self, f"margin_{old}")
            self._given.pop(f"margin_{old}", None)
        self._margin_fields = ()
        fields = tensor_fields(value)  # type: ignore[arg-type]
        for field in fields:
            tensor, own = getattr(value, field), f"margin_{field}"
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(own, tensor)
            else:
                self.register_buffer(own, self._kept(own, tensor), persistent=False)
        self._margin_fields = fields
        self._follow_margin()

    def _follow_margin(self) -> None:
        """The options' margin has the tensors that the head has; not those of which a rank has a part, as
        fully_shard puts them there between two passes."""
        held = [getattr(self, f"margin_{name}", None) for name in self._margin_fields]
        if held and not any(tensor is not None and checks.is_dtensor(tensor) for tensor in held):
            object.__setattr__(self, "options", self.present_options())

    def present_options(self) -> HeadOptions:
        """The options with the margin's tensors that the head has now: those of ``torch.func`` and of
        nn.DataParallel come and go without a word."""
        options = self.options
        if not self._margin_fields:
            return options
        assert options.margin is not None
        tensors = {name: getattr(self, f"margin_{name}") for name in self._margin_fields}
        margin = with_tensors(options.margin, tensors)
        return options if margin is options.margin else replace(options, margin=margin)

    def margin_parameters(self) -> list[nn.Parameter]:
        """What of the margin is learned, where it is a value."""
        held = (self._parameters.get(f"margin_{name}") for name in self._margin_fields)
        return [parameter for parameter in held if parameter is not None]
