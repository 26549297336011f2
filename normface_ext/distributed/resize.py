"""Classes that come, go or change places in a class-parallel head: rows move to the rank that has them then.

Every rank asks those that have the old rows for its new ones, ``BLOCK`` at a time: beside its old and its new
rows no rank has more in memory than it asks for, and is asked for, in one go.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..cosine.rows import gaussian_unitball_
from ..engine import checks
from ..softmax.carry import Carrier
from ..softmax.resize import Asked, Checked, Resizing
from .collectives import FetchedRows, Route, add_over_shards, from_first
from .conversion import is_spread, with_rows
from .shard import ClassShard, shard_range
from .storage import gathered, together

if TYPE_CHECKING:
    from .modules import ShardedNormFaceLoss

#: Rows that a rank asks for at a time.
BLOCK = 1 << 14
#: New rows that are drawn at a time; a multiple of 16, the numbers that torch draws in one go.
_DRAWN = 1 << 12


class SpreadCarrier(Carrier):
    """Carries rows between the ranks of a group; what every rank has whole it carries as in one process."""

    def __init__(
        self,
        op: str,
        source: Tensor,
        new: Tensor,
        old: ClassShard,
        optimizers: Sequence[Optimizer],
        device: torch.device,
    ) -> None:
        super().__init__(op, source, new, old.num_classes, optimizers)
        self.old: ClassShard = old
        self.here: ClassShard = ClassShard.of(len(source), old.group)
        self.device: torch.device = device
        first, after = torch.searchsorted(new, torch.tensor([self.here.first, self.here.after])).tolist()
        #: Those of `new` that this rank has.
        self.mine: slice = slice(first, after)
        self._places = (new[self.mine] - self.here.first).to(device)
        self._routes: list[tuple[Tensor, Route]] | None = None

    def of(self, old: Tensor, first: Tensor | float) -> Tensor:
        """Of a spread tensor this rank's rows; `first` are those of its new classes."""
        if not is_spread(old):
            return super().of(old, first)
        mine = old.to_local().detach()
        rows = mine.new_empty(self.here.count, *old.shape[1:])
        for places, route in self._ways():
            rows[places] = route.fetch(mine)
        self.begin(rows, self._places, first)
        return with_rows(rows, self.here.num_classes, old.device_mesh)

    def _ways(self) -> list[tuple[Tensor, Route]]:
        """(places in this rank's new rows, where their rows are), by and by; as many on every rank."""
        if self._routes is None:
            self._routes = []
            mine = self.source[self.here.first : self.here.after].to(self.device)
            for begin in range(0, shard_range(len(self.source), self.old.world, 0)[1], BLOCK):
                block = mine[begin : begin + BLOCK]
                kept = (block >= 0).nonzero()[:, 0]
                route = Route(block[kept], self.classes, self.old.group)
                self._routes.append((kept + begin, route))
        return self._routes

    def new_rows(self, values: Tensor) -> Tensor:
        if not isinstance(values, DTensor):
            return super().new_rows(values)
        return values.to_local()[self._places]

    def travels(self, old: Tensor) -> tuple[str, ...]:
        """What of a tensor goes from rank to rank beside its values, in the order in which it does."""
        found = [] if old.grad is None else ["grad"]
        for optimizer in self.optimizers:
            state = optimizer.state.get(old, {})
            found += [
                f"{type(optimizer).__name__} {name}" for name, value in state.items() if is_spread(value)
            ]
        return tuple(found)

    def check_state(self, optimizer: str, name: str, value: object, old: Tensor) -> None:
        super().check_state(optimizer, name, value, old)
        spread = not isinstance(value, Tensor) or is_spread(value) or not is_spread(old)
        if not spread and self.has_rows(name, value, old):  # type: ignore[arg-type]
            raise TypeError(
                f"{self.op}: expected `optimizer` to keep its rows where the weight's are, got {optimizer}'s"
                f" `{name}`, which is elsewhere"
            )


