"""What a tolerance is made of beside the truth: sizes of terms, underflow, choices that roundings make."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import formulas
from .functions import Call, Tensors
from .rounding import EXACT, Held, Recorded


def ambiguous(call: Call, tensors: Tensors, size: float) -> bool:
    """Whether roundings decide which class or row is the hardest: the gradients may then differ."""
    options = call.options
    t = {name: v.detach().double() if v.is_floating_point() else v for name, v in tensors.items()}
    weight = t.get("weight")
    if call.op == "inner_distance" and options["p"] == 1 and options["normalize"]:  # sign(x - w)
        agents = formulas.unit(weight, eps=options["eps"])[0]
        gap, sizes = (t["x"][:, None] - agents).abs(), t["x"].abs()[:, None] + agents.abs()
        return bool((gap <= 4 * size * sizes).any())
    if not (options.get("hardest_only") or options.get("max_positive_only")):
        return False
    classes = t["x"].shape[1] if weight is None else weight.shape[0]
    kept = t["labels"] != options["ignore_index"]
    y = t["labels"][kept]
    own = formulas.own_columns(y, classes)
    d = formulas.agent_distances(t["x"][kept], weight, own, options["eps"], EXACT)
    near = (
        16 * size * (1 if weight is not None else 1 + float(d.abs().max().nan_to_num() if d.numel() else 0))
    )
    if d.isnan().any():  # which of the others NaN is nearest to
        return True
    if options["hardest_only"] and classes > 2:
        nearest = d.masked_fill(own, math.inf).topk(2, largest=False).values
        if not (nearest[:, 1] - nearest[:, 0] > near).all():
            return True
    if options.get("max_positive_only") and len(d) > 1:
        first, second = d.gather(1, y[:, None]).flatten().topk(2).values
        return not bool(first - second > near)
    return False


def number_of_scale(tensors: Tensors, options: dict[str, Any]) -> float:
    given = tensors.get("scale")
    return float(options.get("scale", 1.0) if given is None else given.detach())


def tiny_of(call: Call, tensors: Tensors, wide: torch.dtype) -> dict[str, Tensor | float]:
    """What flushing to zero on the way may cost a gradient: it is divided by its row's norm afterwards."""
    least = 16 * max(1.0, abs(number_of_scale(tensors, call.options))) * torch.finfo(wide).smallest_normal
    found: dict[str, Tensor | float] = {}
    for name, t in tensors.items():
        found[name] = least
        if t.is_floating_point() and t.dim() == 2 and "eps" in call.options and call.op != "normalize":
            norms = (t.detach().double().square().sum(1, keepdim=True) + call.options["eps"]).sqrt()
            found[name] = (least / norms.clamp(1e-300, 1.0)).nan_to_num(least)
    return found


def terms_of(
    call: Call, tensors: Tensors, upstream: list[Tensor], noises: list[Recorded], by_formula: Any
) -> dict[str, Tensor]:
    """By name, the sizes of the terms that add up to a gradient: what cannot cancel without a trace."""
    recorded = noises[0]
    if recorded.c is None:
        if call.op == "inner_distance" and call.options["p"] == 2:
            found = product_terms(call, tensors, upstream)
        else:
            found = {name: g for name, g in by_formula(Held())[1].items() if g is not None}
        if call.options.get("normalize"):  # the unit agents are rounded before anything is taken off them
            x, w = (tensors[name].detach().double() for name in ("x", "weight"))
            agents = formulas.unit(w, eps=call.options["eps"])[0]
            gap = (x[:, None] - agents).abs() + torch.finfo(torch.float32).eps * agents.abs()
            found["value"] = (
                (2 * gap if call.options["p"] == 2 else torch.ones_like(gap)) * agents.abs()
            ).sum(2)
        return found
    x, w = (tensors[name].detach().double() for name in ("x", "weight"))
    (x_hat, n), (w_hat, m) = (formulas.unit(t, eps=call.options["eps"]) for t in (x, w))
    x_hat, w_hat, s = x_hat.nan_to_num(0.0), w_hat.nan_to_num(0.0), number_of_scale(tensors, call.options)
    found: dict[str, Tensor] = {}
    if call.options.get("label_smoothing") and recorded.c.numel():  # s times differences of cosines
        found["value"] = abs(s) * (x_hat.norm(dim=1).max() * w_hat.norm(dim=1).max()).nan_to_num(1.0)
    if recorded.slope is None:  # no gradient is asked for
        return found
    # What a rounding may switch on is a term too.
    slope = torch.stack([noise.slope for noise in noises]).nan_to_num(0.0, 0.0).amax(0)
    if "labels" in tensors:
        kept = tensors["labels"] != call.options["ignore_index"]
        every = x.new_zeros(len(x), len(w))
        # A cosine is off by an epsilon at best, which a softmax multiplies by s.
        every[kept] = slope * (1 + abs(s) / 4) + smoothed(call, tensors, upstream, kept)
        slope = every
    found |= {"x": slope @ w_hat.abs() / n, "weight": slope.t() @ x_hat.abs() / m}
    if "scale" in tensors:
        cosines = recorded.c if slope.shape == recorded.c.shape else 1.0
        found["scale"] = (slope * abs(cosines)).sum() / abs(s or 1.0)
    return found


def smoothed(call: Call, tensors: Tensors, upstream: list[Tensor], kept: Tensor) -> Tensor | float:
    """What label smoothing asks of every cosine, s a/C u_j v_i, of which parts are taken back."""
    smoothing = call.options.get("label_smoothing", 0.0)
    if not smoothing or not kept.any():
        return 0.0
    w, y = tensors["weight"], tensors["labels"][kept]
    u, v = tensors.get("class_weight"), tensors.get("sample_weight")
    of_class = torch.ones(len(w), dtype=torch.float64) if u is None else u.double()
    of_row = torch.ones(len(y), dtype=torch.float64) if v is None else v.double()[kept]
    led = float(upstream[0].abs().max())
    if call.options["reduction"] == "mean":
        led /= float((of_row * of_class[y]).sum())
    return led * abs(number_of_scale(tensors, call.options)) * smoothing / len(w) * of_row[:, None] * of_class


def product_terms(call: Call, tensors: Tensors, upstream: list[Tensor]) -> dict[str, Tensor]:
    """inner_distance, p = 2: its gradients may come from products of rows about their common middle."""
    x, w = (tensors[name].detach().double() for name in ("x", "weight"))
    if call.options["normalize"]:
        w, n = formulas.unit(w, eps=call.options["eps"])
    else:
        n = torch.ones_like(w[:, :1])
    g = upstream[0].double().abs()
    g_w = g
    if call.tensors.get("labels") is not None:
        g_w = torch.where(formulas.own_columns(tensors["labels"], len(w)), g, 0)
    found: dict[str, Tensor] = {}
    for rows in (x, w):
        middle = rows.nan_to_num(0.0, 0.0, 0.0).sum(0) / max(1, len(rows))
        a, b = (x - middle).abs(), (w - middle).abs()
        sizes = {
            "x": 2 * (g.sum(1, keepdim=True) * a + g @ b),
            "weight": 2 * (g_w.t() @ a + g_w.sum(0)[:, None] * b) / n,
        }
        found = {name: size.maximum(found[name]) if found else size for name, size in sizes.items()}
    return found
