"""KappaFace's margins from an epoch's features; LDAM's, and its weights from an epoch on; NormSoftmax."""

import functools
import math
import warnings

import pytest
import recipe_formulas as formulas
import recipe_jobs as jobs
import torch
from dense_head import assert_equal_to_1e10, problem
from ranks import ranks
from torch.utils.checkpoint import checkpoint

import normface_ext as nf

COUNTS = jobs.COUNTS
KappaFace = functools.partial(nf.recipes.KappaFace, COUNTS, 16)


def epoch(rows=60, seed=0):
    x, _, labels = problem(rows=rows, seed=seed)
    kept = labels != -100
    return x[kept], labels[kept]


def collected(x, labels, **given):
    margin = KappaFace(**given).double()
    margin.collect(x, labels)
    margin.update()
    return margin


def test_margins_are_those_of_the_paper_after_an_epoch():
    x, labels = epoch()
    margin = KappaFace(m=0.7, T=0.5, gamma=0.6).double()
    assert margin.margins.tolist() == [0.7] * 7
    for half in (slice(0, 25), slice(25, None)):
        margin.collect(3 * x[half], labels[half])
    margin.update()
    expected = formulas.kappa_margins(x, labels, COUNTS, 0.7, 0.5, 0.6)
    torch.testing.assert_close(
        margin.margins, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0
    )
    assert not margin.sums.any() and not margin.seen.any()
    # And the head has them.
    x, weight, labels = problem()
    loss = nf.functional.normface_loss(x, weight, labels, 64.0, margin=margin)
    kept = labels != -100
    truth = formulas.kappaface(x[kept], weight, labels[kept], margin.margins.tolist()).mean()
    torch.testing.assert_close(loss, truth, rtol=1e-12, atol=0)


def test_float32_sums_are_near():
    x, labels = epoch()
    margin = KappaFace()
    margin.collect(x.float(), labels)
    margin.update()
    torch.testing.assert_close(margin.margins, collected(x, labels).margins, rtol=1e-5, atol=0)


def test_a_class_without_features_keeps_its_margin():
    x, labels = epoch()
    margin = collected(x, labels)
    before = margin.margins.clone()
    x, labels = epoch(seed=1)
    margin.collect(x[labels != 2], labels[labels != 2])
    margin.update()
    assert margin.margins[2] == before[2] and (margin.margins != before).sum() == 6
    without = formulas.kappa_margins(
        x[labels != 2], torch.tensor([0, 1, 9, 2, 3, 4, 5])[labels[labels != 2]], COUNTS[:2] + COUNTS[3:]
    )
    torch.testing.assert_close(margin.margins[[0, 1, 3, 4, 5, 6]], torch.tensor(without, dtype=torch.float64))
    margin.update()  # of nothing
    assert (margin.margins != before).sum() == 6


def test_equal_features_have_the_largest_concentration_of_the_others():
    x, labels = epoch()
    x[labels == 3] = x[labels == 3][:1]
    single = (labels != 5) | (torch.arange(len(labels)) == (labels == 5).nonzero()[0])
    for wide in (True, False):
        margin = KappaFace(gamma=1.0)
        margin = margin.double() if wide else margin
        margin.collect((x if wide else x.float())[single], labels[single])
        margin.update()
        assert margin.margins.isfinite().all()
        # With gamma 1 a margin falls with kappa alone; the largest one's class has the least too.
        least = (margin.margins == margin.margins.min()).nonzero()[:, 0].tolist()
        assert len(least) == 3 and {3, 5} < set(least)


def test_classes_that_are_all_alike():
    for kept in ([0], [0, 1, 2]):  # one class, and three of an image each: no deviation
        margin = collected(torch.eye(16, dtype=torch.float64)[kept], torch.tensor(kept))
        rare = torch.tensor([(math.cos(math.pi * n / (1.05 * 200)) + 1) / 2 for n in COUNTS])
        made = 0.8 * (0.7 * 0.5 + 0.3 * rare.double())
        torch.testing.assert_close(margin.margins[kept], made[kept], rtol=1e-6, atol=0)
        assert (margin.margins[3:] == 0.8).all()


def test_what_is_not_collected():
    x, labels = epoch()
    expected = collected(x[4:], labels[4:]).margins
    x[:2], labels[2:4] = math.nan, -100
    x[2] = math.inf
    margin = KappaFace().double()
    margin.collect(x, labels)
    margin.eval().collect(x, labels)
    margin.train().update()
    assert torch.equal(margin.margins, expected)


def test_a_pass_that_is_run_again_collects_nothing():
    x, labels = epoch()
    margin = KappaFace().double()

    def block(x):
        margin.collect(x, labels)
        return x.sum()

    checkpoint(block, x.requires_grad_(), use_reentrant=False).backward()
    assert margin.seen.sum() == len(labels)


def test_training_resumes_within_an_epoch():
    def head():
        return nf.NormFaceLoss(16, 7, scale=16.0, margin=KappaFace(), dtype=torch.float64).double()

    x, labels = epoch()
    whole, resumed = head(), head()
    whole.margin.collect(x[:30], labels[:30])
    whole.margin.update()
    whole.margin.collect(x[:30], labels[:30])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.load_state_dict(whole.state_dict())
    for each in (whole, resumed):
        each.margin.collect(x[30:], labels[30:])
        each.margin.update()
    assert torch.equal(whole.margin.margins, resumed.margin.margins)
    assert torch.equal(whole(x, labels), resumed(x, labels))
    assert whole.half().margin.margins.dtype == torch.float64