class SpreadResizing(Resizing):
    """What it takes to resize a class-parallel head: all ranks together."""

    head: ShardedNormFaceLoss

    @property
    def _group(self) -> ProcessGroup:
        return self.head.shard.group

    @property
    def _device(self) -> torch.device:
        weight = self.head.weight
        assert isinstance(weight, DTensor)
        return weight.to_local().device

    def agreed(self, check: Callable[[], Checked]) -> Checked:
        return together("the look at the arguments", check, self._group)

    def check_weight(self, op: str) -> None:
        if not is_spread(self.head.weight):
            raise TypeError(f"{op}: expected a weight that is spread by rows over a 1-D mesh")

    def check_same(self, op: str, asked: Asked) -> None:
        source = asked.carrier.source
        told = len(source), asked.labelled is None, hashlib.sha256(source.numpy().tobytes()).hexdigest()
        assert isinstance(asked.carrier, SpreadCarrier)
        mine = told, asked.carrier.travels(self.head.weight)
        heard = gathered("the comparison of arguments", mine, self._group)
        if len(everyone := {of_rank for of_rank, _ in heard}) > 1:
            counts = sorted({n for n, *_ in everyone})
            shown = f"`n` {', '.join(map(str, counts))}" if len(counts) > 1 else "others"
            raise ValueError(
                f"{op}: expected the same `n`, `keep` and `init` on every rank of the head, got {shown}"
            )
        if len({of_rank for _, of_rank in heard}) > 1:
            raise ValueError(
                f"{op}: expected the same `optimizer` on every rank of the head, with state and gradient of"
                " the weight on all of them or on none, got others"
            )

    def carrier(
        self, op: str, source: Tensor, new: Tensor, classes: int, optimizers: Sequence[Optimizer]
    ) -> Carrier:
        return SpreadCarrier(op, source, new, self.head.shard, optimizers, self._device)

    def drawn(self, asked: Asked, generator: torch.Generator | None) -> Tensor:
        """This rank's new rows. All are drawn on every rank, a block at a time, by the first rank's
        generator: they are those of one process. A generator that was at the same place goes on from the
        same place, as it does there."""
        weight, centers = self.head.weight, self.head.options.sub_centers
        count, width = len(asked.carrier.new) * centers, weight.shape[-1]
        wanted = slice(self._mine(asked).start * centers, self._mine(asked).stop * centers)
        found = torch.empty(wanted.stop - wanted.start, width, dtype=weight.dtype)
        if not count:
            return found
        own = torch.default_generator if generator is None else generator
        before = own.get_state()
        state = from_first(before.to(self._device), self._group).to(before.device)
        drawing = torch.Generator(own.device)
        drawing.set_state(state)
        for begin, end in _blocks(count):
            block = torch.empty(end - begin, width, dtype=weight.dtype, device=own.device)
            gaussian_unitball_(block, generator=drawing)
            first, after = max(begin, wanted.start), min(end, wanted.stop)
            if first < after:
                found[first - wanted.start : after - wanted.start] = block[first - begin : after - begin]
        if torch.equal(before, state):
            own.set_state(drawing.get_state())
        return found.to(self._device)

    def summed(self, sums: Tensor) -> Tensor:
        (total,) = add_over_shards([sums.to(self._device)], self._group)
        return total.to(sums.device)

    def kept(self, asked: Asked, begin: int, end: int) -> slice:
        mine = self._mine(asked)
        first = min(max(mine.start, begin), end)
        return slice(first - begin, max(first, min(mine.stop, end)) - begin)

    def _mine(self, asked: Asked) -> slice:
        assert isinstance(asked.carrier, SpreadCarrier)
        return asked.carrier.mine

    def finish(self, classes: int) -> None:
        super().finish(classes)
        self.head.shard = ClassShard.of(classes, self._group)

    def check_labels(self, op: str, labels: Tensor) -> None:
        checks.label_range(op, labels, self.head.num_classes, None)

    def rows(self, labels: Tensor) -> Tensor:
        weight = self.head.weight
        assert isinstance(weight, DTensor)
        route = Route(labels.long(), self.head.num_classes, self._group)
        rows: Tensor = FetchedRows.apply(weight.to_local(), route)
        return rows


def _blocks(count: int) -> list[tuple[int, int]]:
    """[0, count) in parts whose draws one after another are those of one draw: the last, in which torch has
    numbers left over, is no short one."""
    bounds = [*range(0, max(count - _DRAWN, 0) + 1, _DRAWN), count]
    return list(pairwise(bounds))
