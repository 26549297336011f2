"""Caffe's layers of a NormFace head, one module each: constructed from their `Spec`, called with bottoms.

The constructor refuses what it does not support; forward takes the bottom blobs and returns the tuple of
tops. Parameters are named as torch names them; ``BLOBS`` lists them in Caffe's order. ``math`` and
``caffe`` are the two modes of :func:`normface_ext.caffe.load_head`.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, log_softmax

from .. import _checks, functional
from ..modules import gaussian_unitball_, unit_rows_
from .spec import Context, Spec

#: -log(FLT_MIN): what a row costs at most in Caffe's SoftmaxWithLoss.
LOSS_CAP = -math.log(torch.finfo(torch.float32).tiny)
#: Stands for "no label is ignored": every other negative label is an error.
NO_IGNORED_LABEL = torch.iinfo(torch.int64).min
#: Caffe's L1 normalisation uses this on both devices.
CAFFE_L1_EPS = 1e-6
FILLERS = ("constant", "uniform", "gaussian", "gaussian_unitball", "xavier", "msra")


class Layer(nn.Module):
    BOTTOMS: ClassVar[tuple[int, int]] = (1, 1)
    TOPS: ClassVar[tuple[int, int]] = (1, 1)
    BLOCKS: ClassVar[tuple[str, ...]] = ()
    BLOBS: ClassVar[tuple[str, ...]] = ()
    #: Further blobs that Caffe stores and that have no effect while they are zero.
    SPARE_BLOBS: ClassVar[int] = 0
    #: The default loss_weight of the first top, and the tops that have no gradient.
    LOSS: ClassVar[float] = 0.0
    STATISTICS: ClassVar[tuple[int, ...]] = ()

    def __init__(self, spec: Spec, context: Context) -> None:
        super().__init__()
        self.wiring = f"{', '.join(spec.bottoms)} -> {', '.join(spec.tops)}".strip()
        self.label = str(spec)

    def blobs(self) -> list[nn.Parameter | None]:
        """Parameters in Caffe's order, None where the number of features is not known yet."""
        return [getattr(self, name) for name in self.BLOBS]

    def extra_repr(self) -> str:
        return self.wiring


class Filler(NamedTuple):
    """FillerParameter, in a form that copies and pickles."""

    type: str
    value: float
    min: float
    max: float
    mean: float
    std: float
    variance_norm: int


def check_filler(spec: Spec, path: str) -> Filler:
    filler = spec.get(path)
    if filler.type not in FILLERS:
        spec.refuse(
            f"expected `{path}.type` to be one of {', '.join(FILLERS)}, got {filler.type!r}", f"{path}.type"
        )
    if filler.sparse != -1:
        spec.refuse(f"`{path}.sparse` is not supported", f"{path}.sparse")
    return Filler(*(getattr(filler, name) for name in Filler._fields))


