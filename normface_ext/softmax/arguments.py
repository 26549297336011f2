"""A head's arguments: checked, and as the kernels are told them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..engine import checks
from ..engine.calls import plan_device, product_dtype
from ..engine.mixing import BothLabels, both_labels, check_finite
from ..engine.plan import asked_for, products
from ..engine.row_state import NO_INPUTS, TERMS, TermInputs
from .centers import class_count, for_each_row, ignored_row
from .hard_negatives import HardNegatives, filtered
from .loss_options import NUMBERS, LossOptions, MarginTensors
from .margins import GUARDS, NO_MARGIN, Margin, of_rows
from .options import HeadOptions
from .rows import nearest_rows


class HeadInputs(NamedTuple):
    """A head's arguments, checked. The kernels know of rows of the weight, which are the classes where a
    class is one row: `places` are the labels as such rows, and class_weight has a number for each."""

    scale: Tensor | None
    scale_value: float
    labels: Tensor
    sample_weight: Tensor | None
    class_weight: Tensor | None
    classes: int
    places: Tensor


def checked_inputs(
    op: str,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: float | Tensor,
    sample_weight: Tensor | None,
    class_weight: Tensor | None,
    options: HeadOptions,
) -> HeadInputs:
    checks.features_and_weight(op, x, weight)
    centers, ignored = options.sub_centers, checks.ignored(options.ignore_index)
    classes = class_count(op, weight, centers)
    labels = checks.labels(op, labels, x, classes, options.ignore_index)
    scale_tensor, scale_value = checks.scale(op, scale, x, per_row=True)
    row_weight = checks.weights(op, "sample_weight", sample_weight, x, x.shape[0])
    if options.check_finite:
        checks.finite_operands(op, x, weight, labels != ignored, scale_tensor, row_weight)
    if scale_tensor is not None and scale_tensor.dim() == 1:  # a row that does not count may hold anything
        scale_tensor = torch.where(checks.weighed(labels != ignored, row_weight), scale_tensor, 0)
    of_class = checks.weights(op, "class_weight", class_weight, x, classes)
    places = nearest_rows(x, weight, labels, centers, options.ignore_index, options.eps)
    of_class = for_each_row(of_class, centers)
    return HeadInputs(scale_tensor, scale_value, labels, row_weight, of_class, classes, places)


def mixed_inputs(
    op: str,
    x: Tensor,
    weight: Tensor,
    labels: tuple[Tensor, Tensor | None, float | Tensor | None],
    scale: float | Tensor,
    sample_weight: Tensor | None,
    class_weight: Tensor | None,
    options: HeadOptions,
) -> tuple[HeadInputs, BothLabels]:
    """The same of rows with two labels: (labels, labels_b, lam). Labels and weights are [2N], a scale per row
    is [N]."""
    checks.features_and_weight(op, x, weight)
    centers, ignored = options.sub_centers, options.ignore_index
    classes = class_count(op, weight, centers)
    both = both_labels(op, x, *labels, sample_weight, classes, ignored)
    scale_tensor, scale_value = checks.scale(op, scale, x, per_row=True)
    of_class = checks.weights(op, "class_weight", class_weight, x, classes)
    if options.check_finite:
        check_finite(op, x, weight, both, sample_weight, scale_tensor)
    if scale_tensor is not None and scale_tensor.dim() == 1:
        scale_tensor = torch.where(both.any_counts(), scale_tensor, 0)
    places = both.labels
    if centers > 1:
        places = nearest_rows(torch.cat([x, x]), weight, places, centers, ignored, options.eps)
    told = both.labels, both.weight, for_each_row(of_class, centers), classes, places
    return HeadInputs(scale_tensor, scale_value, *told), both


#: m1, m2, m3, the formula's and the guard's codes and straightness, where the margin is none.
NO_NUMBERS = (1.0, 0.0, 0.0, 0, 0, False)
Numbers = tuple[float, float, float, int, int, bool]


def margin_arguments(
    op: str, margin: Margin | None, labels: Tensor, classes: int, straight: bool
) -> tuple[MarginTensors, Numbers]:
    """A margin for the rows whose labels these are: its tensors, [] or [N], and its numbers (0 where there is
    a tensor), formula, guard and straightness."""
    if margin is None:
        return NUMBERS, NO_NUMBERS
    tensors: list[Tensor | None] = []
    numbers: list[float] = []
    for name, value in zip(("m1", "m2", "m3"), margin.numbers(), strict=True):
        if isinstance(value, Tensor):
            value = value.detach() if straight else value
            tensors.append(of_rows(op, name, value, margin.per_row, labels, classes))
            numbers.append(0.0)
        else:
            tensors.append(None)
            numbers.append(value)
    m1, m2, m3 = numbers
    return (tensors[0], tensors[1], tensors[2]), (m1, m2, m3, margin.formula, GUARDS[margin.guard], straight)


class Term(NamedTuple):
    """What the sweep over the classes is told of the others' logits."""

    number: int = TERMS["softmax"]
    lowest: float = -1.0
    highest: float = 1.0
    inputs: TermInputs = NO_INPUTS


