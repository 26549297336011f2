"""Numbers at the ends of their ranges, in every lane: rows of any size, any index to ignore, any scale.

Sums, products and decisions must not leave the range of the type they are made in while the result is
inside it.
"""

import math

import pytest
import torch
from kernel_cases import engine_ops
from test_head_kernels import CHOICES, PLAIN, choose, cuda_lane  # noqa: F401  (a fixture)
from test_normface_loss import sample

import normface_ext as nf
from normface_ext.engine import library, native

HINGES = {
    "triplet": (nf.functional.c_triplet_loss, {}),
    "triplet, hardest": (nf.functional.c_triplet_loss, {"hardest_only": True, "add_center_loss": True}),
    "triplet, dense": (nf.functional.c_triplet_loss, {"active_limit": 0}),
    "contrastive": (nf.functional.c_contrastive_loss, {}),
    "contrastive, dense": (nf.functional.c_contrastive_loss, {"active_limit": 0, "neg_margin": 2.5}),
    "contrastive, exponential": (nf.functional.c_contrastive_loss, {"exp_negative_weight": True}),
}
every_hinge = pytest.mark.parametrize("loss", HINGES)


def gradients(function, *tensors):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    value = function(*leaves)
    return value.detach(), *torch.autograd.grad(value.sum(), leaves)


def close(got, expected, tolerance):
    """By the norm of the difference, in float64."""
    got, expected = got.double(), expected.double()
    error = float((got - expected).norm() / expected.norm())
    assert error <= tolerance, f"{error:.2e}"


# Rows that are not finite ------------------------------------------------------------------------------


@every_hinge
@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_poisoned_row_shows_in_a_hinge_loss(lane, loss, poison, dtype):
    function, options = HINGES[loss]
    x, weight = lane.randn(3, 5, dtype=dtype), lane.randn(4, 5, dtype=dtype, seed=1)
    labels = lane.tensor([0, 3, 1])
    x[1, 2] = poison
    losses, dx, _ = gradients(lambda *t: function(*t, labels, reduction="none", **options), x, weight)
    assert losses.isfinite().tolist() == [True, False, True]
    assert not dx[1].isfinite().any()
    assert dx[0].isfinite().all() and dx[2].isfinite().all()


@every_hinge
@pytest.mark.parametrize("poison", [math.inf, math.nan])
def test_a_poisoned_row_that_is_ignored_does_not(lane, loss, poison):
    function, options = HINGES[loss]
    x, weight = lane.randn(3, 5), lane.randn(4, 5, seed=1)
    kept = [0, 2]
    alone = gradients(lambda *t: function(*t, lane.tensor([0, 1]), **options), x[kept], weight)
    x[1] = poison
    value, dx, dw = gradients(lambda *t: function(*t, lane.tensor([0, -100, 1]), **options), x, weight)
    for got, expected in zip((value, dx[kept], dw), alone, strict=True):
        torch.testing.assert_close(got, expected)
    assert (dx[1] == 0).all()


def test_an_infinity_is_no_ignored_row(lane):
    x = lane.tensor([[math.inf, 1.0], [1.0, 1.0]])
    weight, labels = lane.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), lane.tensor([0, 1])
    value, dx, _ = gradients(lambda *t: nf.functional.c_triplet_loss(*t, labels), x, weight)
    assert value.isnan() and dx[0].isnan().all()


# Rows of any size --------------------------------------------------------------------------------------

#: What rows may be multiplied by, so that they stay finite and normal.
SIZES = {torch.float64: [1e154, 1e300, 1e-170, 1e-290], torch.float32: [1e37, 1e19, 1e-30]}
SIZED = [(dtype, size) for dtype, sizes in SIZES.items() for size in sizes]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6}


def scale_invariant(function, x, weight, of_x, of_weight):
    """Powers of two near the sizes leave every digit: losses do not see them, gradients divide by them."""
    of_x, of_weight = (2.0 ** round(math.log2(size)) for size in (of_x, of_weight))
    expected = gradients(function, x, weight)
    value, dx, dw = gradients(function, x * of_x, weight * of_weight)
    tolerance = TOLERANCE[x.dtype]
    close(value, expected[0], tolerance)
    close(dx.double() * of_x, expected[1], tolerance)
    close(dw.double() * of_weight, expected[2], tolerance)


