"""The heads of a module whose weight's gradient can be taken row by row, and why another's cannot."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..agents.layers import CContrastiveLoss, CTripletLoss
from ..engine.checks import is_dtensor
from ..sigmoid.layers import SphereFace2Loss
from ..softmax.layers import NormFaceLoss

HEADS = (NormFaceLoss, SphereFace2Loss, CContrastiveLoss, CTripletLoss)


def heads_of(owner: str, module: nn.Module) -> list[nn.Module]:
    """Those in ``module``, at least one."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"{owner}: expected `head` to be a module, got {type(module).__name__}")
    heads: list[nn.Module] = [each for each in module.modules() if isinstance(each, HEADS)]
    if not heads:
        names = ", ".join(kind.__name__ for kind in HEADS)
        raise ValueError(
            f"{owner}: expected `head` to be or to contain a head ({names}), got {type(module).__name__}"
            " without one"
        )
    return heads


def weight_of(owner: str, head: nn.Module) -> nn.Parameter:
    """Its weight, of which every step in backward writes the rows."""
    weight, name = head._parameters.get("weight"), type(head).__name__
    if weight is None:
        raise ValueError(f"{owner}: expected the weight of {name} to be a parameter, got a parametrized one")
    if is_dtensor(weight) and not hasattr(head, "shard"):
        raise ValueError(
            f"{owner}: expected the weight of {name} to be all here, or spread by distributed.shard_head, got"
            " a DTensor of fully_shard or another"
        )
    if hasattr(head, "shard") and isinstance(head, (CContrastiveLoss, CTripletLoss)):
        raise ValueError(
            f"{owner}: expected a softmax head, a sigmoid one, or a loss over agents of one process, got"
            f" {name}"
        )
    if getattr(head, "sampler", None) is not None:
        raise ValueError(
            f"{owner}: expected {name} to train on all classes, got sample_rate < 1, whose gradient is"
            " sparse: distributed.RowSGD and RowAdamW move its rows alone"
        )
    return weight


def check_layout(owner: str, weight: Tensor) -> None:
    part = weight.to_local() if is_dtensor(weight) else weight  # type: ignore[attr-defined]
    if not part.is_contiguous():
        raise ValueError(f"{owner}: expected the weight of the head to be contiguous")


def check_dtype(owner: str, weight: Tensor) -> None:
    """Of a weight that backward moves."""
    if weight.dtype not in (torch.float64, torch.float32, torch.bfloat16):
        raise TypeError(
            f"{owner}: expected the weight of the head to be float32, float64 or bfloat16, got"
            f" {weight.dtype}: float16 needs a GradScaler"
        )


def check_sharing(owner: str, module: nn.Module, head: nn.Module, weight: nn.Parameter) -> None:
    """Nobody else has the weight, and no wrapper wants to see its gradient."""
    for other in module.modules():
        if other is not head and any(each is weight for each in other._parameters.values()):
            raise ValueError(
                f"{owner}: expected the weight of {type(head).__name__} to be its own, got one that"
                f" {type(other).__name__} has as well"
            )
        if isinstance(other, nn.parallel.DistributedDataParallel):
            ignored = set(getattr(other.module, "_ddp_params_and_buffers_to_ignore", ()))
            if any(each is weight for name, each in other.module.named_parameters() if name not in ignored):
                raise ValueError(ddp_sentence(owner))


def ddp_sentence(owner: str) -> str:
    return (
        f"{owner}: expected a weight whose gradient stays on this rank, got one that DistributedDataParallel"
        " averages over the ranks; distributed.shard_head spreads the classes instead"
    )


def has_hooks(weight: Tensor) -> bool:
    """Whether somebody wants to see its gradient."""
    return bool(weight._backward_hooks) or bool(getattr(weight, "_post_accumulate_grad_hooks", None))
