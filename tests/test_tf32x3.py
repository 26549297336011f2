"""float32 by three products of tf32: as exact as a float32 sum, on tensor cores that cut off."""

from __future__ import annotations

import math

import pytest
import torch
from emulation import build
from kernel_cases.engine_ops import arguments, sweep
from kernel_cases.plain_terms import unit
from lanes import LANES

import normface_ext as nf
from normface_ext.engine import native
from normface_ext.engine.plan import asking
from normface_ext.engine.row_state import LARGEST

PRODUCT = "sm80_tf32x3"


@pytest.fixture(params=[lane for lane in LANES if not lane.widens], ids=lambda lane: lane.name)
def cuda_lane(request):
    """The lanes that run CUDA kernels."""
    with request.param.active() as lane:
        yield lane


def rms(error):
    return error.double().square().mean().sqrt().item()


# The instruction ---------------------------------------------------------------------------------------


def tf32(x):
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


def step(terms, exponents):
    """The sum of numbers, each cut off 24 bits below the largest exponent, and cut off to 24 bits."""
    unit_of = 2.0 ** (max(exponents) - 24)
    total = sum(math.trunc(term / unit_of) for term in terms)
    excess = max(0, abs(total).bit_length() - 24)
    return math.copysign((abs(total) >> excess << excess) * unit_of, total)


def multiplied(a, b, c):
    """By hardware of compute capability 8: four columns at a time."""

    def exponent(x):
        return max(math.frexp(x)[1] - 1, -126) if x else -126

    for first in (0, 4):
        pairs = list(zip(a[first : first + 4], b[first : first + 4], strict=True))
        c = step(
            [c, *(x * y for x, y in pairs)], [exponent(c), *(exponent(x) + exponent(y) for x, y in pairs)]
        )
    return c


