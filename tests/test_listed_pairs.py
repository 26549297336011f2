"""Gradients of listed pairs of a feature and an agent (cosine_pairs_backward) against plain torch."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases.engine_ops import arguments, backward, call, sweep, wide
from kernel_cases.plain_terms import CASES, unit
from lanes import DTYPES

from normface_ext.engine.row_state import INVERSE_NORM, SINKS
from normface_ext.testing import assert_close_to_truth

N, D, C, LISTED = 7, 33, 19, 9


def inverse(rows, eps=1e-12):
    lengths = rows.double().abs().amax(1, keepdim=True).clamp(min=1e-300)
    tame = (rows.double() / lengths).square().sum(1) + eps / lengths[:, 0].square()
    held = torch.finfo(wide(rows)).max
    return (1 / (tame.sqrt() * lengths[:, 0])).clamp(max=held).to(wide(rows))


def pairs(x, weight, classes, factors, **given):
    return call("cosine_pairs_backward", {
        "x": x, "weight": weight, "factors": factors, "classes": classes, "x_inverse": inverse(x),
        "weight_inverse": inverse(weight), "need_x": True, "need_weight": True, "eps": 1e-12,
        "is_shard": False, **given,
    })  # fmt: skip


def problem(lane, dtype, dim=D):
    x, weight = lane.randn(N, dim, dtype=dtype), lane.randn(C, dim, dtype=dtype, seed=1)
    classes = lane.tensor(torch.randint(C + 6, (N, LISTED), generator=torch.Generator().manual_seed(2)))
    classes = classes.clamp(max=C)  # C: unused; some classes twice in a row, some nowhere
    classes[3] = C
    classes[classes == 5] = C
    return x, weight, classes, lane.randn(N, LISTED, dtype=wide(x), seed=3)


def plain(x, weight, classes, factors, dtype):
    leaves = [t.to(dtype).requires_grad_() for t in (x, weight)]
    used = torch.where(classes < C, factors.to(dtype), 0)
    cosines = (unit(leaves[0])[:, None] * unit(leaves[1])[classes.clamp(max=C - 1)]).sum(2)
    return torch.autograd.grad((used * cosines).sum(), leaves)


@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [2, 16, 31, 128, 257])
def test_gradients(lane, dtype, dim):
    x, weight, classes, factors = problem(lane, dtype, dim)
    truth = plain(x, weight, classes, factors, torch.float64)
    coarse = plain(x, weight, classes, factors, wide(x))
    for got, true, near, name in zip(
        pairs(x, weight, classes, factors), truth, coarse, ("dx", "dweight"), strict=True
    ):
        assert got.dtype == dtype
        near = None if dtype == torch.float64 else near.to(dtype)
        assert_close_to_truth(got, true, near, name, dim=None, floor=16)
    assert (pairs(x, weight, classes, factors)[0][3] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rows_of_any_length_add_their_direction(lane, dtype):
    """Rows so long or so short that a factor times 1 / ||.|| has no number are added as unit rows."""
    x, weight, classes, factors = problem(lane, dtype)
    before = pairs(x, weight, classes, factors)
    power = {torch.float64: 200, torch.float32: 15, torch.bfloat16: 15}[dtype]
    long, short = (
        2.0 ** (3 * power),
        2.0 ** -(3 * power),
    )  # powers of two: the direction stays to the last bit
    lengths = lane.tensor(torch.tensor([long, short, 1.0] * 7, dtype=torch.float64))
    own = lengths[:N, None].to(wide(x)), lengths[:C, None].to(wide(x))
    eps = {"eps": 0.0}
    exact = pairs(
        x, weight, classes, factors, **eps, x_inverse=inverse(x, 0.0), weight_inverse=inverse(weight, 0.0)
    )
    scaled = (x * own[0]).to(dtype), (weight * own[1]).to(dtype)
    inverses = {"x_inverse": inverse(scaled[0], 0.0), "weight_inverse": inverse(scaled[1], 0.0)}
    after = pairs(*scaled, classes, factors, **eps, **inverses)
    for got, plain_rows, length in zip(after, exact, own, strict=True):
        again = got.double() * length.double()
        bound = 16 * torch.finfo(dtype).eps * plain_rows.double().abs().amax()
        assert (again - plain_rows.double()).abs().max() <= bound
    assert (before[0] - exact[0]).abs().max() < 1e-3


def test_what_is_listed_nowhere_reaches_nothing(lane):
    """Not even NaN: a row without entries and a class without entries have the gradient 0."""
    x, weight, classes, factors = problem(lane, torch.float32)
    clean = pairs(x, weight, classes, factors)
    x[3], weight[5] = math.nan, math.inf
    for got, expected in zip(pairs(x, weight, classes, factors), clean, strict=True):
        assert torch.equal(got, expected)
    assert (clean[0][3] == 0).all() and (clean[1][5] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_entries_that_are_no_class_are_unused(lane, dtype):
    x, weight, classes, factors = problem(lane, dtype)
    expected = pairs(x, weight, classes, factors)
    others = lane.tensor(torch.tensor([C + 1, 2**31, 2**62, -1, -C, -(2**31), -(2**63)]))
    unused = classes == C
    classes[unused] = others.repeat(C)[: int(unused.sum())]
    for got, clean in zip(pairs(x, weight, classes, factors), expected, strict=True):
        assert torch.equal(got, clean)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["hinge", "exponential"])
def test_a_full_list_is_the_dense_gradient(lane, name, dtype):
    case = CASES[name]
    x, weight, labels = (
        lane.randn(N, D, dtype=dtype),
        lane.randn(C, D, dtype=dtype, seed=1),
        lane.labels(N, C),
    )
    threshold = lane.tensor(torch.full([N], 1.7, dtype=torch.float64))
    given = arguments(x, weight, labels, **case.options(lane, threshold), need_x=False)
    given |= {"sink": SINKS["active"], "capacity": C}
    swept, listed, found = sweep(given)
    slopes = torch.zeros(4, N, dtype=torch.float64, device=x.device)
    slopes[0] = torch.linspace(0.5, 2, N)
    dense = backward(given, swept, slopes, x.new_ones((), dtype=wide(x)))
    norms = {"x_inverse": swept.rows[INVERSE_NORM].to(wide(x)), "weight_inverse": swept.inverse_norm}
    factors = found * slopes[0].to(found.dtype)[:, None]
    sparse = pairs(x, weight, listed, factors, **norms)
    assert (listed < C).any() and (listed == C).any()
    for one, other in zip(sparse, dense, strict=False):
        coarse = wide(x) if lane.widens else dtype
        eps = torch.finfo(dtype).eps + 16 * torch.finfo(coarse).eps
        assert (one.double() - other.double()).abs().max() <= eps * other.double().abs().max()


def test_the_smallest_lists(lane):
    x, weight, classes, factors = problem(lane, torch.float32)
    for rows, few, listed in ((0, C, 3), (N, C, 0), (N, 0, 2)):
        own, agents = x[:rows].contiguous(), weight[:few].contiguous()
        none = torch.full((rows, listed), few, device=x.device)
        dx, dw = pairs(own, agents, none, x.new_ones(rows, listed), is_shard=few == 0)
        assert dx.shape == own.shape and dw.shape == agents.shape and (dx == 0).all() and (dw == 0).all()
    dx, dw = pairs(x, weight, classes, factors, need_x=False)
    assert dx.numel() == 0 and dw.abs().max() > 0
    dx, dw = pairs(x, weight, classes, factors, need_weight=False)
    assert dw.numel() == 0 and dx.abs().max() > 0
