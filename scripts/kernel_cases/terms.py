"""Every term of the sweep by every set of kernels, with every sink: the ops, past the losses made of them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from normface_ext.engine.calls import plan_device
from normface_ext.engine.row_state import LARGEST, SECOND_SUM, SHIFT, SINKS, SUM

from . import engine_ops, plain_terms
from .case import Case, Results, labels, randn
from .softmax import is_here

BATCH, DIM, CLASSES, CHUNK = 17, 40, 101, 37
CAPACITY = 5
#: Products (csrc/engine/products.h) that know every term, by their operands; others have the softmax's alone.
NARROW = ["cublas", "sm80_scores", "sm80_weight_gradient", "sm90_scores", "sm90_weight_gradient"]
NARROW = [product for product in NARROW if is_here(product)]
KNOWING = {
    torch.float16: NARROW,
    torch.bfloat16: NARROW,
    torch.float32: ["cublas", "sm80_tf32x3"],
    torch.float64: ["cublas"],
}
#: x_sum made in the first sweep and the coefficients in the second, or the other way round.
WAYS = {"again": (True, False), "stored": (False, True)}


def problem(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight, labels; every row that counts is near one class that is not its own."""
    weight, y = randn(CLASSES, DIM, dtype=dtype, seed=1), labels(BATCH, CLASSES)
    near = weight[(y.clamp_min(0) + 7) % CLASSES].double()
    return (near + randn(BATCH, DIM, dtype=torch.float64)).to(dtype), weight, y


def thresholds(case: plain_terms.Case, x: Tensor, weight: Tensor) -> Tensor:
    """[N], in the widest gap of each row's larger cosines: no rounding in 16 bits decides."""
    cosines = plain_terms.unit(x.double()) @ plain_terms.unit(weight.double()).T
    larger = cosines.sort(1).values[:, -CAPACITY - 4 : -1]
    gap, place = larger.diff(dim=1).max(1)
    middle = larger.gather(1, place[:, None])[:, 0] + gap / 2
    return middle if case.softmax else 2 - 2 * middle


def arguments(case: plain_terms.Case, x: Tensor, weight: Tensor, y: Tensor, t: Tensor, **given: object):
    numbers = case.numbers and torch.tensor(case.numbers, dtype=torch.float64, device=x.device)
    of_case = {**case.options_of(numbers, t), "class_chunk": CHUNK}
    return engine_ops.arguments(x, weight, y, **{**of_case, **given})


def product_of(x: Tensor, product: str) -> str:
    """The CPU has one."""
    return product if plan_device(x).type == "cuda" else "blas"


def upstream(like: Tensor) -> Tensor:
    """[N] factors of the values of the rows."""
    return randn(BATCH, dtype=torch.float64, seed=5).to(like.device)


def of_any_shift(case: plain_terms.Case, rows: Tensor, counts: Tensor) -> Results:
    """The sums of the rows that count, without kappa; a logarithm beside 1, since it may be 0."""
    value, second, shift = rows[SUM][counts], rows[SECOND_SUM][counts], rows[SHIFT][counts]
    return [1 + value.log() + shift, second / value] if case.softmax else [value, second]


def slopes_of(case: plain_terms.Case, value: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """(along the others, along the target), [N] float64 each."""
    factors = upstream(value)
    others = factors / value if case.softmax else factors
    return torch.where(counts, others, 0.0), torch.where(counts, -factors, 0.0)


def swept(
    case: plain_terms.Case, product: str, way: str, x: Tensor, weight: Tensor, y: Tensor, t: Tensor
) -> Results:
    """Sums and gradients."""
    need_x, store = WAYS[way]
    given = arguments(case, x, weight, y, t, product=product_of(x, product), need_x=need_x, store=store)
    result, _, _ = engine_ops.sweep(given)
    rows, counts = result.rows, y != plain_terms.IGNORED
    others, target = slopes_of(case, rows[SUM], counts)
    zero = torch.zeros_like(others)
    one = torch.ones((), dtype=engine_ops.wide(x), device=x.device)
    dx, dw, _ = engine_ops.backward(given, result, torch.stack([others, target, zero, zero]), one)
    return [*of_any_shift(case, rows, counts), dx, dw]


def swept_truth(case: plain_terms.Case, x: Tensor, weight: Tensor, y: Tensor, t: Tensor) -> Results:
    counts = y != plain_terms.IGNORED
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight)]
    plain = plain_terms.sweep(case, *leaves, y, t, torch.zeros_like(t), counts=counts)
    value, second = plain.sum.detach(), plain.second.detach()
    others, target = slopes_of(case, value, counts)
    slopes = torch.stack([others, target, 0 * others, 0 * others])
    total = plain_terms.objective(plain, slopes, torch.ones_like(t), None)
    rows = torch.zeros(SHIFT + 1, BATCH, dtype=torch.float64)
    rows[SUM], rows[SECOND_SUM] = value, second
    return [*of_any_shift(case, rows, counts), *torch.autograd.grad(total, leaves)]


def listed(
    case: plain_terms.Case, product: str, store: bool, x: Tensor, weight: Tensor, y: Tensor, t: Tensor
) -> Results:
    """The list, and gradients along it."""
    sink = {"sink": SINKS["active"], "capacity": CAPACITY, "need_x": False}
    result, classes, found = engine_ops.sweep(
        arguments(case, x, weight, y, t, product=product_of(x, product), store=store, **sink)
    )
    factors = found * upstream(x).to(found.dtype)[:, None]
    return [classes, found, *engine_ops.pairs_backward(x, weight, factors, classes, result)]


