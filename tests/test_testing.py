"""The helpers that judge can say no."""

import math

import pytest
import torch

from normface_ext import reference, testing
from normface_ext.testing import (
    ROW_KINDS,
    assert_close_to_truth,
    assert_matches_reference,
    make_rows,
    random_like,
    value_and_gradients,
)

TRUTH = torch.tensor([[1.0, -2.0, 3.0], [1e-3, 2e-3, -1e-3]], dtype=torch.float64) / 3
ROUNDED = TRUTH.float()


def judge(actual, truth=TRUTH, plain=ROUNDED, **options):
    return assert_close_to_truth(actual, truth, plain, "op", **options)


def bumped(at, by):
    actual = ROUNDED.clone()
    actual[at] += by
    return actual


def test_what_is_as_good_as_plain_torch_passes():
    assert 0 < judge(ROUNDED) <= 1
    assert judge(ROUNDED[:0], TRUTH[:0], ROUNDED[:0]) == 0


def test_what_is_worse_fails_and_says_where():
    with pytest.raises(AssertionError) as raised:
        judge(bumped((0, 2), 1e-4))
    message = str(raised.value)
    assert message.startswith("op: worst at [0, 2]: got 1.0001")
    assert "expected 1," in message.replace("expected 1 (", "expected 1, (")
    assert "plain torch: 1)" in message and "1 of 6 elements are beyond" in message
    percent = int(message.split(" % of the allowed")[0].split()[-1])
    assert percent > 1000


def test_a_row_is_judged_by_its_own_size():
    """An error that is nothing in the first row is all of the second."""
    judge(bumped((0, 2), 5e-7), floor=8)
    with pytest.raises(AssertionError, match=r"worst at \[1, 0\]"):
        judge(bumped((1, 0), 5e-7), floor=8)
    judge(bumped((1, 0), 5e-7), floor=8, dim=None)


def test_plain_torch_buys_tolerance_only_for_its_own_row_and_only_what_it_needs():
    sloppy = ROUNDED.clone()
    sloppy[0, 0] += 1e-3
    judge(bumped((0, 1), 1.9e-3), plain=sloppy)
    with pytest.raises(AssertionError):
        judge(bumped((0, 1), 2.1e-3), plain=sloppy)
    with pytest.raises(AssertionError):
        judge(bumped((0, 1), 1.9e-3), plain=sloppy, factor=1.0)
    with pytest.raises(AssertionError):
        judge(bumped((1, 1), 1e-5), plain=sloppy)
    with pytest.raises(AssertionError):
        judge(bumped((0, 1), 1.9e-3), plain=None)


def test_terms_that_cancel_allow_their_own_rounding():
    terms = torch.tensor([[1.0, 1, 1], [0, 0, 1e3]], dtype=torch.float64)
    judge(bumped((1, 0), 5e-4), terms=terms)
    with pytest.raises(AssertionError):
        judge(bumped((1, 0), 2e-3), terms=terms)
    with pytest.raises(AssertionError):
        judge(bumped((0, 0), 5e-4), terms=terms)


def test_a_coarser_epsilon_can_be_asked_for():
    actual = TRUTH + 1e-8
    assert_close_to_truth(actual, TRUTH, None, "op", eps=1e-5)
    with pytest.raises(AssertionError):
        assert_close_to_truth(actual, TRUTH, None, "op")
    with pytest.raises(AssertionError):
        assert_close_to_truth(actual + 1e-3, TRUTH, None, "op", eps=1e-5)


def test_underflow_can_be_allowed_for():
    judge(bumped((1, 0), 1e-5), tiny=2e-5)
    with pytest.raises(AssertionError):
        judge(bumped((1, 0), 1e-4), tiny=2e-5)