PLAIN = Term()


def term_of(found: HardNegatives) -> Term:
    """For the kernels: the row thresholds, and the six numbers in one tensor."""
    threshold = found.threshold.detach().double().contiguous()
    numbers = threshold.new_zeros(6)
    for place, value in enumerate((*found.logit, *found.slope, found.below)):
        if isinstance(value, Tensor):
            numbers[place : place + 1].copy_(value.detach())
        elif value != 0:
            numbers[place].fill_(value)  # the device writes it: nothing is copied from the host
    return Term(TERMS["hard_negatives"], found.lowest, found.highest, TermInputs(threshold, numbers))


def told_apart(
    found: Margin | HardNegatives | None, options: HeadOptions, labels: Tensor
) -> tuple[Margin | None, Term]:
    """What is asked of the target's cosine, and what of the others'."""
    if isinstance(found, HardNegatives):
        return found.target, term_of(found)
    if options.filter_threshold is None:
        return found, PLAIN
    return found, term_of(filtered(NO_MARGIN, options.filter_threshold, labels))


#: What was planned before, by all that it was made from. A schedule of the scale makes a new one every step.
_planned: dict[tuple[object, ...], LossOptions] = {}
_MOST_PLANNED = 256


def loss_options(
    scale_value: float,
    options: HeadOptions,
    x: Tensor,
    weight: Tensor,
    batch: int,
    classes: int,
    margin: Numbers = NO_NUMBERS,
    term: Term = PLAIN,
) -> LossOptions:
    """What the kernels are told of a head of `classes` classes."""
    precision = product_dtype(x, weight)
    sizes = batch, x.shape[1], classes
    traced = torch.compiler.is_compiling() or any(type(size) is not int for size in sizes)  # SymInts
    if traced or asked_for():
        return _planned_anew(scale_value, options, x, batch, classes, precision, margin, term)
    device = plan_device(x)
    told = options.eps, options.workspace, options.sub_centers, options.ignore_index, options.label_smoothing
    of_term = term.number, term.lowest, term.highest
    of_step = scale_value, *sizes, precision, device, torch.get_num_threads()
    key = (*of_step, *margin, options.reduction, *told, *of_term)
    found = _planned.get(key)
    if found is None:
        found = _planned_anew(scale_value, options, x, batch, classes, precision, margin, term)
        if len(_planned) >= _MOST_PLANNED:
            _planned.clear()
        _planned[key] = found
    return found


def _planned_anew(
    scale_value: float,
    options: HeadOptions,
    x: Tensor,
    batch: int,
    classes: int,
    precision: torch.dtype,
    margin: Numbers,
    term: Term,
) -> LossOptions:
    centers = options.sub_centers
    m1, m2, m3, formula, guard, straight = margin
    softmax = term.number == TERMS["softmax"]
    step = batch, x.shape[1], classes, precision, plan_device(x), options.workspace
    made = products(*step, softmax=softmax, centers=centers)
    return LossOptions(
        scale_value,
        options.eps,
        classes,
        *made,
        precision,
        ignored_row(centers, options.ignore_index),
        options.label_smoothing,
        term=term.number,
        lowest=term.lowest,
        highest=term.highest,
        centers=centers,
        reduction=checks.REDUCTIONS[options.reduction],
        m1_value=m1,
        m2_value=m2,
        m3_value=m3,
        formula=formula,
        guard=guard,
        straight=straight,
    )
