"""functional.normalize in every lane: values and gradients against the float64 specification."""

import math

import pytest
import torch
from lanes import DTYPES, ODD_SIZES

import normface_ext as nf
from normface_ext import reference, testing
from normface_ext.testing import assert_close_to_truth, assert_matches_reference, value_and_gradients

TAME = ("plain", "twin", "opposite", "spike", "ones")
WIDE = {torch.float64: torch.float64}  # everything else accumulates in float32


def normalize(*arguments, **options):
    return lambda x: nf.functional.normalize(x, *arguments, **options)


def specified(*arguments, **options):
    return lambda x: reference.normalize(x, *arguments, **options)


def held(dim=1, p=2, eps=1e-12, return_norm=False):
    """normalize with the norm held constant: its gradient is what the radial part is taken from."""

    def function(x):
        norm = reference.rows.norm_of(x, dim, p, eps)
        return (x / norm.detach(), norm) if return_norm else x / norm.detach()

    return function


def check(x, *arguments, name="normalize", row_dim=-1, use_plain=True, upstream=None, **options):
    assert_matches_reference(
        normalize(*arguments, **options),
        specified(*arguments, **options),
        [x],
        name,
        dim=row_dim,
        use_plain=use_plain,
        terms=held(*arguments, **options),
        upstream=upstream,
    )


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", ODD_SIZES)
def test_rows(lane, dim, dtype, p):
    for rows in (1, 5, 33):
        check(lane.rows(rows, dim, dtype, kinds=TAME, grad=True), 1, p, return_norm=True)


@pytest.mark.parametrize("p", [1, 2])
def test_long_rows(lane, p):
    check(lane.rows(3, 5000, kinds=TAME, grad=True), 1, p, return_norm=True)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [0, 1, 2, 3, -1, -3, -4])
def test_every_axis_of_nchw(lane, dim, dtype, p):
    x = lane.randn(2, 5, 3, 17, dtype=dtype, grad=True)
    check(x, dim, p, return_norm=True, row_dim=dim)


@pytest.mark.parametrize("shape", [(7,), (1,), (3, 1), (1, 7), (2, 3, 4, 5, 6), (2, 1, 3), (5, 70, 1)])
def test_every_rank(lane, shape):
    x = lane.randn(*shape, grad=True)
    for dim in range(len(shape)):
        check(x, dim, 2, return_norm=True, row_dim=dim, name=f"normalize dim {dim}")


@pytest.mark.parametrize(("channels", "pixels"), [(1, 40), (31, 33), (64, 49), (257, 3), (3, 257)])
def test_a_channel_axis_of_odd_sizes(lane, channels, pixels):
    x = lane.randn(2, channels, pixels, grad=True)
    for p in (1, 2):
        check(x, 1, p, return_norm=True, row_dim=1)


def odd_layouts(lane, dtype):
    """(name, x, dim): rows that do not lie one after the other, or not on a boundary."""
    base = lane.randn(9, 67, dtype=dtype)
    yield "transposed", lane.randn(67, 9, dtype=dtype).t(), 1
    yield "transposed, other axis", lane.randn(67, 9, dtype=dtype).t(), 0
    yield "every second column", base[:, ::2], 1
    yield "columns from the fourth on", base[:, 3:], 1
    yield "unaligned start", lane.randn(9 * 67 + 1, dtype=dtype)[1:].view(9, 67), 1
    yield "rows from the second on", base[1:], 1
    yield "every second row", base[::2], 1
    yield "one row repeated", base[:1].expand(4, 67), 1
    yield "permuted", lane.randn(4, 5, 6, dtype=dtype).permute(2, 0, 1), 1
    yield "a channel slice", lane.randn(2, 8, 3, 5, dtype=dtype)[:, 2:7], 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_odd_layouts(lane, dtype):
    for name, x, dim in odd_layouts(lane, dtype):
        upstream = testing.random_like([x.contiguous()])
        got = x.detach().requires_grad_()
        y = nf.functional.normalize(got, dim)
        y.backward(upstream[0])
        plain = x.detach().contiguous()
        (truth,), (truth_dx,) = value_and_gradients(
            specified(dim), [plain.requires_grad_()], upstream, dtype=torch.float64
        )
        (eager,), (eager_dx,) = value_and_gradients(specified(dim), [plain], upstream)
        assert_close_to_truth(y, truth, eager, name, dim=dim)
        assert_close_to_truth(got.grad, truth_dx, eager_dx, f"{name}, gradient", dim=dim)


