"""One case: a function on a device, and what it should return."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Results = list[Tensor]


@dataclass(frozen=True)
class Case:
    """``ours`` gets the inputs on the device, ``truth`` the same numbers on the CPU in float64.

    ``by_library`` are the places of results that a matrix product of cuBLAS wrote last, not a kernel of ours.
    """

    name: str
    ours: Callable[..., Results]
    truth: Callable[..., Results]
    inputs: list[Tensor]
    by_library: tuple[int, ...] = ()


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def number(value: float, dtype: torch.dtype) -> Tensor:
    """A scale or a margin, 0-d: no narrower than float32."""
    return torch.tensor(value, dtype=accumulator(dtype))


def labels(batch: int, classes: int, *, ignored: bool = True) -> Tensor:
    """Both ends of the range, several rows of one class, and ignored rows."""
    generator = torch.Generator().manual_seed(classes)
    made = torch.randint(classes, (batch,), generator=generator)
    made[:1], made[1:4] = 0, classes - 1
    if ignored:
        made[batch // 2] = -100
    return made


Function = Callable[..., Tensor | tuple[Tensor, ...]]


def differentiated(function: Function, leaves: int) -> Callable[..., Results]:
    """``function`` with its gradients of the first ``leaves`` arguments, under one Gaussian upstream."""

    def results(*tensors: Tensor) -> Results:
        given = [t.detach().clone().requires_grad_() for t in tensors[:leaves]]
        returned = function(*given, *tensors[leaves:])
        outputs = returned if isinstance(returned, tuple) else (returned,)
        upstream = [randn(*out.shape, dtype=torch.float64, seed=5).to(out) for out in outputs]
        return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, given, upstream)]

    return results


def case(
    name: str,
    ours: Function,
    truth: Function,
    leaves: list[Tensor],
    *constants: Tensor,
    by_library: tuple[int, ...] = (),
) -> Case:
    """Values and gradients of two functions of the same arguments."""
    count, inputs = len(leaves), [*leaves, *constants]
    return Case(name, differentiated(ours, count), differentiated(truth, count), inputs, by_library)