def factors(seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = 2.0 ** torch.randint(-6, 6, (32, 8), generator=generator)
    return (torch.randn(32, 8, generator=generator) * sizes).split([16, 8, 8])


@pytest.mark.skipif(build.unavailable() is not None, reason=f"{build.unavailable()}")
def test_the_emulated_instruction_cuts_off():
    a, b, c = factors(3)
    c = torch.cat([c, 1e3 * c])
    d = build.load("faults").tf32_product(a, b, c)
    rows, columns = tf32(a).tolist(), tf32(b).T.tolist()
    expected = [
        [multiplied(row, column, of_c) for column, of_c in zip(columns, of_row, strict=True)]
        for row, of_row in zip(rows, c.tolist(), strict=True)
    ]
    assert d.tolist() == expected
    # That is neither what float32 rounds to, nor what the factors' other bits would give.
    assert (d.double() != (tf32(a).double() @ tf32(b).double() + c).float()).any()
    assert rms(d - (a.double() @ b.double() + c)) > 1e2 * rms(d - (tf32(a).double() @ tf32(b).double() + c))


# Its kernels -------------------------------------------------------------------------------------------


def in_order(x, weight):
    """<x_i, w_i> in float32, column by column, as a library's kernel sums."""
    total = torch.zeros(len(x))
    for k in range(x.shape[1]):
        total = (total + x[:, k].double() * weight[:, k].double()).float()
    return total


@pytest.mark.parametrize("dim", [128, 512])
@pytest.mark.parametrize("positive", [False, True])
def test_scores_are_those_of_float32(cuda_lane, dim, positive):
    """Of rows near one class each: there a sum grows in one direction, and what is cut off adds up."""
    lane, rows = cuda_lane, 64
    weight = torch.randn(rows, dim, generator=torch.Generator().manual_seed(1))
    x = 0.8 * weight + 0.6 * torch.randn(rows, dim, generator=torch.Generator().manual_seed(2))
    if positive:
        weight, x = weight.abs(), x.abs()
    labels = (torch.arange(rows) + 1) % rows
    given = arguments(*map(lane.tensor, (x, weight, labels)), need_largest=True, need_x=False)
    swept, _, _ = sweep({**given, "product": PRODUCT, "workspace": 1 << 30})
    truth = (unit(x.double()) * unit(weight.double())).sum(1)
    plain = in_order(unit(x.double()).float(), unit(weight.double()).float())
    assert rms(swept.rows[LARGEST].cpu() - truth) < rms(plain - truth)


def test_sums_over_the_classes_are_those_of_float32(cuda_lane):
    """Over several stretches of them, from E as it was kept."""
    lane, classes = cuda_lane, 900
    weight, x = (
        lane.randn(classes, 40, dtype=torch.float32).abs(),
        lane.randn(6, 40, dtype=torch.float32, seed=1),
    )
    given = arguments(x, weight, lane.labels(6, classes), store=True, scale_value=1.0)
    swept, _, _ = sweep({**given, "product": PRODUCT, "workspace": 1 << 30})
    e, w = swept.stored.view(6, -1)[:, :classes].cpu(), unit(weight.cpu().double())
    truth = e.double() @ w
    plain = torch.stack([in_order(e, column.float().expand_as(e)) for column in w.T], 1)
    assert rms(swept.x_sum.cpu() - truth) < rms(plain - truth)


def test_gradients_are_those_of_float32(cuda_lane):
    """Of many rows, whose coefficients all have one sign."""
    lane = cuda_lane
    x = lane.randn(640, 64).abs().float()
    weight, labels = lane.randn(40, 64, dtype=torch.float32, seed=1, grad=True), lane.labels(640, 40)

    def gradient(w):
        loss = nf.functional.normface_loss(x.to(w.dtype), w, labels, 4.0, reduction="sum")
        return torch.autograd.grad(loss, w)[0]

    errors = {}
    truth = gradient(weight.detach().double().requires_grad_())
    for product in ("simt", PRODUCT):
        with asking(product, store=True):
            errors[product] = rms(gradient(weight) - truth)
    assert errors[PRODUCT] < errors["simt"]


def test_the_gradient_of_rows_that_are_wrong_at_a_large_scale(cuda_lane):
    """Their E is e^79 and their factor e^-79, which no second part of tf32 could tell from 0."""
    lane, rows = cuda_lane, 19
    weight = lane.randn(40, 16, dtype=torch.float32, seed=1)
    x = weight[:rows] + 0.05 * lane.randn(rows, 16, dtype=torch.float32)
    labels = lane.tensor((torch.arange(rows) + 20) % 40)

    def gradient(w):
        return torch.autograd.grad(1e-3 * nf.functional.normface_loss(x.to(w.dtype), w, labels, 80.0), w)[0]

    with asking(PRODUCT, store=True):
        got = gradient(weight.clone().requires_grad_())
    torch.testing.assert_close(
        got.double(), gradient(weight.double().requires_grad_()), rtol=0, atol=1e-6 * 1e-3
    )


def test_a_step_is_the_same_every_time(cuda_lane):
    lane = cuda_lane
    x, weight = lane.randn(70, 40, dtype=torch.float32), lane.randn(300, 40, dtype=torch.float32, seed=1)
    labels, results = lane.labels(70, 300), []
    for _ in range(2):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        with asking(PRODUCT, store=True):
            loss = nf.functional.normface_loss(*leaves, labels, 16.0)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for one, same in zip(*results, strict=True):
        assert torch.equal(one, same)


def test_it_is_asked_for_by_name_and_takes_float32_alone(cuda_lane):
    (product,) = [one for one in native.PRODUCTS if one.name == PRODUCT]
    assert product.results is None  # no GPU has seen it
    lane = cuda_lane
    for dtype, dim in ((torch.float64, 8), (torch.bfloat16, 8), (torch.float32, 6), (torch.float32, 516)):
        x, weight = lane.randn(3, dim, dtype=dtype), lane.randn(5, dim, dtype=dtype, seed=1)
        with asking(PRODUCT), pytest.raises(RuntimeError, match=f"expected a `product` that takes D={dim}"):
            nf.functional.normface_loss(x, weight, lane.labels(3, 5), 9.0)
