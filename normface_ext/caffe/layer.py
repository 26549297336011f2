"""What every layer of a head has: its wiring, what it takes, and its blobs."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..engine import checks
from ..engine.state import Passes, WideState, recomputing
from .fillers import Filler, dtype_of, new_blob
from .spec import Context, Spec


class Layer(WideState):
    BOTTOMS: ClassVar[tuple[int, int]] = (1, 1)
    #: What the bottoms are, for who gives another number of them.
    BOTTOM_NAMES: ClassVar[str] = ""
    #: Which of the bottoms are labels.
    LABELS: ClassVar[tuple[int, ...]] = ()
    TOPS: ClassVar[tuple[int, int]] = (1, 1)
    BLOCKS: ClassVar[tuple[str, ...]] = ()
    BLOBS: ClassVar[tuple[str, ...]] = ()
    #: Further blobs that Caffe stores and that have no effect while they are zero.
    SPARE_BLOBS: ClassVar[int] = 0
    #: The default loss_weight of the first top, and the tops that have no gradient.
    LOSS: ClassVar[float] = 0.0
    STATISTICS: ClassVar[tuple[int, ...]] = ()
    #: The option that says how large the blobs are.
    SIZE: ClassVar[str] = ""
    #: Blobs that are one number here, of which a .caffemodel may have several that are equal.
    ONE_NUMBER: ClassVar[tuple[str, ...]] = ()

    def __init__(self, spec: Spec, context: Context) -> None:
        super().__init__()
        self.name: str = spec.name  # in the file, of which another layer of another phase may have it, too
        self.wiring: str = f"{', '.join(spec.bottoms)} -> {', '.join(spec.tops)}".strip()
        self.label: str = str(spec)
        self.dtype: torch.dtype | None = context.dtype
        self.device: torch.device | str | None = context.device
        self.fillers: dict[str, Filler] = {}
        self.shapes: dict[str, list[int]] = {}  # of the blobs whose size is known
        self.lr_mults: list[float] = [1.0]
        #: blob -> every (layer, blob) that is the same parameter; the first has the filler.
        self.peers: dict[str, list[tuple[Layer, str]]] = {}

    def declare(self, name: str, filler: Filler, shape: list[int] | None = None) -> None:
        """A blob that ``create`` makes, once its shape is known and nothing is wrong with the file."""
        self.register_parameter(name, None)
        self.fillers[name] = filler
        if shape is not None:
            self.shapes[name] = shape

    def bytes_of(self, name: str) -> int:
        return math.prod(self.shapes[name]) * dtype_of(self.dtype).itemsize

    def create(self, dtype: torch.dtype | None, device: torch.device | str | None) -> None:
        for name, shape in self.shapes.items():
            if getattr(self, name) is None:
                owner, blob = self.peers.get(name, [(self, name)])[0]
                self.place(name, new_blob(name, shape, owner.fillers[blob], dtype, device))

    def place(self, name: str, value: Tensor) -> None:
        """A blob's value: copied into the parameter, or made one. Nothing here can fail half-way."""
        if getattr(self, name) is not None:
            getattr(self, name).copy_(value)
        else:
            trained = self.lr_mults[self.BLOBS.index(name)] != 0
            parameter = nn.Parameter(value, requires_grad=trained)
            for layer, blob in self.peers.get(name, [(self, name)]):
                layer.register_parameter(blob, parameter)

    def blobs(self) -> list[nn.Parameter | None]:
        """Parameters in Caffe's order, None where the number of features is not known yet."""
        return [getattr(self, name) for name in self.BLOBS]

    def width(self, width: int | None) -> int | None:
        """Numbers in a row of the first top, of those in a row of the first bottom; None: not known."""
        return None

    def extra_repr(self) -> str:
        return self.wiring


class LateLayer(Layer):
    """A layer with blobs whose size the first bottom tells, where the file does not."""

    def late_shape(self, size: int) -> list[int]:
        """The shape of those blobs for so many numbers in a row of the bottom."""
        raise NotImplementedError

    def is_late(self, name: str) -> bool:
        """Whether the blob is one of them, although its size may be known by now."""
        raise NotImplementedError

    def materialize(self, size: int, like: Tensor) -> None:
        """Creates and fills the blobs when the first bottom, or a state, tells their size."""
        missing = [name for name in self.BLOBS if self.is_late(name) and getattr(self, name) is None]
        if not missing:
            return
        if size < 1:
            raise ValueError(f"expected at least one feature for `{missing[0]}`, got none")
        self.shapes.update({name: self.late_shape(size) for name in missing})
        wide = self.dtype is None and like.dtype == torch.float64
        self.create(like.dtype if wide else self.dtype, like.device if self.device is None else self.device)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self.BLOBS:
            given = state_dict.get(f"{prefix}{name}")
            fits = isinstance(given, Tensor) and given.dim() == len(self.late_shape(1))
            if self.is_late(name) and isinstance(given, Tensor) and fits:
                self.materialize(given.shape[-1], given)
        super()._load_from_state_dict(state_dict, prefix, *args)


class MovingLayer(Layer):
    """A layer with a state that its forward pass moves in training; in evaluation it rests."""

    def __init__(self, spec: Spec, context: Context) -> None:
        super().__init__(spec, context)
        self._passes = Passes()

    def state_of(self, labels: Tensor, state: Tensor) -> tuple[Tensor, bool]:
        """(the state before a pass, whether it is to move). A pass that a backward pass runs again, as
        activation checkpointing does, gets what it had, and moves nothing."""
        if not self.training:
            return state, False
        if not checks.has_values(labels):
            return state, True
        if recomputing():
            return self._passes.state(self.label, labels), False
        before = state.clone()
        self._passes.add(labels, before)
        return before, True
