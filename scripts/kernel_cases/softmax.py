"""The fused head on all classes: every set of kernels that a plan may name, and every option."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import normface_ext as nf
from normface_ext import functional, reference
from normface_ext.softmax import arguments as head_arguments

from .case import Case, accumulator, case, labels, number, randn

#: What plan() may answer for 16-bit operands: algorithm, scores, weight gradient.
CHOICES = {
    "library": ("stored", "cublas", "cublas"),
    "scores": ("stored", "tensor cores", "cublas"),
    "scores again": ("recompute", "tensor cores", "cublas"),
    "tensor cores": ("stored", "tensor cores", "tensor cores"),
    "tensor cores again": ("recompute", "tensor cores", "tensor cores"),
    "single sweep": ("single sweep", "tensor cores", "tensor cores"),
}
#: The same for wider operands.
PLAIN = {
    "library": ("stored", "cublas", "cublas"),
    "plain": ("stored", "cuda cores", "cuda cores"),
    "plain again": ("recompute", "cuda cores", "cuda cores"),
}


def plan_of(choice: str, chunk: int, *, again: bool = False) -> Callable[..., Any]:
    """A plan() that on CUDA says so, `chunk` classes at a time, whatever it would choose; `again`: without
    storing E."""
    algorithm, scores, gradient = (CHOICES | PLAIN)[choice]
    algorithm = "recompute" if again else algorithm

    def plan(*given: Any, **options: Any) -> Any:
        made = nf.plan(*given, **options)
        classes = given[2]
        width = classes if algorithm == "stored" else min(chunk, classes)
        return dataclasses.replace(
            made,
            algorithm=algorithm,
            scores=scores,
            weight_gradient=gradient,
            class_chunk=width,
            chunks=-(-classes // width),
        )

    return plan


def head(name: str, choice: str, leaves: list[Tensor], *constants: Tensor, **options: Any) -> Case:
    """leaves: x, weight and perhaps the scale; constants: labels, and perhaps the factors."""
    learned = len(leaves) == 3
    scale = options.pop("scale", None)

    def arguments(tensors: tuple[Tensor, ...]) -> tuple[list[Any], dict[str, Any]]:
        x, weight, *rest = tensors
        s = rest.pop(0) if learned else scale
        factors = dict(zip(("sample_weight", "class_weight"), rest[1:], strict=False))
        return [x, weight, rest[0], s], {**options, **factors}

    def ours(*tensors: Tensor) -> Tensor:
        given, named = arguments(tensors)
        with mock.patch.object(head_arguments, "plan", plan_of(choice, chunk=37)):
            return functional.normface_loss(*given, **named)

    def truth(*tensors: Tensor) -> Tensor:
        given, named = arguments(tensors)
        return reference.normface_loss(*given, **named)

    return case(f"normface_loss by {choice}, {name}", ours, truth, leaves, *constants)


def cases(dtype: torch.dtype) -> Iterator[Case]:
    narrow = dtype.itemsize == 2
    for choice in CHOICES if narrow else PLAIN:
        for batch, dim, classes in ((17, 40, 101), (131, 72, 33)):
            x, w = randn(batch, dim, dtype=dtype), randn(classes, dim, dtype=dtype, seed=1)
            y = labels(batch, classes)
            shape = str((batch, dim, classes))
            for s in (10.0, 100.0):  # one shift for all rows, and the largest logit of each
                options = {"margin": nf.ArcFace(0.3)}
                yield head(f"{shape} s={s:g}", choice, [x, w, number(s, dtype)], y, **options)
            each = torch.linspace(5.0, 100.0, batch, dtype=accumulator(dtype))
            yield head(f"{shape} a scale per row", choice, [x, w, each], y, reduction="sum")
            # The host knows that the shift is fixed; features alone are narrow, as under autocast.
            wide = w.to(accumulator(dtype))
            yield head(f"{shape} float32 weight", choice, [x, wide], y, scale=10.0, reduction="none")
        factors = [randn(size, dtype=accumulator(dtype), seed=size).abs() for size in (batch, classes)]
        options = {"scale": 9.0, "label_smoothing": 0.1, "margin": nf.CosFace(0.2)}
        yield head("smoothed and weighted", choice, [x, w], y, *factors, **options)
    # Rows that no kernel of ours takes: not of whole 16 bytes, and too long.
    for dim in (41, 520):
        leaves = [randn(17, dim, dtype=dtype), randn(101, dim, dtype=dtype, seed=1)]
        yield head(f"D={dim}", "library", leaves, labels(17, 101), scale=10.0)