def test_plain_torch_that_overflowed_buys_nothing():
    overflowed = ROUNDED.clone()
    overflowed[0] = math.inf
    judge(ROUNDED, plain=overflowed)
    with pytest.raises(AssertionError, match="worst at"):
        judge(bumped((0, 1), 1e-3), plain=overflowed)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_must_lie_where_the_truth_has_them(bad):
    actual, truth = ROUNDED.clone(), TRUTH.clone()
    actual[1, 2] = bad
    with pytest.raises(AssertionError, match=r"op: got .* where the truth is .*, at \[1, 2\]; 1 of 6"):
        judge(actual)
    truth[1, 2] = bad
    judge(actual, truth, actual)
    with pytest.raises(AssertionError, match=r"at \[1, 2\]"):
        judge(ROUNDED, truth, actual)
    other = actual.clone()
    other[1, 2] = math.nan if not math.isnan(bad) else math.inf
    with pytest.raises(AssertionError, match=r"at \[1, 2\]"):
        judge(other, truth, actual)
    judge(actual, truth, actual)  # and the finite rest is still judged
    actual[1, 0] += 1
    with pytest.raises(AssertionError, match=r"worst at \[1, 0\]"):
        judge(actual, truth, None)


def test_a_truth_beyond_the_dtype_is_an_infinity_there():
    truth = torch.tensor([1e5, -1.0], dtype=torch.float64)
    assert_close_to_truth(torch.tensor([math.inf, -1], dtype=torch.float16), truth, None, "op")
    with pytest.raises(AssertionError):
        assert_close_to_truth(torch.tensor([65504, -1], dtype=torch.float16), truth, None, "op")


def test_subnormal_spacing_is_allowed_and_no_more():
    info = torch.finfo(torch.float16)
    spacing = info.smallest_normal * info.eps
    truth = torch.tensor([0.4 * spacing], dtype=torch.float64)
    assert_close_to_truth(torch.zeros(1, dtype=torch.float16), truth, None, "op", floor=1)
    with pytest.raises(AssertionError):
        assert_close_to_truth(torch.full((1,), 20 * spacing, dtype=torch.float16), truth, None, "op")


def test_shapes_and_dtypes_must_agree():
    with pytest.raises(AssertionError, match=r"op: shape \[3, 2\], but the truth has \[2, 3\]"):
        judge(ROUNDED.t())
    with pytest.raises(AssertionError, match=r"op: shape \[2, 3\], but plain torch has \[2\]"):
        judge(ROUNDED, plain=ROUNDED[:, 0])
    with pytest.raises(AssertionError, match=r"op: dtype torch.float64, but plain torch has"):
        judge(TRUTH)
    with pytest.raises(AssertionError, match="the truth must be float64"):
        judge(ROUNDED, truth=ROUNDED)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_rows_are_what_they_say(dtype):
    dim = 24
    rows = make_rows(2 * len(ROW_KINDS), dim, dtype)
    assert rows.dtype == dtype and torch.isfinite(rows).all()
    wide = rows.double()
    for first in (0, len(ROW_KINDS)):
        of = {kind: wide[first + i] for i, kind in enumerate(ROW_KINDS)}
        assert torch.equal(of["twin"], 2 * of["plain"])
        assert torch.equal(of["opposite"], -0.5 * of["plain"])
        assert of["zero"].abs().max() == 0 and (of["ones"] == 1).all()
        assert of["huge"].abs().max() > testing.HUGE[dtype] / 2
        assert 0 < of["tiny"].abs().max() < 5 * testing.TINY[dtype]
        spike = of["spike"].abs().sort(descending=True).values
        assert spike[0] == 1 and spike[1] < 0.01
    assert not torch.equal(wide[0], wide[len(ROW_KINDS)])
    assert torch.equal(rows, make_rows(2 * len(ROW_KINDS), dim, dtype))
    assert not torch.equal(rows, make_rows(2 * len(ROW_KINDS), dim, dtype, seed=1))


def test_huge_and_tiny_rows_hurt_plain_torch():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        huge, tiny = make_rows(2, 64, dtype, kinds=("huge", "tiny"))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert torch.isinf(huge.to(wide).square().sum())
        assert tiny.to(wide).square().sum() == 0 or tiny.to(wide).square().sum() < 1e-30
    assert torch.isinf(make_rows(1, 64, torch.float16, kinds=["huge"]).abs().sum(dtype=torch.float16))


