"""What goes into a checkpoint and what comes out of it: plain values only, finite numbers, the same names."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.optim import Optimizer

from ..engine.checks import FLOATING
from .manifest import Manifest
from .rows import local


def named(names: Sequence[str], most: int = 2) -> str:
    """The first of several names, for a sentence."""
    shown = ", ".join(name if len(name) <= 48 else f"...{name[-45:]}" for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _flat(state: dict[str, Any]) -> dict[str, Any]:
    """The state as DCP stores it: one entry for each tensor and for each plain value."""
    planner = DefaultSavePlanner()
    planner.set_up_planner(state)
    return dict(planner.state_dict)


def check_plain(op: str, state: dict[str, Any]) -> None:
    """Raises TypeError for what would not come back without running code."""
    _check_keys(op, "extra", state["extra"])
    for name, value in _flat(state).items():
        if isinstance(value, Tensor):
            continue
        try:
            written = io.BytesIO()
            torch.save(value, written)
            written.seek(0)
            torch.load(written, weights_only=True)
        except Exception as error:
            raise TypeError(
                f"{op}: expected tensors and plain values (numbers, strings, None, lists, tuples, dicts), got"
                f" {type(value).__name__} in {named([name])}"
            ) from error


def _check_keys(op: str, name: str, value: object) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise TypeError(
                    f"{op}: expected the keys of `{name}` to be strings, got {type(key).__name__} {key!r}"
                )
            _check_keys(op, f"{name}.{key}", inner)


def nonfinite(model: nn.Module, optimizers: Iterable[Optimizer]) -> str:
    """Names of parameters and optimizer states with NaN or infinity, and of buffers with NaN (infinity may
    mean something there); empty where there is none. Of sharded ones this rank's part is looked at."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    bad = [name for parameter, name in names.items() if not _finite(parameter)]
    bad += [name for name, buffer in model.named_buffers() if not _finite(buffer, infinity=True)]
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, Tensor) and not _finite(value):
                    bad.append(f"{key} of {names.get(parameter, 'a parameter')}")
    return named(bad)


def _finite(tensor: Tensor, infinity: bool = False) -> bool:
    values = local(tensor.detach())
    if values.is_meta or values.is_sparse or values.numel() == 0 or values.dtype not in FLOATING:
        return True
    ends = torch.stack(values.aminmax())  # NaN goes through, and no mask of the tensor's size is made
    return not bool((ends.isnan() if infinity else ~ends.isfinite()).any())


def check_fits(op: str, path: Path, listed: Manifest, state: dict[str, Any]) -> None:
    """Raises ValueError where a checkpoint is not one of this state."""
    wanted, entries = _flat(state), listed.entries
    # What the user knows by name first: an optimizer's options come last.
    missing = sorted((n for n in wanted if n not in entries), key=_is_option)
    # Of `extra` the caller takes what he asks for.
    lost = sorted((n for n in entries if n not in wanted and not n.startswith("extra.")), key=_is_option)
    if missing or lost:
        parts = [f"no {named(missing)}"] if missing else []
        parts += [f"{named(lost, 1)}, which would be lost"] if lost else []
        raise ValueError(
            f"{op}: expected {path} to be of this model and optimizer, got one with {' but '.join(parts)}"
        )
    for name, value in wanted.items():
        entry = entries[name]
        if isinstance(value, Tensor):
            expected: str | None = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        else:
            expected = None
        got = None if entry.dtype is None else f"{entry.dtype} {entry.size}"
        if got != expected:
            raise ValueError(
                f"{op}: expected {named([name])} to be {expected or 'a plain value'}, got"
                f" {got or 'a plain value'} in {path}"
            )


def _is_option(name: str) -> bool:
    return name.startswith("optimizers.param_groups.")
