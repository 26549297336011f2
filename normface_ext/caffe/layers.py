"""Caffe's layers of a NormFace head, one module each: constructed from their `Spec`, called with bottoms.
Here those with parameters and Normalize; ``losses`` and ``shapes`` have the others.

The constructor refuses what it does not support; forward takes the bottom blobs and returns the tuple of
tops. Parameters are named as torch names them; ``BLOBS`` lists them in Caffe's order. ``math`` and
``caffe`` are the two modes of ``normface_ext.caffe.load_head``.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .. import functional
from ..cosine.rows import unit_rows_
from ..engine import checks
from ..engine.files import quoted
from .fillers import MOST_NUMBERS, check_filler
from .layer import Layer
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


class _UnitRows(torch.autograd.Function):
    """w / ||w|| in value, w in gradient: Caffe normalises the stored weight and does not look back."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, eps: float) -> Tensor:
        return functional.normalize(weight, dim=1, eps=eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Normalize(Layer):
    """y = x / n along axis 1; a second top is n, with a gradient only where ``bp_norm`` asks for it."""

    TOPS = (1, 2)
    BLOCKS = ("normalize_param",)

    def __init__(self, spec: Spec, context: Context) -> None:
        super().__init__(spec, context)
        kind = spec.get("normalize_param.normalize_type")
        if kind not in ("L1", "L2"):
            spec.refuse(
                f"expected `normalize_type` to be 'L1' or 'L2', got {quoted(kind)}",
                "normalize_param.normalize_type",
            )
        self.p = 1 if kind == "L1" else 2
        self.eps = CAFFE_L1_EPS if self.p == 1 and context.caffe else context.eps
        self.return_norm, self.bp_norm = len(spec.tops) == 2, bool(spec.get("normalize_param.bp_norm"))
        self.fix_gradient = bool(spec.get("normalize_param.fix_gradient"))
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


class Agents(Layer):
    """A layer with the class weights [num_output, D]: its own, or those of the second bottom."""

    BOTTOMS = (1, 2)
    block: ClassVar[str]

    def __init__(self, spec: Spec, context: Context) -> None:
        super().__init__(spec, context)
        block, self.own = self.block, len(spec.bottoms) == 1
        self.hard, self.eps = context.caffe, context.eps
        self.num_output = int(spec.get(f"{block}.num_output"))
        self.normalize = bool(spec.get(f"{block}.normalize"))
        spec.only(f"{block}.axis", 1)
        spec.only(f"{block}.transpose", False, "Caffe normalises the wrong vectors with it")
        if not (1 if self.own else 0) <= self.num_output <= MOST_NUMBERS:
            spec.refuse(
                f"expected `num_output` in [1, {MOST_NUMBERS}], got {self.num_output}", f"{block}.num_output"
            )
        if not self.own and self.normalize:
            spec.refuse(
                "`normalize: true` acts on a weight of the layer's own, and here the weight is a bottom:"
                " put a Normalize layer before it",
                f"{block}.normalize",
            )
        self.weight: nn.Parameter | None
        self.declare("weight", check_filler(spec, f"{block}.weight_filler", context))
        if self.own and context.in_features is not None:
            self.shapes["weight"] = [self.num_output, context.in_features]

    def materialize(self, features: int, like: Tensor) -> None:
        """Creates and fills the weight when the first features, or a state, tell their number."""
        if self.weight is not None or not self.own:
            return
        if features < 1:
            raise ValueError("expected at least one feature for `weight`, got none")
        self.shapes["weight"] = [self.num_output, features]
        wide = self.dtype is None and like.dtype == torch.float64
        self.create(like.dtype if wide else self.dtype, like.device if self.device is None else self.device)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        given = state_dict.get(f"{prefix}weight")
        if self.weight is None and self.own and isinstance(given, Tensor) and given.dim() == 2:
            self.materialize(given.shape[1], given)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def renormalize_(self) -> None:
        """Overwrites the layer's own weight by its unit rows, as Caffe does in every forward pass."""
        if self.weight is None:
            raise ValueError(f"{self.label}: the weight has no shape yet: give `in_features`, or run forward")
        unit_rows_(self.weight, self.eps, self.label)

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


class InnerProduct(Agents):
    """<x_i, w_j>, [N, C]; with ``normalize`` the rows of w are unit rows."""

    BLOCKS = ("inner_product_param",)
    SIZE = "inner_product_param.num_output"
    block = "inner_product_param"

    def __init__(self, spec: Spec, context: Context) -> None:
        super().__init__(spec, context)
        if spec.has(f"{self.block}.distance_type"):
            spec.refuse("unknown option `inner_product_param.distance_type`", f"{self.block}.distance_type")
        self.bias: nn.Parameter | None
        self.has_bias = bool(spec.get(f"{self.block}.bias_term"))
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
            weight = _UnitRows.apply(weight, self.eps)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return (linear(x, weight.to(x.dtype), bias),)


class InnerDistance(Agents):
    """sum_k (x_ik - w_jk)^2 or sum_k |x_ik - w_jk|, [N, C]."""

    BLOCKS = ("inner_distance_param", "inner_product_param")
    SIZE = "inner_distance_param.num_output"
    SPARE_BLOBS = 1  # Caffe allocates a bias by default
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
            weight = _UnitRows.apply(weight, self.eps)
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


class Scale(Layer):
    """s times the bottom, where s is the blob within [min_value, max_value]; no gradient is masked. Caffe
    moves the blob itself in forward; here that is ``clamp_``, since a forward changes no parameter."""

    BLOCKS = ("scale_param",)
    BLOBS = ("scale",)

    def __init__(self, spec: Spec, context: Context) -> None:
        super().__init__(spec, context)
        if spec.get("scale_param.num_axes") != 0:
            spec.refuse(
                "expected `num_axes: 0`, one scale for all (the default is 1, one per class)",
                "scale_param.num_axes",
            )
        spec.only("scale_param.bias_term", False)
        self.min_value = spec.get("scale_param.min_value") if spec.has("scale_param.min_value") else -math.inf
        self.max_value = spec.get("scale_param.max_value") if spec.has("scale_param.max_value") else math.inf
        if self.min_value > self.max_value:
            spec.refuse(
                f"expected `min_value` <= `max_value`, got {self.min_value:g} and {self.max_value:g}",
                "scale_param.min_value",
            )
        self.scale: nn.Parameter
        filler = check_filler(spec, "scale_param.filler", context)
        if not spec.has("scale_param.filler"):
            filler = filler._replace(type="constant", value=1.0)
        self.declare("scale", filler, [])

    def bounded_scale(self) -> Tensor:
        return checks.bounded(self.scale, self.min_value, self.max_value)

    @torch.no_grad()
    def clamp_(self) -> None:
        self.scale.clamp_(self.min_value, self.max_value)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (checks.floating("forward", "bottom 0", x) * self.bounded_scale().to(x.dtype),)

    def extra_repr(self) -> str:
        return f"{self.wiring}, scale={float(self.bounded_scale().detach()):g}"


class Parameter(Layer):
    """A blob of its own, such as the agents of a two-bottom InnerProduct."""

    BOTTOMS = (0, 0)
    SIZE = "parameter_param.shape"
    BLOCKS = ("parameter_param",)
    BLOBS = ("weight",)

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
