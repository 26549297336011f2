"""The paper's numbers: bounds, scales and the ceiling of the target probability."""

import math

import pytest
import torch

import normface_ext as nf
from normface_ext import theory


def test_casia_bound_of_the_paper():
    assert theory.loss_lower_bound(10575, 1.0) == pytest.approx(8.27, abs=5e-3)
    assert theory.loss_lower_bound(10575) == pytest.approx(8.2663, abs=5e-5)


@pytest.mark.parametrize(
    ("classes", "scale", "bound"),
    [
        (10, 1, 1.377),
        (1_000, 1, 5.909),
        (10_575, 1, 8.266),
        (360_232, 1, 11.795),
        (1_000_000, 1, 12.816),
        (10_000_000, 1, 15.118),
        (100_000_000, 1, 17.421),
        (10_575, 10, 0.3918),
        (10_575, 16, 0.0012),
        (10_575, 20, 2.2e-5),
    ],
)
def test_bounds_of_the_tables(classes, scale, bound):
    digits = 0.6 * 10.0 ** math.floor(math.log10(bound) - (1 if bound < 0.01 else 3))
    assert theory.loss_lower_bound(classes, scale) == pytest.approx(bound, abs=digits)


@pytest.mark.parametrize(
    ("classes", "scales"),
    [
        (10, (4.00, 6.12, 8.19)),
        (1_000, (9.15, 11.50, 13.80)),
        (10_575, (11.52, 13.87, 16.17)),
        (360_232, (15.05, 17.39, 19.70)),
        (1_000_000, (16.07, 18.42, 20.72)),
        (10_000_000, (18.37, 20.72, 23.03)),
        (100_000_000, (20.67, 23.02, 25.33)),
    ],
)
def test_scales_of_the_table(classes, scales):
    for bound, scale in zip((0.1, 0.01, 0.001), scales, strict=True):
        assert theory.scale_for_bound(classes, bound) == pytest.approx(scale, abs=0.0051)


@pytest.mark.parametrize("classes", [2, 3, 10, 10_575, 10**9])
@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0, 30.0, 64.0])
def test_the_two_are_inverse(classes, scale):
    bound = theory.loss_lower_bound(classes, scale)
    assert theory.scale_for_bound(classes, bound) == pytest.approx(scale, rel=1e-9)


def test_the_bound_falls_with_the_scale_and_rises_with_the_classes():
    over_scale = [theory.loss_lower_bound(1000, s) for s in (0, 1, 2, 8, 30, 64, 700)]
    assert over_scale == sorted(over_scale, reverse=True) and over_scale[-1] > 0
    assert over_scale[0] == pytest.approx(math.log(1000))
    over_classes = [theory.loss_lower_bound(n, 4.0) for n in (1, 2, 10, 1000, 10**6)]
    assert over_classes == sorted(over_classes) and over_classes[0] == 0


def test_no_scale_is_needed_for_what_zero_already_gives():
    assert theory.scale_for_bound(10, math.log(10) + 1e-9) == 0
    assert theory.scale_for_bound(10, 1e6) == 0
    assert theory.scale_for_bound(1, 0.5) == 0


def test_a_simplex_reaches_the_bound():
    """n weights in a regular simplex, each class on its own weight: cosines 1 and -1/(n-1)."""
    n = 6
    simplex = torch.eye(n, dtype=torch.float64) - 1 / n
    loss = nf.reference.normface_loss(simplex, simplex, torch.arange(n), 5.0, eps=0.0)
    assert float(loss) == pytest.approx(theory.loss_lower_bound(n, 5.0), rel=1e-12)


def test_highest_probabilities_of_the_paper():
    assert theory.max_probability(10) == pytest.approx(0.45, abs=5e-3)
    assert theory.max_probability(1000) == pytest.approx(0.007, abs=5e-4)
    assert theory.max_probability(10) == pytest.approx(math.e / (math.e + 9 / math.e), rel=1e-14)
    assert theory.max_probability(1) == 1
    assert theory.max_probability(1000, 500.0) == 1  # exp(500) would still fit, exp(1000) not
    assert theory.max_probability(1000, 1e6) == 1


def test_auto_scale_is_the_scale_of_its_bound():
    for classes in (10, 10_575, 10**6):
        scale = theory.auto_scale(classes)
        assert theory.loss_lower_bound(classes, scale) == pytest.approx(theory.AUTO_SCALE_BOUND)
    assert theory.auto_scale(10_575) == pytest.approx(20.8, abs=0.1)
    assert theory.auto_scale(1) == 1


def largest_target(margin):
    """psi at the angle 0."""
    return math.cos(margin.m1 * 0.0 + margin.m2) - margin.m3


@pytest.mark.parametrize("classes", [1, 10, 10_575, 85_742, 10**6, 10**12])
@pytest.mark.parametrize(
    "margin",
    [nf.CosFace(0.35), nf.ArcFace(0.5), nf.CosFace(0.9), nf.ArcFace(1.5), nf.CombinedMargin(1.0, 0.3, 0.2)],
    ids=str,
)
def test_auto_scale_with_a_margin(classes, margin):
    """64 for every count of classes, as the recipes have it; more where the margin leaves so little of the
    largest cosine that the bound asks for more."""
    scale, most = theory.auto_scale(classes, margin), largest_target(margin)
    needed = theory.scale_for_bound(classes, theory.AUTO_SCALE_BOUND) / most
    assert scale == pytest.approx(max(64.0, needed))
    # What the bound says with psi(1) in the place of 1.
    assert theory.loss_lower_bound(classes, scale * most) <= theory.AUTO_SCALE_BOUND * 1.000001
    assert nf.NormFaceLoss(2, min(classes, 10_575), margin=margin).scale == theory.auto_scale(
        min(classes, 10_575), margin
    )


def test_auto_scale_of_margins_that_leave_nothing_or_have_no_numbers():
    for margin in (nf.CosFace(1.0), nf.CosFace(2.5), nf.ArcFace(1.6), nf.AdaFace()):
        assert theory.auto_scale(10**9, margin) == 64
    for margin in (nf.CosFace(0.0), nf.ArcFace(0.0), nf.CombinedMargin()):  # none at all
        assert theory.auto_scale(10_575, margin) == theory.auto_scale(10_575) < 64
    with pytest.raises(TypeError, match="expected `num_classes` to be an int"):
        theory.auto_scale(3.0, nf.ArcFace(0.5))


@pytest.mark.parametrize(
    ("function", "argument"),
    [
        (theory.loss_lower_bound, "scale"),
        (theory.max_probability, "scale"),
        (theory.scale_for_bound, "bound"),
    ],
)
def test_bad_arguments_are_named(function, argument):
    op = function.__name__
    for classes in (2.0, "2", True, None):
        with pytest.raises(TypeError, match=rf"^{op}: expected `num_classes` to be an int, got "):
            function(classes, 1.0)
    with pytest.raises(ValueError, match=rf"^{op}: expected `num_classes` >= 1, got 0$"):
        function(0, 1.0)
    for value in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"^{op}: expected `{argument}` to be .*, got {value}$"):
            function(10, value)
