"""Recipes of tensors: small, printable, drawn by Hypothesis, and the same tensor whenever they are made.

A recipe names what its rows are instead of holding numbers, so that a failing call prints as a few lines of
Python and shrinks to the kind of row that it takes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = {"f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
#: Powers of ten that rows are multiplied by: what a row may be, and what its squared distances still hold.
EXPONENTS = {"f64": 150, "f32": 30, "f16": 4, "bf16": 30}
SQUARABLE = {"f64": 150, "f32": 17, "f16": 3, "bf16": 17}
LAYOUTS = ("contiguous", "transposed", "sliced", "offset", "expanded")
ORDINARY = ("plain", "shared", "opposite", "basis", "small integers", "spike", "ones", "offset")
POISON = ("nan", "inf")
#: Around the edges of vectors, warps, tiles and blocks.
EDGES = (1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class Rows:
    """[rows, dim]; row i is of kind kinds[i % len(kinds)]: a name of the tuples above, "mixed", or a power of
    ten that multiplies a Gaussian row. "shared" rows have directions that tensors have in common, so that
    cosines of exactly 1 and, with "opposite", -1 come up."""

    rows: int
    dim: int
    dtype: str = "f32"
    kinds: tuple[str, ...] = ("plain",)
    seed: int = 0
    layout: str = "contiguous"
    grad: bool = True

    def make(self) -> Tensor:
        dtype, limit = DTYPES[self.dtype], EXPONENTS[self.dtype]
        generator = _generator(self.seed + 1)
        values = torch.randn(self.rows, self.dim, generator=generator, dtype=torch.float64)
        for i in range(self.rows):
            kind = self.kinds[0 if self.layout == "expanded" else i % len(self.kinds)]
            row = values[i]
            if kind in ("shared", "opposite"):
                # Few bits: exact in every dtype, and so are its multiples by powers of two.
                common = torch.randint(-12, 13, (self.dim,), generator=_generator(i // 2)).double() + 0.5
                values[i] = common * (2.0 ** (i % 5 - 2)) * (-1 if kind == "opposite" else 1)
            elif kind == "basis":
                values[i] = 0
                values[i, (self.seed + i) % self.dim] = (-1.0) ** i * 2.0 ** (i % 3)
            elif kind == "small integers":
                values[i] = (2 * row).round()
                values[i, i % self.dim] = 1.0
            elif kind == "spike":
                values[i] = 1e-3 * row
                values[i, i % self.dim] = 1.0
            elif kind == "ones":
                values[i] = 1
            elif kind == "offset":
                values[i] = 1000 + row
            elif kind == "zero":
                values[i] = 0
            elif kind == "denormal":
                values[i] = torch.finfo(dtype).smallest_normal / 64 * (4 * row).round()
                values[i, i % self.dim] = torch.finfo(dtype).smallest_normal / 8
            elif kind in POISON:
                values[i, i % self.dim] = math.nan if kind == "nan" else (-1) ** i * math.inf
            elif kind == "mixed":
                values[i] = row * 10 ** (limit * (2 * torch.rand(self.dim, generator=generator).double() - 1))
            elif kind != "plain":
                values[i] = row * float(kind)
        return self._laid(values.to(dtype)).requires_grad_(self.grad)

    def _laid(self, values: Tensor) -> Tensor:
        if self.layout == "transposed":
            return values.t().contiguous().t()
        if self.layout == "sliced":
            wide = values.new_full((self.rows, 2 * self.dim + 1), 7.0)
            wide[:, 1::2] = values
            return wide[:, 1::2]
        if self.layout == "offset":
            flat = values.new_full((values.numel() + 3,), 7.0)
            flat[3:] = values.flatten()
            return flat[3:].view(self.rows, self.dim)
        if self.layout == "expanded" and self.rows:
            return values[:1].expand(self.rows, self.dim)
        return values

    def has(self, *kinds: str) -> bool:
        return any(kind in kinds for kind in self.kinds[: max(1, self.rows)])


@dataclass(frozen=True)
class Labels:
    """[count] in [0, classes) or ignore: "random", "same", "ends", "some ignored" or "ignored"."""

    count: int
    classes: int
    kind: str = "random"
    ignore: int = -100
    seed: int = 0
    strided: bool = False

    def make(self) -> Tensor:
        made = torch.randint(self.classes, (self.count,), generator=_generator(self.seed))
        if self.kind == "same":
            made[:] = self.seed % self.classes
        elif self.kind == "ends":
            made[::2], made[1::2] = 0, self.classes - 1
        elif self.kind == "some ignored":
            made[torch.rand(self.count, generator=_generator(self.seed + 1)) < 0.4] = self.ignore
        elif self.kind == "ignored":
            made[:] = self.ignore
        if self.strided:
            wide = torch.full((self.count, 2), -(2**40))
            wide[:, 0] = made
            return wide[:, 0]
        return made


@dataclass(frozen=True)
class Factors:
    """[count] weights of rows or classes."""

    count: int
    dtype: str = "f32"
    kind: str = "random"
    seed: int = 0

    def make(self) -> Tensor:
        made = 0.25 + torch.rand(self.count, generator=_generator(self.seed), dtype=torch.float64)
        if self.kind == "some zero":
            made[1::2] = 0
        return made.to(DTYPES[self.dtype])


@dataclass(frozen=True)
class Same:
    """[count] of pairs: bool or int64."""

    count: int
    seed: int = 0
    integers: bool = False

    def make(self) -> Tensor:
        made = torch.rand(self.count, generator=_generator(self.seed)) < 0.5
        return made.long() if self.integers else made


@dataclass(frozen=True)
class Scalar:
    """A 0-d scale."""

    value: float
    dtype: str = "f32"
    grad: bool = True

    def make(self) -> Tensor:
        return torch.tensor(self.value, dtype=DTYPES[self.dtype]).requires_grad_(self.grad)


Recipe = Rows | Labels | Factors | Same | Scalar
SEEDS = st.integers(0, 10_000)


def kinds(dtype: str, eps: float, limits: dict[str, int] = EXPONENTS) -> st.SearchStrategy[tuple[str, ...]]:
    """One to four kinds of rows of a tensor. What 0 / 0 is where eps is 0, nobody says: no zero rows then."""
    limit = limits[dtype]
    names = [*ORDINARY, "plain", "plain", *(["mixed"] if limits is EXPONENTS else [])]
    names += ["zero"] if eps > 0 else []
    if limits is EXPONENTS:  # squares of such differences are 0
        names.append("denormal")
    scaled = st.integers(-limit, limit).map(lambda e: f"1e{e}")
    ordinary = st.one_of(st.sampled_from(names), scaled)
    one = st.one_of(*[ordinary] * 12, st.sampled_from(POISON))
    return st.lists(one, min_size=1, max_size=4).map(tuple)


def layouts() -> st.SearchStrategy[str]:
    return st.sampled_from(("contiguous",) * 4 + LAYOUTS)


@st.composite
def sizes(draw, cells: int, empty: bool = True) -> tuple[int, int, int]:
    """(N, D, C) around the edges, with N D, C D and N C within `cells`, N D C within 40 times that."""
    order = draw(st.permutations([0, 1, 2]))
    chosen = [1, 1, 1]
    for axis in order:
        others = [size for other, size in enumerate(chosen) if other != axis]
        most = min(cells // max(others), 40 * cells // (others[0] * others[1]))
        fitting = [size for size in EDGES if size <= max(1, most)]
        # Small ones more often: most of what can go wrong does so there, and it is quick.
        chosen[axis] = draw(st.one_of(st.sampled_from(fitting), st.sampled_from(fitting[:6])))
    if empty and draw(st.integers(0, 40)) == 40:
        chosen[0] = 0
    return chosen[0], chosen[1], chosen[2]