def test_upstream_gradients_of_odd_layouts(lane):
    x = lane.randn(6, 35)
    g = lane.randn(35, 6).t()
    for upstream in (g, g[:1].expand(6, 35), lane.tensor(2.0).expand(6, 35)):
        leaf = lane.tensor(x, grad=True)
        nf.functional.normalize(leaf).backward(upstream)
        truth = reference.normalize_backward(upstream.double(), None, x.double(), 1, 2, 1e-12)
        plain = reference.normalize_backward(upstream, None, x, 1, 2, 1e-12)
        assert_close_to_truth(leaf.grad, truth, plain, "gradient")


@pytest.mark.parametrize("p", [1, 2])
def test_channels_last_is_kept(lane, p):
    x = lane.randn(2, 19, 5, 4).to(memory_format=torch.channels_last)
    y, norm = nf.functional.normalize(x, 1, p, return_norm=True)
    assert y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous()
    assert norm.shape == (2, 1, 5, 4)
    leaf = x.detach().requires_grad_()
    g = lane.randn(2, 19, 5, 4, seed=1)  # contiguous: another layout than x
    nf.functional.normalize(leaf, 1, p).backward(g)
    assert leaf.grad.is_contiguous(memory_format=torch.channels_last)
    truth_y, truth_norm = reference.normalize(x.double(), 1, p, return_norm=True)
    plain_y, plain_norm = reference.normalize(x, 1, p, return_norm=True)
    assert_close_to_truth(y, truth_y, plain_y, "y", dim=1)
    assert_close_to_truth(norm, truth_norm, plain_norm, "norm", dim=1)
    truth = reference.normalize_backward(g.double(), None, x.double(), 1, p, 1e-12)
    assert_close_to_truth(
        leaf.grad, truth, reference.normalize_backward(g, None, x, 1, p, 1e-12), "dx", dim=1
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "dim"), [((0, 5), 1), ((5, 0), 1), ((0,), 0), ((2, 3, 0), 1), ((2, 0, 3), 1), ((0, 0), 0)]
)
def test_empty(lane, shape, dim, dtype):
    x = lane.randn(*shape, dtype=dtype, grad=True)
    y, norm = nf.functional.normalize(x, dim, 2, 0.25, return_norm=True)
    assert y.shape == x.shape and y.dtype == dtype
    assert norm.shape == tuple(1 if axis == dim else size for axis, size in enumerate(shape))
    assert (norm == 0.5).all()  # rows without elements have the norm sqrt(eps)
    (y.sum() + norm.sum()).backward()
    assert x.grad.shape == x.shape


# Rows that hurt -------------------------------------------------------------------------------------


