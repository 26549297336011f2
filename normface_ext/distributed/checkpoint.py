"""Checkpoints of a run with sharded heads, on ``torch.distributed.checkpoint``: what is there is complete.

A checkpoint is the folder ``step-N`` of DCP's own files and a manifest with their checksums. It is written
under another name and renamed when every rank is done, so a crash while saving leaves the previous ones as
they were. It can be loaded on any number of ranks; what was damaged since is refused, and nothing that is
loaded can run code.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from ..engine.arguments import integer
from .collectives import explained
from .contents import check_fits, check_plain, nonfinite
from .manifest import NAME, Manifest
from .optim import RowOptimizer
from .storage import LoadAll, Reader, Writer, explained_failure, gathered, together

_FOLDER = re.compile(r"(saving-over-)?step-(\d+)")


def _optimizers(given: Optimizer | Iterable[Optimizer]) -> list[Optimizer]:
    """As a list, with the state that DCP saves or loads in place."""
    optimizers = [given] if isinstance(given, Optimizer) else list(given)
    for optimizer in optimizers:
        if isinstance(optimizer, RowOptimizer):
            optimizer.prepare()
    return optimizers


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _same_everywhere(step: int | None, folder: str | Path) -> None:
    """An error on every rank where they would load different steps, and wait for each other for ever."""
    steps = gathered("the comparison of checkpoints", step)
    if len(set(steps)) > 1:
        raise FileNotFoundError(
            f"load_checkpoint: expected `folder` {folder} on storage that all ranks share,"
            f" got these newest steps by rank: {steps}"
        )


# A folder that does not count is called saving-*:
#   saving-N            a draft,
#   saving-over-step-N  a checkpoint that a draft of the same step replaces, which counts where step-N is not,
#   saving-removed-*    what is being deleted, perhaps no longer whole.
_DOES_NOT_COUNT = re.compile(r"saving-(\d+|over-step-\d+|removed-(saving-over-)?step-\d+)")


def _remove(path: Path) -> None:
    """Renamed first: a crash while it is deleted leaves no half of it to be loaded."""
    removed = path.with_name(f"saving-removed-{path.name}")
    if removed.exists():
        shutil.rmtree(removed)
    shutil.rmtree(path.rename(removed))


def _clean_up(folder: Path) -> None:
    """After a run that died while saving: what it was about to replace is back, its drafts are gone."""
    for path in filter(lambda path: _DOES_NOT_COUNT.fullmatch(path.name), folder.glob("saving-*")):
        match = _FOLDER.fullmatch(path.name)
        if match and not (folder / f"step-{match[2]}").exists():
            path.rename(folder / f"step-{match[2]}")
        else:
            shutil.rmtree(path)


def _put_in_place(draft: Path, final: Path, keep: int | None) -> None:
    """The draft becomes the checkpoint. At every moment of it a whole one of the step is found."""
    replaced = final.with_name(f"saving-over-{final.name}")
    if final.exists():
        final.rename(replaced)
    draft.rename(final)
    _flush(final.parent)
    if replaced.exists():
        _remove(replaced)
    if keep is not None:
        others = [path for _, path in checkpoints(final.parent) if path != final]
        for path in others[: max(0, len(others) - (keep - 1))]:
            _remove(path)


def _flush(folder: Path) -> None:
    """The names in a folder, to storage: nothing older is deleted before the new one is safe there."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checkpoints(folder: str | Path) -> list[tuple[int, Path]]:
    """(step, path) of the complete checkpoints in a folder, oldest first."""
    found: dict[int, Path] = {}
    for path in Path(folder).glob("*step-*"):
        match = _FOLDER.fullmatch(path.name)
        if not match or not ((path / ".metadata").exists() or (path / NAME).exists()):
            continue
        if match[1] is None or int(match[2]) not in found:
            found[int(match[2])] = path
    return sorted(found.items())


