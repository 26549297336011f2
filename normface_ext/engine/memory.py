"""Where the workspace of a plan cannot be had: the plan without E takes its place, and the user is told."""

from __future__ import annotations

import warnings

import torch

from .plan import Plan, plan

#: The least workspace that could not be had, by device. It is not asked for again: on CUDA an allocation that
#: fails empties torch's cache first, at every step.
_refused: dict[torch.device, int] = {}


def is_refusal(error: Exception) -> bool:
    """Whether an allocation failed. The kernels can raise only RuntimeError (csrc/checks.h)."""
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or (isinstance(error, RuntimeError) and "could not allocate" in str(error))


def refuse(op: str, failed: Plan, device: torch.device) -> None:
    _refused[device] = failed.workspace_bytes
    warnings.warn(
        f"{op}: the {failed.workspace_bytes / 2**20:.1f} MiB of the plan that keeps E could not be"
        f" allocated on {device}; from now on E is computed twice there instead (see `workspace`)",
        RuntimeWarning,
        stacklevel=2,
    )


def is_refused(wanted: Plan, device: torch.device) -> bool:
    return device in _refused and wanted.workspace_bytes >= _refused[device]


def smaller_plan(
    failed: Plan, batch: int, dim: int, classes: int, dtype: torch.dtype, device: torch.device
) -> Plan | None:
    """A plan without E in at most half the memory; None where there is none."""
    for share in (8, 4, 2):
        budget = failed.workspace_bytes // share
        try:
            found = plan(batch, dim, classes, dtype, device, workspace=budget)
        except ValueError:  # not even one class per chunk fits
            continue
        if not found.store:
            return found
    return None
