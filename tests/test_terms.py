"""Every term of the sweep with every sink, stored or made again, whole or on shards.

The ops of the engine against plain torch in float64."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from kernel_cases import plain_terms
from kernel_cases.engine_ops import arguments, backward, call, sweep, wide
from kernel_cases.plain_terms import CASES, IGNORED, unit
from lanes import DTYPES

from normface_ext.engine.row_state import (
    COSINE,
    INVERSE_NORM,
    ROW_FIELDS,
    ROW_WEIGHT,
    SECOND_SUM,
    SHIFT,
    SINKS,
    SUM,
    TERMS,
)
from normface_ext.testing import assert_close_to_truth

N, D, C = 9, 16, 23
#: Rows that do not count: a label to ignore, a weight of 0.
SKIPPED, WEIGHTLESS = 4, 6
#: First classes of the shards; the third is empty.
BOUNDS = [0, 7, 15, 15, C]
ADDED = [place for place, rule in enumerate(ROW_FIELDS.values()) if rule == "sum"]


def test_every_term_is_among_the_cases():
    missing = set(TERMS) - {case.term for case in CASES.values()}
    assert missing == set(), "missing in scripts/kernel_cases/plain_terms.py"


def between(cosines):
    """[N] numbers in the widest gap of the middle cosines of every row: no rounding crosses them."""
    middle = cosines.double().sort(1).values[:, cosines.shape[1] // 3 : -2]
    gap, place = middle.diff(dim=1).max(1)
    return middle.gather(1, place[:, None])[:, 0] + gap / 2


class Problem:
    """Rows of which two do not count and hold NaN or infinity, and what the ops are given of them."""

    def __init__(self, lane, case, dtype, **given):
        self.lane, self.case, self.dtype = lane, case, dtype
        x, self.weight = lane.randn(N, D, dtype=dtype), lane.randn(C, D, dtype=dtype, seed=1)
        self.labels = lane.labels(N, C, seed=3)
        self.labels[SKIPPED] = IGNORED
        self.sample_weight = lane.tensor([1.0, 2.0, 0.5, 1.0, 3.0, 1.0, 0.0, 1.5, 1.0], wide(x))
        self.counts = (self.labels != IGNORED) & (self.sample_weight != 0)
        self.cosines = unit(x.double()) @ unit(self.weight.double()).T
        tau = between(self.cosines)
        self.threshold = tau if case.softmax else 2 - 2 * tau
        x[SKIPPED], x[WEIGHTLESS] = math.nan, math.inf
        self.x = x
        self.slopes = lane.randn(4, N, dtype=torch.float64, seed=5)
        self.slopes[3] = 0
        self.slopes = torch.where(self.counts, self.slopes, 0)
        self.upstream = lane.randn(N, dtype=wide(x), seed=6)
        self.class_weight = 0.5 + lane.randn(C, dtype=wide(x), seed=7).abs()
        self.given = given

    def arguments(self, **given):
        options = self.case.options(self.lane, self.threshold)
        own = {"sample_weight": self.sample_weight, "class_weight": self.class_weight, "class_chunk": 8}
        return arguments(self.x, self.weight, self.labels, **{**options, **own, **self.given, **given})

    def plain(self, kappa, dtype=torch.float64, leaves=None, operand=None):
        x, weight = (self.x.to(dtype), self.weight.to(dtype)) if leaves is None else leaves
        return plain_terms.sweep(
            self.case, x, weight, self.labels, self.threshold, kappa, counts=self.counts, operand=operand
        )

    def gradients(self, kappa, dtype=torch.float64, operand=None):
        leaves = [t.to(dtype).requires_grad_() for t in (self.x, self.weight)]
        swept = self.plain(kappa, dtype, leaves, operand)
        return torch.autograd.grad(
            plain_terms.objective(swept, self.slopes, self.upstream, self.class_weight), leaves
        )

    @property
    def coarse(self):
        """What plain torch computes in, and its operands' dtype: as coarse as this lane may be."""
        return {"dtype": wide(self.x), "operand": None if self.lane.widens else self.dtype}

    @property
    def met(self):
        """The same of what coefficients meet: bfloat16 where the scores' operands are float16, too."""
        narrow = self.dtype.itemsize == 2 and not self.lane.widens
        return {**self.coarse, "operand": torch.bfloat16 if narrow else self.coarse["operand"]}

    def close_stored(self, got, truth, plain, name):
        """The same for coefficients as the products take them: on a GPU in bfloat16 for 16-bit operands."""
        if self.dtype.itemsize == 2 and not self.lane.widens:
            assert torch.equal(got, got.bfloat16().float()), name
            return assert_close_to_truth(
                got, truth, plain.bfloat16().float(), name, dim=None, eps=torch.finfo(torch.bfloat16).eps
            )
        return self.close(got, truth, plain, name)

    def close(self, got, truth, plain, name, counts=None):
        """float64 to 1e-12, and else as plain torch of the same dtype."""
        if counts is not None:
            got, truth = got[counts], truth[counts]
            plain = plain if plain is None else plain[counts]
        if self.dtype == torch.float64:
            bound = 1e-12 * max(1.0, float(truth.abs().max()))
            torch.testing.assert_close(got, truth, rtol=0, atol=bound, msg=lambda text: f"{name}: {text}")
            return
        eps = torch.finfo(got.dtype if got.dtype == self.dtype else torch.float32).eps
        coarsely = plain.to(got.dtype)
        assert_close_to_truth(got, truth, coarsely, name, dim=None, eps=eps)


