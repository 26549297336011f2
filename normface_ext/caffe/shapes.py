"""The layers around a head without a parameter: Softmax, Dropout, Flatten, Flip, Eltwise, Slice, Concat,
Silence."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import dropout, softmax

from ..engine import checks
from ..engine.dtypes import accumulator
from .layer import Layer
from .spec import Context, Spec


class Softmax(Layer):
    """The probabilities along axis 1, at the end of a deploy net."""

    BLOCKS: ClassVar[tuple[str, ...]] = ("softmax_param",)

    def __init__(self, spec: Spec, context: Context) -> None:
        super().__init__(spec, context)
        spec.only("softmax_param.axis", 1)
        spec.only("softmax_param.normalize_type", "Softmax")

    def forward(self, scores: Tensor) -> tuple[Tensor]:
        checked = checks.floating("forward", "bottom 0", scores)
        if checked.dim() < 2:
            raise ValueError(f"expected the bottom to be [N, C, ...], got shape {list(checked.shape)}")
        return (softmax(checked, 1, dtype=accumulator(checked.dtype)).to(checked.dtype),)


class Dropout(Layer):
    """Each number is 0 with probability dropout_ratio, and the others are divided by 1 - dropout_ratio; in
    training only."""

    BLOCKS: ClassVar[tuple[str, ...]] = ("dropout_param",)

    def __init__(self, spec: Spec, context: Context) -> None:
        super().__init__(spec, context)
        self.ratio: float = float(spec.get("dropout_param.dropout_ratio"))
        if not 0 < self.ratio < 1:
            spec.refuse(
                f"expected `dropout_ratio` in (0, 1), got {self.ratio:g}", "dropout_param.dropout_ratio"
            )

    def width(self, width: int | None) -> int | None:
        return width

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (dropout(checks.floating("forward", "bottom 0", x), self.ratio, self.training),)


class Flatten(Layer):
    BLOCKS: ClassVar[tuple[str, ...]] = ("flatten_param",)

    def __init__(self, spec: Spec, context: Context) -> None:
        super().__init__(spec, context)
        spec.only("flatten_param.axis", 1)
        spec.only("flatten_param.end_axis", -1)

    def width(self, width: int | None) -> int | None:
        return width

    def forward(self, x: Tensor) -> tuple[Tensor]:
        if x.dim() < 2:
            raise ValueError(f"expected the bottom to be [N, D, ...], got shape {list(x.shape)}")
        return (x.flatten(1),)


class Silence(Layer):
    """Takes blobs, so that they are no tops of the net."""

    BOTTOMS: ClassVar[tuple[int, int]] = (1, 1 << 30)
    TOPS: ClassVar[tuple[int, int]] = (0, 0)

    def forward(self, *bottoms: Tensor) -> tuple[()]:
        return ()


class Flip(Layer):
    BLOCKS: ClassVar[tuple[str, ...]] = ("flip_param",)

    def __init__(self, spec: Spec, context: Context) -> None:
        super().__init__(spec, context)
        pairs = (("flip_height", 2), ("flip_width", 3))
        self.dims: list[int] = [dim for name, dim in pairs if spec.get(f"flip_param.{name}")]

    def forward(self, x: Tensor) -> tuple[Tensor]:
        if x.dim() != 4:
            raise ValueError(f"expected the bottom to be 4-D [N, C, H, W], got shape {list(x.shape)}")
        return (x.flip(self.dims),)


class Eltwise(Layer):
    BOTTOMS: ClassVar[tuple[int, int]] = (2, 1 << 30)
    BLOCKS: ClassVar[tuple[str, ...]] = ("eltwise_param",)

    def __init__(self, spec: Spec, context: Context) -> None:
        super().__init__(spec, context)
        self.operation: str = ("PROD", "SUM", "MAX", "SORT")[spec.get("eltwise_param.operation")]
        if self.operation == "SORT":
            spec.refuse("expected `operation` to be PROD, SUM or MAX, got SORT", "eltwise_param.operation")
        self.coefficients: list[float] = list(spec.get("eltwise_param.coeff")) or [1.0] * len(spec.bottoms)
        if len(self.coefficients) != len(spec.bottoms) or (
            self.operation != "SUM" and any(c != 1.0 for c in self.coefficients)
        ):
            spec.refuse("expected `coeff` once per bottom, and with SUM only", "eltwise_param.coeff")

    def forward(self, *bottoms: Tensor) -> tuple[Tensor]:
        if any(b.shape != bottoms[0].shape for b in bottoms):
            raise ValueError(f"expected bottoms of one shape, got {[list(b.shape) for b in bottoms]}")
        if self.operation == "SUM":
            terms = [b if c == 1.0 else c * b for b, c in zip(bottoms, self.coefficients, strict=True)]
        else:
            terms = list(bottoms)
        join: Any = {"SUM": torch.add, "MAX": torch.maximum, "PROD": torch.mul}[self.operation]
        result = terms[0]
        for term in terms[1:]:
            result = join(result, term)
        return (result,)


class Slice(Layer):
    TOPS: ClassVar[tuple[int, int]] = (1, 1 << 30)
    BLOCKS: ClassVar[tuple[str, ...]] = ("slice_param",)

    def __init__(self, spec: Spec, context: Context) -> None:
        super().__init__(spec, context)
        old = spec.has("slice_param.slice_dim")
        self.axis: int = int(spec.get("slice_param.slice_dim" if old else "slice_param.axis"))
        self.points: list[int] = [int(p) for p in spec.get("slice_param.slice_point")]
        self.parts: int = len(spec.tops)
        if self.points and len(self.points) != self.parts - 1:
            spec.refuse(
                f"expected {self.parts - 1} `slice_point`, got {len(self.points)}", "slice_param.slice_point"
            )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        size = x.shape[self.axis]
        if not self.points and size % self.parts:
            raise ValueError(
                f"expected axis {self.axis} in {self.parts} equal parts, got shape {list(x.shape)}"
            )
        points = self.points or [size // self.parts * i for i in range(1, self.parts)]
        if sorted({0, size, *points}) != [0, *points, size]:
            raise ValueError(
                f"expected slice points within axis {self.axis} of {list(x.shape)}, got {points}"
            )
        return tuple(torch.tensor_split(x, points, self.axis))


class Concat(Layer):
    BOTTOMS: ClassVar[tuple[int, int]] = (1, 1 << 30)
    BLOCKS: ClassVar[tuple[str, ...]] = ("concat_param",)

    def __init__(self, spec: Spec, context: Context) -> None:
        super().__init__(spec, context)
        old = spec.has("concat_param.concat_dim")
        self.axis: int = int(spec.get("concat_param.concat_dim" if old else "concat_param.axis"))

    def forward(self, *bottoms: Tensor) -> tuple[Tensor]:
        try:
            return (torch.cat(bottoms, self.axis),)
        except (RuntimeError, IndexError) as error:
            raise ValueError(
                f"expected bottoms to fit on axis {self.axis}, got {[list(b.shape) for b in bottoms]}"
            ) from error
