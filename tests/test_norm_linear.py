"""functional.norm_linear in every lane: values and gradients against the float64 specification."""

import itertools
import math

import pytest
import torch
from lanes import DTYPES, ODD_SIZES

import normface_ext as nf
from normface_ext import reference, testing
from normface_ext.testing import assert_close_to_truth, assert_matches_reference

SHAPES = [(5, 33, 7), (1, 1, 1), (4, 8, 1), (1, 64, 33), (33, 31, 32), (3, 257, 65)]  # N, D, C


def plain_torch(lane, x, weight):
    """The reference, or, where tensor cores multiply 16-bit operands, what autocast makes of it."""
    operand = min(x.dtype, weight.dtype, key=lambda dtype: dtype.itemsize)
    if lane.widens or operand.itemsize > 2:
        return reference.norm_linear

    def function(x, weight, scale, eps=1e-12, *, normalize_input=True):
        wide_x, wide_w = x.float(), weight.float()
        x_hat = wide_x / reference.rows.norm_of(wide_x, 1, 2, eps) if normalize_input else wide_x
        w_hat = wide_w / reference.rows.norm_of(wide_w, 1, 2, eps)
        return (scale * (x_hat.to(operand) @ w_hat.to(operand).t()).float()).to(x.dtype)

    return function


def held(normalize_input=True):
    """norm_linear with the norms held constant: gradients before the radial part is taken out."""

    def function(x, weight, scale):
        x_hat = x / reference.rows.norm_of(x, 1, 2, 1e-12).detach() if normalize_input else x
        return scale * x_hat @ (weight / reference.rows.norm_of(weight, 1, 2, 1e-12).detach()).t()

    return function


def check(lane, tensors, name="norm_linear", **options):
    *_, scale = tensors
    plain = plain_torch(lane, *tensors[:2])
    assert_matches_reference(
        lambda x, w, s=scale: nf.functional.norm_linear(x, w, s, **options),
        lambda x, w, s=scale: reference.norm_linear(x, w, s, **options),
        [t for t in tensors if isinstance(t, torch.Tensor)],
        name,
        plain=lambda x, w, s=scale: plain(x, w, s, **options),
        terms=lambda x, w, s=scale: held(**options)(x, w, s),
    )


@pytest.mark.parametrize("normalize_input", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(lane, shape, dtype, normalize_input):
    batch, dim, classes = shape
    x = lane.randn(batch, dim, dtype=dtype, grad=True)
    weight = lane.randn(classes, dim, dtype=dtype, seed=1, grad=True)
    check(lane, [x, weight, 8.0], normalize_input=normalize_input)


@pytest.mark.parametrize("size", ODD_SIZES)
def test_odd_sizes(lane, size):
    small = 3 if lane.slow else 9
    for batch, dim, classes in ((size, 17, small), (small, size, 5), (small, 17, size)):
        x, weight = lane.randn(batch, dim, grad=True), lane.randn(classes, dim, seed=1, grad=True)
        check(lane, [x, weight, 30.0], name=f"N={batch}, D={dim}, C={classes}")


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float16),
    ],
)
def test_mixed_dtypes(lane, dtypes):
    x = lane.randn(6, 40, dtype=dtypes[0], grad=True)
    weight = lane.randn(9, 40, dtype=dtypes[1], seed=1, grad=True)
    check(lane, [x, weight, 16.0])
    out = nf.functional.norm_linear(x, weight, 16.0)
    assert out.dtype == dtypes[0]


