"""sample_weight of the losses over agents: sum w_i l_i, and the mean divides by what the rows weigh."""

import itertools
import math

import pytest
import torch
from ranks import ranks
from weight_jobs import CASES, every_case, problem_of

import normface_ext as nf
from normface_ext import reference
from normface_ext.testing import assert_matches_reference

F = nf.functional
IGNORE = -100
LAYERS = {"c_contrastive_loss": nf.CContrastiveLoss, "c_triplet_loss": nf.CTripletLoss}
STATS = {"c_contrastive_loss": "c_contrastive_stats", "c_triplet_loss": "c_triplet_stats"}
OPTIONS = {
    "c_contrastive_loss": {
        "plain": {"neg_margin": 1.9},
        "hardest": {"neg_margin": 2.2, "hardest_only": True},
        "max positive": {"max_positive_only": True, "neg_margin": 1.7},
        "positive first": {"positive_first": True, "positive_upper_bound": 2.0, "neg_margin": 2.2},
        "normalized": {"normalize_negative": 0.3, "neg_margin": 2.1, "pos_weight": 0.5},
        "normalized exponential": {
            "normalize_negative": 0.1,
            "neg_margin": 2.1,
            "exp_negative_weight": True,
            "pos_weight": 0.1,
        },
    },
    "c_triplet_loss": {
        "plain": {"margin": 0.2},
        "hardest": {"hardest_only": True},
        "center": {"add_center_loss": True, "pos_weight": 0.3},
        "positive first": {"positive_first": True, "positive_upper_bound": 2.0, "add_center_loss": True},
    },
}


def every_option_without(*names):
    """Every (loss, options) that has none of these options."""
    cases = [
        pytest.param(loss, options, id=f"{loss}-{name}")
        for loss, table in OPTIONS.items()
        for name, options in table.items()
        if not set(names) & set(options)
    ]
    return pytest.mark.parametrize(("loss", "options"), cases)


every_option = every_option_without()
both = pytest.mark.parametrize("loss", OPTIONS)


def problem(lane, dtype=torch.float32, grad=True):
    """Seven rows near their agents; the third is ignored, the fifth weighs nothing."""
    weight = lane.randn(19, 8, dtype=dtype, seed=1, grad=grad)
    labels = lane.labels(7, 19)
    x = weight.detach()[labels].double() + lane.randn(7, 8, dtype=torch.float64)
    labels[2] = IGNORE
    factors = lane.tensor([1.0, 0.25, 9.0, 2.5, 0.0, 0.5, 1.75], torch.float64)
    return lane.tensor(x, dtype, grad=grad), weight, labels, factors.to(dtype)


@every_option
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("limit", [0, 18])
def test_equals_the_reference(lane, loss, options, reduction, limit):
    x, weight, labels, factors = problem(lane)
    given = {**options, "reduction": reduction, "sample_weight": factors}
    assert_matches_reference(
        lambda x, w: getattr(F, loss)(x, w, labels, active_limit=limit, **given),
        lambda x, w: getattr(reference, loss)(x, w, labels, **given),
        [x, weight],
        f"{loss} {options}",
        floor=32.0,
    )


@every_option_without("max_positive_only", "normalize_negative")
def test_by_the_rows_losses(lane, loss, options):
    """Independent of how either sums: where no row's loss depends on the others."""
    x, weight, labels, factors = problem(lane, torch.float64)
    rows = getattr(reference, loss)(x, weight, labels, reduction="none", **options)
    kept = labels != IGNORE
    expected = {
        "none": factors * rows,
        "sum": (factors * rows).sum(),
        "mean": (factors * rows).sum() / factors[kept].sum(),
    }
    for reduction, value in expected.items():
        got = getattr(F, loss)(x, weight, labels, sample_weight=factors, reduction=reduction, **options)
        torch.testing.assert_close(got, value)
        slopes = [torch.autograd.grad(v.sum(), (x, weight), retain_graph=True) for v in (got, value)]
        for a, b in zip(*slopes, strict=True):
            torch.testing.assert_close(a, b)


@every_option_without("max_positive_only")  # of two equal rows the first is the largest
def test_a_row_of_weight_2_is_two_rows(lane, loss, options):
    """In the mean, in the statistics, and in the mean that normalize_negative divides by."""
    x, weight, labels, _ = problem(lane, torch.float64, grad=False)
    twice = lane.tensor([0, 0, 1, 2, 3, 3, 3, 4, 5, 6], torch.int64)
    factors = torch.bincount(twice).to(x)
    for name in (loss, STATS[loss]):
        call = getattr(F, name)
        torch.testing.assert_close(
            call(x, weight, labels, sample_weight=factors, **options),
            call(x[twice], weight, labels[twice], **options),
        )


def test_the_largest_positive_is_found_before_the_weights(lane):
    x, weight, labels, factors = problem(lane, torch.float64, grad=False)
    options = {"max_positive_only": True, "neg_weight": 0.0, "reduction": "none"}
    rows = F.c_contrastive_loss(x, weight, labels, **options)
    largest = int(rows.argmax())
    factors[largest] = 0.125
    weighed = F.c_contrastive_loss(x, weight, labels, sample_weight=factors, **options)
    torch.testing.assert_close(weighed, 0.125 * rows)
    factors[largest] = 0.0  # a row that does not count is not the largest
    assert int(F.c_contrastive_loss(x, weight, labels, sample_weight=factors, **options).argmax()) != largest


