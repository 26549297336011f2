"""States of one process and of several: the rows of a rank out of whole tensors, and whole tensors again."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from ..softmax.centers import as_rows, by_class
from .collectives import explained
from .shard import ClassShard, shard_range


def sharded_layout(whole: Tensor, parameter: Tensor) -> Tensor:
    """What one process has for a parameter, or for an optimizer's state of it, as ranks that spread it lay it
    out: what a rank has are rows of that, and the sub-centres of a class [C * K, ...] are one row of it. So
    is a class's number of steps, which is that of each of its centres."""
    if parameter.dim() == 3 and whole.dim() in (1, 2):
        classes, centers = parameter.shape[:2]
        if centers > 1 and whole.shape[0] == classes * centers:
            return by_class(whole, centers)[:, 0] if whole.dim() == 1 else by_class(whole, centers)
    return whole


def single_layout(values: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    """The way back from :func:`sharded_layout`, of all that an optimizer has for a parameter of one
    process."""
    found = dict(values)
    tensors = {key: value for key, value in values.items() if isinstance(value, Tensor)}
    if parameter.dim() != 2:
        return found
    for shape in {value.shape for value in tensors.values() if value.dim() == 3}:
        classes, centers, _ = shape
        if classes * centers != parameter.shape[0]:
            continue
        for key, value in tensors.items():
            if value.shape == shape:
                found[key] = as_rows(value)
            elif value.shape == (classes,):
                found[key] = value.repeat_interleave(centers)
    return found


def is_spread(tensor: object) -> TypeGuard[DTensor]:
    """Whether its rows are spread as a class-parallel head's."""
    return isinstance(tensor, DTensor) and tensor.device_mesh.ndim == 1 and tensor.placements == (Shard(0),)


def with_rows(mine: Tensor, rows: int, mesh: DeviceMesh) -> DTensor:
    """A DTensor [rows, ...] ``Shard(0)`` of this rank's rows; no rank hears of another."""
    shape = torch.Size([rows, *mine.shape[1:]])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(mine, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def _rows_here(whole: Tensor, parameter: DTensor) -> DTensor:
    """This rank's rows of what every rank has whole, as it has those of a spread parameter."""
    mesh = parameter.device_mesh
    first, count = shard_range(whole.shape[0], mesh.size(), mesh.get_local_rank())
    # A copy: with a view the whole would be kept.
    mine = whole.detach()[first : first + count].to(parameter.to_local().device, copy=True).contiguous()
    return with_rows(mine, whole.shape[0], mesh)


# A state_dict of one process, in a class-parallel head ------------------------------------------------------


def spread_state(module: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Replaces what a state_dict has whole of a module's spread parameters by this rank's rows. What does not
    fit stays, for torch to name it."""
    for name, parameter in module.named_parameters(recurse=False):
        given = state_dict.get(f"{prefix}{name}")
        if not is_spread(parameter) or not isinstance(given, Tensor) or isinstance(given, DTensor):
            continue
        whole = sharded_layout(given, parameter)
        if whole.shape == parameter.shape and not whole.is_meta:
            state_dict[f"{prefix}{name}"] = _rows_here(whole, parameter)


def load_optimizer_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """``optimizer.load_state_dict(state)``, from one process to ranks that spread parameters by rows, each of
    which takes its rows of it, or from such ranks to others or to one process.

    Called on every rank with the same state, as ``optimizer.state_dict()`` of one process or
    :func:`full_state_dict` gives it; of one that ``torch.load(path, mmap=True)`` opens this rank's rows alone
    are read. The parameters are to be in the same order, which is how torch finds them. No rank hears of
    another. ``RowSGD`` and ``RowAdamW`` do the same in their own ``load_state_dict``.

    Args:
        optimizer: any of ``torch.optim``'s that keeps its state by parameter.
        state: the same on every rank.

    Raises:
        TypeError: optimizer, or a state that is none.
        ValueError: a state of other rows; other groups than the optimizer's, as torch says it.
    """
    op = "load_optimizer_state"
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"{op}: expected `optimizer` to be an Optimizer, got {type(optimizer).__name__}")
    optimizer.load_state_dict(spread_optimizer_state(op, optimizer, state))


def spread_optimizer_state(op: str, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state with this rank's rows where the parameter's are spread."""
    if not isinstance(state, dict) or not {"state", "param_groups"} <= state.keys():
        got = "{}" if state == {} else type(state).__name__
        raise TypeError(f"{op}: expected `state` to be an optimizer's state_dict on every rank, got {got}")
    ours = _parameters(optimizer)
    theirs = [name for group in state["param_groups"] for name in group["params"]]
    known, found = dict(zip(theirs, ours, strict=False)), {}
    for name, values in state["state"].items():
        parameter = known.get(name)
        if is_spread(parameter):
            found[name] = {key: _of_rank(op, key, value, parameter) for key, value in values.items()}
        else:
            found[name] = values if parameter is None else single_layout(values, parameter)
    return {**state, "state": found}


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _of_rank(op: str, key: str, value: object, parameter: DTensor) -> object:
    """What of a parameter's state belongs to this rank: its rows, or all where it has none."""
    if not isinstance(value, Tensor) or value.dim() == 0 or isinstance(value, DTensor):
        return value
    value = sharded_layout(value, parameter)
    if value.shape[0] != parameter.shape[0]:
        raise ValueError(
            f"{op}: expected `{key}` to have the {parameter.shape[0]} rows of its parameter, got"
            f" {value.shape[0]}"
        )
    return _rows_here(value, parameter)


# And back ---------------------------------------------------------------------------------------------------


def full_state_dict(owner: nn.Module | Optimizer) -> dict[str, Any]:
    """The ``state_dict()`` of a module or an optimizer with whole tensors, as one process has it.

    All ranks call it together. The first of the ranks that share the classes gets plain tensors in host
    memory, copies that nothing moves any more; the others get {}. Rows come from one rank after another:
    beside what it returns the first has no more in memory than another's part, the others nothing. What is
    spread otherwise than by rows every rank has whole for a moment.

    What it returns loads into a head of one process, or into a class-parallel one on any number of ranks,
    by ``load_state_dict``, on every rank with the same; that of an optimizer by
    :func:`load_optimizer_state`, which knows the layouts of sub-centres.

    Args:
        owner: an ``nn.Module``, which may have heads and a backbone, or an ``Optimizer``.

    Raises:
        TypeError: owner.
        RuntimeError: a rank died or came too late.
    """
    if isinstance(owner, nn.Module):
        given, rest = {"": owner.state_dict()}, {}
    elif isinstance(owner, Optimizer):
        rest = owner.state_dict()
        given = rest.pop("state")
    else:
        raise TypeError(
            f"full_state_dict: expected `owner` to be a Module or an Optimizer, got {type(owner).__name__}"
        )
    first = _is_first(value for values in given.values() for value in values.values())
    state = {
        name: {key: _whole(value, first) for key, value in values.items()} for name, values in given.items()
    }
    if not first:
        return {}
    if isinstance(owner, Optimizer):
        return {"state": state, **copy.deepcopy(rest)}
    found = state[""]
    for prefix, module in owner.named_modules(remove_duplicate=False):  # as a state_dict names them
        key = f"{prefix}.weight" if prefix else "weight"
        # Of sub-centres, whose classes are not split.
        if isinstance(getattr(module, "shard", None), ClassShard) and found[key].dim() == 3:
            found[key] = as_rows(found[key])
    return found


def _is_first(values: Iterable[object]) -> bool:
    """Whether this rank is the first of those that have the rows of the values; of all, where no rows are
    spread."""
    spread = [value for value in values if is_spread(value)]
    if not spread:
        return not dist.is_initialized() or dist.get_rank() == 0
    return all(value.device_mesh.get_local_rank() == 0 for value in spread)


@torch.no_grad()
def _whole(value: Any, wanted: bool) -> Any:
    """A tensor's copy in host memory where it is wanted, and None elsewhere; another value as it is."""
    if not isinstance(value, Tensor):
        return value
    tensor = value.detach()
    if is_spread(tensor):
        return _joined(tensor)
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.to("cpu", copy=True) if wanted else None


def _joined(tensor: DTensor) -> Tensor | None:
    """The rows of all ranks on the first of their mesh; None on the others."""
    mesh = tensor.device_mesh
    group, rank = mesh.get_group(), mesh.get_local_rank()
    mine = tensor.to_local().contiguous()
    whole = torch.empty(tensor.shape, dtype=tensor.dtype) if rank == 0 else None
    for other in range(mesh.size()):
        first, count = shard_range(tensor.shape[0], mesh.size(), other)
        if rank not in (0, other) or not count * math.prod(tensor.shape[1:]):
            continue
        part = mine.new_empty(count, *tensor.shape[1:]) if other != rank else mine
        if other:
            with explained("the journey of rows to the first rank", group):
                sent = part.view(-1).view(torch.uint8)  # bytes, which every backend sends
                if rank == 0:
                    dist.recv(sent, dist.get_global_rank(group, other), group=group)
                else:
                    dist.send(sent, dist.get_global_rank(group, 0), group=group)
        if whole is not None:
            whole[first : first + count] = part
    return whole
