"""What the heads ask of an optimizer: no weight decay on a scale, and Caffe's hard normalisation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..softmax.layers import NormFaceLoss


def is_scale(name: str, parameter: nn.Parameter) -> bool:
    """Whether a named parameter is the learned scale s of a head: one element, and called ``scale``."""
    return name.rpartition(".")[2] == "scale" and parameter.numel() == 1


def parameter_groups(module: nn.Module, weight_decay: float, **options: Any) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer in which the heads' learned scales and margins are not decayed.

    Weight decay pulls s towards 0 and with it the loss towards its bound at s = 0, log C; Caffe's released
    nets do so, since their Scale layer has the default ``decay_mult: 1``.

    Args:
        module: backbone, head, or both. Parameters that need no gradient are left out.
        weight_decay: of everything else.
        options: further entries of every group, such as ``lr``.

    Returns:
        One group with the weight decay and, if there is a scale or a margin, one with weight decay 0.
    """
    heads = (each for each in module.modules() if isinstance(each, NormFaceLoss))
    margins = {id(parameter) for head in heads for parameter in head.margin_parameters()}
    decayed: list[nn.Parameter] = []
    scales: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            own = is_scale(name, parameter) or id(parameter) in margins
            (scales if own else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay, **options},
        {"params": scales, "weight_decay": 0.0, **options},
    ]
    return [group for group in groups if group["params"]]


def _renormalizable(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules that offer ``renormalize_``."""
    if callable(getattr(module, "renormalize_", None)):
        yield module
        return
    for child in module.children():
        yield from _renormalizable(child)


def renormalize_after_step(optimizer: torch.optim.Optimizer, module: nn.Module) -> RemovableHandle:
    """After every ``optimizer.step()`` the weights of the heads in ``module`` become unit rows.

    Caffe's ``normalize: true`` overwrites the stored weight by its unit rows in every forward pass, in the
    TEST phase too. Here nothing is overwritten in forward: the same update, w <- normalize(w - lr g), is
    made right after the step, and ``handle.remove()`` on the returned handle ends it. The weights are
    made unit rows now as well, so that the first step starts where Caffe's does. Momentum stays as it
    is, as in Caffe.

    Raises:
        TypeError: arguments.
        ValueError: a module without ``renormalize_`` anywhere in it.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"renormalize_after_step: expected `optimizer` to be an Optimizer, got {type(optimizer).__name__}"
        )
    heads = list(_renormalizable(module))
    if not heads:
        raise ValueError(
            "renormalize_after_step: expected `module` to contain a head with `renormalize_`"
            f" (NormLinear, NormFaceLoss, ...), got {type(module).__name__} without one"
        )

    def renormalize(*_: Any) -> None:
        for head in heads:
            head.renormalize_()  # type: ignore[operator]

    renormalize()
    return optimizer.register_step_post_hook(renormalize)
