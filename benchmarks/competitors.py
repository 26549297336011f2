"""Who is measured: every provider gets raw x and raw weight and returns the same number.

A provider is a function (case, compile budget) -> forward(x, weight, labels, scale). One that cannot do
a case raises `Unavailable` with the reason, which the table then shows.
"""

from __future__ import annotations

import contextlib
import importlib.util
import signal
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from cases import SCALE, Case, Inputs, make_inputs
from torch import Tensor

import normface_ext as nf

Forward = Callable[[Tensor, "Tensor | None", "Tensor | None", "float | Tensor"], Tensor]
OURS, EAGER, COMPILE = "normface_ext", "eager", "compile"


class Unavailable(Exception):
    """Why a provider takes no part in a case."""


class CompileBudget:
    """Seconds that all compilations of a run may take together, and whether to compile for "fwd" too."""

    def __init__(self, seconds: float, forward_only: bool = False) -> None:
        self.total = self.left = seconds
        self.forward_only = forward_only

    @contextlib.contextmanager
    def spend(self) -> Iterator[None]:
        """Runs the block for at most the seconds left (where the system has SIGALRM)."""
        if self.left < 1:
            raise Unavailable(f"the {self.total:.0f} s for compiling are used up (--compile-limit)")

        def stop(signum: int, frame: object) -> None:
            raise TimeoutError("compiling took too long (--compile-limit)")

        start = time.monotonic()
        before = signal.signal(signal.SIGALRM, stop) if hasattr(signal, "SIGALRM") else None
        if before is not None:
            signal.setitimer(signal.ITIMER_REAL, self.left)
        try:
            yield
        finally:
            if before is not None:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, before)
            self.left -= time.monotonic() - start


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


def _ours(case: Case, budget: CompileBudget) -> Forward:
    # Looked up at each call, so that a test can put a wrong kernel in its place.
    if case.kind == "normalize":
        return lambda x, w, y, s: nf.functional.normalize(x, dim=case.axis)
    if case.kind == "norm_linear":
        return lambda x, w, y, s: nf.functional.norm_linear(x, w, s)
    margin = nf.reference.MARGINS[case.margin]
    return lambda x, w, y, s: nf.functional.normface_loss(x, w, y, s, margin=margin)


def _eager(case: Case, budget: CompileBudget) -> Forward:
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


def _compile(case: Case, budget: CompileBudget) -> Forward:
    """torch.compile of eager, compiled here and now on the case's own shapes."""
    torch._dynamo.reset()
    compiled = torch.compile(_eager(case, budget), dynamic=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with budget.spend():
        inputs = make_inputs(case, device)
        for mode in ("fwd+bwd", "fwd") if budget.forward_only else ("fwd+bwd",):
            step(compiled, inputs, SCALE, case, mode)
    return compiled


def _plain_head(case: Case) -> None:
    if case.kind != "head" or case.margin != "normface":
        raise Unavailable("")  # nothing to say: it has no such operation


def _normalized(x: Tensor, w: Tensor, scale: float | Tensor) -> tuple[Tensor, Tensor]:
    """What peers without normalisation are fed with; the scale on the smaller side."""
    return scale * F.normalize(x), F.normalize(w)


def _torch_linear_cross_entropy(case: Case, budget: CompileBudget) -> Forward:
    """Its automatic chunk is one row where classes outnumber features this much, hence our own: a quarter."""
    _plain_head(case)
    if not hasattr(F, "linear_cross_entropy") or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Unavailable("needs torch >= 2.13")
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=max(64, case.batch // 4))

    def forward(x: Tensor, w: Tensor, y: Tensor, s: float | Tensor) -> Tensor:
        return F.linear_cross_entropy(*_normalized(x, w, s), y, options=options)

    return forward


def _peer(module: str, package: str, case: Case) -> None:
    _plain_head(case)
    if not torch.cuda.is_available() or importlib.util.find_spec(module.partition(".")[0]) is None:
        raise Unavailable("")  # without a GPU, or not installed: not worth a line
    if importlib.util.find_spec(module) is None:
        raise Unavailable(f"this {package} has no {module}")


def _liger(case: Case, budget: CompileBudget) -> Forward:
    _peer("liger_kernel.transformers", "liger-kernel", case)
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()

    def forward(x: Tensor, w: Tensor, y: Tensor, s: float | Tensor) -> Tensor:
        x_hat, w_hat = _normalized(x, w, s)
        return loss(w_hat, x_hat, y)

    return forward


def _cce(case: Case, budget: CompileBudget) -> Forward:
    _peer("cut_cross_entropy", "cut-cross-entropy", case)
    from cut_cross_entropy import linear_cross_entropy

    operand = torch.promote_types(case.precision.operand, torch.bfloat16)

    def forward(x: Tensor, w: Tensor, y: Tensor, s: float | Tensor) -> Tensor:
        x_hat, w_hat = _normalized(x, w, s)
        return linear_cross_entropy(x_hat.to(operand), w_hat.to(operand), y)

    return forward


def _quack(case: Case, budget: CompileBudget) -> Forward:
    _peer("quack.linear_cross_entropy", "quack-kernels", case)
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    if case.precision.operand.itemsize > 2 or case.batch % 8 or case.classes % 8:
        raise Unavailable("needs 16-bit operands and sizes divisible by 8")

    def forward(x: Tensor, w: Tensor, y: Tensor, s: float | Tensor) -> Tensor:
        x_hat, w_hat = _normalized(x, w, s)
        return chunked_linear_cross_entropy(x_hat.to(torch.bfloat16), w_hat.to(torch.bfloat16), y)

    return forward


PROVIDERS: dict[str, Callable[[Case, CompileBudget], Forward]] = {
    OURS: _ours,
    EAGER: _eager,
    COMPILE: _compile,
    "torch.lin_ce": _torch_linear_cross_entropy,
    "liger": _liger,
    "cce": _cce,
    "quack": _quack,
}


def build(name: str, case: Case, budget: CompileBudget) -> Forward:
    """The provider's forward for this case; whatever goes wrong on the way becomes `Unavailable`."""
    try:
        return PROVIDERS[name](case, budget)
    except Unavailable:
        raise
    except Exception as error:
        if name in (OURS, EAGER):
            raise
        reason = (str(error).strip().splitlines() or [""])[0][:100]
        raise Unavailable(f"{type(error).__name__}: {reason}") from error