@every_hinge
@pytest.mark.parametrize(("dtype", "size"), SIZED, ids=str)
def test_a_hinge_loss_of_rows_of_any_size(lane, loss, dtype, size):
    function, options = HINGES[loss]
    x, weight = lane.randn(4, 6, dtype=dtype), lane.randn(5, 6, dtype=dtype, seed=1)
    labels = lane.tensor([0, 4, 2, 2])
    # The gradient of a row of 1e37 would be denormal.
    upstream = 1.0 if dtype == torch.float64 else 2.0**10
    scale_invariant(lambda *t: upstream * function(*t, labels, eps=0.0, **options), x, weight, size, 1.0)
    scale_invariant(lambda *t: upstream * function(*t, labels, eps=0.0, **options), x, weight, 1.0, size)


@pytest.mark.parametrize(("dtype", "size"), SIZED, ids=str)
@pytest.mark.parametrize("margin", [None, nf.ArcFace(0.3)], ids=str)
@pytest.mark.parametrize("workspace", [None, 4096])
def test_the_head_of_rows_of_any_size(lane, dtype, size, margin, workspace):
    x, weight = lane.randn(4, 6, dtype=dtype), lane.randn(5, 6, dtype=dtype, seed=1)
    labels = lane.tensor([0, 4, 2, 2])

    def function(*t):
        return 1024 * nf.functional.normface_loss(
            *t, labels, 8.0, margin=margin, eps=0.0, workspace=workspace
        )

    scale_invariant(function, x, weight, size, 1.0)
    scale_invariant(function, x, weight, 1.0, size)


@pytest.mark.parametrize("choice", [*CHOICES, *PLAIN])
@pytest.mark.parametrize("small", [1.0, 1e-5])
def test_the_targets_part_of_dw_from_large_features(cuda_lane, monkeypatch, choice, small):  # noqa: F811
    """Its slope over such a norm is no float."""
    lane = cuda_lane
    dtype = torch.bfloat16 if choice in CHOICES and choice != "library" else torch.float32
    choose(monkeypatch, choice, 3)
    x, weight = lane.randn(4, 8, dtype=dtype), lane.randn(5, 8, dtype=dtype, seed=1)
    labels, factors = lane.tensor([0, 4, 2, 2]), lane.tensor([small] * 4)

    def function(x, weight):
        return nf.functional.normface_loss(
            x, weight, labels, 0.5, sample_weight=factors, reduction="sum", eps=0.0
        )

    expected = gradients(function, x, weight)[2]
    close(gradients(function, x * 2.0**124, weight)[2], expected, 3e-6 if dtype.itemsize > 2 else 4e-3)


def test_the_target_cosine_of_large_float64_rows(lane):
    x = lane.tensor(torch.tensor([[1.4e154, 1.4e154]], dtype=torch.float64))
    weight = lane.tensor([[1.0, 0.0], [0.0, 1.0]], torch.float64)
    value = nf.functional.normface_loss(x, weight, lane.tensor([0]), 4.0, margin=nf.CosFace(0.25))
    assert float(value) == pytest.approx(math.log1p(math.exp(1.0)), rel=1e-12)
    value = nf.functional.c_triplet_loss(x, weight, lane.tensor([0]), margin=0.75)
    assert float(value) == pytest.approx(0.75, rel=1e-12)


# What stands for no class ------------------------------------------------------------------------------

EXTREME = [-(2**63), -(2**31), -(2**31) - 1, 2**31, 2**32, 2**32 + 1, 2**63 - 1]


@pytest.mark.parametrize("choice", [*CHOICES, *PLAIN])
@pytest.mark.parametrize("ignore", EXTREME)
def test_any_index_to_ignore_in_the_head(cuda_lane, monkeypatch, choice, ignore):  # noqa: F811
    """Neither its low half nor its difference to a class is a label."""
    dtype = torch.bfloat16 if choice in CHOICES and choice != "library" else torch.float32
    choose(monkeypatch, choice, 3)
    x, weight, labels = sample(cuda_lane, 4, 8, 7, dtype)
    results = []
    for index in (-100, ignore):
        labels[1] = index
        for scale in (9.0, 100.0):
            results.append(
                gradients(
                    lambda *t, s=scale, index=index: nf.functional.normface_loss(
                        *t, labels, s, ignore_index=index
                    ),
                    x,
                    weight,
                )
            )
    for one, same in zip(results[:2], results[2:], strict=True):
        for a, b in zip(one, same, strict=True):
            assert torch.equal(a, b)


