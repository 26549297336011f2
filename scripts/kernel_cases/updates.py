"""A head's weight moved inside backward, and gradients added up in place: every product that dW lies on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import normface_ext as nf
from normface_ext import reference

from .case import Case, Results, accumulator, labels, randn
from .softmax import asked, choices

SCALE, STEPS = 8.0, 2
OPTIMIZERS = {
    "sgd": (nf.optim.FusedSGD, torch.optim.SGD, {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.01}),
    "adamw": (nf.optim.FusedAdamW, torch.optim.AdamW, {"lr": 0.05, "eps": 1e-3}),
}


def head_of(weight: Tensor) -> nf.NormFaceLoss:
    classes, dim = weight.shape
    made = nf.NormFaceLoss(dim, classes, scale=SCALE, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        made.weight.copy_(weight)
    return made


def moved(choice: str, optimizer: str, x: Tensor, weight: Tensor, y: Tensor) -> Case:
    ours_of, torchs, options = OPTIMIZERS[optimizer]

    def ours(x: Tensor, weight: Tensor, y: Tensor) -> Results:
        head = head_of(weight)
        made: Any = ours_of(head, **options)
        for _ in range(STEPS):
            with asked(choice, chunk=37):
                head(x, y).backward()
            made.step()
        return [head.weight.detach()]

    def truth(x: Tensor, weight: Tensor, y: Tensor) -> Results:
        w = weight.clone().requires_grad_()
        made: Any = torchs([w], **options)
        for _ in range(STEPS):
            made.zero_grad()
            reference.normface_loss(x, w, y, SCALE).backward()
            made.step()
        return [w.detach()]

    return Case(f"{optimizer} in backward by {choice}", ours, truth, [x, weight, y])


def added(choice: str, x: Tensor, weight: Tensor, y: Tensor) -> Case:
    def ours(x: Tensor, weight: Tensor, y: Tensor) -> Results:
        head = head_of(weight)
        nf.optim.accumulate_in_place(head)
        for _ in range(STEPS):
            with asked(choice, chunk=37):
                head(x, y).backward()
        assert head.weight.grad is not None
        return [head.weight.grad]

    def truth(x: Tensor, weight: Tensor, y: Tensor) -> Results:
        w = weight.clone().requires_grad_()
        for _ in range(STEPS):
            reference.normface_loss(x, w, y, SCALE).backward()
        assert w.grad is not None
        return [w.grad]

    return Case(f"gradients added in place by {choice}", ours, truth, [x, weight, y])


def cases(dtype: torch.dtype) -> Iterator[Case]:
    for choice in choices(dtype):
        x, weight, y = randn(17, 40, dtype=dtype), randn(101, 40, dtype=dtype, seed=1), labels(17, 101)
        yield added(choice, x, weight, y)
        # float16 weights are not moved in backward: features alone are narrow, as under autocast.
        wide = weight.to(accumulator(dtype)) if dtype == torch.float16 else weight
        for optimizer in OPTIMIZERS:
            yield moved(choice, optimizer, x, wide, y)
