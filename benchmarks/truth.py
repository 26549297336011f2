"""What is right: value and gradients in float64, in chunks so that memory stays bounded.

Nothing here is sampled: every row and every class is compared, also at a million classes.
"""

from __future__ import annotations

import torch
from cases import Case, Inputs
from competitors import Forward, step
from torch import Tensor

from normface_ext import reference

QUANTITIES = ("loss", "dx", "dw", "ds")
CHUNK_BYTES = 256 << 20

# Ours may err FACTOR times as much as eager PyTorch in the same dtype, plus HAIR roundings, because
# eager's own error can be zero by luck.
FACTOR, HAIR = 4.0, 4.0
WITHOUT_EAGER = 16 * torch.finfo(torch.float32).eps  # taken for eager's error where eager could not run

Values = dict[str, Tensor]


def truth(case: Case, inputs: Inputs, scale: float) -> Values:
    """loss (or the output), dx, dw and ds in float64; those that exist."""
    with torch.no_grad():
        x = inputs.x.double()
        if case.kind == "normalize":
            y = reference.normalize(x, case.axis)
            upstream = inputs.upstream.double()
            return {"loss": y, "dx": reference.normalize_backward(upstream, None, x, case.axis, 2, 1e-12)}
        weight = inputs.weight.double()
        if case.kind == "norm_linear":
            s = torch.tensor(scale, dtype=torch.float64, device=x.device)
            out = reference.norm_linear(x, weight, s)
            gradients = reference.norm_linear_backward(inputs.upstream.double(), x, weight, s, 1e-12)
            return dict(zip(QUANTITIES, (out, *gradients), strict=True))
    return _head_truth(case, x, inputs.weight.detach(), inputs.labels, scale)


def _head_truth(case: Case, x: Tensor, weight: Tensor, labels: Tensor, scale: float) -> Values:
    """Two passes over chunks of classes: log-sum-exp, then gradients."""
    margin = reference.MARGINS[case.margin]
    batch, rows = x.shape[0], torch.arange(x.shape[0], device=x.device)
    chunk = max(1, CHUNK_BYTES // (8 * batch))
    starts = range(0, weight.shape[0], chunk)
    x_hat, x_norm = reference.normalize(x, return_norm=True)

    target = (x_hat * reference.normalize(weight[labels].double())).sum(1)[:, None].requires_grad_()
    psi = target if margin is None else reference.margin(target, margin)
    (slope,) = torch.autograd.grad(psi.sum(), target)
    psi, target = psi.detach()[:, 0], target.detach()[:, 0]

    def scores(start: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        w_hat, w_norm = reference.normalize(weight[start : start + chunk].double(), return_norm=True)
        cos = x_hat @ w_hat.t()
        here = (labels >= start) & (labels < start + chunk)
        cos[rows[here], labels[here] - start] = psi[here]
        return w_hat, w_norm, cos, rows[here], labels[here] - start

    lse = torch.stack([torch.logsumexp(scale * scores(start)[2], 1) for start in starts]).logsumexp(0)
    dx_hat, dw, ds = torch.zeros_like(x), torch.empty_like(weight, dtype=torch.float64), 0.0
    for start in starts:
        w_hat, w_norm, cos, row, column = scores(start)
        grad = (scale * cos - lse[:, None]).exp_()
        grad[row, column] -= 1
        grad /= batch
        ds = ds + (grad * cos).sum()
        grad *= scale
        grad[row, column] *= slope[row, 0]
        dx_hat += grad @ w_hat
        dw_hat = grad.t() @ x_hat
        dw[start : start + chunk] = (dw_hat - w_hat * (w_hat * dw_hat).sum(1, keepdim=True)) / w_norm
    dx = (dx_hat - x_hat * (x_hat * dx_hat).sum(1, keepdim=True)) / x_norm
    return {"loss": (lse - scale * psi).mean(), "dx": dx, "dw": dw, "ds": ds}


def relative_errors(value: Tensor, right: Tensor) -> tuple[float, float]:
    """(Frobenius, largest element): the second sees one wrong tile in a large matrix."""
    square = norm = worst = largest = 0.0
    pieces = max(1, 8 * right.numel() // CHUNK_BYTES) if right.dim() else 1
    flat_value, flat_right = value.detach().reshape(-1), right.reshape(-1)
    for v, r in zip(flat_value.chunk(pieces), flat_right.chunk(pieces), strict=True):
        r = r.to(v.device)  # it may lie in a file, mapped
        difference = v.double() - r
        square, norm = square + float(difference.square().sum()), norm + float(r.square().sum())
        worst, largest = max(worst, float(difference.abs().max())), max(largest, float(r.abs().max()))
    if not (square == square and worst == worst):
        return float("inf"), float("inf")
    return (square / norm) ** 0.5 if norm else square**0.5, worst / largest if largest else worst


def errors(
    forward: Forward, inputs: Inputs, scale: float, case: Case, right: Values, *, learn_scale: bool = True
) -> dict[str, float]:
    """Relative errors under the names of QUANTITIES, and under "worst <name>" by the largest element.

    Both ways of passing the scale are checked, as a number (what is timed) and as a tensor with a
    gradient (unless `learn_scale` is False; then there is no "ds"); the larger error counts.
    """
    found: dict[str, float] = {}
    for learned in (False, True) if learn_scale and "ds" in right else (False,):
        s = torch.tensor(scale, device=inputs.x.device, requires_grad=True) if learned else scale
        inputs.clear_gradients()
        values = {"loss": step(forward, inputs, s, case, "fwd+bwd"), "dx": inputs.x.grad}
        if inputs.weight is not None:
            values["dw"] = inputs.weight.grad
        if learned:
            values["ds"] = s.grad
        for name, value in values.items():
            for key, error in zip((name, f"worst {name}"), relative_errors(value, right[name]), strict=True):
                found[key] = max(found.get(key, 0.0), error)
    inputs.clear_gradients()
    return found


def complaints(ours: dict[str, float], eager: dict[str, float], dtype: torch.dtype) -> list[str]:
    """Sentences about every error of ours beyond what eager's own error allows; empty when all is well."""
    found = []
    for name, error in ours.items():
        theirs = eager.get(name, WITHOUT_EAGER)
        allowed = FACTOR * theirs + HAIR * torch.finfo(dtype).eps
        if not error <= allowed:
            found.append(f"{name}: error {error:.1e}, allowed {allowed:.1e} (eager: {theirs:.1e})")
    return found
