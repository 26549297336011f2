"""The ops of the engine: one sweep over the classes for softmax heads and losses over agents. Fake kernels
and typed wrappers; no checks, no defaults."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from . import memory, transforms, updates
from .calls import add_fakes, by_name, kernels, options_of, plan_device, stored_cells
from .dtypes import accumulator
from .plan import Products
from .row_state import NO_INPUTS, ROW_FIELDS, SINKS, TERMS, SweepOptions, Swept, TermInputs


def _head_sweep_fake(
    *,
    x: Tensor,
    weight: Tensor,
    store: bool,
    need_x: bool,
    need_class_sum: bool,
    capacity: int,
    product_precision: torch.dtype,
    **_: Any,
) -> tuple[Tensor, ...]:
    wide = accumulator(x.dtype)
    (batch, dim), classes = x.shape, weight.shape[0]
    kept, stored = stored_cells(x, batch, classes, product_precision)
    return (
        x.new_empty([len(ROW_FIELDS), batch], dtype=torch.float64),
        x.new_empty([classes], dtype=wide),
        x.new_empty([batch, dim] if need_x else [0], dtype=wide),
        x.new_empty([dim + 1 if need_class_sum else 0], dtype=wide),
        x.new_empty([kept if store else 0], dtype=stored),
        x.new_empty([batch, capacity], dtype=torch.int64),
        x.new_empty([batch, capacity], dtype=wide),
    )


def _head_shift_fake(*, x: Tensor, **_: Any) -> Tensor:
    return x.new_empty([x.shape[0]], dtype=torch.float64)


def head_backward_fake(
    *,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    need_x: bool,
    need_weight: bool,
    need_scale: bool,
    is_shard: bool,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    of_scale = [] if scale is None else list(scale.shape)
    return (
        x.new_empty(x.shape if need_x else [0], dtype=accumulator(x.dtype) if is_shard else x.dtype),
        weight.new_empty(weight.shape if need_weight else [0]),
        x.new_empty(of_scale if need_scale else [0], dtype=torch.float64),
    )


def _head_backward_update_fake(**_: Any) -> None:
    """Writes where it is told to."""


def _target_cosine_fake(*, x: Tensor, **_: Any) -> Tensor:
    return x.new_empty([x.shape[0]], dtype=torch.float64)


def _target_center_fake(*, labels: Tensor, **_: Any) -> Tensor:
    return labels.new_empty([labels.shape[0]])


add_fakes(
    by_name(
        {
            "target_cosine": _target_cosine_fake,
            "target_center": _target_center_fake,
            "head_sweep": _head_sweep_fake,
            "head_shift": _head_shift_fake,
            "head_backward": head_backward_fake,
            "head_backward_update": _head_backward_update_fake,
        }
    )
)


Options = TypeVar("Options", bound=SweepOptions)


def planned(options: Options, products: Products) -> Options:
    return replace(options, **products._asdict())


_cosine_options = options_of("target_cosine", SweepOptions)
_sweep_options = options_of("head_sweep", SweepOptions)
_shift_options = options_of("head_shift", SweepOptions)
_backward_options = options_of("head_backward", SweepOptions)
_update_options = options_of("head_backward_update", SweepOptions)


class CosineOptions(NamedTuple):
    """What ``target_cosine`` takes of them."""

    ignore_index: int
    eps: float
    is_shard: bool = False


def target_cosine(x: Tensor, weight: Tensor, labels: Tensor, options: SweepOptions | CosineOptions) -> Tensor:
    """cos(x_i, w_labels[i]), [N] float64, without a gradient of its own; 0 where the class is not here."""
    told = _cosine_options(options)
    if transforms.watched():
        return transforms.constant(
            "target_cosine", kernels(x, weight).target_cosine, (x, weight, labels), told
        )
    cosine: Tensor = kernels(x, weight).target_cosine(x, weight, labels, *told)
    return cosine


def target_center(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    centers: int,
    ignore_index: int,
    eps: float,
    *,
    is_shard: bool = False,
) -> Tensor:
    """The row of the weight [C centers, D] nearest to x_i among those of its label's class, int64 [N],
    without a gradient; ELSEWHERE where the class is not here, IGNORED where the row does not count."""
    told = ignore_index, eps, is_shard, centers
    if transforms.watched():
        return transforms.constant(
            "target_center", kernels(x, weight).target_center, (x, weight, labels), told
        )
    place: Tensor = kernels(x, weight).target_center(x, weight, labels, *told)
    return place


def head_sweep(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: Tensor | None,
    sample_weight: Tensor | None,
    class_weight: Tensor | None,
    options: SweepOptions,
    *,
    need_x: bool,
    need_weight: bool,
    need_largest: bool = False,
    shift: Tensor | None = None,
    term: TermInputs = NO_INPUTS,
) -> Swept:
    """The sums over the classes at hand."""
    swept = kernels(x, weight).head_sweep(
        x,
        weight,
        labels,
        scale,
        *term,
        sample_weight,
        class_weight,
        shift,
        options.keep and need_weight,
        need_x,
        options.smoothing > 0,
        need_largest,
        SINKS["none"],
        0,
        *_sweep_options(options),
    )
    return Swept(*swept[:5])


class Collected(NamedTuple):
    """What the ``sink`` of a sweep found, [N, capacity] each: csrc/engine/head_arguments.h."""

    classes: Tensor
    values: Tensor


def head_sweep_collecting(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    options: SweepOptions,
    term: TermInputs,
    *,
    sink: str,
    capacity: int,
    store: bool,
    need_class_sum: bool = False,
    need_largest: bool = False,
) -> tuple[Swept, Collected]:
    """The same without x_sum, and what the sink collects."""
    *swept, classes, values = kernels(x, weight).head_sweep(
        x,
        weight,
        labels,
        None,
        *term,
        None,
        None,
        None,
        store,
        False,
        need_class_sum,
        need_largest,
        SINKS[sink],
        capacity,
        *_sweep_options(options),
    )
    return Swept(*swept), Collected(classes, values)


Result = TypeVar("Result")


def in_memory(
    op: str,
    x: Tensor,
    weight: Tensor,
    options: Options,
    sweep: Callable[[Options], Result],
    *,
    store: bool = True,
) -> tuple[Result, Options]:
    """What ``sweep`` of the options gives, and the options that its backward has to be given: of a smaller
    plan where the memory for E, which it keeps if `store`, cannot be had. A traced step has one plan."""
    if torch.compiler.is_compiling() or not (options.keep and store):
        return sweep(options), options
    (batch, dim), classes, device = x.shape, max(1, weight.shape[0]), plan_device(x)
    softmax = options.term == TERMS["softmax"]
    step = batch, max(1, dim), classes, options.product_precision, device, softmax, options.centers
    if not memory.is_refused(step, options.workspace):
        try:
            return sweep(options), options
        except (RuntimeError, MemoryError) as error:
            if not memory.is_refusal(error):
                raise
        memory.refuse(op, step, options.workspace)
    smaller = memory.smaller(step, options.workspace)
    if smaller is not None:
        options = planned(options, smaller)
    return sweep(options), options


def head_sweep_in_memory(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: Tensor | None,
    sample_weight: Tensor | None,
    class_weight: Tensor | None,
    options: Options,
    *,
    op: str,
    need_x: bool,
    need_weight: bool,
    need_largest: bool = False,
    shift: Tensor | None = None,
    term: TermInputs = NO_INPUTS,
) -> tuple[Swept, Options]:
    """``head_sweep`` as :func:`in_memory`; `op` is who asks, for a warning."""

    def sweep(given: Options) -> Swept:
        return head_sweep(
            x,
            weight,
            labels,
            scale,
            sample_weight,
            class_weight,
            given,
            need_x=need_x,
            need_weight=need_weight,
            need_largest=need_largest,
            shift=shift,
            term=term,
        )

    return in_memory(op, x, weight, options, sweep, store=need_weight)


def head_shift(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: Tensor | None,
    options: SweepOptions,
    term: TermInputs = NO_INPUTS,
) -> Tensor:
    """kappa as the classes at hand alone would have it, [N] float64; -inf where there is none."""
    shift: Tensor = kernels(x, weight).head_shift(x, weight, labels, scale, *term, *_shift_options(options))
    return shift


def head_backward(
    grad_loss: Tensor,
    slopes: Tensor,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: Tensor | None,
    class_weight: Tensor | None,
    swept: Swept,
    options: SweepOptions,
    needed: tuple[bool, ...],
    term: TermInputs = NO_INPUTS,
    taking: updates.Taking | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and scale, in the scale's dtype, from the slopes of the rows' losses. That of
    the weight goes to ``taking``, if there is one, and is not `needed` then."""
    called = kernels(x, weight)
    tensors = grad_loss.contiguous(), slopes, x, weight, labels, scale, *term, class_weight, *swept
    dx, dw, ds = called.head_backward(*tensors, *needed, *_backward_options(options))
    if taking is not None:  # last: it overwrites the rows that the features' gradient reads
        with taking.arguments() as arguments:
            called.head_backward_update(*tensors, *arguments, *_update_options(options))
    return dx, dw, ds if scale is None else ds.to(scale.dtype)
