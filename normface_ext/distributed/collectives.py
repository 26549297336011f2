"""Every communication of the class-parallel heads, and nothing else.

A step of a head costs: the rows of all ranks to every rank (`gather_rows`), a few sums per row
(`add_over_shards`), and the features' gradients back to their owners (`scatter_rows`). Ranks whose batches
differ in size agree on the largest first; shorter ones are filled with rows that nobody counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup

from ..engine import checks
from ..engine.row_state import LARGEST
from .shard import ClassShard, owners

# torch 2.13 gave both collectives new names and warns of the old ones.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


@contextmanager
def explained(what: str, group: ProcessGroup | None) -> Iterator[None]:
    """A failed collective says what failed and what to do, on every rank that is left. Without a group there
    is none."""
    try:
        yield
    except RuntimeError as error:
        if group is None:
            raise
        raise RuntimeError(
            f"normface_ext.distributed: {what} failed on rank {dist.get_rank(group)} of"
            f" {dist.get_world_size(group)}: a process of the group died, or came later than the group's"
            " timeout allows. Start again from the last checkpoint (`torchrun --max-restarts` does)."
            f" The backend says: {error}"
        ) from error


@dataclass(frozen=True)
class Batch:
    """The rows of all ranks: rank r has [r * each, (r + 1) * each), first its own, then padding.

    Attributes:
        x: [W * each, D], labels: [W * each] global labels; padding has the ignored label and zeros.
        sample_weight: [W * each] or None.
        each: rows per rank, padding included.
        mine: rows of this rank, without padding.
        rank: of this process in the group.
        need_x: the features of some rank need a gradient, so that all ranks have to scatter it.
        count: the rows of all ranks without padding, if it was asked for.
    """

    x: Tensor
    labels: Tensor
    sample_weight: Tensor | None
    each: int
    mine: int
    rank: int
    need_x: bool
    count: int | Tensor | None = None

    def check_finite(
        self, op: str, weight: Tensor, shard: ClassShard, ignore_index: int, scale: Tensor | None = None
    ) -> None:
        """ValueError on every rank, with one sentence, where a row of any rank is not finite, or on any the
        scale or a class of `weight`, whose rows [C_local centers, D] are those of this rank. All ranks have
        all rows; what only one has it tells the others."""
        kept = self.labels != ignore_index

        def of_rank(index: int) -> str:
            return f"{index % self.each} of rank {index // self.each}"

        checks.finite_rows(op, "x", self.x, checks.weighed(kept, self.sample_weight), of_rank)
        if self.sample_weight is not None:
            checks.finite_rows(op, "sample_weight", self.sample_weight, kept, of_rank)
        bad = (~weight.detach().isfinite().all(1)).nonzero()[:, 0]
        last = bad.new_full((1,), -1)
        if bad.numel():
            last = (bad[-1:] // (weight.shape[0] // shard.count)).add(shard.first)
        if scale is not None and not scale.detach().isfinite():
            last = last.new_full((1,), shard.num_classes)  # beyond every class
        worst = int(largest_over_shards(last, shard.group))
        if worst == shard.num_classes:
            raise ValueError(f"{op}: expected `scale` to be finite, got NaN or infinity")
        if worst >= 0:
            raise ValueError(f"{op}: expected `weight` to be finite, got NaN or infinity in class {worst}")

    def own(self, rows: Tensor) -> Tensor:
        """This rank's part of something per row."""
        first = self.rank * self.each
        return rows[first : first + self.mine]