@every_option
@pytest.mark.parametrize("limit", [0, 18])
def test_a_row_of_weight_0_is_an_ignored_one(lane, loss, options, limit):
    results = []
    for poison, ignored in itertools.product((0.0, math.nan, math.inf), (False, True)):
        x, weight, labels, factors = problem(lane)
        with torch.no_grad():
            x[[2, 4]] += poison
        if ignored:
            labels[4], factors[4] = IGNORE, math.nan
        given = {"sample_weight": factors, "active_limit": limit, **options}
        value = getattr(F, loss)(x, weight, labels, check_finite=True, **given)
        value.backward()
        stats = getattr(F, STATS[loss])(x, weight, labels, **given)
        assert (x.grad[[2, 4]] == 0).all()
        results.append([value.detach(), stats, x.grad, weight.grad])
    for other in results[1:]:
        for one, same in zip(results[0], other, strict=True):
            assert torch.equal(one, same)


@both
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_when_no_row_counts_the_mean_is_0(lane, loss, value):
    x, weight, labels, factors = problem(lane)
    if value:
        labels.fill_(IGNORE)
    factors.fill_(value)
    mean = getattr(F, loss)(x, weight, labels, sample_weight=factors)
    mean.backward()
    assert mean == 0 and (x.grad == 0).all() and (weight.grad == 0).all()
    assert (getattr(F, STATS[loss])(x, weight, labels, sample_weight=factors) == 0).all()


@both
def test_ones_change_nothing(lane, loss):
    x, weight, labels, factors = problem(lane)
    plain = getattr(F, loss)(x, weight, labels)
    torch.testing.assert_close(getattr(F, loss)(x, weight, labels, sample_weight=factors * 0 + 1), plain)


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_weights_of_other_dtypes(lane, loss, dtype):
    x, weight, labels, factors = problem(lane)
    expected = getattr(F, loss)(x, weight, labels, sample_weight=factors)
    assert torch.equal(getattr(F, loss)(x, weight, labels, sample_weight=factors.to(dtype)), expected)


@both
def test_layers_take_them(loss):
    x, labels = torch.randn(5, 6), torch.tensor([0, 8, IGNORE, 3, 1])
    factors = torch.tensor([1.0, 0.0, 9.0, 2.5, 0.5])
    layer = LAYERS[loss](6, 9)
    expected = getattr(F, loss)(x, layer.weight, labels, sample_weight=factors)
    assert torch.equal(layer(x, labels, factors), expected)
    assert torch.equal(layer(x, labels, sample_weight=factors), expected)
    stats = getattr(F, STATS[loss])(x, layer.weight, labels, sample_weight=factors)
    assert torch.equal(layer.stats(x, labels, sample_weight=factors), stats)


def test_the_running_mean_is_weighted():
    x, labels, factors = torch.randn(4, 6), torch.tensor([0, 8, 3, 1]), torch.tensor([1.0, 0.0, 2.5, 0.5])
    layer = nf.CContrastiveLoss(6, 9, add_intra_mae=True)
    spread = layer.stats(x, labels, factors)[0]
    layer(x, labels, factors)
    torch.testing.assert_close(layer.intra_mae, 0.01 * spread)


@both
def test_what_is_no_weight_is_refused(loss):
    """The sentences are the softmax head's."""
    x, w, y = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 4])
    for name in (loss, STATS[loss]):
        call = getattr(F, name)
        for wrong, kind, sentence in (
            ([1.0, 1.0, 1.0], TypeError, "to be a Tensor, got list"),
            (torch.ones(3, dtype=torch.int64), TypeError, "to be float64, float32, float16 or bfloat16"),
            (torch.ones(2), ValueError, r"to have shape \[3\], got \[2\]"),
            (torch.ones(3, 1), ValueError, r"to have shape \[3\], got \[3, 1\]"),
            (torch.ones(3, requires_grad=True), ValueError, "not to require a gradient"),
            (torch.ones(3, device="meta"), ValueError, r"on the device of `x` \(cpu\), got meta"),
        ):
            with pytest.raises(kind, match=f"^{name}: expected `sample_weight` {sentence}"):
                call(x, w, y, sample_weight=wrong)
        with pytest.raises(ValueError, match=f"^{name}: expected `sample_weight` to be finite, .* in row 1$"):
            call(x, w, y, sample_weight=torch.tensor([1.0, math.nan, 1.0]), check_finite=True)


@pytest.mark.parametrize("world", [2, 3])
def test_shards_equal_one_process(world):
    found_by = ranks(world).run(every_case)
    for key in found_by[0]:
        name, options = CASES[key]
        x, weight, labels, factors, upstream = problem_of()
        loss = getattr(F, name)(x, weight, labels, sample_weight=factors, **options)
        led = upstream if loss.dim() else torch.ones(())
        dx, dw = torch.autograd.grad(loss, (x, weight), led.to(loss))
        got = [[torch.from_numpy(part) for part in found[key]] for found in found_by]
        value = torch.cat([rank[0] for rank in got]) if loss.dim() else got[0][0]
        for rank in got:
            assert loss.dim() or torch.equal(rank[0], value)
        torch.testing.assert_close(value, loss.detach())
        torch.testing.assert_close(torch.cat([rank[1] for rank in got]), dx)
        torch.testing.assert_close(torch.cat([rank[2] for rank in got]), dw)
        assert dx.abs().max() > 0 and dw.abs().max() > 0
