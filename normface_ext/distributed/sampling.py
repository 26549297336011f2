"""Negative class sampling: a step trains the rows' own classes and a random part of the others.

Partial FC (An et al., 2021) keeps every positive and draws negatives anew at every step. Here each class
is in or out by a hash of (seed, step, class): the draw depends neither on the number of ranks nor on what
was drawn before, so a run that resumes, on any number of ranks, goes on as it would have.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..engine import checks
from ..engine.arguments import BETWEEN_0_AND_1, INT64_MAX, INT64_MIN, integer, number
from ..engine.state import Passes, recomputing
from .shard import ClassShard

_BITS = 53  # of the hash that are used: exact in a float64


def _mix(value: Tensor) -> Tensor:
    """The finalizer of SplitMix64 (Steele, Lea, Flood, 2014) on int64, whose products wrap around."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        value = (value ^ _shift_right(value, shift)) * factor
    return value ^ _shift_right(value, 31)


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Logical, where int64's own shift copies the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def chosen(seed: Tensor, step: Tensor, classes: Tensor, rate: float) -> Tensor:
    """Which of ``classes`` (int64) are in the draw: each one with probability ``rate``, independently."""
    key = _mix(_mix(seed) + step)
    return _shift_right(_mix(key + classes * -0x61C8864680B583EB), 64 - _BITS) < int(rate * (1 << _BITS))


class ClassSampler(nn.Module):
    """Draws the classes of a step. Its seed and step are buffers: a state_dict resumes it.

    A forward pass that ``torch.utils.checkpoint`` runs again has the draw it had, and no step is counted.

    Args:
        rate: the probability of a negative class, in (0, 1).
        seed: the same on all ranks.

    Raises:
        TypeError, ValueError: rate, seed.
    """

    seed: Tensor
    step: Tensor

    def __init__(self, rate: float, seed: int = 0) -> None:
        super().__init__()
        self.rate: float = number("ClassSampler", "rate", rate, BETWEEN_0_AND_1)
        seed = integer("ClassSampler", "seed", seed, INT64_MIN, INT64_MAX)
        self.register_buffer("seed", torch.tensor(seed, dtype=torch.int64))
        self.register_buffer("step", torch.tensor(0, dtype=torch.int64))
        self._passes = Passes()

    def draw(self, places: Tensor, shard: ClassShard, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The next draw: (rows [K] of the shard, ascending, and the labels as places among those rows).

        ``places`` are labels as ``ClassShard.places`` gives them; every class named there is drawn. On
        CUDA the host waits for K. By ``labels``, as the caller gave them, a pass that is run again is known.
        """
        device = places.device
        classes = torch.arange(shard.first, shard.first + shard.count, device=device)
        drawn = chosen(self.seed.to(device), self._step_of(labels).to(device), classes, self.rate)
        here = places >= 0
        drawn[places[here]] = True
        rows = drawn.nonzero()[:, 0]
        if rows.numel() == 0:  # no class of this shard, so no label either
            return rows, places
        position = drawn.cumsum(0) - 1
        return rows, torch.where(here, position[places.clamp(min=0)], places)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        *args: Any,
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *args)
        own = {f"{prefix}{name}" for name in self._buffers}
        if not own & state_dict.keys():  # of a head that took all classes: there is nothing to resume
            missing_keys[:] = [key for key in missing_keys if key not in own]

    def _step_of(self, labels: Tensor) -> Tensor:
        """The step of this pass; the next one begins."""
        if recomputing() and checks.has_values(labels):
            return self._passes.state(type(self).__name__, labels)
        step = self.step.clone()
        if checks.has_values(labels):
            self._passes.add(labels, step)
        self.step += 1
        return step

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"