def exactly_normalized(x, p, eps):
    """float64 rows of any magnitude: each is divided by its largest entry first, eps with it."""
    x = x.double()
    largest = x.abs().amax(1, keepdim=True)
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))
    scaled = x / largest
    if p == 1:
        return scaled / (scaled.abs().sum(1, keepdim=True) + eps / largest)
    return scaled / (scaled.square().sum(1, keepdim=True) + eps / largest / largest).sqrt()


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_any_magnitude_keep_their_direction(lane, dtype, p):
    """1e19 in float32 and 1e4 in float16 overflow on the way in plain torch: only the floor is allowed."""
    kinds = ("plain", "huge", "zero", "tiny", "ones")
    for eps in (1e-12, 0.0):
        if eps == 0:
            kinds = ("plain", "huge", "tiny", "ones")
        x = lane.rows(10, 77, dtype, kinds=kinds)
        y = nf.functional.normalize(x, 1, p, eps)
        assert torch.isfinite(y).all()
        assert_close_to_truth(y, exactly_normalized(x, p, eps), None, f"eps {eps}")


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("magnitude", [1e19, 1e-19, 1e25, 1e-25, 1e37])
def test_gradients_at_any_magnitude(lane, magnitude, p):
    base = testing.make_rows(4, 40, torch.float64, kinds=["plain"])
    x = lane.tensor(base / base.norm(dim=1, keepdim=True) * magnitude, torch.float32, grad=True)
    g = lane.randn(4, 40, seed=3)
    nf.functional.normalize(x, 1, p, 0.0).backward(g)
    truth = reference.normalize_backward(g.double(), None, x.detach().double(), 1, p, 0.0)
    assert_close_to_truth(x.grad, truth, None, "dx", floor=16)


def test_norms_of_16_bit_rows_are_float32(lane):
    """A float16 norm would overflow at 65504 and underflow at 6e-8."""
    for dtype in (torch.float16, torch.bfloat16):
        x = lane.tensor([[60000.0] * 9, [1e-4] * 9], dtype)
        for p in (1, 2):
            y, norm = nf.functional.normalize(x, 1, p, return_norm=True)
            assert norm.dtype == torch.float32 and y.dtype == dtype
            truth_y, truth = reference.normalize(x.double(), 1, p, return_norm=True)
            assert_close_to_truth(norm, truth, None, "norm")
            assert_close_to_truth(y, truth_y, None, "y")


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_rows(lane, dtype, p):
    """y = 0, and dx = g / n(0) where the dtype has it; float16 holds it at its largest value."""
    x = lane.tensor(torch.zeros(2, 5), dtype, grad=True)
    y, norm = nf.functional.normalize(x, 1, p, return_norm=True)
    at_zero = 1e-6 if p == 2 else 1e-12
    assert (y == 0).all()
    assert norm.flatten().tolist() == pytest.approx([at_zero] * 2, rel=1e-6, abs=0)
    g = lane.tensor([[1.0, -2.0, 0.0, 3.0, -4.0]] * 2, dtype)
    y.backward(g)
    assert torch.isfinite(x.grad).all()
    expected = g.double() / at_zero
    if dtype == torch.float16:
        expected = expected.clamp(-65504, 65504)
    assert_close_to_truth(x.grad, expected, None, "dx")


