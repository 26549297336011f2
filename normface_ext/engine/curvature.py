"""Second derivatives of what is made of sums over the classes, in plain torch and in bounded memory.

The outputs of a head are f(c_y, S) of every row's target cosine and of its sums S over the classes. Its first
gradients G, of <upstream, f>, are the kernels'. Who differentiates those once more asks for the gradient of
<V, G>, and that is the derivative of <upstream, f> along V:

    <V, G> = <df/dc_y, c_y'> + <df/dS, S'>,   ' being the derivative along V

One pass over the classes finds S and S'. Autograd says on [N] numbers what <V, G> is worth per S and per S'.
A second pass takes both back to the features and the weight, tile by tile. Nothing of size N x C is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from .. import reference
from .autograd import Again, Given, first_by_kernel, no_second_derivative, no_third_derivative
from .dtypes import accumulator
from .row_state import TERMS, SweepOptions

#: Matrices of a tile's size that live at once, and such of its classes' size.
_OF_CELLS, _OF_CLASSES = 24, 12
#: Bytes of a tile where the workspace has more: a larger one is no faster.
_ENOUGH = 1 << 28
#: Rows of a tile.
_ROWS = 4096

#: What a head has besides features and weight that may have a gradient, such as the scale: [] or [N] float64.
Numbers = tuple[Tensor | None, ...]


class Tile(NamedTuple):
    rows: slice
    classes: slice
    #: bool: no cell. The row's own class, a centre that is not its class's nearest, and all of a row that
    #: does not count: its cosines may have a term beyond every number, and that times a slope of 0 is NaN.
    left_out: Tensor


class RowFormula(Protocol):
    """The outputs of a head, differentiable twice. Of rows that do not count nothing is read."""

    op: str
    labels: Tensor  # [N] int64
    counts: Tensor  # [N] bool
    eps: float
    workspace: int  # bytes
    TERMS: ClassVar[tuple[str, ...]]  # of the engine, whose formula this is
    centers: int  # of a class: rows of the weight, and labels are rows as well

    @property
    def options(self) -> SweepOptions: ...

    def sums(self, cosine: Tensor, tile: Tile, numbers: Numbers) -> tuple[Tensor, ...]:
        """S of these rows over these classes, from their cosines."""

    def outputs(self, cosine: Tensor, sums: tuple[Tensor, ...], numbers: Numbers) -> tuple[Tensor, ...]:
        """f of the target cosines [N] and of S [N] each, both float64."""


def twice_by_tiles(
    gradients: Given, formula: Callable[[], RowFormula], upstream: Given, *inputs: Tensor | None
) -> Given:
    """First gradients of ``inputs``, which are x, weight and the numbers; with their own where a graph is
    made."""
    if not torch.is_grad_enabled():
        return gradients
    made = formula()
    if made.options.term not in [TERMS[name] for name in made.TERMS]:
        return no_second_derivative(made.op, gradients, *upstream, *inputs)
    return first_by_kernel(lambda *_: gradients, _by_tiles(made, len(upstream)), *upstream, *inputs)


def _by_tiles(formula: RowFormula, outputs: int) -> Again:
    """Of gradients whose inputs are (the upstream of so many outputs, x, weight, the numbers)."""

    def again(inputs: Given, along: Given, needed: tuple[bool, ...]) -> Given:
        upstream, (x, weight, *numbers) = inputs[:outputs], inputs[outputs:]
        assert x is not None and weight is not None
        if len(x) == 0:
            none = (
                torch.zeros_like(t) if t is not None and n else None
                for t, n in zip(inputs, needed, strict=True)
            )
            return no_third_derivative(formula.op, tuple(none), *inputs, *along)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            step = _Step(formula, x, weight, tuple(numbers), along)
            given = step.gradients(upstream, needed[:outputs], needed[outputs:])
        return no_third_derivative(formula.op, given, *inputs, *along)

    return again


class _Moving(NamedTuple):
    """Unit rows, and how they move along V (None: they do not)."""

    unit: Tensor
    slope: Tensor | None


def _moving(rows: Tensor, along: Tensor | None, eps: float) -> _Moving:
    unit = reference.normalize(rows, 1, 2, eps)
    assert isinstance(unit, Tensor)
    # The derivative of x / |x| is a symmetric matrix: along V it is what it makes of a gradient V.
    return _Moving(
        unit, None if along is None else reference.normalize_backward(along, None, rows, 1, 2, eps)
    )


def _of_rows(
    rows: Tensor, along: Tensor | None, of_unit: Tensor, of_slope: Tensor | None, eps: float
) -> Tensor:
    """The gradient of the rows from those of ``_moving``."""
    with torch.enable_grad():
        leaf = rows.detach().requires_grad_()
        unit, slope = _moving(leaf, along, eps)
        total = (unit * of_unit).sum()
        if slope is not None and of_slope is not None:
            total = total + (slope * of_slope).sum()
        (gradient,) = torch.autograd.grad(total, leaf)
    return gradient


def _times(a: Tensor, b: Tensor | None) -> Tensor | float:
    return 0.0 if b is None else a @ b


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b


@contextmanager
def _leaves(*values: Tensor | None) -> Iterator[list[Tensor | None]]:
    with torch.enable_grad():
        yield [None if v is None else v.detach().requires_grad_() for v in values]


def _gradients(total: Tensor, wanted: list[Tensor | None], *, graph: bool = False) -> list[Tensor]:
    """Zeros where it does not depend on one that is there; nothing for one that is not."""
    present = [t for t in wanted if t is not None]
    if not present or not total.requires_grad:
        return [torch.zeros_like(t) for t in present]
    return list(
        torch.autograd.grad(total, present, create_graph=graph, allow_unused=True, materialize_grads=True)
    )


def _dot(pairs: list[tuple[Tensor, Tensor]], like: Tensor) -> Tensor:
    total = like.new_zeros(())
    for a, b in pairs:
        total = total + (a * b).sum()
    return total


class _Step:
    """One second backward."""

    def __init__(
        self, formula: RowFormula, x: Tensor, weight: Tensor, numbers: Numbers, along: Given
    ) -> None:
        self.formula, self.x, self.weight = formula, x, weight
        self.wide = wide = accumulator(x.dtype)
        self.given_numbers, self.numbers = numbers, [None if n is None else n.double() for n in numbers]
        along_x, self.along_weight, *along_numbers = along
        self.along_numbers = [
            torch.zeros_like(n) if v is None else v.double()
            for n, v in zip(self.numbers, along_numbers, strict=True)
            if n is not None
        ]
        counts = formula.counts[:, None]
        self.features = torch.where(counts, x.to(wide), 1)
        self.along_x = None if along_x is None else torch.where(counts, along_x.to(wide), 0)
        self.rows = _moving(self.features, self.along_x, formula.eps)
        self.own = formula.labels.clamp(0, max(0, len(weight) - 1))
        self.target = self._classes(self.own)

    def _classes(self, which: slice | Tensor) -> _Moving:
        return _moving(*self._given_classes(which), self.formula.eps)

    def _given_classes(self, which: slice | Tensor) -> tuple[Tensor, Tensor | None]:
        along = self.along_weight
        return self.weight[which].to(self.wide), None if along is None else along[which].to(self.wide)

    def _tiles(self) -> Iterator[slice]:
        """Of the classes."""
        (batch, dim), classes = self.x.shape, len(self.weight)
        cells = _OF_CELLS * min(batch, _ROWS) + _OF_CLASSES * dim
        width = max(1, min(self.formula.workspace, _ENOUGH) // (self.wide.itemsize * max(1, cells)))
        centers = self.formula.centers
        width = max(1, width // centers) * centers  # whole classes
        for first in range(0, classes, width):
            yield slice(first, min(classes, first + width))

    def _blocks(self, classes: slice) -> Iterator[Tile]:
        centers = self.formula.centers
        columns = torch.arange(classes.start, classes.stop, device=self.own.device) // centers
        for first in range(0, len(self.own), _ROWS):
            rows = slice(first, first + _ROWS)
            own = self.own[rows, None] // centers == columns
            yield Tile(rows, classes, own | ~self.formula.counts[rows, None])

    def _pooled(self, tile: Tile, cosine: Tensor) -> Tile:
        """Of a class of several centres the nearest alone counts, of equal ones the first."""
        centers = self.formula.centers
        if centers == 1:
            return tile
        nearest = cosine.unflatten(1, (-1, centers)).max(2).indices
        others = torch.arange(centers, device=cosine.device) != nearest[:, :, None]
        return tile._replace(left_out=tile.left_out | others.flatten(1))

    def _cosines(self, rows: slice, of: _Moving) -> tuple[Tensor, Tensor]:
        """(c, c') of a tile."""
        unit, slope = self.rows.unit[rows], self.rows.slope
        cosine = unit @ of.unit.t()
        moved = torch.zeros_like(cosine) if of.slope is None else unit @ of.slope.t()
        return cosine, moved if slope is None else moved + slope[rows] @ of.unit.t()

    def _target_cosines(self) -> tuple[Tensor, Tensor]:
        """(c_y, c_y'), [N] float64."""
        (x, dx), (w, dw) = self.rows, self.target
        moved = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        if dx is not None:
            moved = moved + (dx.double() * w.double()).sum(1)
        if dw is not None:
            moved = moved + (x.double() * dw.double()).sum(1)
        return (x.double() * w.double()).sum(1), moved

    def _all_sums(self) -> tuple[list[Tensor], list[Tensor]]:
        """(S, S'), [N] float64 each."""
        totals: list[Tensor] = []
        for classes in self._tiles():
            of = self._classes(classes)
            for tile in self._blocks(classes):
                parts = self._sums_of(tile, *self._cosines(tile.rows, of))
                if not totals:
                    totals = [part.new_zeros(len(self.own)) for part in parts]
                for total, part in zip(totals, parts, strict=True):
                    total[tile.rows] += part
        sums, slopes = totals[: len(totals) // 2], totals[len(totals) // 2 :]
        counts = self.formula.counts
        return [torch.where(counts, s, 1.0) for s in sums], [torch.where(counts, s, 0.0) for s in slopes]

    def _sums_of(self, tile: Tile, cosine: Tensor, moved: Tensor) -> tuple[Tensor, ...]:
        """S and S' of a tile. <factor, S'> is linear in the factor, and S' is found as its slope there."""
        tile = self._pooled(tile, cosine)
        with _leaves(cosine, *self.numbers) as (c, *numbers):
            assert c is not None
            sums = self.formula.sums(c, tile, tuple(numbers))
            factors = [torch.ones_like(s, requires_grad=True) for s in sums]
            total = _dot(list(zip(factors, sums, strict=True)), c)
            of_cosine, *of_numbers = _gradients(total, [c, *numbers], graph=True)
            pairs = [(of_cosine, moved), *zip(of_numbers, self.along_numbers, strict=True)]
            slopes = _gradients(_dot(pairs, c), [*factors])
        return *(s.detach().double() for s in sums), *(s.double() for s in slopes)

    def gradients(self, upstream: Given, need_upstream: tuple[bool, ...], needed: tuple[bool, ...]) -> Given:
        """Of the upstream, and of x, weight and the numbers."""
        counts = self.formula.counts
        cosine, cosine_slope = (torch.where(counts, c, 0) for c in self._target_cosines())
        sums, sum_slopes = self._all_sums()
        with _leaves(cosine, cosine_slope, *self.numbers) as (c, dc, *numbers):
            assert c is not None and dc is not None
            s, ds = ([t.detach().requires_grad_() for t in made] for made in (sums, sum_slopes))
            u = [None if g is None else g.detach().requires_grad_() for g in upstream]
            made = self.formula.outputs(c, tuple(s), tuple(numbers))
            pairs = [(out, g) for out, g in zip(made, u, strict=True) if g is not None]
            per_c, *rest = _gradients(_dot(pairs, c), [c, *s, *numbers], graph=True)
            per_s, per_number = rest[: len(s)], rest[len(s) :]
            total = _dot(
                [
                    (per_c, dc),
                    *zip(per_s, ds, strict=True),
                    *zip(per_number, self.along_numbers, strict=True),
                ],
                c,
            )
            found = iter(_gradients(total, [c, *s, *numbers, *u]))
        of_c = torch.where(counts, next(found), 0)
        of_s = [torch.where(counts, next(found), 0) for _ in s]
        of_numbers = [None if n is None else next(found) for n in self.numbers]
        of_upstream = tuple(next(found).to(g.dtype) if g is not None else None for g in upstream)
        slopes = [torch.where(counts, p.detach(), 0) for p in (per_c, *per_s)]
        need_x, need_weight = needed[:2]
        of_x = of_weight = None
        if any(needed):
            of_x, of_weight, of_numbers = self._taken_back(
                of_c, slopes[0], of_s, slopes[1:], of_numbers, need_weight
            )
        rounded = (
            None if g is None or n is None else g.to(n.dtype)
            for g, n in zip(of_numbers, self.given_numbers, strict=True)
        )
        given = of_x if need_x else None, of_weight, *rounded
        return (
            *(
                g if need else None
                for g, need in zip((*of_upstream, *given), (*need_upstream, *needed), strict=True)
            ),
        )

    def _taken_back(
        self,
        of_c: Tensor,
        of_dc: Tensor,
        of_s: list[Tensor],
        of_ds: list[Tensor],
        of_numbers: list[Tensor | None],
        need_weight: bool,
    ) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
        """Gradients of x, weight and the numbers, from those of c_y, c_y', S and S'."""
        wide, (x, dx) = self.wide, self.rows
        of_unit, of_slope = torch.zeros_like(x), None if dx is None else torch.zeros_like(x)
        of_weight = torch.empty_like(self.weight, dtype=wide) if need_weight else None
        for classes in self._tiles():
            of = self._classes(classes)
            per_unit, per_slope = torch.zeros_like(of.unit), torch.zeros_like(of.unit)
            for tile in self._blocks(classes):
                rows = tile.rows
                cosine, moved = self._cosines(rows, of)
                g, dg, more = self._cells(
                    tile, cosine, moved, [s[rows] for s in of_s], [s[rows] for s in of_ds]
                )
                of_numbers = [_plus(a, b) for a, b in zip(of_numbers, more, strict=True)]
                of_unit[rows] += g @ of.unit + _times(dg, of.slope)
                if of_slope is not None:
                    of_slope[rows] += dg @ of.unit
                if need_weight:
                    per_unit += g.t() @ x[rows] + (0.0 if dx is None else dg.t() @ dx[rows])
                    per_slope += dg.t() @ x[rows]
            if of_weight is not None:
                given = self._given_classes(classes)
                of_weight[classes] = _of_rows(*given, per_unit, per_slope, self.formula.eps)
        own, per_c, per_dc = self.target, of_c[:, None].to(wide), of_dc[:, None].to(wide)
        of_unit += per_c * own.unit + (0.0 if own.slope is None else per_dc * own.slope)
        if of_slope is not None:
            of_slope += per_dc * own.unit
        if of_weight is not None:
            per_unit = per_c * x + (0.0 if dx is None else per_dc * dx)
            given = self._given_classes(self.own)
            mine = _of_rows(*given, per_unit, per_dc * x, self.formula.eps)
            of_weight.index_put_(
                (self.own,), mine, accumulate=True
            )  # sorted on CUDA: the same bits every time
        of_x = _of_rows(self.features, self.along_x, of_unit, of_slope, self.formula.eps)
        of_x = torch.where(self.formula.counts[:, None], of_x, 0).to(self.x.dtype)
        return of_x, None if of_weight is None else of_weight.to(self.weight.dtype), of_numbers

    def _cells(
        self, tile: Tile, cosine: Tensor, moved: Tensor, of_s: list[Tensor], of_ds: list[Tensor]
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """The gradients of a tile's c and c', and what it adds to those of the numbers."""
        tile = self._pooled(tile, cosine)
        with _leaves(cosine, *self.numbers) as (c, *numbers):
            assert c is not None
            sums = self.formula.sums(c, tile, tuple(numbers))
            total = _dot([(s, g.to(s.dtype)) for s, g in zip(sums, of_ds, strict=True)], c)
            of_moved, *of_numbers = _gradients(total, [c, *numbers], graph=True)
            pairs = [(of_moved, moved), *zip(of_numbers, self.along_numbers, strict=True)]
            pairs += [(s, g.to(s.dtype)) for s, g in zip(sums, of_s, strict=True)]
            of_cosine, *rest = _gradients(_dot(pairs, c), [c, *numbers])
        more = iter(rest)
        return of_cosine, of_moved.detach(), [None if n is None else next(more) for n in self.numbers]