def test_ranks_have_one_set_of_margins():
    x, _, labels = problem(rows=60)
    together = ranks(3).run(jobs.margins, "global")
    alone = collected(x, labels).margins
    for found in together:
        torch.testing.assert_close(found, alone, rtol=1e-12, atol=0)
        assert torch.equal(found, together[0])
    none, first, second = ranks(3).run(jobs.margins, "local")
    assert (none == 0.8).all() and not torch.equal(first, second)


def test_a_class_parallel_head_has_each_label_s_margin():
    x, weight, labels = problem()
    kept = labels != -100
    weight.requires_grad_()
    margins = torch.linspace(0.1, 0.7, 7).tolist()
    loss = formulas.kappaface(x[kept], weight, labels[kept], margins, scale=16.0).mean()
    loss.backward()
    for found in ranks(3).run(jobs.step):
        assert_equal_to_1e10(found, [loss.detach(), weight.grad])


def test_another_number_of_classes_is_refused():
    x, weight, labels = problem()
    with pytest.raises(IndexError, match=r"^KappaFace: expected `labels` in \[0, 2\), got"):
        nf.functional.normface_loss(x, weight, labels, 64.0, margin=nf.recipes.KappaFace([1, 2], 16))
    with pytest.raises(IndexError, match=r"^KappaFace: expected `labels` in \[0, 7\) or ignore_index"):
        KappaFace().collect(x, labels + 5)
    with pytest.raises(ValueError, match=r"^KappaFace: expected `features` to be \[N, 16\], got"):
        KappaFace().collect(x[:, :3], labels)


def test_features_without_values():
    head = nf.NormFaceLoss(4, 2, margin=nf.recipes.KappaFace([1, 2], 4), device="meta")
    loss = head(torch.empty(3, 4, device="meta"), torch.empty(3, dtype=torch.int64, device="meta"))
    assert loss.is_meta and loss.shape == () and head.margin.margins.tolist() == [0.8, 0.8]


def test_ldam_weighs_the_classes_from_an_epoch_on():
    x, weight, labels = problem()
    head = nf.recipes.LDAM(16, 7, COUNTS, reweight_from=3, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(weight)
    kept = labels != -100
    losses = formulas.ldam(x[kept], weight, labels[kept], COUNTS)
    u = torch.tensor(formulas.effective_number_weights(COUNTS), dtype=torch.float64)[labels[kept]]
    expected = {
        0: losses.mean(),
        2: losses.mean(),
        3: (u * losses).sum() / u.sum(),
        4: (u * losses).sum() / u.sum(),
    }
    for number in (0, 3, 2, 4):
        head.set_epoch(number)
        torch.testing.assert_close(head(x, labels), expected[number], rtol=1e-10, atol=0)
    twin = nf.recipes.LDAM(16, 7, COUNTS, reweight_from=3, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twin.load_state_dict(head.state_dict())
    twin.set_epoch(4)
    assert torch.equal(twin(x, labels), head(x, labels))


def test_weights_by_effective_numbers():
    weights = nf.recipes.drw_weights
    assert weights(COUNTS).tolist() == pytest.approx(formulas.effective_number_weights(COUNTS), rel=1e-9)
    assert weights(COUNTS, 0.0).tolist() == [1.0] * 7
    inverse = torch.tensor([1 / n for n in COUNTS], dtype=torch.float64)
    torch.testing.assert_close(weights(COUNTS, 1.0), inverse / inverse.mean())
    torch.testing.assert_close(weights(COUNTS, 1 - 1e-9), inverse / inverse.mean(), rtol=1e-6, atol=0)


def test_norm_softmax_is_the_head_at_one_over_the_temperature():
    head = nf.recipes.NormSoftmax(16, 7, temperature=0.1, learn_scale=True, reduction="none")
    assert isinstance(head, nf.NormFaceLoss) and head.scale_value() == 10
    assert head.learn_scale and head.reduction == "none"


def ldam(**given):
    return nf.recipes.LDAM(4, 2, [1, 2], **given)


BAD = [
    (lambda: KappaFace(m=4), ValueError, r"KappaFace: expected `m` in \[0, 3.14159\), got 4"),
    (lambda: KappaFace(gamma=1.5), ValueError, r"KappaFace: expected `gamma` in \[0, 1\], got 1.5"),
    (lambda: KappaFace(T=-1), ValueError, r"KappaFace: expected `T` to be finite and >= 0"),
    (lambda: KappaFace(sync="all"), ValueError, r"KappaFace: expected `sync` to be one of local, global"),
    (lambda: nf.recipes.KappaFace([1, 0], 4), ValueError, r"KappaFace: expected `counts` to be finite"),
    (lambda: KappaFace(device="nowhere"), ValueError, r"KappaFace: expected `device` to be a device, got"),
    (lambda: nf.recipes.LDAM(4, 3, [1, 2]), ValueError, r"LDAM: expected `counts` to have shape \[3\]"),
    (lambda: ldam(beta=2), ValueError, r"drw_weights: expected `beta` in \[0, 1\], got 2"),
    (lambda: ldam(reweight_from=-1), ValueError, r"LDAM: expected `reweight_from` >= 0"),
    (lambda: ldam().set_epoch(-1), ValueError, r"LDAM: expected `epoch` >= 0"),
    (lambda: ldam().set_epoch(1.0), TypeError, r"LDAM: expected `epoch` to be an int"),
    (lambda: nf.recipes.NormSoftmax(4, 2, temperature=0), ValueError, r"NormSoftmax: expected `temp"),
]


@pytest.mark.parametrize("make, error, sentence", BAD)
def test_bad_arguments(make, error, sentence):
    with pytest.raises(error, match=f"^{sentence}"):
        make()