def save_checkpoint(
    folder: str | Path,
    step: int,
    model: nn.Module,
    optimizers: Optimizer | Iterable[Optimizer],
    *,
    extra: Mapping[str, Any] | None = None,
    keep: int | None = 2,
    check_finite: bool = True,
) -> Path:
    """Saves a step, on all ranks together: weights, buffers (a sampler's among them), optimizer rows, extra.

    Args:
        folder: on storage that all ranks see; ``folder/step-N`` becomes the checkpoint.
        step: N, at least 0. Saved again, a step replaces itself.
        model: backbone and heads in one module (``nn.ModuleDict``, say), so that every parameter of the
            optimizers has a name.
        optimizers: one or several.
        extra: anything else (epoch, sampler states), the same on all ranks: tensors, numbers, strings,
            ``None``, and lists, tuples and dicts of them, the keys strings.
        keep: how many to leave, this one and the highest steps beside it; ``None`` for all.
        check_finite: refuse to save parameters or optimizer states with NaN or infinity, or buffers with
            NaN. A run that has gone wrong would otherwise push its last good checkpoints out.

    ``RowSGD`` and ``RowAdamW`` can be saved before their first step. To torch's own optimizers DCP then gives
    a step with gradients of zero, which their step count and, with weight decay, their momentum show.

    Returns:
        The path of the checkpoint.

    Raises:
        TypeError: step, keep; extra, or an option of an optimizer, that is no tensor and no plain value.
        ValueError: step, keep, what is not finite. Nothing is saved, and the checkpoints there are stay.
        OSError: storage failed on some rank; raised on all, with the file and the rank. The checkpoints
            before are as they were.
        RuntimeError: a rank died or came too late.
    """
    op = "save_checkpoint"
    step = integer(op, "step", step, 0)
    if keep is not None:
        keep = integer(op, "keep", keep, 1, kind="an int or None")
    folder = Path(folder)
    final, draft = folder / f"step-{step}", folder / f"saving-{step}"
    writer = Writer(draft)
    optimizer_list = _optimizers(optimizers)
    weights, states = get_state_dict(model, optimizer_list)
    state = {"model": weights, "optimizers": states, "extra": dict(extra or {})}

    def prepare() -> None:
        check_plain(op, state)
        if check_finite and (bad := nonfinite(model, optimizer_list)):
            raise ValueError(
                f"{op}: expected finite values, got NaN or infinity in {bad}; step {step} is not saved, go on"
                " from an earlier one (`check_finite=False` saves it all the same)"
            )
        if _is_first():
            folder.mkdir(parents=True, exist_ok=True)
            _clean_up(folder)

    together(f"the preparation of {draft}", prepare)
    try:
        with explained(f"saving {draft}", dist.group.WORLD):
            saved = save(state, storage_writer=writer)
        parts = together(f"the checksums of {draft}", writer.parts)
        everyone = gathered(f"the manifest of {draft}", parts)
        listing = [part for of_rank in everyone for part in of_rank]

        def finish() -> None:
            if _is_first():
                Manifest.of(step, draft, saved, listing).write(draft)
                _put_in_place(draft, final, keep)

        together(f"the end of saving {draft}", finish)
    except (CheckpointException, OSError) as error:
        if _is_first():
            shutil.rmtree(draft, ignore_errors=True)  # on a full disk its bytes are needed
        if isinstance(error, OSError):
            raise
        raise explained_failure(op, draft, error) from None
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
    saved there; it has to have the same keys. Every byte that is read is compared with its checksum, and
    nothing is assigned before everything has been read on every rank.

    Returns:
        The step, or ``None`` where the folder has no checkpoint: a run begins.

    Raises:
        TypeError: step.
        FileNotFoundError: ``step`` was given and is not there, a file of the checkpoint is not there, or the
            ranks see different checkpoints.
        ValueError: a file is damaged; or the checkpoint is of another run: a name, a size or a dtype differs,
            or an optimizer's state is missing or would be lost. The sentence names the file or the tensor.
        OSError: storage failed.
        RuntimeError: a rank died or came too late.
    """
    op = "load_checkpoint"
    if step is not None:
        step = integer(op, "step", step, kind="an int or None")
    found = [entry for entry in checkpoints(folder) if step is None or entry[0] == step]
    _same_everywhere(found[-1][0] if found else None, folder)
    if not found:
        if step is not None:
            raise FileNotFoundError(f"{op}: expected a checkpoint of step {step} in {folder}")
        return None
    loaded, path = found[-1]
    optimizer_list = _optimizers(optimizers)
    weights, states = get_state_dict(model, optimizer_list)
    state: dict[str, Any] = {"model": weights, "optimizers": states, "extra": {} if extra is None else extra}

    def look() -> Manifest:
        listed = Manifest.read(path, loaded)
        for name in [n for n in weights if n.endswith("_extra_state") and f"model.{n}" not in listed.entries]:
            del weights[name]  # then there is nothing to restore, as for load_state_dict
        check_fits(op, path, listed, state)
        return listed

    reader = Reader(path, together(f"the look at {path}", look))
    planner = LoadAll()
    try:
        with explained(f"loading {path}", dist.group.WORLD):
            load(state, storage_reader=reader, planner=planner)
    except CheckpointException as error:
        raise explained_failure(op, path, error) from None
    together(f"the groups of {path}", lambda: planner.check_groups(op, path))
    planner.assign()
    set_state_dict(
        model, optimizer_list, model_state_dict=state["model"], optim_state_dict=state["optimizers"]
    )
    if extra is not None:
        extra.update(state["extra"])
    together(f"the end of loading {path}", lambda: None)
    return loaded
