"""Two labels of a row, as mixup and cutmix make them: loss_i = lam_i L(x_i, y_i) + (1 - lam_i) L(x_i, yb_i).

What it means is the same for every loss: the row stands in the batch twice, with one label each, and its
weight is shared out by lam. So the mean divides by the sum of the weights of what counts, an ignored label
takes its share along, and lam = 1 is the row with its first label.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from . import checks, transforms
from .arguments import SHARE, number
from .autograd import store_as
from .dtypes import accumulator


class BothLabels(NamedTuple):
    """Of N rows with two labels each, first all with one, then all with the other."""

    labels: Tensor  # [2N] int64
    weight: Tensor  # [2N]: lam and 1 - lam, times sample_weight, in the accumulator dtype of x
    #: [2N] float64: how much of a row each of them is, where a row is to be one. lam and 1 - lam, and 1 where
    #: the row has no other label that counts.
    share: Tensor
    counts: Tensor  # [2N] bool: not ignored, and of a weight that is not 0

    def any_counts(self) -> Tensor:
        """[N] bool: whether a row counts with either label."""
        return self.counts.view(2, -1).any(0)


def both_labels(
    op: str,
    x: Tensor,
    labels: object,
    labels_b: object,
    lam: object,
    sample_weight: object,
    classes: int,
    ignore_index: int | None,
) -> BothLabels:
    """Checked. `x` [N, D] has been."""
    if labels_b is None or lam is None:
        given, missing = ("labels_b", "lam") if lam is None else ("lam", "labels_b")
        raise ValueError(f"{op}: expected `{missing}` together with `{given}`, got None")
    first = checks.labels(op, labels, x, classes, ignore_index)
    second = checks.labels(op, labels_b, x, classes, ignore_index, name="labels_b")
    both = torch.cat([first, second])
    part = _parts(op, lam, x)
    weight = checks.weights(op, "sample_weight", sample_weight, x, x.shape[0])
    weight = part if weight is None else part * weight.repeat(2)
    counts = checks.weighed(both != checks.ignored(ignore_index), weight)
    alone = ~counts.view(2, -1).all(0).repeat(2)
    first_part = part[: x.shape[0]].double()  # a row is 1 to the last digit: it is counted
    share = torch.where(alone, 1, torch.cat([first_part, 1 - first_part]))
    return BothLabels(both, weight, share, counts)


def _parts(op: str, lam: object, x: Tensor) -> Tensor:
    """lam and 1 - lam, [2N]. Elsewhere than on the CPU the device asserts that a tensor is in [0, 1]."""
    rows, wide = x.shape[0], accumulator(x.dtype)
    if not isinstance(lam, Tensor):
        share = number(op, "lam", lam, SHARE, kind="a number, or a floating tensor of shape [] or [N]")
        one = x.new_ones(rows, dtype=wide)  # times a number, which to torch.compile is then no constant
        return torch.cat([one * share, one * (1 - share)])
    shares = checks.floating(op, "lam", lam)
    if shares.dim() > 1 or (shares.dim() == 1 and shares.shape[0] != rows):
        raise ValueError(
            f"{op}: expected `lam` to be a number, or a floating tensor of shape [] or [{rows}], got shape"
            f" {list(shares.shape)}"
        )
    if shares.requires_grad:
        raise ValueError(f"{op}: expected `lam` not to require a gradient, got one that does")
    checks.same_device(op, "lam", shares, "x", x)
    fits = ((shares >= 0) & (shares <= 1)).all()
    if checks.readable(shares):
        if not fits:
            raise ValueError(f"{op}: expected `lam` in [0, 1], got {_outside(shares):g}")
    elif not shares.is_meta:
        torch._assert_async(fits, f"{op}: expected `lam` in [0, 1]")
    shares = shares.to(wide).expand(rows)
    return torch.cat([shares, 1 - shares])


def _outside(shares: Tensor) -> float:
    flat = shares.reshape(-1)
    return float(flat[~((flat >= 0) & (flat <= 1))][0])


def no_statistics(op: str, wanted: bool) -> None:
    """Raises where the statistics of rows with two labels are asked for."""
    if wanted:
        raise ValueError(
            f"{op}: expected `return_statistics` False with `labels_b`, of which a row has no one target"
        )


def check_finite(
    op: str,
    x: Tensor,
    weight: Tensor,
    both: BothLabels,
    sample_weight: Tensor | None,
    scale: Tensor | None = None,
) -> None:
    """``checks.finite_operands`` of the rows that count with either label."""
    counts = both.any_counts()
    checks.finite_operands(op, x, weight, counts, scale)
    if sample_weight is not None:
        checks.finite_rows(op, "sample_weight", sample_weight, counts)


class _Twice(Function):
    """The gradients of both halves in 16 bits are added in float32 before they are rounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.eps = eps
        return torch.cat([x, x])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        total = gradient.float().view(2, *x.shape).sum(0)
        return store_as(total, x.dtype, (x.float().square().sum(1) + ctx.eps).rsqrt(), ctx.eps), None


def twice(x: Tensor, eps: float) -> Tensor:
    """[x; x], [2N, D], of rows that will be normalised with this eps."""
    if x.dtype.itemsize > 2 or transforms.watched():
        return torch.cat([x, x])
    result: Tensor = _Twice.apply(x, eps)
    return result


def joined(made: Tensor, reduction: str) -> Tensor:
    """What a loss makes of rows that stand there twice, as what it makes of the rows."""
    if reduction == "none":
        return made.view(2, -1).sum(0)
    return 2 * made if reduction == "batchmean" else made  # it was divided by 2 N
