"""A trained model, made ready for where this package is not."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from .cosine.head import ScaledHead
from .cosine.layers import NormalizeLayer
from .cosine.plain import PlainNormalize, PlainNormLinear
from .engine import checks
from .engine.options import HoldsOptions
from .softmax.layers import NormFaceLoss


class LeftBehind(nn.Module):
    """In the place of a layer that is for training."""

    def __init__(self, layer: str) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError(
            f"export_ready: expected a model whose forward needs no {self.layer}, got a call of it"
        )

    def extra_repr(self) -> str:
        return self.layer


def export_ready(module: nn.Module) -> nn.Module:
    """A deep copy in which this package's layers are made of torch's own operations: for torch.jit.script and
    other tools that read a model's Python, for devices without our kernels, and to leave losses behind.

    torch.export, torch.onnx.export, torch.jit.trace and AOTInductor need no such copy: the layers do the same
    by themselves while one of those is at work.

    ``NormalizeLayer`` and ``NormLinear`` have their outputs, to the rounding of the dtype, and gradients.
    ``NormFaceLoss`` becomes its ``logits``: features [N, D] -> s cos [N, C]. A scale is the number that it is
    now, a parametrized weight its present value. Other layers are left out with their weights; RuntimeError
    where one is called nevertheless. The copy is in the mode, training or not, of what it was made from.

    Args:
        module: any module, such as a layer or a model that holds some.

    Raises:
        TypeError: not a module.
        ValueError: a head whose classes are spread over ranks.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"export_ready: expected `module` to be a Module, got {type(module).__name__}")
    copied: dict[int, object] = {}  # what deepcopy looks up before it copies
    for name, layer in module.named_modules():
        if isinstance(layer, HoldsOptions):
            copied[id(layer)] = _plain(name, layer, copied).train(layer.training)
    return copy.deepcopy(module, copied)


def _plain(name: str, layer: HoldsOptions, copied: dict[int, object]) -> nn.Module:
    if isinstance(layer, NormalizeLayer):
        return PlainNormalize(**vars(layer.options))
    if not isinstance(layer, ScaledHead):
        return LeftBehind(type(layer).__name__)
    weight = layer.weight
    if checks.is_dtensor(weight):
        raise ValueError(
            f"export_ready: expected the classes of `{name or 'module'}` on one rank, got a"
            f" {type(layer).__name__}; load its state_dict into a head of one process first"
        )
    if isinstance(weight, nn.Parameter):
        own = copy.deepcopy(weight, copied)
    else:  # of a parametrization
        own = nn.Parameter(weight.detach().clone())
    centers = layer.options.sub_centers if isinstance(layer, NormFaceLoss) else 1
    return PlainNormLinear(own, layer.scale_value(), **vars(layer.linear_options()), sub_centers=centers)
