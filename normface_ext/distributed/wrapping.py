"""Class-parallel heads inside models that DistributedDataParallel or FSDP2 wrap: what they leave alone."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from .conversion import is_spread
from .spread import DDP_IGNORES, SpreadClasses

Model = TypeVar("Model", bound=nn.Module)


def class_parallel_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of a model's class-parallel heads, by their names in it.

    Every rank has other rows of them and nobody averages their gradients, so FSDP2 is to leave them alone:
    ``fully_shard(model, ignored_params=set(class_parallel_weights(model).values()))``.

    Raises:
        TypeError: model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"class_parallel_weights: expected `model` to be a Module, got {type(model).__name__}"
        )
    return {
        f"{prefix}.{name}" if prefix else name: module.get_parameter(name)
        for prefix, module in model.named_modules()
        if isinstance(module, SpreadClasses)
        for name, parameter in module.named_parameters(recurse=False)
        if is_spread(parameter)
    }


def exclude_from_ddp(model: Model) -> Model:
    """Makes DistributedDataParallel leave the weights of a model's class-parallel heads alone; to be called
    before it gets the model, which is returned. What it was told to leave alone before, it still is. A head
    that is itself given to DistributedDataParallel says so by itself.

    Raises:
        TypeError: model.
    """
    names = class_parallel_weights(model)
    if not isinstance(model, SpreadClasses):
        setattr(model, DDP_IGNORES, [*getattr(model, DDP_IGNORES, ()), *names])
    return model
