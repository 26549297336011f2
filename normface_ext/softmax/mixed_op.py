"""Two labels of a row by one product: what of the sweep is the other label's, and the autograd Function.

The sums over the other classes of two labels differ in two terms, which are known from their cosines:
S_q = S_p + E_p - E_q. The sweep leaves out the label with the larger logit, p. Then S_q >= E_p >= E_q, and
what is taken away costs no digit. Everything else is the head's: losses and slopes of both labels come from
``softmax_finish`` of 2N rows, the gradients from one ``head_backward``, whose slope at p takes along what p
is to q, and from N cosines at the labels q.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from ..engine import row_state, sweep
from ..engine.autograd import asked, detach_without_grad, no_second_derivative, store_as
from ..engine.calls import kernels
from ..engine.dtypes import accumulator
from . import ops
from .loss_options import LossOptions, MarginTensors

OTHERS, TARGET = row_state.SLOPES.index("others"), row_state.SLOPES.index("target")


class Pair(NamedTuple):
    """The two labels of rows as the sweep has them, [N] each; the label of a row, or part of one, that does
    not count is the ignored one."""

    first: Tensor  # bool: p is the first label
    p: Tensor
    q: Tensor
    both: Tensor  # bool: both count, and are two
    cosine: Tensor  # [2N] float64, of the first labels and of the second

    def of_label(self, of_p: Tensor, of_q: Tensor) -> Tensor:
        """What p and q have, [..., N], as what the labels have, [..., 2N]."""
        return torch.cat([torch.where(self.first, of_p, of_q), torch.where(self.first, of_q, of_p)], -1)

    def of_pair(self, of_labels: Tensor) -> tuple[Tensor, Tensor]:
        """The way back."""
        one, two = of_labels.chunk(2, -1)
        return torch.where(self.first, one, two), torch.where(self.first, two, one)


def paired(
    labels: Tensor, places: Tensor, counts: Tensor, cosine: Tensor, scale: float | Tensor, ignored: int
) -> Pair:
    """Of labels, their places in the weight at hand, counts and cosines [2N]: p is the label with the larger
    logit of those that count."""
    (label_one, label_two), (one, two) = labels.chunk(2), torch.where(counts, places, ignored).chunk(2)
    (counts_one, counts_two), (c_one, c_two) = counts.chunk(2), cosine.chunk(2)
    first = counts_one & (~counts_two | (scale * c_one >= scale * c_two))
    both = counts_one & counts_two & (label_one != label_two)
    return Pair(first, torch.where(first, one, two), torch.where(first, two, one), both, cosine)


class Between(NamedTuple):
    """What p and q are to each other, [N] float64, by q's own kappa."""

    e_p: Tensor  # 0 where there is one label
    e_q: Tensor
    shrink: Tensor  # exp(kappa of p - kappa of q)


def rows_of_both(
    rows: Tensor, pair: Pair, weight: Tensor, target_weight: Tensor | None, scale: float | Tensor
) -> tuple[Tensor, Between]:
    """The state [ROW_FIELDS, N] of the rows with p -> that of the rows with either label, [ROW_FIELDS, 2N].
    `weight` and `target_weight` [2N] are those of the labels."""
    kappa, (c_p, c_q) = rows[row_state.SHIFT], pair.of_pair(pair.cosine)
    # E_p may be beyond every number by p's kappa, where that is the largest of the others' logits.
    own = torch.where(pair.both, torch.maximum(kappa, scale * c_p), kappa)
    e_p = torch.where(pair.both, (scale * c_p - own).exp(), 0)
    e_q = torch.where(pair.both, (scale * c_q - own).exp(), 0)
    shrink = torch.where(pair.both, (kappa - own).exp(), 1)
    total = rows[row_state.SUM] * shrink + (e_p - e_q)
    second = rows[row_state.SECOND_SUM] * shrink + (c_p * e_p - c_q * e_q)
    both = rows.repeat(1, 2)
    both[row_state.SUM] = pair.of_label(rows[row_state.SUM], total)
    both[row_state.SECOND_SUM] = pair.of_label(rows[row_state.SECOND_SUM], second)
    both[row_state.SHIFT] = pair.of_label(kappa, own)
    both[row_state.COSINE] = pair.cosine
    both[row_state.ROW_WEIGHT] = weight
    both[row_state.TARGET_WEIGHT] = 1.0 if target_weight is None else target_weight
    return both, Between(e_p, e_q, shrink)


def slopes_of_pair(slopes: Tensor, pair: Pair, between: Between) -> tuple[Tensor, Tensor]:
    """(slopes [SLOPE_FIELDS, N] of the rows with p, the slope along q's cosine besides [N]) from those of the
    rows with either label, [.., 2N]."""
    of_p, of_q = pair.of_pair(slopes[: row_state.SLOPE_FIELDS])
    joined = of_p + of_q
    joined[OTHERS] = of_p[OTHERS] + of_q[OTHERS] * between.shrink
    at_p = of_q[OTHERS] * between.e_p
    joined[TARGET] = of_p[TARGET] + torch.where(pair.both, at_p, of_q[TARGET])
    return joined, torch.where(pair.both, of_q[TARGET] - of_q[OTHERS] * between.e_q, 0)