def test_rows_of_unknown_kind_are_refused():
    with pytest.raises(ValueError, match=r"make_rows: expected `kinds` among plain, .*, got 'odd'"):
        make_rows(1, 1, kinds=["odd"])
    assert make_rows(0, 3).shape == (0, 3) and make_rows(9, 0).shape == (9, 0)


def test_values_and_gradients_come_from_fresh_leaves():
    x, y = torch.tensor([2.0, 3.0], requires_grad=True), torch.tensor([5.0, 7.0])
    (out,), (dx, dy) = value_and_gradients(lambda a, b: a * b, [x, y], [torch.tensor([1.0, 10.0])])
    assert out.tolist() == [10, 21] and dx.tolist() == [5, 70] and dy is None
    assert x.grad is None and not out.requires_grad
    (out,), (dx, _) = value_and_gradients(lambda a, b: a * b, [x, y], dtype=torch.float64)
    assert out.dtype == dx.dtype == torch.float64 and dx.tolist() == [5, 7]
    _, (dx,) = value_and_gradients(lambda a: (a * a, a.exp()), [x], [torch.ones(2), None])
    assert dx.tolist() == [4, 6]


def test_upstream_gradients_are_not_uniform():
    (g,) = random_like([torch.zeros(100, dtype=torch.float16)])
    assert g.dtype == torch.float16 and g.unique().numel() > 50


def matches(kernel, **options):
    x = make_rows(5, 7, kinds=["plain"]).requires_grad_()
    assert_matches_reference(kernel, reference.normalize, [x], "normalize", **options)


class WrongSlope(torch.autograd.Function):
    """Right values; its gradient is right only for equal upstream gradients or not at all."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return reference.normalize(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return reference.normalize_backward(g.mean().expand_as(g), None, x, 1, 2, 1e-12)


def test_float64_is_held_to_float64():
    x = make_rows(5, 33, torch.float64, kinds=["plain", "spike"]).requires_grad_()
    assert_matches_reference(reference.normalize, reference.normalize, [x], "normalize")
    with pytest.raises(AssertionError, match="normalize, output 0: worst at"):
        assert_matches_reference(
            lambda x: reference.normalize(x) * (1 + 1e-13), reference.normalize, [x], "normalize"
        )
    with pytest.raises(AssertionError, match="normalize, output 0"):
        assert_matches_reference(
            lambda x: reference.normalize(x.float()).double(), reference.normalize, [x], "normalize"
        )


def test_single_numbers_may_have_a_factor_of_their_own():
    x = torch.tensor(0.1, requires_grad=True)
    options = {"plain": lambda x: 3 * (x + 1e-4), "floor": 1.0}

    def judge_scalar(**more):
        assert_matches_reference(lambda x: 3 * (x + 4e-4), lambda x: 3 * x, [x], "op", **options, **more)

    judge_scalar(scalar_factor=5.0)
    for more in ({}, {"factor": 2.0}, {"factor": 5.0, "scalar_factor": 2.0}):
        with pytest.raises(AssertionError, match="op, output 0: worst at"):
            judge_scalar(**more)


def test_a_kernel_is_compared_in_value_and_gradient():
    matches(reference.normalize)
    matches(reference.normalize, use_plain=False)
    matches(reference.normalize, terms=lambda x: x / x.detach().norm(dim=1, keepdim=True))
    with pytest.raises(AssertionError, match="normalize, output 0: worst at"):
        matches(lambda x: reference.normalize(x) * 1.00001)
    with pytest.raises(AssertionError, match="normalize, gradient 0: worst at"):
        matches(WrongSlope.apply)
    with pytest.raises(AssertionError, match="normalize, gradient 0: worst at"):
        matches(WrongSlope.apply, terms=lambda x: x / x.detach().norm(dim=1, keepdim=True))
    with pytest.raises(AssertionError, match="normalize, gradient 0: got None"):
        matches(lambda x: reference.normalize(x.detach()))
