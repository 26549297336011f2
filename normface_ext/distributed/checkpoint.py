"""Checkpoints of a run with sharded heads, on ``torch.distributed.checkpoint``: what is there is complete.

A checkpoint is the folder ``step-N`` of DCP's own files. It is written under another name and renamed when
every rank is done, so a crash while saving leaves the previous ones as they were. It can be loaded on any
number of ranks.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from .collectives import explained
from .optim import RowOptimizer

_NAME = re.compile(r"step-(\d+)")


def _optimizers(given: Optimizer | Iterable[Optimizer]) -> list[Optimizer]:
    """As a list, with the state that DCP saves or loads in place."""
    optimizers = [given] if isinstance(given, Optimizer) else list(given)
    for optimizer in optimizers:
        if isinstance(optimizer, RowOptimizer):
            optimizer.prepare()
    return optimizers


def _wait_for_all(what: str) -> None:
    group = dist.group.WORLD
    if dist.is_initialized() and group is not None:
        with explained(what, group):
            dist.barrier()


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _same_everywhere(step: int | None, folder: str | Path) -> None:
    """An error on every rank where they would load different steps, and wait for each other for ever."""
    if not dist.is_initialized():
        return
    steps: list[int | None] = [None] * dist.get_world_size()
    group = dist.group.WORLD
    assert group is not None
    with explained("the comparison of checkpoints", group):
        dist.all_gather_object(steps, step)
    if len(set(steps)) > 1:
        raise FileNotFoundError(
            f"load_checkpoint: expected `folder` {folder} on storage that all ranks share,"
            f" got these newest steps by rank: {steps}"
        )


def _set_aside(checkpoint: Path) -> Path:
    """Renames it to what does not count: a crash while it is deleted leaves no half of it to be loaded."""
    return checkpoint.rename(checkpoint.with_name(f"saving-over-{checkpoint.name}"))


def checkpoints(folder: str | Path) -> list[tuple[int, Path]]:
    """(step, path) of the complete checkpoints in a folder, oldest first."""
    found = []
    for path in Path(folder).glob("step-*"):
        match = _NAME.fullmatch(path.name)
        if match and (path / ".metadata").exists():
            found.append((int(match[1]), path))
    return sorted(found)


def save_checkpoint(
    folder: str | Path,
    step: int,
    model: nn.Module,
    optimizers: Optimizer | Iterable[Optimizer],
    *,
    extra: Mapping[str, Any] | None = None,
    keep: int | None = 2,
) -> Path:
    """Saves a step, on all ranks together: weights, buffers (a sampler's among them), optimizer rows, extra.

    Args:
        folder: on storage that all ranks see; ``folder/step-N`` becomes the checkpoint.
        step: N, at least 0. Saved again, a step replaces itself.
        model: backbone and heads in one module (``nn.ModuleDict``, say), so that every parameter of the
            optimizers has a name.
        optimizers: one or several.
        extra: anything else that ``torch.save`` takes (epoch, sampler states), the same on all ranks.
        keep: how many to leave, this one and the highest steps beside it; ``None`` for all.

    ``RowSGD`` and ``RowAdamW`` can be saved before their first step. To torch's own optimizers DCP then gives
    a step with gradients of zero, which their step count and, with weight decay, their momentum show.

    Returns:
        The path of the checkpoint.

    Raises:
        ValueError: step, keep.
        RuntimeError: a rank died or came too late.
        torch.distributed.checkpoint.api.CheckpointException: storage failed on some rank; raised on all.
    """
    if step < 0:
        raise ValueError(f"save_checkpoint: expected `step` >= 0, got {step}")
    if keep is not None and keep < 1:
        raise ValueError(f"save_checkpoint: expected `keep` >= 1 or None, got {keep}")
    folder = Path(folder)
    final, draft = folder / f"step-{step}", folder / f"saving-{step}"
    if _is_first():
        folder.mkdir(parents=True, exist_ok=True)
        for left_over in folder.glob("saving-*"):  # of a run that died here
            shutil.rmtree(left_over)
    _wait_for_all("the barrier before saving")
    weights, states = get_state_dict(model, _optimizers(optimizers))
    save({"model": weights, "optimizers": states, "extra": dict(extra or {})}, checkpoint_id=draft)
    _wait_for_all("the barrier after saving")
    if _is_first():
        old = [_set_aside(final)] if final.exists() else []
        draft.rename(final)
        if keep is not None:
            others = [path for _, path in checkpoints(folder) if path != final]
            old += [_set_aside(path) for path in others[: max(0, len(others) - (keep - 1))]]
        for path in old:
            shutil.rmtree(path)
    _wait_for_all("the barrier that ends saving")
    return final


def load_checkpoint(
    folder: str | Path,
    model: nn.Module,
    optimizers: Optimizer | Iterable[Optimizer],
    *,
    extra: dict[str, Any] | None = None,
    step: int | None = None,
) -> int | None:
    """Loads the newest complete checkpoint (or that of ``step``) in place, on all ranks together.

    The number of ranks may differ from that of the run that saved it. ``extra`` is updated with what was
    saved there; it has to have the same keys.

    Returns:
        The step, or ``None`` where the folder has no checkpoint: a run begins.

    Raises:
        FileNotFoundError: ``step`` was given and is not there, or the ranks see different checkpoints.
        RuntimeError: a rank died or came too late.
    """
    found = [entry for entry in checkpoints(folder) if step is None or entry[0] == step]
    _same_everywhere(found[-1][0] if found else None, folder)
    if not found:
        if step is not None:
            raise FileNotFoundError(f"load_checkpoint: expected a checkpoint of step {step} in {folder}")
        return None
    loaded, path = found[-1]
    optimizer_list = _optimizers(optimizers)
    weights, states = get_state_dict(model, optimizer_list)
    state: dict[str, Any] = {"model": weights, "optimizers": states, "extra": {} if extra is None else extra}
    load(state, checkpoint_id=path)
    set_state_dict(model, optimizer_list, model_state_dict=weights, optim_state_dict=state["optimizers"])
    if extra is not None:
        extra.update(state["extra"])
    _wait_for_all("the barrier after loading")
    return loaded
