"""The layers: their output and gradients are the function's, bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import normface_ext as nf

from .call import workspace_of
from .functions import OPS, Call, Tensors
from .inputs import Scalar
from .judge import Wrong, bits

LAYERS = {
    "normalize": nf.NormalizeLayer,
    "norm_linear": nf.NormLinear,
    "normface_loss": nf.NormFaceLoss,
    "inner_distance": nf.InnerDistance,
    "c_contrastive_loss": nf.CContrastiveLoss,
    "c_triplet_loss": nf.CTripletLoss,
    "pair_contrastive_loss": nf.PairContrastiveLoss,
    "triplet_loss": nf.TripletLoss,
}


def layer_of(call: Call, tensors: Tensors) -> nn.Module:
    options, weight = dict(call.options), tensors.get("weight")
    if call.op == "normalize":
        return nf.NormalizeLayer(**options, return_norm=True)
    if weight is None:
        return LAYERS[call.op](**options)
    if "scale" in call.tensors:
        options |= {"scale": float(call.tensors["scale"].value), "learn_scale": True, "max_scale": 1e6}
    if "margin" in options and call.op == "normface_loss":
        options["margin"] = nf.CombinedMargin(*options["margin"][:3], guard=(*options["margin"], None)[3])
        options["class_weight"] = tensors.get("class_weight")
    if "workspace" in options:
        options["workspace"] = workspace_of(tensors, options)
    classes, features = weight.shape[0] // options.get("sub_centers", 1), weight.shape[1]
    layer: nn.Module = LAYERS[call.op](features, classes, dtype=weight.dtype, **options)
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    return layer


def usable(call: Call) -> bool:
    """Layers have a scale above 0 and agents of their own; a scale to learn has the weight's dtype."""
    scale, weight = call.tensors.get("scale"), call.tensors.get("weight")
    if isinstance(scale, Scalar) and (scale.dtype != getattr(weight, "dtype", None) or not scale.grad):
        return False
    value = scale.value if isinstance(scale, Scalar) else call.options.get("scale", 1.0)
    lonely = call.op.startswith("c_") and "weight" not in call.tensors
    return value >= 0.01 and not lonely


def check_layer(call: Call) -> None:
    tensors = call.make()
    layer = layer_of(call, tensors)
    names = [n for n in call.tensors if n not in ("weight", "scale", "class_weight")]

    def results(outputs: Any, leaves: list[Tensor]) -> list[bytes]:
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        led = [out for out in outputs if out.requires_grad]
        slopes = torch.autograd.grad([out.sum() for out in led], leaves) if led and leaves else ()
        return [bits(t, nan=True) for t in (*outputs, *slopes)]

    leaves = [t for t in tensors.values() if t.requires_grad]
    expected = results(OPS[call.op].run(tensors, call.options), leaves)
    inputs = [tensors[n] for n in names]
    own = {"weight": getattr(layer, "weight", None), "scale": getattr(layer, "scale", None)}
    mine = [own.get(n) if n in own else t for n, t in tensors.items()]
    outputs = layer(*inputs)
    if call.op.startswith("c_"):
        outputs = outputs, layer.stats(*inputs)
    if results(outputs, [t for t in mine if t.requires_grad]) != expected:
        raise Wrong(f"{type(layer).__name__} differs from {call.op}")
