"""Where the workspace of a plan cannot be had: the plan without E takes its place, and the user is told."""

from __future__ import annotations

import warnings

import torch

from .plan import Products, plan_of_step

#: N, D, rows of the weight, dtype, device, whether the term is the softmax's, and how many rows a class has:
#: what a plan is made for.
Step = tuple[int, int, int, torch.dtype, torch.device, bool, int]

#: The least workspace that could not be had, by device. It is not asked for again: on CUDA an allocation that
#: fails empties torch's cache first, at every step.
_refused: dict[torch.device, int] = {}


def is_refusal(error: Exception) -> bool:
    """Whether an allocation failed. The kernels can raise only RuntimeError (csrc/checks.h)."""
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or (isinstance(error, RuntimeError) and "could not allocate" in str(error))


def refuse(op: str, step: Step, workspace: int) -> None:
    """The plan of this step, within a budget, could not be followed."""
    device, failed = step[4], plan_of_step(*step, workspace)
    _refused[device] = failed.workspace_bytes
    warnings.warn(
        f"{op}: the {failed.workspace_bytes / 2**20:.1f} MiB of the plan that keeps E could not be"
        f" allocated on {device}; from now on E is computed twice there instead (see `workspace`)",
        RuntimeWarning,
        stacklevel=2,
    )


def is_refused(step: Step, workspace: int) -> bool:
    device = step[4]
    return device in _refused and plan_of_step(*step, workspace).workspace_bytes >= _refused[device]


def smaller(step: Step, workspace: int) -> Products | None:
    """Without E, in at most half the memory; None where there is no such plan."""
    failed = plan_of_step(*step, workspace)
    for share in (8, 4, 2):
        budget = failed.workspace_bytes // share
        try:
            found = plan_of_step(*step, budget)
        except ValueError:  # not even one class per chunk fits
            continue
        if not found.store:
            return Products(False, budget, "auto")
    return None