@every_hinge
@pytest.mark.parametrize("ignore", EXTREME)
def test_any_index_to_ignore_in_a_hinge_loss(lane, loss, ignore):
    function, options = HINGES[loss]
    x, weight, labels = sample(lane, 4, 8, 7)
    results = []
    for index in (-100, ignore):
        labels[1] = index
        results.append(
            gradients(lambda *t, i=index: function(*t, labels, ignore_index=i, **options), x, weight)
        )
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


# norm_linear -------------------------------------------------------------------------------------------

HALF_SCALES = [64.0, -64.0, 3e4, 1e6, 0.0, 1e-3, 1e-6, -1e-7]


@pytest.mark.parametrize("scale", HALF_SCALES)
@pytest.mark.parametrize("normalize_input", [True, False])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_norm_linear_in_float16_with_any_scale(lane, scale, normalize_input, as_tensor):
    """What float16 can hold it does hold, however large or small the scale."""
    size = 1.0 if normalize_input else 1000.0 / max(1.0, abs(scale) / 64)
    x = (lane.randn(5, 40) * size).half()
    weight = lane.randn(7, 40, seed=1)
    s = lane.tensor(scale) if as_tensor else scale

    def function(x, weight):
        return nf.functional.norm_linear(x, weight, s, normalize_input=normalize_input)

    def truth(x, weight):
        return nf.reference.norm_linear(x, weight, scale, normalize_input=normalize_input)

    leaves = [t.detach().clone().requires_grad_() for t in (x, weight)]
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    got, expected = function(*leaves), truth(*wide)
    upstream = (lane.randn(5, 7, seed=2) * 1e-2).half()
    slopes = torch.autograd.grad(got, leaves, upstream)
    true_slopes = torch.autograd.grad(expected, wide, upstream.double())
    assert got.dtype == torch.float16
    # Two 16-bit factors and the result, each rounded once: per entry of the sum, as a share of the largest.
    value, held = got.detach().double(), expected.detach().abs() <= 65504
    bound = 2**-10 * float(abs(scale) * (1 if normalize_input else x.double().norm(dim=1).max())) + 2**-24
    assert float((value - expected.detach())[held].abs().max()) <= bound
    assert value[~held].isinf().all()
    for slope, true_slope in zip(slopes, true_slopes, strict=True):
        smallest = 2**-24 if slope.dtype == torch.float16 else 1e-40
        fits = true_slope.abs() <= (65504 if slope.dtype == torch.float16 else math.inf)
        error = (slope.double() - true_slope)[fits].abs().max()
        assert float(error) <= 4e-3 * float(true_slope.abs().max()) + smallest


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float16, 1100.0), (torch.bfloat16, 2.0**124), (torch.float32, 2.0**124)]
)
def test_norm_linear_of_large_features_as_they_are(cuda_lane, dtype, size):  # noqa: F811
    """s x has no value in the type, s <x, w> has."""
    lane = cuda_lane
    x, weight = lane.tensor([[size, 1.0]], dtype), lane.tensor([[0.0, 1.0]], dtype)
    out = nf.functional.norm_linear(x, weight, 64.0, normalize_input=False)
    assert out.tolist() == [[64.0]]


# A margin on another device ----------------------------------------------------------------------------


def test_a_margin_elsewhere_is_refused(lane):
    margin = torch.ones((), device="meta")
    x, weight, labels = lane.randn(2, 3), lane.randn(3, 3), lane.tensor([0, 1])
    for call in (nf.functional.c_contrastive_loss, nf.functional.c_contrastive_stats):
        with pytest.raises(ValueError, match=rf"{call.__name__}: expected `neg_margin` on the device of `x`"):
            call(x, weight, labels, neg_margin=margin)
    with pytest.raises(ValueError, match=r"_loss: expected `neg_margin` on the device of `distances`"):
        nf.caffe.general_contrastive_loss(x, labels, neg_margin=margin)


def test_the_ops_refuse_what_is_no_number(lane):
    """The second line, for those who call past the functions."""
    ops, x, weight = library.namespace(), lane.randn(2, 4), lane.randn(3, 4)
    labels, cosine, row = lane.tensor([0, 1]), lane.tensor([0.5, 0.5], torch.float64), lane.randn(1)
    with pytest.raises(RuntimeError, match="hinge_threshold: expected `margin` to be a 0-d floating tensor"):
        ops.hinge_threshold(x, weight, labels, cosine, row, 0.0, False, -100, 1e-12, False)
    with pytest.raises(RuntimeError, match="norm_linear: expected `scale` to be a 0-d floating tensor"):
        ops.norm_linear(x, weight, row, 0.0, True, 1e-12)
    with pytest.raises(RuntimeError, match="head_shift: expected `scale` to be a floating tensor, 0-d or"):
        engine_ops.call("head_shift", engine_ops.arguments(x, weight, labels, scale=labels[0]))