def test_zero_rows_between_others_stay_alone(lane):
    x = lane.rows(9, 33, kinds=("plain", "zero", "ones"), grad=True)
    check(x, 1, 2, return_norm=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_stays_in_its_row(lane, bad, dtype):
    for shape, dim in (((6, 37), 1), ((2, 5, 21), 1)):
        x = lane.randn(*shape, dtype=dtype)
        clean = nf.functional.normalize(x, dim)
        g = lane.randn(*shape, dtype=dtype, seed=1)
        leaf = lane.tensor(x, grad=True)
        nf.functional.normalize(leaf, dim).backward(g)
        poisoned = x.clone()
        at = (1, 4) if len(shape) == 2 else (1, 4, 20)
        poisoned[at] = bad
        row = (1,) if len(shape) == 2 else (1, slice(None), 20)
        other = torch.ones(shape, dtype=torch.bool, device=x.device)
        other[row] = False
        poisoned.requires_grad_()
        y = nf.functional.normalize(poisoned, dim)
        y.backward(g)
        assert torch.equal(y[other], clean[other])
        assert torch.equal(poisoned.grad[other], leaf.grad[other])
        assert not torch.isfinite(y[at]), "a row with a NaN or an infinity must not look well"


# Gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("outputs", ["y", "norm", "both"])
def test_gradients_of_either_output_or_both(lane, outputs, p):
    for shape, dim in (((5, 33), 1), ((2, 6, 19), 1), ((4, 9), 0)):
        x = lane.randn(*shape, grad=True)
        y, norm = nf.functional.normalize(x, dim, p, return_norm=True)
        g, g_norm = testing.random_like([y, norm])
        upstream = [g if outputs != "norm" else None, g_norm if outputs != "y" else None]
        check(x, dim, p, return_norm=True, row_dim=dim, upstream=upstream)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("eps", [0.0, 1e-12, 0.5])
@pytest.mark.parametrize(("shape", "dim"), [((3, 5), 1), ((2, 3, 4), 1), ((4, 3), 0)])
def test_gradcheck(lane, shape, dim, eps, p):
    x = lane.randn(*shape, dtype=torch.float64, grad=True)

    def function(x):
        return nf.functional.normalize(x, dim, p, eps, return_norm=True)

    assert torch.autograd.gradcheck(function, x, fast_mode=lane.slow)
    assert torch.autograd.gradgradcheck(function, x, fast_mode=True)


@pytest.mark.parametrize("p", [1, 2])
def test_second_derivatives_are_those_of_the_specification(lane, p):
    def penalty(function, x):
        y, norm = function(x, 1, p, 0.1, return_norm=True)
        (dx,) = torch.autograd.grad((y.sin().sum() + norm.exp().sum()), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), x)[0]

    x = lane.randn(3, 6, dtype=torch.float64, grad=True)
    truth = penalty(reference.normalize, x)
    assert_close_to_truth(penalty(nf.functional.normalize, x), truth, None, "second derivative")


def test_gradient_is_orthogonal_to_the_row(lane):
    """The radial part is projected out: a step can only lengthen x."""
    x = lane.randn(8, 65, dtype=torch.float64, grad=True)
    nf.functional.normalize(x, eps=0.0).backward(lane.randn(8, 65, dtype=torch.float64, seed=1))
    radial = (x.grad * x.detach()).sum(1).abs()
    assert (radial <= 1e-13 * x.grad.norm(dim=1) * x.detach().norm(dim=1)).all()


def test_nothing_is_computed_for_a_tensor_without_gradient(lane):
    x = lane.randn(3, 4)
    y, norm = nf.functional.normalize(x, return_norm=True)
    assert not y.requires_grad and not norm.requires_grad
    with torch.no_grad():
        assert not nf.functional.normalize(lane.randn(3, 4, grad=True)).requires_grad


def test_inputs_are_not_modified(lane):
    x, g = lane.rows(9, 20, grad=True), lane.randn(9, 20, seed=1)
    before, g_before = x.detach().clone(), g.clone()
    y = nf.functional.normalize(x)
    y.backward(g)
    assert torch.equal(x.detach(), before) and torch.equal(g, g_before)
    assert y.data_ptr() != x.data_ptr() and x.grad.data_ptr() != g.data_ptr()


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_equals_eager(lane, compile_fully, dtype):
    def step(x):
        y, norm = nf.functional.normalize(x, 1, 2, return_norm=True)
        return (y * y.sin()).sum() + norm.sum(), y

    compiled = compile_fully(step)
    for shape in ((6, 33), (9, 20)):  # the second one makes the sizes dynamic
        eager_x, compiled_x = (lane.randn(*shape, dtype=dtype, grad=True) for _ in range(2))
        loss, y = step(eager_x)
        loss.backward()
        compiled_loss, compiled_y = compiled(compiled_x)
        compiled_loss.backward()
        assert torch.equal(compiled_y, y) and torch.equal(compiled_loss, loss)
        assert torch.equal(compiled_x.grad, eager_x.grad)


@pytest.mark.parametrize("dim", [1, -3])
def test_compiled_channels_last(lane, compile_fully, dim):
    x = lane.randn(2, 7, 4, 5).to(memory_format=torch.channels_last)
    compiled = compile_fully(normalize(dim))
    assert torch.equal(compiled(x), nf.functional.normalize(x, dim))
    assert compiled(x).stride() == x.stride()