def gather_rows(
    x: Tensor,
    labels: Tensor,
    group: ProcessGroup,
    *,
    ignore_index: int,
    sample_weight: Tensor | None = None,
    equal_batches: bool = False,
    counted: bool = False,
) -> Batch:
    """The batches of all ranks, in one all-gather of bytes: features, label and weight of a row together.

    Args:
        x: [N, D], any N, and D and dtype the same on all ranks. labels: [N] int64. sample_weight: [N].
            Of both there may be several of a row, [N, K], and so there are in the batch then.
        equal_batches: the caller's word that N is the same on all ranks, and that x needs a gradient on all
            of them or on none, which saves asking (a collective of 16 bytes, and on CUDA a wait of the
            host).
        counted: the batch is to know how many rows there are, which costs a collective of 8 bytes unless the
            batches are equal.
    """
    world, rank, mine = dist.get_world_size(group), dist.get_rank(group), x.shape[0]
    each, need_x = mine, x.requires_grad and torch.is_grad_enabled()
    if not equal_batches:
        each, need_x = _agreed(mine, need_x, x.device, group)
    single = labels.dim() == 1
    columns = [(x.detach(), 0), (labels[:, None] if single else labels, ignore_index)]
    if sample_weight is not None:
        columns.append((sample_weight[:, None] if single else sample_weight, 0))
    count: int | Tensor | None = None
    if counted:
        own = torch.full((), mine, dtype=torch.float64, device=x.device)
        count = world * mine if equal_batches else add_over_shards([own], group)[0]
    pieces = [_bytes(column, each, filler) for column, filler in columns]
    packed = torch.cat(pieces, dim=1)
    everyone = torch.empty((world * each, packed.shape[1]), dtype=torch.uint8, device=x.device)
    with explained("the all-gather of features", group):
        _all_gather(everyone, packed, group=group)
    parts = everyone.split([piece.shape[1] for piece in pieces], dim=1)
    unpacked = [
        part.clone(memory_format=torch.contiguous_format).view(column.dtype)  # at an aligned address
        if part.numel()
        else column.new_empty(world * each, column.shape[1])
        for part, (column, _) in zip(parts, columns, strict=True)
    ]
    if single:
        unpacked[1:] = [part[:, 0].contiguous() for part in unpacked[1:]]
    return Batch(
        unpacked[0],
        unpacked[1],
        unpacked[2] if sample_weight is not None else None,
        each,
        mine,
        rank,
        need_x,
        count,
    )


def _agreed(mine: int, need_x: bool, device: torch.device, group: ProcessGroup) -> tuple[int, bool]:
    """The largest number of rows on any rank, and whether any rank's features need a gradient: one without
    rows may have made its empty batch out of nothing."""
    if torch.compiler.is_compiling():  # the host reads the answer, of which a trace knows nothing
        torch._dynamo.graph_break(
            msg="a class-parallel head asks all ranks for their batch sizes: expected torch.compile without"
            " fullgraph=True, or a head with equal_batches=True"
        )
    most = torch.tensor([mine, need_x], dtype=torch.int64, device=device)
    with explained("the all-reduce of batch sizes", group):
        dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
    each, needed = most.tolist()
    return each, bool(needed)


def _bytes(column: Tensor, rows: int, filler: int) -> Tensor:
    """[rows, bytes of a row], rows past the column's end filled."""
    padded = column.new_full((rows, column.shape[1]), filler)
    padded[: column.shape[0]] = column
    return padded.view(torch.uint8) if padded.numel() else padded.new_empty(rows, 0, dtype=torch.uint8)


def gather_row_gradients(
    gradient: Tensor, batch: Batch, group: ProcessGroup, what: str = "the loss's gradients"
) -> Tensor:
    """The upstream gradients [N], or other numbers, of all ranks' rows: [W * each]."""
    padded = gradient.new_zeros(batch.each)
    padded[: batch.mine] = gradient
    everyone = gradient.new_empty(batch.x.shape[0])
    with explained(f"the all-gather of {what}", group):
        _all_gather(everyone, padded, group=group)
    return everyone


def add_over_shards(parts: list[Tensor], group: ProcessGroup) -> list[Tensor]:
    """Sums over the group in float64, in one all-reduce; the same bits on every rank."""
    flat = torch.cat([part.reshape(-1).double() for part in parts])
    with explained("the all-reduce of row sums", group):
        dist.all_reduce(flat, group=group)
    sums = flat.split([part.numel() for part in parts])
    return [total.view(part.shape) for total, part in zip(sums, parts, strict=True)]


def largest_over_shards(value: Tensor, group: ProcessGroup) -> Tensor:
    """The elementwise maximum over the group."""
    largest = value.clone()
    with explained("the all-reduce of maxima", group):
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    return largest


def largest_of_all(rows: Tensor, group: ProcessGroup) -> Tensor:
    """A copy of the rows' state [ROW_FIELDS, N] with their largest cosines over all shards. NaN is larger
    than anything here, as within a shard: infinity stands for it."""
    rows, own = rows.clone(), rows[LARGEST]
    rows[LARGEST] = largest_over_shards(torch.where(own.isnan(), torch.inf, own), group)
    return rows


