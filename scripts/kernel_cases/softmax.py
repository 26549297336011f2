"""The fused head on all classes: every product that may be chosen, and every option."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

import normface_ext as nf
from normface_ext import functional, reference
from normface_ext.engine.plan import asking

from .case import Case, accumulator, case, labels, number, randn

#: What may be chosen for 16-bit operands: product, and whether E is kept.
CHOICES = {
    "library": ("cublas", True),
    "scores": ("sm80_scores", True),
    "scores again": ("sm80_scores", False),
    "tensor cores": ("sm80_weight_gradient", True),
    "tensor cores again": ("sm80_weight_gradient", False),
    "single sweep": ("sm80_single_sweep", False),
    "wgmma scores": ("sm90_scores", True),
    "wgmma gradient": ("sm90_weight_gradient", True),
    "wgmma gradient again": ("sm90_weight_gradient", False),
    "wgmma sweep": ("sm90_single_sweep", False),
}


def is_here(product: str) -> bool:
    """Whether this machine runs it: wgmma is of compute capability 9.0 itself, or emulated without a GPU."""
    wanted = (9, 0) if product.startswith("sm90_") else None
    return wanted is None or not torch.cuda.is_available() or torch.cuda.get_device_capability() == wanted


CHOICES = {name: choice for name, choice in CHOICES.items() if is_here(choice[0])}
#: The same for wider operands; tf32x3 takes float32 alone.
PLAIN = {
    "library": ("cublas", True),
    "plain": ("simt", True),
    "plain again": ("simt", False),
    "tf32x3": ("sm80_tf32x3", True),
    "tf32x3 again": ("sm80_tf32x3", False),
}


def choices(dtype: torch.dtype) -> dict[str, tuple[str, bool]]:
    """Those for operands of such features."""
    if dtype.itemsize == 2:
        return CHOICES
    return {name: choice for name, choice in PLAIN.items() if dtype == torch.float32 or "tf32" not in name}


def asked(choice: str, chunk: int) -> AbstractContextManager[None]:
    """A choice, whatever a plan would be; where E is not kept, `chunk` classes at a time."""
    product, store = (CHOICES | PLAIN)[choice]
    return asking(product, store=store, chunk=chunk)


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
        with asked(choice, chunk=37):
            return functional.normface_loss(*given, **named)

    def truth(*tensors: Tensor) -> Tensor:
        given, named = arguments(tensors)
        return reference.normface_loss(*given, **named)

    return case(f"normface_loss by {choice}, {name}", ours, truth, leaves, *constants)


def cases(dtype: torch.dtype) -> Iterator[Case]:
    for choice in choices(dtype):
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
    # Classes of three rows, which the products that never write the scores leave to the library's.
    leaves = [randn(17, 40, dtype=dtype), randn(99, 40, dtype=dtype, seed=1)]
    for s in (10.0, 100.0):
        options = {"sub_centers": 3, "margin": nf.ArcFace(0.3)}
        yield head(
            f"three centres s={s:g}", "library", [*leaves, number(s, dtype)], labels(17, 33), **options
        )
    # Rows that no kernel of ours takes: not of whole 16 bytes, and too long.
    for dim in (41, 520, 1100):
        leaves = [randn(17, dim, dtype=dtype), randn(101, dim, dtype=dtype, seed=1)]
        yield head(f"D={dim}", "library", leaves, labels(17, 101), scale=10.0)