def listed_truth(case: plain_terms.Case, x: Tensor, weight: Tensor, y: Tensor, t: Tensor) -> Results:
    counts = y != plain_terms.IGNORED
    plain = plain_terms.sweep(case, x, weight, y, t, torch.zeros_like(t), counts=counts)
    active = (plain.coefficients != 0) & counts[:, None]
    place = torch.arange(CLASSES).where(active, CLASSES).sort(1).values[:, :CAPACITY]
    found = torch.where(
        place < CLASSES, plain.coefficients.gather(1, place.clamp_max(CLASSES - 1)), 0.0
    ).detach()
    return [place, found, *pairs_truth(found * upstream(x)[:, None], place, x, weight)]


def pairs_truth(factors: Tensor, classes: Tensor, x: Tensor, weight: Tensor) -> Results:
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight)]
    cosines = plain_terms.unit(leaves[0]) @ plain_terms.unit(leaves[1]).T
    of_pairs = torch.where(
        classes < CLASSES, cosines.gather(1, classes.clamp_max(CLASSES - 1)) * factors, 0.0
    )
    return list(torch.autograd.grad(of_pairs.sum(), leaves))


def hardest(case: plain_terms.Case, product: str, x: Tensor, weight: Tensor, y: Tensor, t: Tensor) -> Results:
    sink = {"sink": SINKS["hardest"], "capacity": 1, "need_x": False}
    result, classes, found = engine_ops.sweep(
        arguments(case, x, weight, y, t, product=product_of(x, product), **sink)
    )
    counts = y != plain_terms.IGNORED
    return [classes, found[counts], *of_any_shift(case, result.rows, counts)]


def hardest_truth(case: plain_terms.Case, x: Tensor, weight: Tensor, y: Tensor, t: Tensor) -> Results:
    counts = y != plain_terms.IGNORED
    cosines = plain_terms.unit(x) @ plain_terms.unit(weight).T
    own = torch.nn.functional.one_hot(y.clamp_min(0), CLASSES).bool()
    found, place = cosines.masked_fill(own, -torch.inf).max(1, keepdim=True)
    value, second, _ = plain_terms.cells(case, found, t, torch.zeros_like(t))
    rows = torch.zeros(SHIFT + 1, BATCH, dtype=torch.float64)
    rows[SUM], rows[SECOND_SUM] = value[:, 0], second[:, 0]
    return [place.where(counts[:, None], CLASSES), found[counts], *of_any_shift(case, rows, counts)]


def largest(
    case: plain_terms.Case, product: str, way: str, x: Tensor, weight: Tensor, y: Tensor, t: Tensor
) -> Results:
    """The largest cosines beside the sums."""
    need_x, store = WAYS[way]
    given = arguments(case, x, weight, y, t, product=product_of(x, product), need_x=need_x, store=store)
    result, _, _ = engine_ops.sweep({**given, "need_largest": True})
    counts = y != plain_terms.IGNORED
    return [result.rows[LARGEST][counts], *of_any_shift(case, result.rows, counts)]


def largest_truth(case: plain_terms.Case, x: Tensor, weight: Tensor, y: Tensor, t: Tensor) -> Results:
    counts = y != plain_terms.IGNORED
    cosines = plain_terms.unit(x) @ plain_terms.unit(weight).T
    own = torch.nn.functional.one_hot(y.clamp_min(0), CLASSES).bool()
    return [cosines.masked_fill(own, -torch.inf).amax(1)[counts], *swept_truth(case, x, weight, y, t)[:2]]


def hot_classes(x: Tensor, weight: Tensor, y: Tensor) -> Results:
    """Few classes that every row lists, some of them twice."""
    factors, classes = hot_list(x)
    sweep, _, _ = engine_ops.sweep(engine_ops.arguments(x, weight, y))
    return list(engine_ops.pairs_backward(x, weight, factors.to(engine_ops.wide(x)), classes, sweep))


def hot_list(x: Tensor) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    classes = torch.randint(3, (BATCH, 9), generator=generator) * 50
    classes[4] = CLASSES
    return randn(BATCH, 9, dtype=torch.float64, seed=8).to(x.device), classes.to(x.device)


def cases(dtype: torch.dtype) -> Iterator[Case]:
    x, weight, y = problem(dtype)
    for name, term in plain_terms.CASES.items():
        given = [x, weight, y, thresholds(term, x, weight)]
        for product in KNOWING[dtype]:
            for way in WAYS:
                ours = partial(swept, term, product, way)
                yield Case(f"{name} by {product}, {way}", ours, partial(swept_truth, term), given)
                ours = partial(largest, term, product, way)
                yield Case(
                    f"{name} by {product}, the largest, {way}", ours, partial(largest_truth, term), given
                )
            if not term.sparse:
                continue
            for store in (False, True):
                ours = partial(listed, term, product, store)
                stored = "stored" if store else "again"
                yield Case(f"{name} by {product}, a list, {stored}", ours, partial(listed_truth, term), given)
        ours = partial(hardest, term, "cublas")  # the scores have to lie in memory
        yield Case(f"{name}, the hardest", ours, partial(hardest_truth, term), given)
        if term.term == "softmax" and dtype.itemsize > 2:
            ours = partial(largest, term, "simt", "stored")
            yield Case(f"{name} by simt, the largest", ours, partial(largest_truth, term), given)
    yield Case(
        "pairs of few classes",
        hot_classes,
        lambda x, weight, y: pairs_truth(*hot_list(x), x, weight),
        [torch.where(y[:, None] < 0, 1, x), weight, y.clamp_min(0)],
    )