# One decision about the shift --------------------------------------------------------------------------


def largest_fixed_scale(classes, double):
    """By bisection: the last scale of which `_C` says that one kappa serves."""
    low, high = 0.0, 1000.0
    while math.nextafter(low, math.inf) < high:
        middle = (low + high) / 2
        low, high = (middle, high) if native.has_fixed_shift(middle, classes, double) else (low, middle)
    return low


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_number_and_tensor_decide_alike_at_the_border(lane, dtype):
    x, weight, labels = sample(lane, 4, 8, 7, dtype)
    border = largest_fixed_scale(7, dtype == torch.float64)
    for scale in (border, math.nextafter(border, math.inf)):
        results = [
            gradients(lambda *t, s=s: nf.functional.normface_loss(*t, labels, s, reduction="none"), x, weight)
            for s in (scale, lane.tensor(torch.tensor(scale, dtype=torch.float64)))
        ]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2 if dtype == torch.bfloat16 else 2e-5, atol=1e-6)


# Long sums ---------------------------------------------------------------------------------------------


def test_a_class_that_owns_a_long_batch(cuda_lane, monkeypatch):  # noqa: F811
    """Equal rows: any drift of a running sum is systematic."""
    lane, rows = cuda_lane, 3000
    choose(monkeypatch, "plain", 2)
    x = lane.tensor([[0.3, 0.7, -0.2, 0.1]]).expand(rows, 4).contiguous()
    weight = lane.tensor([[1.0, 0.1, 0.2, 0.3], [-0.5, 0.4, 0.1, 0.2]])
    labels = lane.tensor([0]).expand(rows).contiguous()

    def function(x, weight):
        return nf.functional.normface_loss(x, weight, labels, 4.0, reduction="sum")

    wide = [t.double() for t in (x, weight)]
    truth = gradients(lambda *t: nf.reference.normface_loss(*t, labels, 4.0, reduction="sum"), *wide)[2]
    got = gradients(function, x, weight)[2]
    close(got[0], truth[0], 2e-6)


def test_an_agent_with_a_long_list(cuda_lane):  # noqa: F811
    lane, rows = cuda_lane, 1000
    x = lane.tensor([[0.3, 0.7, -0.2, 0.1]]).expand(rows, 4).contiguous()
    weight, labels = lane.tensor([[1.0, 0.1, 0.2, 0.3], [-0.5, 0.4, 0.1, 0.2]]), lane.tensor([0])
    labels = labels.expand(rows).contiguous()
    options = {"reduction": "sum", "margin": 3.0}
    wide = [t.double() for t in (x, weight)]
    truth = gradients(lambda *t: nf.reference.c_triplet_loss(*t, labels, **options), *wide)[2]
    got = gradients(
        lambda *t: nf.functional.c_triplet_loss(*t, labels, active_limit=1, **options), x, weight
    )[2]
    close(got, truth, 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("product", "classes"), [("sm80_single_sweep", 12_480), ("sm90_single_sweep", 52_000)]
)
def test_a_row_of_many_classes(cuda_lane, product, classes):  # noqa: F811
    """Equal terms, thousands to a block of the single sweep, so that any drift is systematic."""
    lane = cuda_lane
    x, weight = lane.randn(4, 8, dtype=torch.bfloat16), lane.randn(classes, 8, seed=1).abs()
    shift = lane.tensor(torch.tensor([0.4, 0.9, 1.3, -0.2], dtype=torch.float64))
    labels = lane.labels(4, classes)
    given = engine_ops.arguments(x, weight, labels, shift=shift)
    scale = {"scale_value": 0.0}  # E is exp(-shift), whatever the cosines are
    swept, _, _ = engine_ops.sweep({**given, **scale, "workspace": 1 << 30, "product": product})
    rows = swept.rows
    close(rows[0] / (classes - 1), (-shift).exp(), 1e-6)
    unit = torch.nn.functional.normalize(weight.double(), dim=1)
    e = (-shift).exp().bfloat16().double()[:, None]
    close(swept.x_sum, e * (unit.sum(0) - unit[labels]), 1e-4)
