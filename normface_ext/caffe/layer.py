"""What every layer of a head has: its wiring, what it takes, and its blobs."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from .fillers import Filler, dtype_of, new_blob
from .spec import Context, Spec


class Layer(nn.Module):
    BOTTOMS: ClassVar[tuple[int, int]] = (1, 1)
    #: What the bottoms are, for who gives another number of them.
    BOTTOM_NAMES: ClassVar[str] = ""
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

    def __init__(self, spec: Spec, context: Context) -> None:
        super().__init__()
        self.wiring = f"{', '.join(spec.bottoms)} -> {', '.join(spec.tops)}".strip()
        self.label = str(spec)
        self.dtype, self.device = context.dtype, context.device
        self.fillers: dict[str, Filler] = {}
        self.shapes: dict[str, list[int]] = {}  # of the blobs whose size is known
        self.lr_mults = [1.0]

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
                self.place(name, new_blob(name, shape, self.fillers[name], dtype, device))

    def place(self, name: str, value: Tensor) -> None:
        """A blob's value: copied into the parameter, or made one. Nothing here can fail half-way."""
        if getattr(self, name) is not None:
            getattr(self, name).copy_(value)
        else:
            trained = self.lr_mults[self.BLOBS.index(name)] != 0
            self.register_parameter(name, nn.Parameter(value, requires_grad=trained))

    def blobs(self) -> list[nn.Parameter | None]:
        """Parameters in Caffe's order, None where the number of features is not known yet."""
        return [getattr(self, name) for name in self.BLOBS]

    def extra_repr(self) -> str:
        return self.wiring