@pytest.mark.parametrize("scale_dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scale_as_a_tensor(lane, dtype, scale_dtype):
    """The gradient of the scale has the scale's dtype, whatever the others are."""
    x, weight = lane.randn(5, 12, dtype=dtype, grad=True), lane.randn(7, 12, dtype=dtype, seed=1, grad=True)
    scale = lane.tensor(12.5, scale_dtype, grad=True)  # exact in bfloat16
    check(lane, [x, weight, scale])
    fixed = nf.functional.norm_linear(x, weight, 12.5)
    assert torch.equal(nf.functional.norm_linear(x, weight, scale), fixed)


@pytest.mark.parametrize("scale", [0.0, -3.0, 1e-3, 200.0])
def test_any_finite_scale(lane, scale):
    x, weight = lane.randn(4, 9, grad=True), lane.randn(5, 9, seed=1, grad=True)
    check(lane, [x, weight, scale])
    check(lane, [x, weight, lane.tensor(scale, grad=True)])


@pytest.mark.parametrize("wanted", list(itertools.product([True, False], repeat=3)))
def test_only_wanted_gradients(lane, wanted):
    x, weight = lane.randn(5, 9, grad=wanted[0]), lane.randn(4, 9, seed=1, grad=wanted[1])
    scale = lane.tensor(7.0, torch.float32, grad=wanted[2])
    check(lane, [x, weight, scale])  # the judge also compares which gradients are None
    out = nf.functional.norm_linear(x, weight, scale)
    assert out.requires_grad == any(wanted)


@pytest.mark.parametrize("normalize_input", [True, False])
def test_an_empty_batch(lane, normalize_input):
    x, weight = lane.randn(0, 6, grad=True), lane.randn(4, 6, grad=True)
    scale = lane.tensor(3.0, grad=True)
    out = nf.functional.norm_linear(x, weight, scale, normalize_input=normalize_input)
    assert out.shape == (0, 4)
    out.sum().backward()
    assert x.grad.shape == (0, 6)
    assert (weight.grad == 0).all() and weight.grad.shape == (4, 6) and scale.grad == 0


def test_features_without_elements(lane):
    x, weight = lane.randn(3, 0, grad=True), lane.randn(2, 0, grad=True)
    out = nf.functional.norm_linear(x, weight, 3.0)
    assert out.tolist() == [[0.0, 0.0]] * 3
    out.sum().backward()
    assert x.grad.shape == (3, 0) and weight.grad.shape == (2, 0)


def test_strided_operands(lane):
    x, weight = lane.randn(20, 6).t(), lane.randn(9, 43)[:, 3:23]
    g = lane.randn(9, 6, seed=2).t()
    leaves = [t.detach().requires_grad_() for t in (x, weight)]
    out = nf.functional.norm_linear(*leaves, 5.0)
    out.backward(g)
    five = torch.tensor(5.0)
    truth = reference.norm_linear_backward(g.double(), x.double(), weight.double(), five.double(), 1e-12)
    plain = reference.norm_linear_backward(g, x, weight, five, 1e-12)
    assert_close_to_truth(
        out,
        reference.norm_linear(x.double(), weight.double(), 5.0),
        reference.norm_linear(x, weight, 5.0),
        "out",
    )
    for leaf, expected, eager in zip(leaves, truth, plain, strict=False):
        assert_close_to_truth(leaf.grad, expected, eager, "gradient")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_any_magnitude(lane, dtype):
    x = lane.rows(8, 40, dtype, kinds=("plain", "huge", "zero", "ones"))
    weight = lane.rows(8, 40, dtype, kinds=("huge", "ones", "plain", "zero"), seed=1)
    out = nf.functional.norm_linear(x, weight, 10.0)
    truth = reference.norm_linear(x.double(), weight.double(), 10.0)
    assert torch.isfinite(out).all()
    # The unit rows are at most 1 long, so 10 is what an error is compared with.
    assert (out.double() - truth).abs().max() <= 10 * 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_rows_have_finite_gradients(lane, dtype):
    x = lane.rows(4, 9, dtype, kinds=("zero", "plain"), grad=True)
    weight = lane.rows(4, 9, dtype, kinds=("plain", "zero"), seed=1, grad=True)
    out = nf.functional.norm_linear(x, weight, 4.0)
    assert (out[0] == 0).all() and (out[:, 1] == 0).all()
    out.backward(lane.randn(4, 4, dtype=dtype, seed=2))
    assert torch.isfinite(x.grad).all() and torch.isfinite(weight.grad).all()


def test_cosines_of_equal_and_opposite_rows_are_one(lane):
    x = lane.rows(6, 50, kinds=("plain", "twin", "opposite"))
    out = nf.functional.norm_linear(x, x[:1], 1.0)
    expected = lane.tensor([[1.0], [1.0], [-1.0]])
    assert (out[:3] - expected).abs().max() <= 4e-7


def test_nan_stays_in_its_row_and_its_column(lane):
    x, weight = lane.randn(5, 12), lane.randn(7, 12, seed=1)
    clean = nf.functional.norm_linear(x, weight, 2.0)
    x[2, 3], weight[4, 0] = math.nan, math.nan
    out = nf.functional.norm_linear(x, weight, 2.0)
    bad = torch.zeros(5, 7, dtype=torch.bool, device=out.device)
    bad[2], bad[:, 4] = True, True
    assert torch.equal(out.isnan(), bad)
    assert torch.equal(out[~bad], clean[~bad])


@pytest.mark.parametrize("normalize_input", [True, False])
@pytest.mark.parametrize("learned", [True, False])
def test_gradcheck(lane, normalize_input, learned):
    x = lane.randn(3, 4, dtype=torch.float64, grad=True)
    weight = lane.randn(5, 4, dtype=torch.float64, seed=1, grad=True)
    scale = lane.tensor(2.5, torch.float64, grad=learned)

    def function(x, weight, scale):
        return nf.functional.norm_linear(x, weight, scale, normalize_input=normalize_input, eps=0.1)

    assert torch.autograd.gradcheck(function, (x, weight, scale), fast_mode=lane.slow)
    assert torch.autograd.gradgradcheck(function, (x, weight, scale), fast_mode=True)


def test_second_derivatives_with_a_float_scale(lane):
    x = lane.randn(3, 4, dtype=torch.float64, grad=True)
    weight = lane.randn(5, 4, dtype=torch.float64, seed=1, grad=True)

    def penalty(function):
        out = function(x, weight, 3.0)
        dx, dw = torch.autograd.grad(out.sin().sum(), (x, weight), create_graph=True)
        return torch.autograd.grad(dx.square().sum() + dw.exp().sum(), (x, weight))

    pairs = zip(penalty(nf.functional.norm_linear), penalty(reference.norm_linear), strict=True)
    for got, truth in pairs:
        assert_close_to_truth(got, truth, None, "second derivative")


def test_runs_are_bit_identical(lane):
    x, weight, g = lane.randn(9, 40), lane.randn(33, 40, seed=1), lane.randn(9, 33, seed=2)
    first, second = (
        testing.value_and_gradients(
            lambda x, w: nf.functional.norm_linear(x, w, 9.0),
            [x.requires_grad_(), weight.requires_grad_()],
            [g],
        )
        for _ in range(2)
    )
    for one, other in zip(first[0] + first[1], second[0] + second[1], strict=True):
        assert torch.equal(one, other)


def test_inputs_are_not_modified(lane):
    tensors = [lane.randn(5, 9, grad=True), lane.randn(4, 9, seed=1, grad=True), lane.tensor(3.0, grad=True)]
    before = [t.detach().clone() for t in tensors]
    g = lane.randn(5, 4, seed=2)
    g_before = g.clone()
    nf.functional.norm_linear(*tensors).backward(g)
    assert torch.equal(g, g_before)
    for now, then in zip(tensors, before, strict=True):
        assert torch.equal(now.detach(), then)


@pytest.mark.covering(1)
@pytest.mark.parametrize("learned", [True, False])
def test_compiled_equals_eager(lane, compile_fully, learned):
    def step(x, weight, scale):
        return nf.functional.norm_linear(x, weight, scale).sin().sum()

    compiled = compile_fully(step)
    for batch in (6, 9):  # the second one makes the sizes dynamic
        runs = []
        for function in (step, compiled):
            x, weight = lane.randn(batch, 12, grad=True), lane.randn(7, 12, seed=1, grad=True)
            scale = lane.tensor(5.0, grad=True) if learned else 5.0
            loss = function(x, weight, scale)
            loss.backward()
            runs.append([loss, x.grad, weight.grad, *([scale.grad] if learned else [])])
        for eager, got in zip(*runs, strict=True):
            assert torch.equal(got, eager)