@torch.no_grad()
def fill_(blob: Tensor, filler: Filler) -> None:
    """Caffe's initial values, in place."""
    if filler.type == "constant":
        blob.fill_(filler.value)
    elif filler.type == "uniform":
        blob.uniform_(filler.min, filler.max)
    elif filler.type == "gaussian":
        blob.normal_(filler.mean, filler.std)
    elif filler.type == "gaussian_unitball":
        blob.copy_(
            gaussian_unitball_(blob.reshape(blob.shape[0] if blob.dim() else 1, -1)).reshape(blob.shape)
        )
    else:
        fan_in = blob.numel() / blob.shape[0] if blob.dim() else 1
        fan_out = blob.numel() / blob.shape[1] if blob.dim() > 1 else 1
        n = (fan_in, fan_out, (fan_in + fan_out) / 2)[filler.variance_norm]
        if filler.type == "xavier":
            blob.uniform_(-math.sqrt(3 / n), math.sqrt(3 / n))
        else:
            blob.normal_(0, math.sqrt(2 / n))


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
                f"expected `normalize_type` to be 'L1' or 'L2', got {kind!r}",
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
        self.dtype, self.device = context.dtype, context.device
        self.num_output = int(spec.get(f"{block}.num_output"))
        self.normalize = bool(spec.get(f"{block}.normalize"))
        spec.only(f"{block}.axis", 1)
        spec.only(f"{block}.transpose", False, "Caffe normalises the wrong vectors with it")
        if self.own and self.num_output < 1:
            spec.refuse("expected `num_output` to be >= 1, got 0", f"{block}.num_output")
        if not self.own and self.normalize:
            spec.refuse(
                "`normalize: true` acts on a weight of the layer's own, and here the weight is a bottom:"
                " put a Normalize layer before it",
                f"{block}.normalize",
            )
        self.filler = check_filler(spec, f"{block}.weight_filler")
        self.weight: nn.Parameter | None
        self.register_parameter("weight", None)

    def materialize(self, features: int, like: Tensor | None = None) -> None:
        """Creates and fills the weight, once the number of features is known."""
        if self.weight is not None or not self.own:
            return
        dtype, device = self.dtype, self.device
        if like is not None:
            device = like.device if device is None else device
            dtype = torch.float64 if dtype is None and like.dtype == torch.float64 else dtype
        blob = torch.empty(self.num_output, features, dtype=dtype, device=device)
        fill_(blob, self.filler)
        self.weight = nn.Parameter(blob, requires_grad=self.trained(0))

    def trained(self, index: int) -> bool:
        return bool(getattr(self, "lr_mults", [1.0])[index])

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
        x = _checks.floating("forward", "bottom 0", bottoms[0])
        if x.dim() < 2:
            raise ValueError(f"expected bottom 0 to be [N, D, ...], got shape {list(x.shape)}")
        x = x.flatten(1)
        if self.own:
            self.materialize(x.shape[1], x)
            assert self.weight is not None
            return _checks.features_and_weight(self._get_name(), x, self.weight)
        weight = bottoms[1]
        if self.num_output and weight.shape[:1] != (self.num_output,):
            raise ValueError(
                f"expected bottom 1 to be [{self.num_output}, D], got shape {list(weight.shape)}"
            )
        return _checks.features_and_weight(self._get_name(), x, weight)