@pytest.mark.covering(2)
@pytest.mark.parametrize("store", [False, True], ids=["made again", "stored"])
@pytest.mark.parametrize("need_x", [False, True], ids=["x_sum in backward", "x_sum in forward"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_sums_and_gradients(lane, name, dtype, need_x, store):
    problem = Problem(lane, CASES[name], dtype)
    given = problem.arguments(store=store, need_x=need_x, need_class_sum=True)
    swept, listed, found = sweep(given)
    assert listed.shape == found.shape == (N, 0)
    rows, counts = swept.rows, problem.counts
    truth = problem.plain(rows[SHIFT])
    plain = problem.plain(rows[SHIFT], **problem.coarse)
    assert torch.equal(rows[ROW_WEIGHT], torch.where(counts, problem.sample_weight, 0).double())
    problem.close(rows[SUM], truth.sum, plain.sum.double(), "sum", counts)
    problem.close(rows[SECOND_SUM], truth.second, plain.second.double(), "second sum", counts)
    torch.testing.assert_close(rows[COSINE], truth.cosine, rtol=0, atol=1e-14)
    norms = unit_norms(problem.x)
    torch.testing.assert_close(rows[INVERSE_NORM][counts], norms[counts], rtol=4e-7, atol=0)
    assert (rows[COSINE][~counts] == 0).all() and (rows[SHIFT][~counts] == 0).all()
    if need_x:
        met = problem.plain(rows[SHIFT], **problem.met)
        problem.close(swept.x_sum, truth.x_sum, met.x_sum, "x_sum", counts)
    dx, dw, ds = backward(given, swept, problem.slopes, problem.upstream)
    assert dx.dtype == dw.dtype == dtype and ds.numel() == 0
    assert (dx[~counts] == 0).all()
    expected, coarse = problem.gradients(rows[SHIFT]), problem.gradients(rows[SHIFT], **problem.coarse)
    for got, true, near, label in zip((dx, dw), expected, coarse, ("dx", "dweight"), strict=True):
        problem.close(got, true, near.to(dtype), label, counts if label == "dx" else None)


def unit_norms(x):
    return 1 / (x.double().square().sum(1) + 1e-12).sqrt()


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_that_of_the_values(lane, name):
    """Autograd through the formula of the value alone: no coefficient is told to it."""
    case = CASES[name]
    problem = Problem(lane, case, torch.float64, class_weight=None)
    swept, _, _ = sweep(problem.arguments())
    leaves = [t.clone().requires_grad_() for t in (problem.x, problem.weight)]
    value = problem.plain(swept.rows[SHIFT], leaves=leaves).sum
    expected = torch.autograd.grad((value * problem.upstream).sum(), leaves)
    slopes = torch.zeros_like(problem.slopes)
    slopes[0] = torch.where(problem.counts, case.slope, 0)
    dx, dw, _ = backward(problem.arguments(), swept, slopes, problem.upstream)
    problem.close(dx, expected[0], None, "dx", problem.counts)
    problem.close(dw, expected[1], None, "dweight")


@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("store", [False, True], ids=["made again", "stored"])
@pytest.mark.parametrize("chunk", [5, 64])
@pytest.mark.parametrize("name", CASES)
def test_the_active_list(lane, name, chunk, store, dtype):
    """Each row's first classes with a coefficient, in order; a row that does not count lists nothing."""
    problem = Problem(lane, CASES[name], dtype)
    for capacity in (0, 3, C):
        given = problem.arguments(sink=SINKS["active"], capacity=capacity, class_chunk=chunk, store=store)
        swept, listed, found = sweep(given)
        truth, plain = problem.plain(swept.rows[SHIFT]), problem.plain(swept.rows[SHIFT], **problem.coarse)
        assert listed.shape == found.shape == (N, capacity) and found.dtype == wide(problem.x)
        for i, counts in enumerate(problem.counts.tolist()):
            classes = truth.coefficients[i].nonzero().flatten().tolist()[:capacity] if counts else []
            assert listed[i].tolist() == classes + [C] * (capacity - len(classes))
            assert (found[i, len(classes) :] == 0).all()
            if classes:
                of = lambda swept, i=i, classes=classes: swept.coefficients[i, classes]  # noqa: E731
                problem.close_stored(found[i, : len(classes)], of(truth), of(plain), "coefficients")
        problem.close(swept.rows[SUM], truth.sum, plain.sum.double(), "sum", problem.counts)


@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk", [5, 64])
@pytest.mark.parametrize("name", CASES)
def test_the_hardest_class(lane, name, chunk, dtype):
    """The largest cosine among the others; the sums are what the term makes of that one cell."""
    problem = Problem(lane, CASES[name], dtype)
    given = problem.arguments(sink=SINKS["hardest"], capacity=1, class_chunk=chunk, need_x=False)
    swept, listed, found = sweep(given)
    rows, counts = swept.rows, problem.counts
    assert swept.x_sum.numel() == swept.stored.numel() == 0
    others = problem.cosines.clone()
    others[counts, problem.labels[counts]] = -math.inf
    assert listed[counts, 0].tolist() == others.argmax(1)[counts].tolist()
    assert (listed[~counts] == C).all() and (found[~counts] == -math.inf).all()
    place = listed.clamp(max=C - 1)
    for part, field in (("coefficients", None), ("sum", SUM), ("second", SECOND_SUM)):
        truth, plain = (
            one_cell(problem, part, problem.plain(rows[SHIFT], **how).cosines.gather(1, place), rows[SHIFT])
            for how in ({}, problem.coarse)
        )
        got = found[:, 0] if field is None else rows[field]
        problem.close(got, truth, plain.to(got.dtype), part, counts)
    assert (rows[SUM][~counts] == 0).all() and (rows[SECOND_SUM][~counts] == 0).all()


def one_cell(problem, part, cosine, kappa):
    """[N]: the cosine itself for the coefficients, else a sum of the term over that one cell."""
    if part == "coefficients":
        return cosine[:, 0]
    value, second, _ = plain_terms.cells(problem.case, cosine, problem.threshold, kappa)
    return (value if part == "sum" else second)[:, 0]


@pytest.mark.covering(2)
@pytest.mark.parametrize("sink", SINKS)
@pytest.mark.parametrize("store", [False, True], ids=["made again", "stored"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_shards_add_up(lane, name, dtype, store, sink):
    problem = Problem(lane, CASES[name], dtype)
    capacity = {"none": 0, "active": 5, "hardest": 1}[sink]
    options = {"sink": SINKS[sink], "capacity": capacity, "class_chunk": 4}
    options |= {"store": store and sink != "hardest", "need_x": sink == "none", "need_class_sum": True}
    whole = problem.arguments(**options)
    swept, listed, found = sweep(whole)
    parts = []
    for first, last in itertools.pairwise(BOUNDS):
        here = (problem.labels >= first) & (problem.labels < last)
        elsewhere = torch.where(problem.labels == IGNORED, IGNORED, -1)
        own = {
            "weight": problem.weight[first:last].contiguous(), "is_shard": True,
            "labels": torch.where(here, problem.labels - first, elsewhere),
            "class_weight": problem.class_weight[first:last].contiguous(),
        }  # fmt: skip
        parts.append((first, {**whole, **own}, *sweep({**whole, **own})))
    rows = parts[0][2].rows.clone()
    rows[ADDED] = torch.stack([part[2].rows[ADDED] for part in parts]).sum(0)
    eps = torch.finfo(wide(problem.x)).eps
    if sink == "hardest":
        each = torch.stack([part[4][:, 0] for part in parts])
        close_to = {"rtol": 16 * eps, "atol": 16 * eps}
        torch.testing.assert_close(each.amax(0), found[:, 0], **close_to)
        owner = each.argmax(0)
        classes = torch.stack([part[3][:, 0] + part[0] for part in parts])
        mine = classes.gather(0, owner[None])[0]
        assert torch.equal(mine[problem.counts], listed[problem.counts, 0])
        one = torch.stack([part[2].rows[[SUM, SECOND_SUM]] for part in parts])
        of_owner = torch.where(owner == torch.arange(len(parts), device=owner.device)[:, None], 1.0, 0.0)
        sums = (one * of_owner[:, None]).sum(0)
        torch.testing.assert_close(sums, swept.rows[[SUM, SECOND_SUM]], rtol=64 * eps, atol=64 * eps)
        return
    torch.testing.assert_close(
        rows[:, problem.counts], swept.rows[:, problem.counts], rtol=64 * eps, atol=64 * eps
    )
    if sink == "active":
        for i in range(N):
            joined = [
                (c + first, e)
                for first, given, _, classes, coefficients in parts
                for c, e in zip(classes[i].tolist(), coefficients[i].tolist(), strict=True)
                if c < len(given["weight"])
            ][:capacity]
            unused = capacity - len(joined)
            assert listed[i].tolist() == [c for c, _ in joined] + [C] * unused
            assert found[i].tolist() == pytest.approx([e for _, e in joined] + [0.0] * unused, rel=64 * eps)
    dx, dw, _ = backward(whole, swept, problem.slopes, problem.upstream)
    each = [
        backward(given, one._replace(rows=rows), problem.slopes, problem.upstream)
        for _, given, one, _, _ in parts
    ]
    assert all(part[0].dtype == wide(problem.x) for part in each)
    terms = sum(part[0].abs() for part in each).amax()
    together, rounding = torch.stack([part[0] for part in each]).sum(0), torch.finfo(dtype).eps
    assert (together - dx).abs().max() <= rounding * dx.abs().max() + 64 * eps * terms
    # Products of other shapes round their cosines otherwise, and a term makes several times as much of that.
    most = dw.abs().max()
    assert (torch.cat([part[1] for part in each]) - dw).abs().max() <= (8 * rounding + 64 * eps) * most


@pytest.mark.parametrize("sink", SINKS)
@pytest.mark.parametrize("name", CASES)
def test_a_nan_shows_and_stays_in_its_rows(lane, name, sink):
    """A row that counts and holds NaN has NaN for its sum; the others do not."""
    problem = Problem(lane, CASES[name], torch.float32)
    capacity = {"none": 0, "active": C, "hardest": 1}[sink]
    given = problem.arguments(sink=SINKS[sink], capacity=capacity, need_x=False)
    clean, _, _ = sweep(given)
    problem.x[2] = math.nan
    swept, listed, found = sweep(given)
    assert swept.rows[[SUM, COSINE], 2].isnan().all()
    others = torch.arange(N, device=problem.x.device) != 2
    assert torch.equal(swept.rows[:, others], clean.rows[:, others])
    own = int(problem.labels[2])
    if sink == "hardest":  # the first of equal ones
        assert listed[2].tolist() == [int(own == 0)] and found[2].isnan().all()
    if sink == "active":
        assert listed[2].tolist() == [j for j in range(C) if j != own] + [C]


def test_nan_is_the_largest_cosine(lane):
    problem = Problem(lane, CASES["hinge"], torch.float32)
    problem.weight[11] = math.nan
    for chunk in (4, 12, C):
        given = problem.arguments(sink=SINKS["hardest"], capacity=1, need_x=False, class_chunk=chunk)
        swept, listed, found = sweep(given)
        hit = problem.counts & (problem.labels != 11)
        assert (listed[hit] == 11).all() and found[hit].isnan().all() and swept.rows[SUM, hit].isnan().all()
        assert (listed[~problem.counts] == C).all() and (swept.rows[SUM, ~problem.counts] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_equal_cosines_the_first_class_is_the_hardest(lane, dtype):
    """Axes as rows and classes, whose cosines are exact: over tiles, threads and lanes of a vector."""
    classes = 150
    weight = lane.tensor(torch.eye(4)[torch.arange(classes) % 4], dtype)
    x = lane.tensor(torch.eye(4), dtype)
    for label, chunk in itertools.product((0, 1, 2, 3, 8), (1, 7, 32, classes)):
        labels = lane.tensor([label] * 4)
        given = arguments(
            x, weight, labels, sink=SINKS["hardest"], capacity=1, need_x=False, class_chunk=chunk
        )
        _, listed, found = sweep(given)
        expected = [row + 4 * (row == label) for row in range(4)]
        assert listed[:, 0].tolist() == expected and (found == found[0, 0]).all(), (label, chunk)


@pytest.mark.parametrize("sink", ["active", "hardest"])
def test_what_is_collected_does_not_depend_on_threads_or_tiles(lane, sink):
    """Cosines of whole sixteenths, which every order of summation gets exactly."""
    generator = torch.Generator().manual_seed(1)
    signs = torch.randint(2, (6 + 201, 16), generator=generator).double() * 2 - 1
    x, weight = lane.tensor(signs[:6], torch.float32), lane.tensor(signs[6:], torch.float32)
    labels = lane.tensor([0, 200, 7, IGNORED, 8, 100])
    threshold = lane.tensor([1.6] * 6, torch.float64)
    case = replace(CASES["exponential"])
    results, threads = [], torch.get_num_threads()
    try:
        for count, chunk in itertools.product((1, 2, 3), (1, 10, 64, 201)):
            torch.set_num_threads(count)
            given = arguments(x, weight, labels, sink=SINKS[sink], capacity=1 if sink == "hardest" else 20)
            given |= case.options(lane, threshold) | {"need_x": False, "class_chunk": chunk, "eps": 0.0}
            results.append(sweep(given)[1:])
    finally:
        torch.set_num_threads(threads)
    for listed, found in results[1:]:
        assert torch.equal(listed, results[0][0]) and torch.equal(found, results[0][1])
    assert (results[0][0] < 201).any()


@pytest.mark.parametrize("name", ["curricular", "fixed", "adaptive", "filter", "hinge", "exponential"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_threshold_exactly_at_a_cosine(lane, name, dtype):
    """It is not past it, nor active: cosines of axes are exact."""
    case = CASES[name]
    axes = torch.eye(4)
    x, weight = lane.tensor(axes[:2], dtype), lane.tensor(torch.cat([axes, -axes]), dtype)
    labels = lane.tensor([2, 2])
    for at, past in (
        (0.0, 1),
        (1.0, 0),
        (-1.0, 6),
    ):  # classes past it: cosines 1, six of 0 with the label's, -1
        threshold = lane.tensor([at if case.softmax else 2 - 2 * at] * 2, torch.float64)
        given = arguments(x, weight, labels, eps=0.0, **case.options(lane, threshold))
        swept, listed, _ = sweep({**given, "sink": SINKS["active"], "capacity": 8})
        truth = plain_terms.sweep(
            case, x.double(), weight.double(), labels, threshold, swept.rows[SHIFT],
            counts=torch.ones(2, dtype=torch.bool, device=x.device), eps=0.0,
        )  # fmt: skip
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(swept.rows[SUM], truth.sum, rtol=tolerance, atol=tolerance)
        if not case.softmax:
            assert (listed < 8).sum(1).tolist() == [past] * 2


BEYOND = {name: CASES[name] for name in ("softmax", "fixed", "filter")}
BEYOND["curricular in [-1, 2]"] = replace(CASES["curricular"], ends=(-1.0, 2.0))


@pytest.mark.parametrize("case", BEYOND.values(), ids=list(BEYOND))
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_scale_beyond_the_window(lane, dtype, sign, case):
    """Then kappa is the row's largest logit among the others, and the sums and gradients are as exact."""
    beyond = replace(case, scale=sign * (900.0 if dtype == torch.float64 else 130.0))
    problem = Problem(lane, beyond, dtype)
    given = problem.arguments(need_class_sum=True)
    shift = call("head_shift", given)
    counts, cosines = problem.counts, problem.cosines
    f = cosines
    if case.numbers is not None:
        a2, a1, a0, *_, below = case.numbers
        f = torch.where(
            cosines > problem.threshold[:, None], (a2 * cosines + a1) * cosines + a0, below * cosines
        )
    logits = beyond.scale * f
    logits[counts, problem.labels[counts]] = -math.inf
    tolerance = {"rtol": 1e-12, "atol": 0} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(shift[counts], logits.amax(1)[counts], **tolerance)
    inside = call("head_shift", {**given, "scale_value": 1.0})
    middle, width = sum(case.ends) / 2, case.ends[1] - case.ends[0]
    low, high = (690, 709) if dtype == torch.float64 else (80, 88.7)
    reach = max(map(abs, case.ends))  # f, and slopes of four times that, meet E before it is summed
    high -= math.log(4 * reach) if reach > 1 else 0
    expected = middle + (low - high + math.log(C)) / 2
    assert inside[counts].tolist() == pytest.approx([expected] * int(counts.sum())) and width < 20
    swept, _, _ = sweep(given)
    assert torch.equal(swept.rows[SHIFT][counts], shift[counts])
    again, _, _ = sweep({**given, "shift": shift})
    # A GPU finds kappa on its way and rescales the sums of the chunks before: a rounding each.
    near = {} if lane.widens else {"rtol": 8 * torch.finfo(dtype).eps, "atol": 0}
    torch.testing.assert_close(again.rows, swept.rows, **({"rtol": 0, "atol": 0} | near))
    truth = problem.plain(swept.rows[SHIFT])
    error = (
        1e-9 if dtype == torch.float64 else 1e-4
    )  # an exponent of some hundreds loses digits of the cosine
    torch.testing.assert_close(swept.rows[SUM][counts], truth.sum[counts], rtol=error, atol=error)
    dx, dw, _ = backward(given, swept, problem.slopes, problem.upstream)
    true_dx, true_dw = problem.gradients(swept.rows[SHIFT])
    for got, true in ((dx[counts], true_dx[counts]), (dw, true_dw)):
        assert (got - true).abs().max() <= error * max(1.0, float(true.abs().max()))


def tame_unit(rows):
    """Unit rows without a square of a large number; zero rows stay zero."""
    largest = rows.abs().amax(1, keepdim=True)
    tame = torch.where(largest == 0, 0, rows / largest)
    return torch.where(largest == 0, 0, tame / tame.square().sum(1, keepdim=True).sqrt())


@pytest.mark.covering(2)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("eps", [1e-12, 0.0], ids=["zero and huge", "tiny and huge"])
@pytest.mark.parametrize("store", [False, True], ids=["made again", "stored"])
def test_rows_of_any_length(lane, name, store, eps):
    """Zero rows have cosines of 0 and, by eps, finite gradients; others only their direction."""
    problem = Problem(lane, CASES[name], torch.float64, class_weight=None)
    problem.x[0] *= 0.0 if eps else 1e-200
    problem.x[1] *= 1e200
    problem.weight[2] *= 0.0 if eps else 1e-200
    problem.weight[int(problem.labels[1])] *= 1e200
    given = problem.arguments(store=store, eps=eps)
    swept, _, _ = sweep(given)
    counts, rows = problem.counts, swept.rows
    x_hat, w_hat = tame_unit(torch.where(counts[:, None], problem.x, 0)), tame_unit(problem.weight)
    cosines = x_hat @ w_hat.T
    own = torch.where(counts, problem.labels, 0)
    value, second, coefficient = plain_terms.cells(problem.case, cosines, problem.threshold, rows[SHIFT])
    for part in (value, second, coefficient):
        part[torch.arange(N, device=own.device), own] = 0
    problem.close(rows[SUM], value.sum(1), None, "sum", counts)
    problem.close(rows[SECOND_SUM], second.sum(1), None, "second sum", counts)
    torch.testing.assert_close(
        rows[COSINE][counts], cosines[range(N), own][counts], rtol=0, atol=max(2e-15, eps)
    )
    problem.close(swept.x_sum, coefficient @ w_hat, None, "x_sum", counts)
    dx, dw, _ = backward(given, swept, problem.slopes, problem.upstream)
    assert dx.isfinite().all() and dw.isfinite().all()
    assert 0 < dx[1].abs().max() < 1e-195 and (eps or dx[0].abs().max() > 1e195)


@pytest.mark.parametrize("sink", SINKS)
@pytest.mark.parametrize("name", CASES)
def test_the_smallest_shapes(lane, name, sink):
    """No rows, one class, a shard without classes."""
    case, capacity = CASES[name], {"none": 0, "active": 2, "hardest": 1}[sink]
    more = {"sink": SINKS[sink], "capacity": capacity, "need_x": sink != "hardest", "need_class_sum": True}
    for batch, classes, shard in ((0, 5, False), (3, 1, False), (3, 0, True), (0, 0, True)):
        x, weight = lane.randn(batch, D), lane.randn(classes, D)
        labels = lane.tensor(torch.full([batch], -1 if shard else 0))
        threshold = lane.tensor(torch.full([batch], 0.5), torch.float64)
        given = arguments(x, weight, labels, is_shard=shard, **case.options(lane, threshold), **more)
        given["total_classes"] = 5
        swept, listed, found = sweep(given)
        assert (swept.rows[[SUM, SECOND_SUM]] == 0).all() and (listed == classes).all()
        assert (found == (-math.inf if sink == "hardest" else 0)).all() and found.shape == (batch, capacity)
        slopes = torch.ones(4, batch, dtype=torch.float64, device=x.device)
        dx, dw, _ = backward(given, swept, slopes, x.new_ones(()))
        assert dx.shape == x.shape and dw.shape == weight.shape
        assert dx.isfinite().all() and dw.isfinite().all()
        shift = call("head_shift", {**given, "scale_value": 900.0})
        assert (shift == (-math.inf if case.softmax else 0)).all() and shift.shape == (batch,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_target_cosine_is_the_sweeps(lane, dtype):
    """To the last digits, huge and zero rows too, and 0 where the target is elsewhere."""
    x, weight = lane.rows(24, 33, dtype), lane.rows(24, 33, dtype, seed=1)
    labels = lane.tensor(torch.arange(24).roll(5))
    labels[3], labels[7] = IGNORED, -1
    given = arguments(x, weight, labels, is_shard=True)
    swept, _, _ = sweep(given)
    cosine = call("target_cosine", given)
    here = labels >= 0
    truth = (unit(x.double()) * unit(weight.double())[labels.clamp(min=0)]).sum(1)
    assert cosine.dtype == torch.float64
    torch.testing.assert_close(cosine[here], truth[here], rtol=0, atol=4e-16)
    torch.testing.assert_close(swept.rows[COSINE], cosine, rtol=0, atol=0)
    assert (cosine[~here] == 0).all()
