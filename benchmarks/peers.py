"""The other heads without an N x C matrix: what torch has, Liger, cut-cross-entropy and QuACK.

None of them normalises, so each is measured twice: fed by eager F.normalize, and by the same compiled by
torch.compile ("+compiled-norm"), which is what a user who knows about it would write. Each gets its
operands in the dtype in which eager's own product runs.

Written against liger-kernel 0.8.5, cut-cross-entropy 25.1.1 and quack-kernels 0.6.5:

    liger_kernel.ops.LigerFusedLinearScaledCrossEntropyFunction.apply(
        _input, weight, target, temperature=1.0, ignore_index=-100, m_tiles_per_cluster=1,
        return_entropy=False, selected_token_ids=None)                          -> loss of each row
    liger_kernel.transformers.functional.liger_fused_linear_cross_entropy(
        input, weight, target, bias=None, ..., chunk_mem_const=1)               -> mean
    cut_cross_entropy.linear_cross_entropy(
        e, c, targets, ignore_index=-100, softcap=None, reduction="mean", shift=False,
        filter_eps="high", impl=CCE)                                            -> mean
    quack.linear_cross_entropy.chunked_linear_cross_entropy(
        x, weight, target, chunk_size=4096, ignore_index=-100, reduction="mean", tuned=True,
        use_scaled_exp=None)                                                    -> mean
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from cases import SCALE, Case, make_inputs
from competitors import BASE, Forward, Provider, step
from torch import Tensor

LIGER, CCE, QUACK = "liger-kernel==0.8.5", "cut-cross-entropy==25.1.1", "quack-kernels==0.6.5"
MODULES = {LIGER: "liger_kernel", CCE: "cut_cross_entropy", QUACK: "quack"}
LOGITS_BYTES = 4 << 30  # liger's Triton head may hold this much of them at a time

#: (x, w) and the scale, None for none, to unit rows in the operands' dtype, the scale on the smaller side
Normalize = Callable[[Tensor, Tensor, "float | Tensor | None"], "tuple[Tensor, Tensor]"]
Head = Callable[[Case, Normalize], Forward]


def normalized(
    operand: torch.dtype, x: Tensor, w: Tensor, scale: float | Tensor | None
) -> tuple[Tensor, Tensor]:
    x_hat = F.normalize(x)
    if scale is not None:
        x_hat = scale * x_hat
    return x_hat.to(operand), F.normalize(w).to(operand)


def _linear_cross_entropy(case: Case, normalize: Normalize) -> Forward:
    """Its automatic chunk is one row where classes outnumber features this much, hence our own: a quarter."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=max(64, case.batch // 4))

    def forward(x: Tensor, w: Tensor, y: Tensor, s: float | Tensor) -> Tensor:
        return F.linear_cross_entropy(*normalize(x, w, s), y, options=options)

    return forward