class InnerProduct(Agents):
    """<x_i, w_j>, [N, C]; with ``normalize`` the rows of w are unit rows."""

    BLOCKS = ("inner_product_param",)
    block = "inner_product_param"

    def __init__(self, spec: Spec, context: Context) -> None:
        super().__init__(spec, context)
        if spec.has(f"{self.block}.distance_type"):
            spec.refuse("unknown option `inner_product_param.distance_type`", f"{self.block}.distance_type")
        self.bias: nn.Parameter | None
        self.register_parameter("bias", None)
        if spec.get(f"{self.block}.bias_term"):
            if not self.own:
                spec.refuse(
                    "expected `bias_term: false` beside a weight that is a bottom, got true (the default)",
                    f"{self.block}.bias_term",
                )
            bias = torch.empty(self.num_output, dtype=context.dtype, device=context.device)
            fill_(bias, check_filler(spec, f"{self.block}.bias_filler"))
            self.bias = nn.Parameter(bias)

    @property
    def BLOBS(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("weight", "bias")[: 0 if not self.own else 2 if self.bias is not None else 1]

    def forward(self, *bottoms: Tensor) -> tuple[Tensor]:
        x, weight = self.operands(bottoms)
        if self.normalize and not self.hard:
            out = functional.norm_linear(x, weight, 1.0, self.eps, normalize_input=False)
            return (out if self.bias is None else out + self.bias.to(out.dtype),)
        if self.normalize:
            weight = _UnitRows.apply(weight, self.eps)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return (linear(x, weight.to(x.dtype), bias),)


class InnerDistance(Agents):
    """sum_k (x_ik - w_jk)^2 or sum_k |x_ik - w_jk|, [N, C]."""

    BLOCKS = ("inner_distance_param", "inner_product_param")
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
            spec.refuse(f"expected `distance_type` to be 'L1' or 'L2', got {kind!r}", path)
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
    """s times the bottom. Forward moves s into [min_value, max_value] in place; no gradient is masked."""

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
        scale = torch.ones((), device=context.device, dtype=context.dtype)
        if spec.has("scale_param.filler"):
            fill_(scale, check_filler(spec, "scale_param.filler"))
        self.scale = nn.Parameter(scale)

    def bounded_scale(self) -> Tensor:
        self.scale.data.clamp_(self.min_value, self.max_value)
        return self.scale

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (_checks.floating("forward", "bottom 0", x) * self.bounded_scale().to(x.dtype),)

    def extra_repr(self) -> str:
        return f"{self.wiring}, scale={float(self.scale.detach()):g}"


class Parameter(Layer):
    """A blob of its own, such as the agents of a two-bottom InnerProduct."""

    BOTTOMS = (0, 0)
    BLOCKS = ("parameter_param",)
    BLOBS = ("weight",)

    def __init__(self, spec: Spec, context: Context) -> None:
        super().__init__(spec, context)
        shape = [int(n) for n in spec.get("parameter_param.shape.dim")]
        if not shape or min(shape) < 1:
            spec.refuse(f"expected `shape` of sizes >= 1, got {shape}", "parameter_param.shape")
            shape = [1]
        blob = torch.empty(shape, device=context.device, dtype=context.dtype)
        fill_(blob, check_filler(spec, "parameter_param.blob_filler"))
        self.weight = nn.Parameter(blob)

    def forward(self) -> tuple[Tensor]:
        return (self.weight,)

    def extra_repr(self) -> str:
        return f"{self.wiring}, {list(self.weight.shape)}"


def scores_and_labels(op: str, scores: object, labels: object, ignored: int) -> tuple[Tensor, Tensor]:
    checked = _checks.matrix(op, "bottom 0", scores, "[N, C]")
    return checked, _checks.labels(op, labels, checked, checked.shape[1], ignored)


class SoftmaxWithLoss(Layer):
    """-log softmax(scores)[label], averaged as `loss_param` says; a second top has the probabilities."""

    BOTTOMS, TOPS, LOSS = (2, 2), (1, 2), 1.0
    BLOCKS = ("softmax_param", "loss_param")
    FUSED = "NormFaceLoss"

    def __init__(self, spec: Spec, context: Context) -> None:
        super().__init__(spec, context)
        self.cap, self.return_probability = context.caffe, len(spec.tops) == 2
        spec.only("softmax_param.axis", 1)
        spec.only("softmax_param.normalize_type", "Softmax")
        gpu = "Caffe has it on the GPU only"
        spec.only("softmax_param.label_smooth_factor", 0.0, gpu)
        for name in ("hard_ratio", "cutting_point", "hard_mining_label"):
            spec.never(f"softmax_param.{name}", gpu)
        spec.never(
            "softmax_param.class_weight", "in Caffe it needs a third bottom, and forward and backward differ"
        )
        self.normalization = ("FULL", "VALID", "BATCH_SIZE", "NONE")[spec.get("loss_param.normalization")]
        if spec.has("loss_param.normalize") and not spec.has("loss_param.normalization"):
            self.normalization = "VALID" if spec.get("loss_param.normalize") else "BATCH_SIZE"
        ignored = spec.has("loss_param.ignore_label")
        self.ignore_label = spec.get("loss_param.ignore_label") if ignored else NO_IGNORED_LABEL

    def averaged(self, total: Tensor, batch: int, valid: Tensor | int) -> Tensor:
        if self.normalization == "NONE":
            return total
        return total / torch.as_tensor(valid if self.normalization == "VALID" else batch).clamp_min(1)

    def tops(
        self, x: Tensor, weight: Tensor, labels: Tensor, eps: float, scale: float | Tensor
    ) -> tuple[Tensor, ...]:
        """The loss of features x [N, D] and class weights [C, D], fused."""
        mean = self.normalization == "VALID"
        value = functional.normface_loss(
            x,
            weight,
            labels,
            scale,
            reduction="mean" if mean else "sum",
            ignore_index=self.ignore_label,
            eps=eps,
        )
        return (value if mean else self.averaged(value, len(labels), len(labels)),)

    def forward(self, scores: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        scores, labels = scores_and_labels("SoftmaxWithLoss", scores, labels, self.ignore_label)
        wide = scores if scores.dtype == torch.float64 else scores.float()
        logs = log_softmax(wide, 1)
        kept = labels != self.ignore_label
        losses = -logs.gather(1, torch.where(kept, labels, 0)[:, None]).squeeze(1)
        if self.cap:  # -log(max(p, FLT_MIN)) in value, p - 1 in gradient
            losses = losses + (losses.detach().clamp_max(LOSS_CAP) - losses.detach())
        total = torch.where(kept, losses, torch.zeros_like(losses)).sum()
        loss = self.averaged(total, len(labels), kept.sum())
        return (loss, logs.exp()) if self.return_probability else (loss,)


class DistanceLoss(Layer):
    """A metric loss over given distances [N, C]; a second top has its statistics, without a gradient."""

    BOTTOMS, TOPS, LOSS, STATISTICS = (2, 2), (1, 2), 1.0, (1,)
    #: The option names of normface_ext where Caffe's differ.
    RENAMED: ClassVar[dict[str, str]] = {"positive_weight": "pos_weight", "negative_weight": "neg_weight"}
    FUSED: ClassVar[str]

    def __init__(self, spec: Spec, context: Context) -> None:
        super().__init__(spec, context)
        self.mode, self.return_statistics = context.mode, len(spec.tops) == 2
        (block,) = self.BLOCKS
        options = {
            field.name: spec.get(f"{block}.{field.name}") for field in spec.get(block).DESCRIPTOR.fields
        }
        self.options: dict[str, Any] = {
            self.RENAMED.get(name, name): value for name, value in options.items()
        }

    def loss(self, x: Tensor, weight: Tensor | None, labels: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def forward(self, distances: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        return self.tops(distances, None, labels, 0.0)

    def tops(self, x: Tensor, weight: Tensor | None, labels: Tensor, eps: float) -> tuple[Tensor, ...]:
        """The tops of distances x [N, C], or fused of features x [N, D] and agents [C, D]."""
        loss, statistics = self.loss(x, weight, labels, eps)
        return (loss, statistics) if self.return_statistics else (loss,)


class GeneralContrastiveLoss(DistanceLoss):
    """C-contrastive; its statistics are (mean positive, mean negative hinge)."""

    BLOCKS = ("general_contrastive_loss_param",)
    RENAMED: ClassVar[dict[str, str]] = {
        **DistanceLoss.RENAMED,
        "positive_margin": "pos_margin",
        "negative_margin": "neg_margin",
        "max_negative_only": "hardest_only",
    }
    FUSED = "CContrastiveLoss"
    intra_mae: Tensor

    def __init__(self, spec: Spec, context: Context) -> None:
        super().__init__(spec, context)
        (block,) = self.BLOCKS
        if not spec.has(f"{block}.normalize_negative"):
            self.options["normalize_negative"] = None
        elif self.options["normalize_negative"] <= 0:
            spec.refuse(
                "expected `normalize_negative` > 0, since Caffe divides by it", f"{block}.normalize_negative"
            )
        if spec.has(f"{block}.square"):
            spec.note("`square` is declared in caffe.proto but no Caffe code reads it", f"{block}.square")
        del self.options["square"]
        self.add_intra_mae, self.cap = (self.options.pop(n) for n in ("add_intra_mae", "max_negative_margin"))
        if self.add_intra_mae:
            self.register_buffer("intra_mae", torch.zeros((), device=context.device, dtype=context.dtype))

    def loss(self, x: Tensor, weight: Tensor | None, labels: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        options = dict(self.options)
        if self.add_intra_mae:
            options["neg_margin"] = options["neg_margin"] + self.intra_mae
        loss, statistics = functional.c_contrastive_loss(
            x,
            weight,
            labels,
            mode=self.mode,
            ignore_index=NO_IGNORED_LABEL,
            return_stats=True,
            eps=eps,
            **options,
        )
        if self.add_intra_mae:
            moved = (0.99 * self.intra_mae + 0.01 * statistics[0].to(self.intra_mae)).clamp_max(self.cap)
            if self.training:
                self.intra_mae.copy_(moved)
            statistics = torch.cat([statistics, moved.to(statistics)[None]])
        return loss, statistics


class GeneralTripletLoss(DistanceLoss):
    """C-triplet; its statistics are (mean positive, mean negative distance)."""

    BLOCKS = ("general_triplet_loss_param",)
    FUSED = "CTripletLoss"

    def loss(self, x: Tensor, weight: Tensor | None, labels: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return functional.c_triplet_loss(
            x, weight, labels, mode=self.mode, ignore_index=NO_IGNORED_LABEL, return_stats=True, eps=eps,
            **self.options,
        )  # fmt: skip


def accuracy(
    scores: Tensor,
    labels: Tensor,
    *,
    min_is_better: bool = False,
    top_k: int = 1,
    ignore_label: int | None = None,
) -> Tensor:
    """The fraction of rows whose label is among the ``top_k`` best scores (Caffe ``Accuracy``).

    Ties go as in Caffe, which sorts (score, class) pairs: to the larger class where larger is better, to
    the smaller class with ``min_is_better`` (distances).

    Args:
        scores: [N, C], similarities or distances. labels: [N] int64.
        ignore_label: rows with it do not count. Without a row the accuracy is 0 / 0, NaN, as in Caffe.

    Returns:
        A 0-d tensor, float64 for float64 scores and float32 otherwise.

    Raises:
        ValueError: shapes, top_k, NaN among the scores. IndexError: a label out of range.
    """
    ignored = NO_IGNORED_LABEL if ignore_label is None else ignore_label
    scores, labels = scores_and_labels("accuracy", scores, labels, ignored)
    if not 1 <= top_k <= scores.shape[1]:
        raise ValueError(f"accuracy: expected `top_k` in [1, {scores.shape[1]}], got {top_k}")
    if scores.isnan().any():
        row = int(scores.isnan().any(1).nonzero()[0])
        raise ValueError(f"accuracy: expected `scores` without NaN, got one in row {row}")
    kept = labels != ignored
    safe = torch.where(kept, labels, 0)[:, None]
    own, columns = scores.gather(1, safe), torch.arange(scores.shape[1], device=scores.device)
    if min_is_better:
        before = (scores < own) | ((scores == own) & (columns < safe))
    else:
        before = (scores > own) | ((scores == own) & (columns > safe))
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    return ((before.sum(1) < top_k) & kept).sum().to(wide) / kept.sum()


class Accuracy(Layer):
    BOTTOMS, STATISTICS = (2, 2), (0,)
    BLOCKS = ("accuracy_param",)

    def __init__(self, spec: Spec, context: Context) -> None:
        super().__init__(spec, context)
        spec.only("accuracy_param.axis", 1)
        self.min_is_better, self.top_k = (
            spec.get("accuracy_param.min_is_better"),
            spec.get("accuracy_param.top_k"),
        )
        ignored = spec.has("accuracy_param.ignore_label")
        self.ignore_label = spec.get("accuracy_param.ignore_label") if ignored else None

    @torch.no_grad()
    def forward(self, scores: Tensor, labels: Tensor) -> tuple[Tensor]:
        return (
            accuracy(
                scores,
                labels,
                min_is_better=self.min_is_better,
                top_k=self.top_k,
                ignore_label=self.ignore_label,
            ),
        )


class Flip(Layer):
    BLOCKS = ("flip_param",)

    def __init__(self, spec: Spec, context: Context) -> None:
        super().__init__(spec, context)
        pairs = (("flip_height", 2), ("flip_width", 3))
        self.dims = [dim for name, dim in pairs if spec.get(f"flip_param.{name}")]

    def forward(self, x: Tensor) -> tuple[Tensor]:
        if x.dim() != 4:
            raise ValueError(f"expected the bottom to be 4-D [N, C, H, W], got shape {list(x.shape)}")
        return (x.flip(self.dims),)


class Eltwise(Layer):
    BOTTOMS = (2, 1 << 30)
    BLOCKS = ("eltwise_param",)

    def __init__(self, spec: Spec, context: Context) -> None:
        super().__init__(spec, context)
        self.operation = ("PROD", "SUM", "MAX", "SORT")[spec.get("eltwise_param.operation")]
        if self.operation == "SORT":
            spec.refuse("expected `operation` to be PROD, SUM or MAX, got SORT", "eltwise_param.operation")
        self.coefficients = list(spec.get("eltwise_param.coeff")) or [1.0] * len(spec.bottoms)
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
    TOPS = (1, 1 << 30)
    BLOCKS = ("slice_param",)

    def __init__(self, spec: Spec, context: Context) -> None:
        super().__init__(spec, context)
        old = spec.has("slice_param.slice_dim")
        self.axis = int(spec.get("slice_param.slice_dim" if old else "slice_param.axis"))
        self.points, self.parts = [int(p) for p in spec.get("slice_param.slice_point")], len(spec.tops)
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
    BOTTOMS = (1, 1 << 30)
    BLOCKS = ("concat_param",)

    def __init__(self, spec: Spec, context: Context) -> None:
        super().__init__(spec, context)
        old = spec.has("concat_param.concat_dim")
        self.axis = int(spec.get("concat_param.concat_dim" if old else "concat_param.axis"))

    def forward(self, *bottoms: Tensor) -> tuple[Tensor]:
        try:
            return (torch.cat(bottoms, self.axis),)
        except (RuntimeError, IndexError) as error:
            raise ValueError(
                f"expected bottoms to fit on axis {self.axis}, got {[list(b.shape) for b in bottoms]}"
            ) from error


#: Caffe's name of every type that `load_head` knows.
TYPES: dict[str, type[Layer]] = {
    kind.__name__: kind
    for kind in (
        Accuracy, Concat, Eltwise, Flip, GeneralContrastiveLoss, GeneralTripletLoss, InnerDistance,
        InnerProduct, Normalize, Parameter, Scale, Slice, SoftmaxWithLoss,
    )
}  # fmt: skip