def cosine_gradients(
    factor: Tensor,
    x: Tensor,
    weight: Tensor,
    classes: Tensor,
    x_inverse: Tensor,
    weight_inverse: Tensor,
    eps: float,
    needed: tuple[bool, ...],
) -> tuple[Tensor, Tensor]:
    """Of sum_i factor_i cos(x_i, w_classes[i]) in x [N, D] and in the rows w_classes[i], [N, D] each, in x's
    dtype, a float32 or a float64. A negative class is none."""
    wide, rows = x.dtype, x.shape[0]
    here, index = classes >= 0, classes.clamp_min(0)
    place = torch.arange(rows, device=x.device)
    gradients: tuple[Tensor, Tensor] = kernels(x, weight).cosine_pairs_backward(
        x,
        weight[index].to(wide),
        factor.to(wide)[:, None],
        torch.where(here, place, rows)[:, None],
        x_inverse.to(wide),
        weight_inverse[index],
        *needed,
        eps,
        False,
    )
    return gradients


def add_by_class(into: Tensor, classes: Tensor, rows: Tensor) -> None:
    """into[classes_i] += rows_i, whose rows of one class are added up in their own dtype first. index_put
    adds in a fixed order. Rows of a negative class are zero."""
    index = classes.clamp_min(0)
    ordered = index.sort().values
    place = torch.searchsorted(ordered, index)  # of the first row of the class; the others stay zero
    sums = torch.zeros_like(rows).index_put((place,), rows, accumulate=True)
    into.index_put_((ordered,), sums.to(into.dtype), accumulate=True)


class _MixedLoss(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        m1: Tensor | None,
        m2: Tensor | None,
        m3: Tensor | None,
        labels: Tensor,
        counts: Tensor,
        row_weight: Tensor,
        class_weight: Tensor | None,
        options: LossOptions,
    ) -> Tensor:
        need_x, need_weight = ctx.needs_input_grad[:2]
        # The gradient of a row has two parts, which are added before they are rounded.
        wide, weight = x.to(accumulator(x.dtype)).contiguous(), weight.contiguous()
        margin, s = (m1, m2, m3), options.scale_value if scale is None else scale.double()
        asked_of = torch.where(counts, labels, options.ignore_index)
        one, two = asked_of.chunk(2)
        of_one = sweep.target_cosine(wide, weight, one.contiguous(), options)
        of_two = sweep.target_cosine(wide, weight, two.contiguous(), options)
        cosine = torch.cat([of_one, of_two])
        pair = paired(labels, labels, counts, cosine, s, options.ignore_index)
        swept, options = sweep.head_sweep_in_memory(
            wide,
            weight,
            pair.p,
            scale,
            None,
            class_weight,
            options,
            op="normface_loss",
            need_x=need_x,
            need_weight=need_weight,
        )
        of_target = None
        if class_weight is not None:
            of_target = class_weight[asked_of.clamp(0, weight.shape[0] - 1)].double()
        table, between = rows_of_both(
            swept.rows, pair, torch.where(counts, row_weight.double(), 0), of_target, s
        )
        made, slopes = ops.softmax_finish(
            table,
            torch.cat([wide, wide]),
            swept.class_sum,
            scale.repeat(2) if scale is not None and scale.dim() == 1 else scale,
            margin,
            options,
            need_margin=any(ctx.needs_input_grad[3:6]),
        )
        joined, at_q = slopes_of_pair(slopes, pair, between)
        classes = torch.where(pair.both, pair.q, -1)
        ctx.save_for_backward(
            x, weight, scale, *margin, wide, pair.p, class_weight, slopes, joined, at_q, classes, *swept
        )
        ctx.options = options
        return made.view(2, -1).sum(0) if options.reduction == 0 else made

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        x, weight, scale, m1, m2, m3, *saved = ctx.saved_tensors
        wide, p, class_weight, slopes, joined, at_q, classes, *saved = saved
        swept, options, needed = row_state.Swept(*saved), ctx.options, ctx.needs_input_grad[:3]
        with torch.no_grad():
            dx, dw, ds = sweep.head_backward(
                grad_loss, joined, wide, weight, p, scale, class_weight, swept, options, needed
            )
            x_inverse = swept.rows[row_state.INVERSE_NORM]
            if (needed[0] or needed[1]) and len(x) > 0:
                dx_q, dw_q = cosine_gradients(
                    grad_loss * at_q,
                    wide,
                    weight,
                    classes,
                    x_inverse,
                    swept.inverse_norm,
                    options.eps,
                    needed[:2],
                )
                if needed[0]:
                    dx = store_as(dx + dx_q, x.dtype, x_inverse, options.eps)
                if needed[1]:
                    add_by_class(dw, classes, dw_q)
            of_both = grad_loss.repeat(2) if options.reduction == 0 else grad_loss
            of_margin = ops.margin_gradients(of_both, slopes, (m1, m2, m3), ctx.needs_input_grad[3:6])
        given = (*asked(needed, (dx, dw, ds)), *of_margin)
        raising = no_second_derivative("normface_loss", given, grad_loss, x, weight, scale, m1, m2, m3)
        return *raising, *[None] * 5


def mixed_loss(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    margin: MarginTensors,
    labels: Tensor,
    counts: Tensor,
    row_weight: Tensor,
    class_weight: Tensor | None,
    options: LossOptions,
) -> Tensor:
    """Of rows x [N, D] with labels, counts, weights and margins [2N], those of the first labels first; the
    options are of N rows. [] or [N]."""
    x, weight = detach_without_grad(x, weight)
    result: Tensor = _MixedLoss.apply(
        x, weight, scale, *margin, labels, counts, row_weight, class_weight, options
    )
    return result
