"""What is measured: shapes of real heads, and the tensors for each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from normface_ext import reference

SCALE = 64.0  # what today's face heads use; the hardest on rounding
CASIA, MS1MV2 = 10_572, 85_742  # identities in the two commonest training sets
#: The multiples of 128 next to CASIA's and to a million: some peers have a fast path for these only.
CASIA_128, MILLION_128 = 10_752, 1_000_192


class Precision(NamedTuple):
    """dtypes of the tensors, and the one that autocast uses, if it is on."""

    features: torch.dtype
    weight: torch.dtype
    autocast: torch.dtype | None

    @property
    def operand(self) -> torch.dtype:
        return self.autocast or self.features


PRECISIONS = {
    "float32": Precision(torch.float32, torch.float32, None),
    "bfloat16": Precision(torch.bfloat16, torch.bfloat16, None),
    "amp-bfloat16": Precision(torch.float32, torch.float32, torch.bfloat16),  # float32 weights, as trained
    # what a backbone under autocast hands over
    "mixed-bfloat16": Precision(torch.bfloat16, torch.float32, torch.bfloat16),
}


@dataclass(frozen=True)
class Case:
    """One row group of the table.

    kind: "head" (features, weights, labels -> mean loss), "norm_linear" (-> N x C scaled cosines) or
    "normalize" (of `shape` along `axis`; then `batch` counts rows and `dim` is their length).
    """

    kind: str
    batch: int
    dim: int
    classes: int = 0
    dtype: str = "float32"
    margin: str = "normface"
    shape: tuple[int, ...] = ()
    axis: int = 1

    @property
    def name(self) -> str:
        if self.kind == "normalize":
            text = f"normalize {'x'.join(map(str, self.shape))}"
            text += "" if self.axis == len(self.shape) - 1 else f" dim={self.axis}"
        else:
            text = f"{self.kind} {self.batch}x{self.dim}x{self.classes}"
        text += "" if self.margin == "normface" else f" {self.margin}"
        return text if self.dtype == "float32" else f"{text} {self.dtype}"

    @property
    def precision(self) -> Precision:
        return PRECISIONS[self.dtype]

    def tiny(self) -> Case:
        """The same code path on a few numbers, for warming up."""
        if self.kind == "normalize":
            return normalize(*(4 for _ in self.shape), axis=self.axis, dtype=self.dtype)
        return Case(self.kind, 8, 8, 16, self.dtype, self.margin)


def head(batch: int, dim: int, classes: int, dtype: str = "float32", margin: str = "normface") -> Case:
    return Case("head", batch, dim, classes, dtype, margin)


def normalize(*shape: int, axis: int = 1, dtype: str = "float32") -> Case:
    rows = math.prod(shape) // shape[axis]
    return Case("normalize", rows, shape[axis], dtype=dtype, shape=shape, axis=axis)


def norm_linear(batch: int, dim: int, classes: int, dtype: str = "float32") -> Case:
    return Case("norm_linear", batch, dim, classes, dtype)


def choose(device: str, quick: bool, full: bool) -> list[Case]:
    """The first two cases are the ones a reader looks at first."""
    if quick:
        return [
            head(32, 16, 100),
            head(16, 32, 257, margin="arcface"),
            normalize(64, 32),
            normalize(2, 8, 4, 4),
            norm_linear(16, 16, 50),
        ]
    others = [normalize(100_000, 512), normalize(32, 512, 14, 14), norm_linear(256, 512, CASIA)]
    if device == "cpu":
        cases = [
            head(256, 512, CASIA),
            head(64, 512, MS1MV2),  # 64 rows: with 256 the default run would take too long on two cores
            head(256, 128, CASIA),
            head(256, 128, MS1MV2),
            *others,
        ]
        if full:
            cases += [head(batch, 512, CASIA) for batch in (64, 1024)]
            cases += [head(256, 512, MS1MV2), head(64, 128, 1_000_000)]
            cases += [head(256, 512, CASIA, margin=m) for m in reference.MARGINS if m != "normface"]
        return cases
    grid = [(512, CASIA), (512, MS1MV2), (128, CASIA), (128, MS1MV2)]
    cases = [head(256, dim, classes, "amp-bfloat16") for dim, classes in grid]
    cases += [head(256, 512, CASIA_128, "amp-bfloat16")]
    cases += [head(1024, dim, MILLION_128, "mixed-bfloat16") for dim in (512, 128)]
    cases += [head(256, dim, classes) for dim, classes in grid]
    cases += others
    if full:
        sizes = [(n, d, c) for d in (512, 128) for c in (CASIA, MS1MV2) for n in (64, 1024)]
        sizes += [(n, d, 1_000_000) for d in (512, 128) for n in (256, 1024)]
        cases += [head(*size, "amp-bfloat16") for size in sizes]
        cases += [head(1024, dim, 1_000_000, "mixed-bfloat16") for dim in (512, 128)]
        cases += [head(1024, 512, MS1MV2, "bfloat16"), norm_linear(1024, 512, MS1MV2, "amp-bfloat16")]
        cases += [normalize(100_000, 512, dtype="bfloat16")]
        cases += [head(256, 512, MS1MV2, "amp-bfloat16", m) for m in reference.MARGINS if m != "normface"]
    return cases


@dataclass
class Inputs:
    """Leaves `x` and `weight` want gradients; `upstream` is the gradient of an output that is no scalar."""

    x: Tensor
    weight: Tensor | None
    labels: Tensor | None
    upstream: Tensor | None

    def leaves(self) -> list[Tensor]:
        return [t for t in (self.x, self.weight) if t is not None]

    def clear_gradients(self) -> None:
        for leaf in self.leaves():
            leaf.grad = None


def make_inputs(case: Case, device: str, seed: int = 0) -> Inputs:
    """Random features, weights and labels, made in place so that no temporary raises the memory peak."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)

    features, weights, autocast = case.precision
    if case.kind == "normalize":
        x, upstream = normal(*case.shape, dtype=features), normal(*case.shape, dtype=features)
        return Inputs(x.requires_grad_(), None, None, upstream)
    x = normal(case.batch, case.dim, dtype=features).requires_grad_()
    weight = normal(case.classes, case.dim, dtype=weights).requires_grad_()
    if case.kind == "norm_linear":
        return Inputs(x, weight, None, normal(case.batch, case.classes, dtype=autocast or features))
    labels = torch.randint(case.classes, (case.batch,), device=device, generator=generator)
    return Inputs(x, weight, labels, None)
