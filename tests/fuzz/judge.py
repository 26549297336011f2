"""How far a result may be from the truth: as far as plain torch and an honest rounding come, and a hair.

The truth is the formula in float64. Beside it stand the formula in the dtype that kernels accumulate in, and
the formula in float64 with its cosines, distances and logits disturbed by a few roundings, all one way, all
the other way, and at random. Each row (the last dimension) may be `FACTOR` times as far off as the worst
of these, plus `HAIR` roundings of its largest value and of the terms that make it.
"""

from __future__ import annotations

import torch
from torch import Tensor

FACTOR, HAIR = 4.0, 8.0


class Wrong(AssertionError):
    """A result that the formula does not allow."""


def rows_of(t: Tensor) -> Tensor:
    return t.reshape(1, 1) if t.dim() == 0 else t


def largest(t: Tensor) -> Tensor:
    """The largest finite magnitude of every row, 0 for none."""
    finite = torch.where(t.isfinite(), t.abs(), 0)
    return finite.amax(-1, keepdim=True) if t.shape[-1] else finite.new_zeros(*t.shape[:-1], 1)


def compare(
    name: str,
    got: Tensor,
    truth: Tensor,
    others: list[Tensor],
    terms: Tensor | None,
    eps: float,
    tiny: Tensor | float = 0.0,
    exempt: Tensor | None = None,
) -> float:
    """Raises `Wrong`, or returns the largest error as a fraction of what is allowed.

    Where a row of the truth is not finite, the same row of the result must not be either (which of its
    elements is a matter of the order of operations); everywhere else the result must be finite. The rows
    `exempt` may hold a zero or a NaN where the truth holds the other. `eps` is that of the arithmetic,
    `terms` the sizes of what adds up to the result.
    """
    if got.shape != truth.shape:
        raise Wrong(f"{name}: shape {list(got.shape)}, not {list(truth.shape)}")
    if got.numel() == 0:
        return 0.0
    info = torch.finfo(got.dtype)
    got, truth = rows_of(got.detach().double()), rows_of(truth.detach())
    others = [rows_of(other.detach().double()) for other in others]
    poisoned = ~truth.isfinite().all(-1, keepdim=True)
    pretended = poisoned & (True if exempt is None else ~exempt) & got.isfinite().all(-1, keepdim=True)
    if pretended.any():
        raise Wrong(f"{name}: row {_where(pretended)} is finite, {_some(got, pretended)}; it should not be")
    over = truth.abs() > 0.98 * info.max
    overflow_lost = over & ~poisoned & ~(got.abs() >= 0.97 * info.max)
    if overflow_lost.any():
        raise Wrong(
            f"{name}: {_some(got, overflow_lost)} where the truth, {_some(truth, overflow_lost)}, overflows"
        )
    judged = ~poisoned & ~over
    if exempt is not None:
        judged = judged & ~(exempt & (truth == 0))
    strange = judged & ~got.isfinite()
    if strange.any():
        raise Wrong(
            f"{name}: {_some(got, strange)} at {_where(strange)} where the truth is {_some(truth, strange)};"
            f" {int(strange.sum())} of {strange.numel()} out of place"
        )
    allowed = info.eps * truth.abs() + HAIR * eps * largest(truth) + tiny + info.smallest_normal * info.eps
    if terms is not None:
        allowed = allowed + HAIR * eps * largest(rows_of(terms.detach()))
    for other in others:
        allowed = allowed + FACTOR * largest(torch.where(truth.isfinite(), other - truth, 0))
    fraction = torch.where(judged, (got - truth).abs() / allowed, 0)
    worst = fraction.argmax()
    if fraction.flatten()[worst] > 1:
        at = torch.unravel_index(worst, fraction.shape)
        raise Wrong(
            f"{name}: {float(got[at])!r} at {[int(i) for i in at]}, the truth is {float(truth[at])!r}: off by"
            f" {float((got - truth).abs()[at]):.3g}, {float(fraction[at]):.3g} times the allowed"
            f" {float(allowed.expand_as(got)[at]):.3g}; {int((fraction > 1).sum())} of {got.numel()} beyond"
        )
    return float(fraction.flatten()[worst])


def _where(mask: Tensor) -> list[int]:
    return [int(i) for i in mask.nonzero()[0]]


def _some(values: Tensor, mask: Tensor) -> float:
    return float(values[mask.expand_as(values)][0])


def bits(t: Tensor | None, nan: bool = False) -> bytes:
    """The memory of a tensor; with `nan` every NaN as the same one."""
    if t is None:
        return b""
    flat = t.detach().cpu().clone(memory_format=torch.contiguous_format).reshape(-1)
    if nan:
        flat[flat.isnan()] = torch.nan
    return flat.view(torch.uint8).numpy().tobytes()