def _liger_scaled(case: Case, normalize: Normalize) -> Forward:
    """Its head for Hopper (wgmma, no N x C matrix), made for a softmax with a temperature."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    def forward(x: Tensor, w: Tensor, y: Tensor, s: float | Tensor) -> Tensor:
        return LigerFusedLinearScaledCrossEntropyFunction.apply(*normalize(x, w, None), y, 1 / s).mean()

    return forward


def liger_budget(case: Case) -> int:
    """Liger's chunk_mem_const: as few chunks of rows as keep the logits within LOGITS_BYTES.

    Its default, 1, allows N x D logits: with a million classes one row at a time.
    """
    chunks = -(-case.batch * case.classes * case.precision.operand.itemsize // LOGITS_BYTES)
    return -(-case.classes // (chunks * case.dim))


def _liger_triton(case: Case, normalize: Normalize) -> Forward:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def forward(x: Tensor, w: Tensor, y: Tensor, s: float | Tensor) -> Tensor:
        x_hat, w_hat = normalize(x, w, s)
        return liger_fused_linear_cross_entropy(x_hat, w_hat, y, chunk_mem_const=liger_budget(case))

    return forward


def _cce(case: Case, normalize: Normalize, **options: object) -> Forward:
    """By default it leaves out blocks of gradients that would round to nothing; filter_eps=None: exact."""
    from cut_cross_entropy import linear_cross_entropy

    def forward(x: Tensor, w: Tensor, y: Tensor, s: float | Tensor) -> Tensor:
        return linear_cross_entropy(*normalize(x, w, s), y, **options)

    return forward


def _quack(case: Case, normalize: Normalize) -> Forward:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def forward(x: Tensor, w: Tensor, y: Tensor, s: float | Tensor) -> Tensor:
        return chunked_linear_cross_entropy(*normalize(x, w, s), y)

    return forward


def _eager_norm(head: Head, case: Case, mode: str, device: str) -> Forward:
    return head(case, functools.partial(normalized, case.precision.operand))


def _compiled_norm(head: Head, case: Case, mode: str, device: str) -> Forward:
    """Compiled here and now, as `competitors._compile` does, but without the head behind it."""
    compiled = torch.compile(functools.partial(normalized, case.precision.operand), dynamic=False)
    forward = head(case, compiled)
    for wanted in dict.fromkeys(("fwd+bwd", mode)):
        step(forward, make_inputs(case, device), SCALE, case, wanted)
    return forward


def _needs_torch_213(case: Case) -> str:
    return "" if hasattr(torch.nn, "LinearCrossEntropyOptions") else "needs torch >= 2.13"


def _needs_gpu(package: str, case: Case) -> str:
    if not torch.cuda.is_available():
        return "needs CUDA"
    if importlib.util.find_spec(MODULES[package]) is None:
        return f"not installed: pip install {package}"
    if case.precision.operand.itemsize > 2:
        return "needs 16-bit operands"
    return ""


def _needs_hopper(case: Case) -> str:
    if reason := _needs_gpu(LIGER, case):
        return reason
    if torch.cuda.get_device_capability() != (9, 0) or case.precision.operand != torch.bfloat16:
        return "needs compute capability 9.0 and bfloat16: elsewhere it is plain torch in chunks"
    missing = f"not installed: pip install {LIGER} 'nvidia-cutlass-dsl>=4.6'"
    return "" if importlib.util.find_spec("cutlass") else missing


def _needs_eights(case: Case) -> str:
    if reason := _needs_gpu(QUACK, case):
        return reason
    return "needs N and C divisible by 8" if case.batch % 8 or case.classes % 8 else ""


def _quack_path(case: Case) -> str:
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    fast = hopper and case.precision.operand == torch.bfloat16 and case.classes % 128 == 0
    return "its fast path" if fast else "its base path: the fast one needs 9.0, bfloat16 and C % 128 = 0"


def installed(package: str) -> str:
    """Name and version found here, of a package written "name==version"."""
    name = package.partition("==")[0]
    try:
        return f"{name} {importlib.metadata.version(name)}" if name else ""
    except importlib.metadata.PackageNotFoundError:
        return ""


PROVIDERS: dict[str, Provider] = dict(BASE)


def _add(name: str, head: Head, **options: object) -> None:
    PROVIDERS[name] = Provider(functools.partial(_eager_norm, head), **options)
    # As with `competitors._compile`, a learned scale would be another graph.
    compiled = {**options, "compiles": True, "learns_scale": False}
    PROVIDERS[f"{name}+compiled-norm"] = Provider(functools.partial(_compiled_norm, head), **compiled)


_liger = {"package": LIGER, "compiles": True}
_cut = {"package": CCE, "compiles": True, "obstacle": functools.partial(_needs_gpu, CCE)}
_add("torch.lin_ce", _linear_cross_entropy, obstacle=_needs_torch_213)
_add("liger-scaled", _liger_scaled, **_liger, obstacle=_needs_hopper, learns_scale=False)
_add("liger-triton", _liger_triton, **_liger, obstacle=functools.partial(_needs_gpu, LIGER))
_add("cce", _cce, **_cut)
_add("cce-exact", functools.partial(_cce, filter_eps=None), **_cut)
_add("quack", _quack, package=QUACK, compiles=True, obstacle=_needs_eights, remark=_quack_path)


def taking_part(case: Case) -> dict[str, Provider]:
    return {name: provider for name, provider in PROVIDERS.items() if provider.has(case)}
