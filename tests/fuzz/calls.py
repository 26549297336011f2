"""One call checked: value, every gradient, bits, inputs. ``check`` is what a failing call prints."""

from __future__ import annotations

from typing import Any

import torch
from lanes import LANES, Lane
from torch import Tensor

from . import judge
from .functions import OPS, Call, Outputs, Tensors
from .judge import Wrong
from .rounding import EXACT, Disturbed, Rounding
from .terms import ambiguous, terms_of, tiny_of


def wide_of(tensors: Tensors) -> torch.dtype:
    floating = [t.dtype for t in tensors.values() if t is not None and t.is_floating_point()]
    return torch.float64 if floating[0] == torch.float64 else torch.float32


def operand_of(call: Call, tensors: Tensors, lane: Lane) -> torch.dtype:
    """In which dtype products see unit rows: the narrowest operand's on tensor cores."""
    wide = wide_of(tensors)
    if lane.widens or call.op in ("normalize", "pair_contrastive_loss", "triplet_loss"):
        return wide
    return min(
        (tensors["x"].dtype, tensors.get("weight", tensors["x"]).dtype, wide), key=lambda d: d.itemsize
    )


def with_gradients(
    function: Any, tensors: Tensors, dtype: torch.dtype | None, upstream: list[Tensor] | None
) -> tuple[Outputs, dict[str, Tensor | None]]:
    """(outputs, gradients by name) on fresh leaves: of `dtype` if one is given, else as the tensors lie."""
    leaves: Tensors = {}
    for name, t in tensors.items():
        leaf = t.detach()
        leaf = leaf.to(dtype) if dtype is not None and leaf.is_floating_point() else leaf
        leaves[name] = leaf.requires_grad_(t.requires_grad) if leaf.is_floating_point() else leaf
    outputs = function(leaves)
    if upstream is not None and [out.shape for out in outputs] != [g.shape for g in upstream]:
        raise Wrong(f"shapes {[list(g.shape) for g in upstream]}, not {[list(out.shape) for out in outputs]}")
    asked = [name for name, t in leaves.items() if t.requires_grad]
    led = [out for out in outputs if out.requires_grad]
    gradients: dict[str, Tensor | None] = {}
    if asked and led and upstream is not None:
        given = [g.to(out) for out, g in zip(outputs, upstream, strict=False) if out.requires_grad]
        found = torch.autograd.grad(led, [leaves[name] for name in asked], given, allow_unused=True)
        gradients = dict(zip(asked, found, strict=True))
    return tuple(out.detach() for out in outputs), gradients


def upstream_of(outputs: Outputs, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed + 12345)
    return [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype) for out in outputs]


def check(call: Call, lane_name: str) -> float:
    """Raises `Wrong` with a sentence, or returns the largest error as a fraction of what is allowed."""
    lane = next(lane for lane in LANES if lane.name == lane_name)
    with lane.active():
        return _check(call, lane)


