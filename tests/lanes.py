"""Lanes: every op test runs on the CPU kernels, on the CUDA kernels emulated on the CPU, and on a GPU.

A lane is what the tests have of the world: a device and a namespace of operators. Lanes that this
machine cannot offer are not collected, and the header says so. NORMFACE_TEST_NAMESPACES replaces them
by a comma list of operator namespaces that take CPU tensors, such as normface_sanitized; which cases run is
decided as ever, by --all or a node id (selection.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from emulation import build

import normface_ext as nf
from normface_ext import testing
from normface_ext.engine import calls, library

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
#: One below, at and above a warp, one element, and a block's width and a bit.
ODD_SIZES = [1, 31, 32, 33, 257]


@dataclass(frozen=True)
class Lane:
    name: str
    namespace: str
    where: str = "cpu"
    slow: bool = False  # one fibre per CUDA thread: keep what runs here small

    @property
    def device(self) -> torch.device:
        return torch.device(self.where)

    @property
    def widens(self) -> bool:
        """16-bit operands of matrix products are computed in float32 (CUDA kernels: tensor cores)."""
        return self.name in ("cpu", "normface_sanitized")

    @property
    def emulates(self) -> bool:
        """CUDA kernels on the CPU, under whichever name (the sanitizers' build has one of its own)."""
        return self.namespace == "normface_emulation"

    def tensor(self, value: object, dtype: torch.dtype | None = None, *, grad: bool = False) -> torch.Tensor:
        """A tensor of this lane from numbers or from another tensor, a leaf of its own."""
        made = value.detach().clone() if isinstance(value, torch.Tensor) else torch.tensor(value)
        return made.to(device=self.device, dtype=dtype).requires_grad_(grad)

    def randn(
        self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, grad: bool = False
    ) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed + sum(shape))
        made = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return self.tensor(made, dtype, grad=grad)

    def rows(
        self, rows: int, dim: int, dtype: torch.dtype = torch.float32, **options: object
    ) -> torch.Tensor:
        grad = bool(options.pop("grad", False))
        return self.tensor(testing.make_rows(rows, dim, dtype, **options), grad=grad)  # type: ignore[arg-type]

    def labels(self, batch: int, classes: int, seed: int = 0) -> torch.Tensor:
        """Random labels with class 0 and class C - 1 among them."""
        generator = torch.Generator().manual_seed(seed)
        made = torch.randint(classes, (batch,), generator=generator)
        made[:1], made[1:2] = 0, classes - 1
        return self.tensor(made)

    @contextmanager
    def active(self) -> Iterator[Lane]:
        with library.use_namespace(load(self.namespace)):
            yield self


_loaded = {"normface_ext"}


def load(namespace: str) -> torch._ops._OpNamespace:
    """The operators of a namespace, built, loaded and given fake kernels at the first call."""
    if namespace not in _loaded:
        build.load(next(library for library, name in build.NAMESPACES.items() if name == namespace))
        calls.register_fakes(namespace)
        _loaded.add(namespace)
    return getattr(torch.ops, namespace)


def available() -> tuple[list[Lane], list[str]]:
    """The lanes of this machine, and for the others why not."""
    asked = os.environ.get("NORMFACE_TEST_NAMESPACES")
    if asked:
        return [Lane(name, name, slow=True) for name in asked.split(",")], []
    lanes, reasons = [Lane("cpu", "normface_ext")], []
    reason = build.unavailable()
    if reason is None:
        lanes.append(Lane("emulated", "normface_emulation", slow=True))
    else:
        reasons.append(f"no lane `emulated`: {reason}")
    info = nf.build_info()
    if torch.cuda.is_available() and info["cuda_loaded"]:
        lanes.append(Lane("cuda", "normface_ext", "cuda"))
    else:
        reasons.append(f"no lane `cuda`: {info['cuda_reason'] or 'no GPU is available'}")
    return lanes, reasons


LANES, MISSING = available()
