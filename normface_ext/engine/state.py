"""State that a forward pass moves: how wide it is, and what becomes of it where a backward pass runs the
forward pass again, as ``torch.utils.checkpoint`` does."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .checks import is_dtensor

#: How many are remembered.
MOST = 16


def recomputing() -> bool:
    """Whether this forward pass runs inside a backward pass: activation checkpointing does it again there,
    and no state must move twice. Not seen in a compiled step, whose compiler recomputes no mutation."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def explain_spread(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    metadata: dict[str, Any],
    errors: list[str],
) -> None:
    """Where a state_dict has DTensors to be copied into plain parameters of a module, says so in the place of
    what torch says then. The arguments are those of ``_load_from_state_dict``."""
    if metadata.get("assign_to_params_buffers", False):
        return
    for name, own in module._parameters.items():
        key = f"{prefix}{name}"
        given = state_dict.get(key)
        if own is not None and isinstance(given, Tensor) and is_dtensor(given) and not is_dtensor(own):
            errors.append(
                f"{type(module).__name__}: expected `{key}` whole in the state_dict, got one that is spread"
                " over ranks; distributed.full_state_dict gives it whole"
            )
            state_dict[key] = own.detach()


class WideState(nn.Module):
    """A module whose state stays float32 or wider when it is made ``half()`` or ``bfloat16()``: in 16 bits a
    running mean soon stops moving."""

    def wide_state(self) -> list[Tensor]:
        """The tensors of which that holds: its buffers."""
        return list(self.buffers())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        state = self.wide_state()  # kept until the end, so that no other tensor gets an id of theirs
        kept = {id(tensor) for tensor in state}

        def wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrowed = tensor.is_floating_point() and moved.dtype.itemsize < 4
            return tensor.to(moved.device) if narrowed and id(tensor) in kept else moved

        return super()._apply(wide, recurse)


@dataclass
class _Pass:
    labels: weakref.ref[Tensor]  # while they live, no other tensor is where they are
    version: int
    state: Tensor
    again: bool = False  # has been run again

    def had(self, labels: Tensor) -> bool:
        own = self.labels()
        if own is None or own.shape != labels.shape:
            return False
        return own.data_ptr() == labels.data_ptr() and self.version == _version(labels)


def _version(tensor: Tensor) -> int:
    """How often it has been changed; a tensor of inference mode does not count that."""
    return 0 if tensor.is_inference() else tensor._version


class Passes:
    """A state before each of the last forward passes of a module, found again by the pass's labels: a
    recomputation gets the very memory, whatever becomes of the features. A copy has none."""

    def __init__(self) -> None:
        self._passes: deque[_Pass] = deque(maxlen=MOST)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def add(self, labels: Tensor, state: Tensor) -> None:
        kept = [p for p in self._passes if p.labels() is not None and not (p.again and p.had(labels))]
        self._passes = deque([*kept, _Pass(weakref.ref(labels), _version(labels), state)], MOST)

    def state(self, owner: str, labels: Tensor) -> Tensor:
        """That of the pass that is run again; RuntimeError where it could be more than one or is none."""
        known = [p for p in self._passes if p.had(labels)]
        candidates = [p for p in known if not p.again] or known
        if len(candidates) != 1:
            raise RuntimeError(
                f"{owner}: expected `labels` to be those of one forward pass when a backward pass runs it"
                f" again, got those of {len(candidates)}; give the module labels from outside of what"
                " torch.utils.checkpoint runs again, a tensor per pass, or leave it out of that"
            )
        candidates[0].again = True
        return candidates[0].state