def _check(call: Call, lane: Lane) -> float:
    op, options = OPS[call.op], call.options
    tensors = {name: t.detach().to(lane.device) for name, t in call.make().items()}
    for name, recipe in call.tensors.items():
        tensors[name].requires_grad_(getattr(recipe, "grad", False))
    before = {name: (judge.bits(t), t._version) for name, t in tensors.items()}

    def run(leaves: Tensors) -> Outputs:
        return op.run(leaves, options)

    probe, _ = with_gradients(run, {n: t.detach() for n, t in tensors.items()}, None, None)
    upstream = upstream_of(probe, call.upstream)
    outputs, gradients = with_gradients(run, tensors, None, upstream)
    again, gradients_again = with_gradients(run, tensors, None, upstream)
    for name, t in tensors.items():
        if (judge.bits(t), t._version) != before[name]:
            raise Wrong(f"{call.op}: `{name}` was changed by the call")
    # NaN is NaN: its sign and payload depend on which operand an instruction took them from.
    pairs = [*zip(outputs, again, strict=True), *((gradients[n], gradients_again[n]) for n in gradients)]
    if any(judge.bits(a, nan=True) != judge.bits(b, nan=True) for a, b in pairs):
        raise Wrong(f"{call.op}: the same call gave other bits the second time")
    if any(judge.bits(a, nan=True) != judge.bits(b, nan=True) for a, b in zip(outputs, probe, strict=True)):
        raise Wrong(f"{call.op}: the value depends on whether gradients are wanted")
    if list(gradients) != [name for name, t in tensors.items() if t.requires_grad]:
        raise Wrong(f"{call.op}: the result has no gradient, or one that nobody wants")
    for name, gradient in gradients.items():
        if gradient is None or gradient.dtype != tensors[name].dtype or gradient.shape != tensors[name].shape:
            raise Wrong(
                f"{call.op}: the gradient of `{name}` is {gradient if gradient is None else gradient.dtype}"
            )
    found = {name: gradient.cpu() for name, gradient in gradients.items()}
    return _judge(call, lane, call.make(), upstream, tuple(out.cpu() for out in outputs), found)


def _judge(
    call: Call,
    lane: Lane,
    tensors: Tensors,
    upstream: list[Tensor],
    outputs: Outputs,
    gradients: dict[str, Tensor | None],
) -> float:
    op, wide, operand = OPS[call.op], wide_of(tensors), operand_of(call, tensors, lane)
    size = torch.finfo(wide).eps if operand.itemsize >= 4 else torch.finfo(operand).eps
    cell = size if operand.itemsize >= 4 else 2.0**-8

    def by_formula(
        r: Rounding, dtype: torch.dtype = torch.float64
    ) -> tuple[Outputs, dict[str, Tensor | None]]:
        def formula(leaves: Tensors) -> Outputs:
            return op.formula(leaves, call.options, r)

        return with_gradients(formula, tensors, dtype, [r.upstream(g.double()) for g in upstream])

    truth, slopes = by_formula(EXACT)
    noises = [Disturbed(size, cell, sign, seed) for sign, seed in ((1, 0), (-1, 0), (0, 1), (0, 2))]
    others = [by_formula(noise) for noise in noises]
    if wide == torch.float32:
        others.append(by_formula(EXACT, wide))
    tiny, terms = tiny_of(call, tensors, wide), terms_of(call, tensors, upstream, noises, by_formula)
    eps = max(torch.finfo(wide).eps, torch.finfo(operand).eps / 4 if operand.itemsize < 4 else 0.0)
    # Rows are what is normalised together.
    across = call.op == "normalize" and call.options["dim"] in (0, -2)

    def compare(
        name: str, got: Tensor, true: Tensor, by: list[Tensor], sizes: Tensor | None = None, **more: Any
    ) -> float:
        if across:
            got, true, by = got.t(), true.t(), [other.t() for other in by]
            sizes = None if sizes is None else sizes.t()
        return judge.compare(f"{call.op}, {name}", got, true, by, sizes, eps, **more)

    worst = 0.0
    for i, out in enumerate(outputs):
        by = [other[0][i] for other in others]
        worst = max(worst, compare(f"output {i}", out, truth[i], by, terms.get("value") if i == 0 else None))
    if ambiguous(call, tensors, size):
        return worst
    for name, gradient in gradients.items():
        got, true, given = gradient, slopes[name], tensors[name].detach()
        if got.dtype == torch.float16:  # rows ruled by eps saturate at the largest half
            got = torch.where(true.isfinite(), got.clamp(-65504, 65504), got)
            true = torch.where(true.isfinite(), true.clamp(-65504, 65504), true)
        by = [other[1][name] for other in others]
        # Whether 0 times the NaN of its own row is NaN is nobody's business.
        own = None if given.dim() == 0 or across else ~given.isfinite().all(-1, keepdim=True)
        label = f"gradient of `{name}`"
        worst = max(worst, compare(label, got, true, by, terms.get(name), tiny=tiny[name], exempt=own))
    return worst
