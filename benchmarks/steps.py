"""Who makes a whole step, head and optimizer, and how one of them is measured in its own process.

A step is what a trainer waits for beside the backbone: the last step's gradients go, forward, backward to raw
features and to the weight, and the optimizer moves the weight. Memory: the peak of a step beyond the weight,
the optimizer's state and the features, so that the gradient of the weight counts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import truth
from cases import SCALE, Case, make_inputs
from competitors import BASE, EAGER
from measure import Measured, extra_mib
from torch import Tensor, nn

import normface_ext as nf
from normface_ext.optim import FusedAdamW, FusedSGD

#: As the recipes of face heads have them. torch's, and the one whose step is a part of backward.
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, FusedSGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}),
    "adamw": (torch.optim.AdamW, FusedAdamW, {"lr": 1e-3, "weight_decay": 0.05}),
}
STEPS = 3  # after which weights are compared


class Stepper(NamedTuple):
    """`options`: what of torch's implementations is asked for; None: the step is a part of backward."""

    ours: bool
    options: dict[str, bool] | None


IN_BACKWARD, BASELINE = "ours, in backward", "eager + foreach"
STEPPERS = {
    BASELINE: Stepper(False, {"foreach": True}),
    "eager + fused": Stepper(False, {"fused": True}),
    "ours + foreach": Stepper(True, {"foreach": True}),
    "ours + fused": Stepper(True, {"fused": True}),
    IN_BACKWARD: Stepper(True, None),
}


class EagerHead(nn.Module):
    def __init__(self, case: Case, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.loss = nn.Parameter(weight), BASE[EAGER].build(case, "fwd+bwd", str(weight.device))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.loss(x, self.weight, labels, SCALE)


def head_of(case: Case, weight: Tensor, *, ours: bool) -> nn.Module:
    if not ours:
        return EagerHead(case, weight)
    head = nf.NormFaceLoss(case.dim, case.classes, scale=SCALE, device="meta")
    head.weight = nn.Parameter(weight)
    return head


def make(name: str, optimizer: str, case: Case, weight: Tensor) -> tuple[nn.Module, torch.optim.Optimizer]:
    stepper, (theirs, fused, options) = STEPPERS[name], OPTIMIZERS[optimizer]
    head = head_of(case, weight, ours=stepper.ours)
    if stepper.options is None:
        return head, fused(head, **options)  # type: ignore[arg-type]
    return head, theirs(head.parameters(), **options, **stepper.options)  # type: ignore[arg-type]


def step(head: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, labels: Tensor, case: Case) -> None:
    autocast = case.precision.autocast
    optimizer.zero_grad()
    with torch.autocast(x.device.type, autocast) if autocast else contextlib.nullcontext():
        loss = head(x, labels)
    loss.backward()
    optimizer.step()


def right_weight(case: Case, optimizer: str, device: str) -> tuple[Tensor, float]:
    """After STEPS steps in float64, and how far it has moved."""
    inputs, (theirs, _, options) = make_inputs(case, device), OPTIMIZERS[optimizer]
    assert inputs.weight is not None and inputs.labels is not None
    plain = Case("head", case.batch, case.dim, case.classes, "float32", case.margin)
    weight, x = inputs.weight.detach().double(), inputs.x.detach().double()
    head = EagerHead(plain, weight.clone())
    made = theirs(head.parameters(), **options)  # type: ignore[arg-type]
    for _ in range(STEPS):
        step(head, made, x, inputs.labels, plain)
    right = head.weight.detach()
    return right, float((right - weight).norm())


class MeasuredStep(Measured):
    """Its mode is the name of the optimizer."""

    call: Callable[[], object]

    def _build(self, case: Case) -> Callable[[], object]:
        inputs = make_inputs(case, self.device)
        assert inputs.weight is not None and inputs.labels is not None
        self.head, self.optimizer = make(self.name, self.mode, case, inputs.weight.detach())
        return lambda: step(self.head, self.optimizer, inputs.x, inputs.labels, case)

    def first(self) -> float | None:
        self._build(self.case.tiny())()  # threads, lazy imports
        self.call = self._build(self.case)
        self.call()  # makes the optimizer's state
        self.optimizer.zero_grad()
        return extra_mib(self.call, make_inputs(self.case.tiny(), self.device), self.device, gradients=False)

    def errors(self, right: Path) -> dict[str, float]:
        """Of the weight after STEPS steps: relative to how far it has moved."""
        self.call = self._build(self.case)
        for _ in range(STEPS):
            self.call()
        wanted = torch.load(right, mmap=True)
        found, _ = truth.relative_errors(self.head.weight, wanted["weight"])
        return {"weight": found * float(wanted["weight"].norm()) / wanted["moved"]}

    def _ready(self) -> Any:
        """A turn clears the gradients of nobody outside the clock: that is a part of the step."""
        return make_inputs(self.case.tiny(), self.device)