def key_of_largest(value: Tensor, key: Tensor, group: ProcessGroup) -> Tensor:
    """For each row the `key`, float64 [N], of the rank whose value [N] is the largest: the smallest key
    where several have it. NaN is larger than anything here, as within a shard."""
    value = torch.where(value.isnan(), torch.inf, value)
    held = value == largest_over_shards(value, group)
    return -largest_over_shards(torch.where(held, -key.double(), -torch.inf), group)


def from_first(value: Tensor, group: ProcessGroup) -> Tensor:
    """What the group's first rank has; of the same shape and dtype on all."""
    value = value.clone()
    with explained("the broadcast from the first rank", group):
        dist.broadcast(value, dist.get_global_rank(group, 0), group=group)
    return value


class ScatteredRows:
    """The sum over ranks of a [W * each, D] gradient, on its way: `wait` gives this rank's rows [N, D].

    Between the two the caller can compute; the gradient must stay as it is until then.
    """

    def __init__(self, gradient: Tensor, batch: Batch, group: ProcessGroup) -> None:
        self._gradient, self._batch, self._group = gradient, batch, group
        self._mine = gradient.new_empty(batch.each, gradient.shape[1])
        with explained("the reduce-scatter of the features' gradient", group):
            waits = torch.compiler.is_compiling()  # torch.compile has the other kind only
            work = _reduce_scatter(self._mine, gradient, group=group, async_op=not waits)
        self._work = None if waits else work  # torch 2.11 traces one that waits as a tensor

    def wait(self) -> Tensor:
        with explained("the reduce-scatter of the features' gradient", self._group):
            if self._work is not None:
                self._work.wait()
        return self._mine[: self._batch.mine]


class Route:
    """Which rows of which ranks this one asks for, and which of its own the others do: agreed on once, for
    rows to travel along it to who asked and, as gradients, back.

    Args:
        wanted: [K] int64, rows of all ranks' by their global numbers, in any order and as often as wanted;
            K may differ from rank to rank.
        classes: rows of all ranks, spread as those of a ``ClassShard``.
    """

    def __init__(self, wanted: Tensor, classes: int, group: ProcessGroup) -> None:
        self._group = group
        world, rank = dist.get_world_size(group), dist.get_rank(group)
        owner, first = owners(wanted, classes, world, rank)
        self._order = owner.argsort(stable=True)
        asked = torch.bincount(owner, minlength=world)
        given = torch.empty_like(asked)
        with explained("the exchange of row counts", group):
            dist.all_to_all_single(given, asked, group=group)
        self._asked, self._given = asked.tolist(), given.tolist()
        #: [G] int64: rows of this rank's that the others want, those of the first rank first.
        self.places: Tensor = self._sent(wanted[self._order], self._asked, self._given) - first

    def _sent(self, rows: Tensor, mine: list[int], theirs: list[int]) -> Tensor:
        """[sum(theirs), ...]: of each rank what it has for this one, as bytes, which every backend sends."""
        got = rows.new_empty(sum(theirs), *rows.shape[1:])
        width = math.prod(rows.shape[1:])
        if width:
            flat, room = (t.reshape(t.shape[0], width).view(torch.uint8) for t in (rows, got))
            with explained("the exchange of rows", self._group):
                dist.all_to_all_single(room, flat, theirs, mine, group=self._group)
        return got

    def fetch(self, local: Tensor) -> Tensor:
        """[K, ...]: the wanted rows of all ranks' ``local`` ones."""
        got = self._sent(local.index_select(0, self.places), self._given, self._asked)
        rows = torch.empty_like(got)
        rows[self._order] = got
        return rows

    def give_back(self, gradient: Tensor, rows: int) -> Tensor:
        """[rows, ...]: what all ranks have for this one's rows, added."""
        got = self._sent(gradient.index_select(0, self._order), self._asked, self._given)
        return got.new_zeros(rows, *got.shape[1:]).index_add_(0, self.places, got)


class FetchedRows(Function):
    """The wanted rows [K, ...] of a weight whose rows are spread, all ranks together."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, route: Route) -> Tensor:
        ctx.route, ctx.rows = route, local.shape[0]
        return route.fetch(local)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _RowsGivenBack.apply(gradient, ctx.route, ctx.rows), None


class _RowsGivenBack(Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, route: Route, rows: int) -> Tensor:
        ctx.route = route
        return route.give_back(gradient, rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return FetchedRows.apply(gradient, ctx.route), None, None
