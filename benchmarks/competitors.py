"""Who is measured: every provider gets raw x and raw weight and returns the same number.

This file has this package and what torch itself offers; `peers.py` has the other packages. A provider
takes part in every case whose operation it has; what then keeps it out, a missing GPU, an absent package,
a size it can't do, is told before anything is built and becomes its row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from cases import SCALE, Case, Inputs, make_inputs
from torch import Tensor

import normface_ext as nf

Forward = Callable[[Tensor, "Tensor | None", "Tensor | None", "float | Tensor"], Tensor]
OURS, EAGER, COMPILE = "normface_ext", "eager", "compile"
EVERY_KIND = ("head", "norm_linear", "normalize")


@dataclass(frozen=True)
class Provider:
    """`build(case, mode, device)` gives the forward; with `compiles` that, or the first call, may take long.

    `obstacle(case)` says why it can't do this case here ("" if it can); `remark(case)` what a reader has to
    know of its row. `learns_scale`: whether the scale may be a tensor that wants a gradient.
    """

    build: Callable[[Case, str, str], Forward]
    kinds: tuple[str, ...] = ("head",)
    margins: bool = False
    compiles: bool = False
    learns_scale: bool = True
    package: str = ""
    obstacle: Callable[[Case], str] = lambda case: ""
    remark: Callable[[Case], str] = lambda case: ""

    def has(self, case: Case) -> bool:
        return case.kind in self.kinds and (self.margins or case.margin == "normface")


def step(forward: Forward, inputs: Inputs, scale: float | Tensor, case: Case, mode: str) -> Tensor:
    """One call as in training (mode "fwd+bwd": gradients land in the leaves) or in validation ("fwd")."""
    autocast = case.precision.autocast
    context = torch.autocast(inputs.x.device.type, autocast) if autocast else contextlib.nullcontext()
    with torch.set_grad_enabled(mode == "fwd+bwd"), context:
        out = forward(inputs.x, inputs.weight, inputs.labels, scale)
    if mode == "fwd+bwd":
        upstream = inputs.upstream
        out.backward(None if upstream is None else upstream.to(out.dtype))
    return out.detach()


def _ours(case: Case, mode: str, device: str) -> Forward:
    # Looked up at each call, so that a test can put a wrong kernel in its place.
    if case.kind == "normalize":
        return lambda x, w, y, s: nf.functional.normalize(x, dim=case.axis)
    if case.kind == "norm_linear":
        return lambda x, w, y, s: nf.functional.norm_linear(x, w, s)
    margin = nf.reference.MARGINS[case.margin]
    return lambda x, w, y, s: nf.functional.normface_loss(x, w, y, s, margin=margin)


def _eager(case: Case, mode: str, device: str) -> Forward:
    if case.kind == "normalize":
        return lambda x, w, y, s: F.normalize(x, dim=case.axis)
    if case.kind == "norm_linear":
        return lambda x, w, y, s: s * F.linear(F.normalize(x), F.normalize(w))
    margin = nf.reference.MARGINS[case.margin]
    if margin is None:
        return lambda x, w, y, s: F.cross_entropy(s * F.linear(F.normalize(x), F.normalize(w)), y)

    def with_margin(x: Tensor, w: Tensor, y: Tensor, s: float | Tensor) -> Tensor:
        cos = F.linear(F.normalize(x), F.normalize(w))
        target = nf.reference.margin(cos.gather(1, y[:, None]), margin)
        return F.cross_entropy(s * cos.scatter(1, y[:, None], target.to(cos.dtype)), y)

    return with_margin


def _compile(case: Case, mode: str, device: str) -> Forward:
    """torch.compile of eager, compiled here and now on the case's own shapes.

    With gradients for "fwd" too, since the errors of the gradients are compared in either mode.
    """
    compiled = torch.compile(_eager(case, mode, device), dynamic=False)
    for wanted in dict.fromkeys(("fwd+bwd", mode)):
        step(compiled, make_inputs(case, device), SCALE, case, wanted)
    return compiled


BASE: dict[str, Provider] = {
    OURS: Provider(_ours, EVERY_KIND, margins=True),
    EAGER: Provider(_eager, EVERY_KIND, margins=True),
    # A learned scale would be another graph, and compiling it takes as long again.
    COMPILE: Provider(_compile, EVERY_KIND, margins=True, compiles=True, learns_scale=False),
}
