"""InnerProduct and InnerDistance: the layers with the class weights, or agents."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .. import functional
from ..cosine.rows import renormalize_weight_
from ..engine import checks
from ..engine.files import quoted
from .fillers import MOST_NUMBERS, check_filler
from .layer import LateLayer
from .spec import Context, Spec


class UnitRows(torch.autograd.Function):
    """w / ||w|| in value, w in gradient: Caffe normalises the stored weight and does not look back."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, eps: float) -> Tensor:
        return functional.normalize(weight, dim=1, eps=eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Agents(LateLayer):
    """A layer with the class weights [num_output, D]: its own, or those of the second bottom."""

    block: ClassVar[str]

    def __init__(self, spec: Spec, context: Context, own: bool, normalize: bool) -> None:
        super().__init__(spec, context)
        block = self.block
        self.own: bool = own
        self.normalize: bool = normalize
        self.hard: bool = context.caffe
        self.eps: float = context.eps
        self.num_output: int = int(spec.get(f"{block}.num_output"))
        spec.only(f"{block}.axis", 1)
        if not (1 if self.own else 0) <= self.num_output <= MOST_NUMBERS:
            spec.refuse(
                f"expected `num_output` in [1, {MOST_NUMBERS}], got {self.num_output}", f"{block}.num_output"
            )
        self.weight: nn.Parameter | None
        self.declare("weight", check_filler(spec, f"{block}.weight_filler", context))
        features = context.in_features if spec.width is None else spec.width
        if own and features is not None:
            self.shapes["weight"] = self.late_shape(features)

    def late_shape(self, size: int) -> list[int]:
        return [self.num_output, size]

    def is_late(self, name: str) -> bool:
        return name == "weight" and self.own

    def width(self, width: int | None) -> int | None:
        return self.num_output or None

    def renormalize_(self) -> None:
        """Overwrites the layer's own weight by its unit rows, as Caffe does in every forward pass."""
        if self.weight is None:
            raise ValueError(f"{self.label}: the weight has no shape yet: give `in_features`, or run forward")
        renormalize_weight_(self, self.eps, self.label)

    def operands(self, bottoms: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """(x [N, D], weight [C, D]) of the bottoms and the parameter, checked against each other."""
        x = checks.floating("forward", "bottom 0", bottoms[0])
        if x.dim() < 2:
            raise ValueError(f"expected bottom 0 to be [N, D, ...], got shape {list(x.shape)}")
        x = x.flatten(1)
        if self.own:
            self.materialize(x.shape[1], x)
            assert self.weight is not None
            return checks.features_and_weight(self._get_name(), x, self.weight)
        weight = bottoms[1]
        if self.num_output and weight.shape[:1] != (self.num_output,):
            raise ValueError(
                f"expected bottom 1 to be [{self.num_output}, D], got shape {list(weight.shape)}"
            )
        return checks.features_and_weight(self._get_name(), x, weight)


class Products(Agents):
    """InnerProduct and InnerDistance: the second bottom, where there is one, is the weight."""

    BOTTOMS: ClassVar[tuple[int, int]] = (1, 2)

    def __init__(self, spec: Spec, context: Context) -> None:
        block, own = self.block, len(spec.bottoms) == 1
        normalize = bool(spec.get(f"{block}.normalize"))
        super().__init__(spec, context, own, normalize)
        spec.only(f"{block}.transpose", False, "Caffe normalises the wrong vectors with it")
        if normalize and not own:
            spec.refuse(
                "`normalize: true` acts on a weight of the layer's own, and here the weight is a bottom:"
                " put a Normalize layer before it",
                f"{block}.normalize",
            )


class InnerProduct(Products):
    """<x_i, w_j>, [N, C]; with ``normalize`` the rows of w are unit rows."""

    BLOCKS: ClassVar[tuple[str, ...]] = ("inner_product_param",)
    SIZE: ClassVar[str] = "inner_product_param.num_output"
    block = "inner_product_param"

    def __init__(self, spec: Spec, context: Context) -> None:
        super().__init__(spec, context)
        if spec.has(f"{self.block}.distance_type"):
            spec.refuse("unknown option `inner_product_param.distance_type`", f"{self.block}.distance_type")
        self.bias: nn.Parameter | None
        self.has_bias: bool = bool(spec.get(f"{self.block}.bias_term"))
        if self.has_bias and not self.own:
            spec.refuse(
                "expected `bias_term: false` beside a weight that is a bottom, got true (the default)",
                f"{self.block}.bias_term",
            )
        self.register_parameter("bias", None)
        if self.has_bias:
            filler = check_filler(spec, f"{self.block}.bias_filler", context)
            self.declare("bias", filler, [self.num_output])

    @property
    def BLOBS(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("weight", "bias")[: 0 if not self.own else 2 if self.has_bias else 1]

    def forward(self, *bottoms: Tensor) -> tuple[Tensor]:
        x, weight = self.operands(bottoms)
        if self.normalize and not self.hard:
            out = functional.norm_linear(x, weight, normalize_input=False, eps=self.eps)
            return (out if self.bias is None else out + self.bias.to(out.dtype),)
        if self.normalize:
            weight = UnitRows.apply(weight, self.eps)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return (linear(x, weight.to(x.dtype), bias),)


class InnerDistance(Products):
    """sum_k (x_ik - w_jk)^2 or sum_k |x_ik - w_jk|, [N, C]."""

    BLOCKS: ClassVar[tuple[str, ...]] = ("inner_distance_param", "inner_product_param")
    SIZE: ClassVar[str] = "inner_distance_param.num_output"
    SPARE_BLOBS: ClassVar[int] = 1  # Caffe allocates a bias by default
    block = "inner_distance_param"

    def __init__(self, spec: Spec, context: Context) -> None:
        super().__init__(spec, context)
        path = f"{self.block}.distance_type"
        if spec.has("inner_product_param"):
            spec.note(
                "reads `inner_distance_param`; of `inner_product_param` only distance_type counts here",
                "inner_product_param",
            )
            if not spec.has(path) and spec.has("inner_product_param.distance_type"):
                path = "inner_product_param.distance_type"
            for name in ("num_output", "normalize", "transpose"):
                if spec.has(f"inner_product_param.{name}"):
                    spec.refuse(f"`{name}` belongs in `inner_distance_param`", f"inner_product_param.{name}")
        kind = spec.get(path)
        if kind not in ("L1", "L2"):
            spec.refuse(f"expected `distance_type` to be 'L1' or 'L2', got {quoted(kind)}", path)
        self.p = 1 if kind == "L1" else 2
        spec.only(
            f"{self.block}.update_center_only", False, "Caffe's two-bottom form reads the labels as weights"
        )

    @property
    def BLOBS(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("weight",) if self.own else ()

    def forward(self, *bottoms: Tensor) -> tuple[Tensor]:
        x, weight = self.operands(bottoms)
        if self.hard and self.normalize:
            weight = UnitRows.apply(weight, self.eps)
        if self.hard and self.p == 1:
            return (_L1OfCaffe.apply(x, weight),)
        soft = self.normalize and not self.hard
        return (functional.inner_distance(x, weight, p=self.p, normalize=soft, eps=self.eps),)


class _L1OfCaffe(torch.autograd.Function):
    """sum |x - w|, with Caffe's gradient: -1 and not -g where the difference is negative, since its `sign`
    macro lacks the outer parentheses, on CPU and GPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return functional.inner_distance(x, weight, p=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        dx, dw = torch.empty_like(x), torch.zeros_like(weight)
        for i, (row, g) in enumerate(zip(x, grad[:, :, None], strict=True)):
            difference = row - weight.to(x.dtype)
            dx[i] = torch.where(difference > 0, g, -(difference < 0).to(g.dtype)).sum(0)
            dw += torch.where(difference < 0, g, -(difference > 0).to(g.dtype)).to(dw.dtype)
        return dx, dw
