"""functional.normface_loss in every lane: values and gradients against the float64 specification."""

import math
import subprocess
import sys

import pytest
import torch
from lanes import ODD_SIZES

import normface_ext as nf
from normface_ext import reference, testing
from normface_ext.reference import MARGINS
from normface_ext.softmax import ops
from normface_ext.testing import assert_close_to_truth, assert_matches_reference, value_and_gradients

IGNORE = -100
every_margin = pytest.mark.parametrize("margin", MARGINS.values(), ids=MARGINS)
every_reduction = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])


def held(labels, margin=None, reduction="mean", ignore_index=IGNORE, eps=1e-12):
    """The loss with the norms held constant: gradients before the radial part is taken out."""

    def function(x, weight, scale):
        before, reference.rows.norm_of = reference.rows.norm_of, lambda *given: before(*given).detach()
        try:
            return reference.normface_loss(
                x,
                weight,
                labels,
                scale,
                margin=margin,
                reduction=reduction,
                ignore_index=ignore_index,
                eps=eps,
            )
        finally:
            reference.rows.norm_of = before

    return function


def tensor_core_loss(operand):
    """Plain torch with its matrix product in 16 bits: what `autocast` makes of the head."""

    def function(x, weight, labels, scale, *, margin=None, reduction="mean", ignore_index=IGNORE, eps=1e-12):
        wide_x, wide_w = map(reference.rows.widened, (x, weight))
        x_hat = wide_x / reference.rows.norm_of(wide_x, 1, 2, eps)
        w_hat = wide_w / reference.rows.norm_of(wide_w, 1, 2, eps)
        cos = (x_hat.to(operand) @ w_hat.to(operand).t()).float()
        before, reference.softmax.cosine = reference.softmax.cosine, lambda *_: cos
        try:
            return reference.normface_loss(
                x, weight, labels, scale, margin=margin, reduction=reduction, ignore_index=ignore_index
            )
        finally:
            reference.softmax.cosine = before

    return function


def check(lane, x, weight, labels, scale, name="normface_loss", *, workspace=None, floor=8.0, **options):
    """scale is a float or a tensor; every tensor that requires a gradient is compared.

    A cosine is off by an epsilon at best, which the softmax multiplies by s, hence the floor. Below
    float's normal range exp gives 0, which the gradients multiply by s again.
    """
    s = max(1.0, abs(float(scale.detach() if isinstance(scale, torch.Tensor) else scale)))
    accumulator = torch.float64 if x.dtype == torch.float64 else torch.float32
    operand = min(x.dtype, weight.dtype, key=lambda dtype: dtype.itemsize)
    rounds = operand.itemsize == 2 and not lane.widens
    tensors = [x, weight] + ([scale] if isinstance(scale, torch.Tensor) else [])

    def judge(tensors, plain, factor, scalar_factor):
        assert_matches_reference(
            lambda x, w, s=scale: nf.functional.normface_loss(
                x, w, labels, s, workspace=workspace, **options
            ),
            lambda x, w, s=scale: reference.normface_loss(x, w, labels, s, **options),
            tensors,
            name,
            plain=lambda x, w, s=scale: plain(x, w, labels, s, **options),
            terms=lambda x, w, s=scale: held(labels, **options)(x, w, s),
            factor=factor,
            scalar_factor=scalar_factor,
            floor=floor + s,
            tiny=4 * s * torch.finfo(accumulator).smallest_normal,
        )

    if not rounds:
        judge(tensors, reference.normface_loss, 2.0, 2.0)
        return
    # Every rounding counts once in either, but not the same way: one sample can be three times worse.
    # The loss is as sharp as its operands; the gradients are made from E, bfloat16 for range.
    judge([t.detach() for t in tensors], tensor_core_loss(operand), 3.0, 8.0)
    judge(tensors, tensor_core_loss(torch.bfloat16), 3.0, 8.0)


def sample(lane, batch=6, dim=33, classes=41, dtype=torch.float32, weight_dtype=None, grad=True):
    x = lane.randn(batch, dim, dtype=dtype, grad=grad)
    weight = lane.randn(classes, dim, dtype=weight_dtype or dtype, seed=1, grad=grad)
    return x, weight, lane.labels(batch, classes)


# Options --------------------------------------------------------------------------------------------


@pytest.mark.covering(2)
@every_reduction
@every_margin
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 64.0, 200.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_options(lane, dtype, scale, margin, reduction):
    """s = 200 is past the window in which one shift serves every row: the exact fallback."""
    x, weight, labels = sample(lane, dtype=dtype)
    labels[3] = IGNORE
    learned = lane.tensor(scale, torch.float32, grad=True)
    check(lane, x, weight, labels, learned, margin=margin, reduction=reduction)
    if reduction == "none":
        check(lane, x, weight, labels, scale, margin=margin, reduction=reduction)


@every_margin
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("scale", [1.0, 30.0, 200.0])
def test_gradcheck(lane, scale, reduction, margin):
    x, weight, labels = sample(lane, 3, 4, 5, torch.float64)
    labels[2] = IGNORE
    learned = lane.tensor(scale, torch.float64, grad=True)

    def function(x, weight, scale):
        return nf.functional.normface_loss(
            x, weight, labels, scale, margin=margin, reduction=reduction, eps=0.01
        )

    assert torch.autograd.gradcheck(function, (x, weight, learned), fast_mode=lane.slow)


@pytest.mark.parametrize("scale", [0.0, -7.0, -150.0, 78.0, 90.0, 1000.0])
def test_any_finite_scale(lane, scale):
    x, weight, labels = sample(lane)
    check(lane, x, weight, labels, scale)
    check(lane, x, weight, labels, lane.tensor(scale, grad=True), reduction="none")


@pytest.mark.parametrize("scale_dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradient_of_the_scale_has_its_dtype(lane, scale_dtype):
    for dtype in (torch.float64, torch.float32):
        x, weight, labels = sample(lane, dtype=dtype)
        check(lane, x, weight, labels, lane.tensor(12.5, scale_dtype, grad=True))


@pytest.mark.parametrize("eps", [0.0, 1e-6, 1.0])
def test_eps_is_inside(lane, eps):
    x, weight, labels = sample(lane)
    check(lane, x, weight, labels, 20.0, eps=eps)


def test_without_margin_it_is_cross_entropy(lane):
    x, weight, labels = sample(lane)
    unit = torch.nn.functional.normalize
    expected = torch.nn.functional.cross_entropy(30 * unit(x.double()) @ unit(weight.double()).t(), labels)
    got = nf.functional.normface_loss(x, weight, labels, 30.0)
    assert_close_to_truth(got, expected, None, "loss", floor=32)


# Sizes and layouts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ODD_SIZES)
def test_odd_sizes(lane, size):
    small = 3 if lane.slow else 9
    for batch, dim, classes in ((size, 17, small), (small, size, 5), (small, 17, size), (2, 33, size)):
        x, weight, labels = sample(lane, batch, dim, classes)
        check(lane, x, weight, labels, 30.0, name=f"N={batch}, D={dim}, C={classes}")


@pytest.mark.parametrize("classes", [2, 3, 63, 64, 65, 127, 129, 1000, 1031])
def test_class_counts(lane, classes):
    x, weight, labels = sample(lane, 4, 20, classes)
    check(lane, x, weight, labels, lane.tensor(24.0, grad=True), margin=nf.ArcFace(0.3))


@every_reduction
def test_one_class_is_always_right(lane, reduction):
    x, weight, _ = sample(lane, 3, 5, 1)
    labels = lane.tensor([0, 0, 0])
    for scale in (1.0, 64.0, 200.0):
        learned = lane.tensor(scale, grad=True)
        loss = nf.functional.normface_loss(x, weight, labels, learned, reduction=reduction)
        loss.sum().backward()
        assert (loss == 0).all() and (x.grad == 0).all() and (weight.grad == 0).all() and learned.grad == 0


@every_reduction
def test_an_empty_batch(lane, reduction):
    x, weight = lane.randn(0, 6, grad=True), lane.randn(4, 6, grad=True)
    scale = lane.tensor(30.0, grad=True)
    labels = lane.tensor([], torch.int64)
    loss = nf.functional.normface_loss(x, weight, labels, scale, reduction=reduction)
    assert loss.shape == ((0,) if reduction == "none" else ())
    loss.sum().backward()
    assert loss.sum() == 0 and x.grad.shape == (0, 6)
    assert (weight.grad == 0).all() and scale.grad == 0


def test_features_without_elements_are_refused(lane):
    with pytest.raises(ValueError, match=r": expected `dim` >= 1, got 0$"):
        nf.functional.normface_loss(lane.randn(3, 0), lane.randn(2, 0), lane.tensor([0, 1, 1]), 8.0)


def test_strided_operands(lane):
    x, weight, _ = sample(lane, grad=False)
    labels = lane.labels(12, 41)[::2]
    wide = torch.zeros(weight.shape[0], 60, device=x.device)
    wide[:, 5:38] = weight
    strided = [x.t().contiguous().t(), wide[:, 5:38]]
    results = []
    for tensors in ([x, weight], strided):
        leaves = [t.detach().requires_grad_() for t in tensors]
        loss = nf.functional.normface_loss(*leaves, labels, 16.0, reduction="none")
        loss.backward(lane.randn(6, 2, seed=5)[:, 0])
        results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    for packed, apart in zip(*results, strict=True):
        assert torch.equal(packed, apart)


def test_labels_at_both_ends_and_many_rows_of_one_class(lane):
    x, weight, _ = sample(lane, 6, 20, 70)
    for labels in ([0] * 6, [69] * 6, [0, 69, 0, 69, 35, 35]):
        check(lane, x, weight, lane.tensor(labels), 30.0, margin=nf.CosFace(0.2))


# Dtypes ---------------------------------------------------------------------------------------------


@pytest.mark.covering(2)
@pytest.mark.parametrize("margin", [None, nf.ArcFace(0.5)], ids=["normface", "arcface"])
@pytest.mark.parametrize("scale", [8.0, 64.0])
@pytest.mark.parametrize("dim", [33, 40])  # tensor cores take multiples of 8
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
    ],
    ids=lambda dtypes: "-".join(str(dtype).removeprefix("torch.") for dtype in dtypes),
)
def test_16_bit(lane, dtypes, dim, scale, margin):
    x, weight, labels = sample(lane, dim=dim, dtype=dtypes[0], weight_dtype=dtypes[1])
    check(lane, x, weight, labels, scale, margin=margin)
    check(lane, x, weight, labels, lane.tensor(scale, grad=True), margin=margin, reduction="none")
    loss = nf.functional.normface_loss(x, weight, labels, scale, margin=margin)
    assert loss.dtype == torch.float32
    loss.backward()
    assert x.grad.dtype == dtypes[0] and weight.grad.dtype == dtypes[1]


@pytest.mark.covering(1)
@pytest.mark.parametrize("store", [True, False], ids=["stored", "recompute"])
@pytest.mark.parametrize(
    ("batch", "dim", "classes"), [(1, 8, 2), (3, 64, 127), (130, 16, 129), (5, 136, 260), (127, 24, 33)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_16_bit_sizes_around_a_tile(lane, dtype, batch, dim, classes, store):
    x, weight, labels = sample(lane, batch, dim, classes, dtype, torch.float32)
    workspace = None if store else least_workspace(lane, x, weight)
    if not store:  # a few chunks, of a width that is no multiple of anything
        per_class = least_workspace(lane, x[:1], weight) // 4
        workspace += min(37, classes // 2) * per_class
    scale = lane.tensor(30.0, grad=True)
    check(lane, x, weight, labels, scale, margin=nf.CosFace(0.2), reduction="sum", workspace=workspace)


def test_weight_gradient_of_a_large_16_bit_batch_is_summed_in_float32(lane):
    """A bfloat16 sum stops growing at 256 equal terms; losses elsewhere drifted so (field: dW in bf16)."""
    batch = 96 if lane.slow else 1024
    x = lane.randn(1, 8, dtype=torch.bfloat16).expand(batch, 8)
    weight = lane.randn(3, 8, dtype=torch.bfloat16, seed=1, grad=True)
    labels = lane.tensor([1] * batch)
    nf.functional.normface_loss(x, weight, labels, 2.0, reduction="sum").backward()
    leaf = weight.detach().double().requires_grad_()
    reference.normface_loss(x.double(), leaf, labels, 2.0, reduction="sum").backward()
    assert_close_to_truth(weight.grad, leaf.grad, None, "dW", floor=3)


# Which gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", [True, False], ids=["stored", "recompute"])
@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True), (False, False)])
def test_only_wanted_gradients(lane, wanted, store):
    x, weight, labels = sample(lane, grad=False)
    x.requires_grad_(wanted[0])
    weight.requires_grad_(wanted[1])
    workspace = None if store else least_workspace(lane, x, weight)
    for scale in (30.0, lane.tensor(30.0), lane.tensor(30.0, grad=True)):
        check(lane, x, weight, labels, scale, workspace=workspace)
        loss = nf.functional.normface_loss(x, weight, labels, scale)
        learned = isinstance(scale, torch.Tensor) and scale.requires_grad
        assert loss.requires_grad == (any(wanted) or learned)


@every_reduction
def test_upstream_gradients_reach_every_row(lane, reduction):
    """Non-uniform and negative ones; a gradient made in forward would miss them (Liger 488, 968)."""
    x, weight, labels = sample(lane)
    loss = nf.functional.normface_loss(x, weight, labels, 30.0, reduction=reduction)
    (g,) = testing.random_like([loss])
    for upstream in (g, torch.zeros_like(g), -3 * torch.ones_like(g), g[:1].expand_as(g) if g.dim() else g):
        (_, (dx, dw)) = value_and_gradients(
            lambda x, w: nf.functional.normface_loss(x, w, labels, 30.0, reduction=reduction),
            [x, weight],
            [upstream],
        )
        _, truth = value_and_gradients(
            lambda x, w: reference.normface_loss(x, w, labels, 30.0, reduction=reduction),
            [x, weight],
            [upstream],
            dtype=torch.float64,
        )
        assert_close_to_truth(dx, truth[0], None, "dx", floor=200)
        assert_close_to_truth(dw, truth[1], None, "dw", floor=200, dim=None)


def test_rows_can_be_weighted_through_reduction_none(lane):
    x, weight, labels = sample(lane)
    weights = lane.tensor([0.0, 1.0, -2.0, 0.5, 1e3, 1e-3])

    def weighted(loss):
        return lambda x, w: (loss(x, w, labels, 16.0, reduction="none") * weights.to(x.dtype)).sum()

    assert_matches_reference(
        weighted(nf.functional.normface_loss),
        weighted(reference.normface_loss),
        [x, weight],
        "weighted",
        dim=None,
    )


def test_backward_can_run_twice(lane):
    x, weight, labels = sample(lane)
    loss = nf.functional.normface_loss(x, weight, labels, 30.0)
    loss.backward(retain_graph=True)
    first = x.grad.clone(), weight.grad.clone()
    x.grad = weight.grad = None
    loss.backward()
    assert torch.equal(x.grad, first[0]) and torch.equal(weight.grad, first[1])


# Ignored rows ---------------------------------------------------------------------------------------


@every_reduction
def test_ignored_rows(lane, reduction):
    x, weight, labels = sample(lane, 8)
    labels[1] = labels[4] = labels[7] = IGNORE
    check(lane, x, weight, labels, 30.0, reduction=reduction, margin=nf.CosFace(0.3))
    loss = nf.functional.normface_loss(x, weight, labels, 30.0, reduction=reduction)
    kept = labels != IGNORE
    shorter = nf.functional.normface_loss(x[kept], weight, labels[kept], 30.0, reduction=reduction)
    assert torch.allclose(loss[kept] if reduction == "none" else loss, shorter, rtol=1e-6)
    loss.sum().backward()
    assert (x.grad[~kept] == 0).all() and (x.grad[kept] != 0).any()


def test_another_ignore_index(lane):
    """-1, and even a label that is a class."""
    x, weight, labels = sample(lane)
    labels[2] = -1
    check(lane, x, weight, labels, 16.0, ignore_index=-1, reduction="none")
    labels[2] = 7
    check(lane, x, weight, labels, 16.0, ignore_index=7)


@pytest.mark.parametrize("store", [True, False], ids=["stored", "recompute"])
@pytest.mark.parametrize("scale", [30.0, 200.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_an_ignored_row_holds_reaches_nothing(lane, bad, scale, store):
    x, weight, labels = sample(lane)
    labels[2] = IGNORE
    workspace = None if store else least_workspace(lane, x, weight)

    def run(x):
        leaves = [t.detach().clone().requires_grad_() for t in (x, weight, lane.tensor(scale))]
        loss = nf.functional.normface_loss(*leaves[:2], labels, leaves[2], workspace=workspace)
        loss.backward()
        return [loss.detach(), *(leaf.grad for leaf in leaves)]

    poisoned = x.detach().clone()
    poisoned[2] = bad
    for got, clean in zip(run(poisoned), run(x), strict=True):
        assert torch.equal(got, clean)


@every_reduction
@pytest.mark.parametrize("scale", [30.0, 200.0])
def test_all_ignored_is_zero_not_nan(lane, scale, reduction):
    x, weight, labels = sample(lane)
    learned = lane.tensor(scale, grad=True)
    labels.fill_(IGNORE)
    loss = nf.functional.normface_loss(x, weight, labels, learned, reduction=reduction)
    loss.sum().backward()
    assert (loss == 0).all()
    assert (x.grad == 0).all() and (weight.grad == 0).all() and learned.grad == 0


def test_nan_in_a_row_shows_in_its_loss_and_in_no_other(lane):
    x, weight, labels = sample(lane)
    for scale in (30.0, 200.0):
        clean = nf.functional.normface_loss(x, weight, labels, scale, reduction="none")
        poisoned = x.detach().clone()
        poisoned[2, 5] = math.nan
        losses = nf.functional.normface_loss(poisoned, weight, labels, scale, reduction="none")
        assert losses.isnan().tolist() == [False, False, True, False, False, False]
        kept = torch.arange(6, device=x.device) != 2
        assert torch.equal(losses[kept], clean[kept])
        assert nf.functional.normface_loss(poisoned, weight, labels, scale).isnan()


def test_nan_in_the_weight_shows_in_every_loss(lane):
    x, weight, labels = sample(lane, grad=False)
    weight[20, 0] = math.nan
    for scale in (30.0, 200.0):
        assert nf.functional.normface_loss(x, weight, labels, scale, reduction="none").isnan().all()


# Hard values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 30.0, 64.0, 67.0, 78.0, 86.0, 200.0])
@pytest.mark.parametrize("classes", [2, 5, 70])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_all_cosines_equal(lane, sign, classes, scale):
    """Collapsed features, all cosines at -1 (or 1): the loss is log C, nothing underflows or overflows."""
    weight = (
        lane.randn(1, 9).expand(classes, 9) * torch.linspace(0.5, 2, classes, device=lane.device)[:, None]
    )
    x = (sign * weight[:1] * 3).expand(2, 9)
    labels = lane.tensor([0, classes - 1])
    learned = lane.tensor(scale, grad=True)
    x, weight = lane.tensor(x, grad=True), lane.tensor(weight, grad=True)
    loss = nf.functional.normface_loss(x, weight, labels, learned)
    # A cosine is off by an epsilon or two, which s multiplies.
    assert float(loss.detach()) == pytest.approx(math.log(classes), abs=1e-6 + 3e-7 * scale)
    loss.backward()
    for gradient in (x.grad, weight.grad, learned.grad):
        assert torch.isfinite(gradient).all()
    # Every class pulls along x itself, so the tangent gradients vanish.
    assert x.grad.abs().max() <= 1e-5 * scale and weight.grad.abs().max() <= 1e-5 * scale


@pytest.mark.parametrize("scale", [60.0, 67.0, 72.0, 78.0, 86.0])
def test_low_cosines_keep_their_digits(lane, scale):
    """E = exp(s c - kappa) near the end of float32's range: neither flushed nor rounded away."""
    direction = lane.randn(1, 24)
    x = lane.tensor(-direction + 0.05 * lane.randn(3, 24, seed=2), grad=True)
    for classes in (2, 3, 40):
        weight = lane.tensor(direction + 0.05 * lane.randn(classes, 24, seed=3), grad=True)
        labels = lane.labels(3, classes)
        check(lane, x, weight, labels, lane.tensor(scale), name=f"C={classes}")
        assert_scale_gradient_is_as_good_as_the_cosines(lane, x, weight, labels, scale)


def assert_scale_gradient_is_as_good_as_the_cosines(lane, x, weight, labels, scale):
    """ds_i = q_i (A_i / S_i - c_iy), q = 1 - p_y: a difference of two cosines near -1, thousands of times
    their size apart from 0. Plain torch's own ds is no standard: one number, off by 1e-6 as a rule and by
    4e-9 when it is lucky. Its cosines on this lane are one: each of the two may be as wrong as the worst of
    them, and A / S is rounded once more.
    """
    learned = lane.tensor(scale, grad=True)
    nf.functional.normface_loss(x, weight, labels, learned).backward()
    wide = [t.detach().double() for t in (x, weight)]
    cosines = reference.cosine(*wide)
    own = torch.nn.functional.one_hot(labels, len(weight)).bool()
    others = torch.softmax((scale * cosines).masked_fill(own, -math.inf), 1)
    q = 1 - torch.softmax(scale * cosines, 1)[own]
    truth = (q * ((others * cosines).sum(1) - cosines[own])).mean()
    plain = (reference.cosine(x.detach(), weight.detach()).double() - cosines).abs().max()
    allowed = q.mean() * (2 * plain + torch.finfo(torch.float32).eps * cosines.abs().max())
    error = (learned.grad.double() - truth).abs()
    assert error <= allowed, f"ds {float(truth):.3g}: error {float(error):.3g}, allowed {float(allowed):.3g}"


@every_margin
@pytest.mark.parametrize("scale", [1.0, 64.0, 200.0])
def test_target_cosines_of_one_and_minus_one(lane, scale, margin):
    x = lane.rows(6, 24, kinds=("plain", "twin", "opposite"), grad=True)
    weight = lane.tensor(torch.cat([x.detach()[:1], lane.randn(4, 24, seed=3)]), grad=True)
    labels = lane.tensor([0, 0, 0, 1, 2, 3])
    loss = nf.functional.normface_loss(x, weight, labels, scale, margin=margin, reduction="none")
    assert torch.isfinite(loss).all() and (loss >= 0).all()
    loss.sum().backward()
    assert torch.isfinite(x.grad).all() and torch.isfinite(weight.grad).all()
    truth = reference.normface_loss(
        x.double(), weight.double(), labels, scale, margin=margin, reduction="none"
    )
    # sin(theta) is steep at the ends: an error of 1e-7 in the cosine is one of 1e-4 in theta.
    slack = 1e-5 if margin is None or (margin.m1 == 1 and margin.m2 == 0) else 1e-3
    assert torch.allclose(loss.double(), truth, rtol=slack, atol=slack * scale)


@every_margin
def test_well_classified_rows_keep_their_digits(lane, margin):
    """Losses of 1e-8 and less, where plain torch's logsumexp - z returns 0 or rounding."""
    classes, scale = 32, 64.0
    eye = torch.eye(classes, classes + 1, dtype=torch.float64)
    targets = torch.linspace(0.31, 0.95, classes, dtype=torch.float64)
    rows = eye * targets[:, None]
    rows[:, -1] = (1 - targets.square()).sqrt()
    x, weight = lane.tensor(rows[::4], torch.float32, grad=True), lane.tensor(eye, torch.float32, grad=True)
    labels = lane.tensor(torch.arange(classes)[::4])
    learned = lane.tensor(scale, grad=True)
    options = {"margin": margin, "reduction": "none"}
    wide = [t.detach().double().requires_grad_() for t in (x, weight, learned)]
    cos = reference.cosine(wide[0], wide[1])
    psi = reference.margin(cos.gather(1, labels[:, None]), margin or nf.CombinedMargin())
    others = labels[:, None] != torch.arange(classes, device=cos.device)
    truth = torch.log1p((torch.exp(wide[2] * (cos - psi)) * others).sum(1))
    loss = nf.functional.normface_loss(x, weight, labels, learned, **options)
    assert (loss > 0).all()
    assert ((loss.double() - truth).abs() <= 2e-5 * truth).all()
    if margin is None:
        plain = reference.normface_loss(x, weight, labels, scale, reduction="none")
        assert (truth < 1e-7).any() and (plain[truth < 1e-9] == 0).all(), "too easy a sample"
    for i in range(len(labels)):
        got = torch.autograd.grad(loss[i], (x, learned), retain_graph=True)
        expected = torch.autograd.grad(truth[i], (wide[0], wide[2]), retain_graph=True)
        size = expected[0][i].abs().max()
        assert ((got[0][i].double() - expected[0][i]).abs() <= 5e-5 * size).all() and size > 0
        assert float(got[1]) == pytest.approx(float(expected[1]), rel=5e-5, abs=0)


def test_rows_of_any_magnitude(lane):
    x = lane.rows(8, 40, kinds=("plain", "huge", "zero", "tiny"), grad=True)
    weight = lane.rows(9, 40, kinds=("huge", "ones", "plain", "zero"), seed=1, grad=True)
    labels = lane.labels(8, 9)
    for scale in (30.0, 200.0):
        loss = nf.functional.normface_loss(x, weight, labels, scale, reduction="none")
        truth = reference.normface_loss(x.double(), weight.double(), labels, scale, reduction="none")
        assert_close_to_truth(loss, truth, None, "loss", floor=16)
        dx, dw = torch.autograd.grad(loss.sum(), (x, weight))
        assert torch.isfinite(dx).all() and torch.isfinite(dw).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_zero_rows_have_finite_gradients(lane, dtype):
    """One padded row or one dead class must not poison the step, in float16 neither."""
    x = lane.rows(4, 9, dtype, kinds=("zero", "plain"), grad=True)
    weight = lane.rows(4, 9, dtype, kinds=("plain", "zero"), seed=1, grad=True)
    loss = nf.functional.normface_loss(x, weight, lane.tensor([0, 1, 2, 3]), 30.0)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(x.grad).all() and torch.isfinite(weight.grad).all()


# Accuracy and repeatability -------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 30.0, 64.0])
def test_never_less_accurate_than_eager_float32(lane, scale):
    """Over a real head on the CPU lane, a small one where threads are emulated."""
    batch, dim, classes = (8, 32, 200) if lane.slow else (64, 128, 10_000)
    weight = lane.randn(classes, dim, seed=1, grad=True)
    labels = lane.labels(batch, classes)
    x = lane.tensor(weight.detach()[labels] + 0.8 * lane.randn(batch, dim), grad=True)
    learned = lane.tensor(scale, grad=True)
    tensors = [x, weight, learned]

    def run(loss, dtype=None):
        function = lambda x, w, s: loss(x, w, labels, s)  # noqa: E731
        (value,), gradients = value_and_gradients(function, tensors, dtype=dtype)
        return [value, *gradients]

    truth = run(reference.normface_loss, torch.float64)
    ours, eager = run(nf.functional.normface_loss), run(reference.normface_loss)
    names = "loss", "dX", "dW", "ds"
    for name, got, plain, exact in zip(names, ours, eager, truth, strict=True):
        norm = exact.norm()
        error, eager_error = (float((t.double() - exact).norm() / norm) for t in (got, plain))
        hair = 4e-7  # a scalar can be right by luck
        assert error <= 1.1 * eager_error + hair, f"{name}: {error:.3g}, eager {eager_error:.3g}"


def least_workspace(lane, x, weight):
    """The smallest budget the plan accepts: one class per chunk, nothing stored."""
    operand = nf.engine.calls.product_dtype(x, weight)
    device = nf.engine.calls.plan_device(x)
    with pytest.raises(ValueError) as raised:
        nf.plan(x.shape[0], *reversed(weight.shape), operand, device, workspace=0)
    return int(str(raised.value).split("at least ")[1].split()[0])


@pytest.mark.parametrize("scale", [30.0, 200.0])
def test_every_budget_gives_the_same_numbers(lane, scale):
    x, weight, labels = sample(lane, 7, 20, 70)
    labels[2] = IGNORE
    learned = lane.tensor(scale, grad=True)
    least = least_workspace(lane, x, weight)
    stored = nf.plan(7, 20, 70, torch.float32, nf.engine.calls.plan_device(x), workspace=1 << 30)
    assert stored.store
    per_class = (stored.workspace_bytes - least) // 70 or 1
    budgets = [least, least + 3 * per_class, stored.workspace_bytes - 1, stored.workspace_bytes]
    plans = [
        nf.plan(7, 20, 70, torch.float32, nf.engine.calls.plan_device(x), workspace=budget)
        for budget in budgets
    ]
    assert [plan.store for plan in plans] == [False, False, False, True]
    assert plans[0].chunks == 70 and plans[1].chunks > 1
    for budget in budgets:
        check(
            lane, x, weight, labels, learned, f"workspace {budget}", workspace=budget, margin=nf.CosFace(0.1)
        )


@pytest.mark.parametrize("store", [True, False], ids=["stored", "recompute"])
@pytest.mark.parametrize("scale", [30.0, 200.0])
def test_runs_are_bit_identical(lane, scale, store):
    x, weight, labels = sample(lane, 9, 40, 300 if lane.slow else 3000)
    learned = lane.tensor(scale, grad=True)
    workspace = None if store else least_workspace(lane, x, weight) + 40_000
    runs = [
        value_and_gradients(
            lambda x, w, s: nf.functional.normface_loss(x, w, labels, s, workspace=workspace),
            [x, weight, learned],
        )
        for _ in range(3)
    ]
    for other in runs[1:]:
        for one, same in zip(runs[0][0] + runs[0][1], other[0] + other[1], strict=True):
            assert torch.equal(one, same)


def test_inputs_are_not_modified(lane):
    x, weight, labels = sample(lane)
    labels[1] = IGNORE
    scale, g = lane.tensor(30.0, grad=True), lane.randn(6, seed=4)
    tensors = [x, weight, labels, scale, g]
    before = [t.detach().clone() for t in tensors]
    versions = [t._version for t in tensors]
    nf.functional.normface_loss(x, weight, labels, scale, reduction="none").backward(g)
    assert [t._version for t in tensors] == versions
    for now, then in zip(tensors, before, strict=True):
        assert torch.equal(now.detach(), then)


# Around it ------------------------------------------------------------------------------------------


@pytest.mark.covering(1)
@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_compiled_equals_eager(lane, compile_fully, reduction, learned):
    def step(x, weight, labels, scale):
        loss = nf.functional.normface_loss(
            x, weight, labels, scale, margin=nf.CosFace(0.2), reduction=reduction
        )
        return (loss * loss).sum()

    compiled = compile_fully(step)
    for batch in (6, 9):  # the second one makes the sizes dynamic
        runs = []
        for function in (step, compiled):
            x, weight, labels = sample(lane, batch)
            scale = lane.tensor(25.0, grad=True) if learned else 25.0
            loss = function(x, weight, labels, scale)
            loss.backward()
            runs.append([loss.detach(), x.grad, weight.grad, *([scale.grad] if learned else [])])
        for eager, got in zip(*runs, strict=True):
            assert torch.equal(got, eager)


def test_compiled_code_still_refuses_bad_labels(lane, compile_fully):
    """The check in Python is skipped while tracing; on the CPU the kernel's own is not."""
    if lane.device.type == "cuda" or lane.namespace == "normface_emulation":
        pytest.skip("CUDA kernels print the row and abort the process, see test_contract")
    compiled = compile_fully(lambda *given: nf.functional.normface_loss(*given, 8.0))
    x, weight, labels = sample(lane)
    compiled(x, weight, labels)
    labels[4] = 41
    with pytest.raises(RuntimeError, match=r"expected `labels` in \[0, 41\) .*got 41 at row 4"):
        compiled(x, weight, labels)


def test_the_combined_loss_of_the_paper(lane):
    """softmax + 0.01 C-contrastive over the same agents: both gradients meet in x and W."""

    def combined(module):
        def function(x, weight):
            softmax = module.normface_loss(x, weight, labels, 20.0)
            distances = 2 - 2 * module.norm_linear(x, weight, 1.0)
            own = torch.zeros_like(distances, dtype=torch.bool).scatter(1, labels[:, None], True)
            pulled, pushed = distances[own].sum(), (1.0 - distances[~own]).clamp_min(0).sum()
            return softmax + 0.01 * (pulled + pushed) / len(labels)

        return function

    x, weight, labels = sample(lane, 6, 12, 20)
    assert_matches_reference(combined(nf.functional), combined(reference), [x, weight], "combined", dim=None)


@pytest.mark.covering(1)
@pytest.mark.parametrize("store", [True, False], ids=["stored", "recompute"])
@pytest.mark.parametrize("shape", [(64, 32, 3000), (400, 48, 200), (2000, 16, 7)], ids=str)
def test_plans_keep_their_word(lane, shape, store):
    """What is allocated beyond inputs and gradients is what the plan said, at any budget."""
    if lane.device.type == "cuda":
        pytest.skip("test_gpu.py measures the card's memory")
    batch, dim, classes = (size // (10 if lane.slow else 1) or 2 for size in shape)
    x, weight, labels = sample(lane, batch, dim, classes)
    least, device = least_workspace(lane, x, weight), nf.engine.calls.plan_device(x)
    stored = nf.plan(batch, dim, classes, x.dtype, device, workspace=1 << 40).workspace_bytes
    budgets = [stored] if store else [least, (least + stored) // 2, stored - 1]
    for budget in budgets:
        plan = nf.plan(batch, dim, classes, x.dtype, device, workspace=budget)

        def step(budget=budget):
            nf.functional.normface_loss(x, weight, labels, 30.0, workspace=budget).backward()
            x.grad = weight.grad = None

        step()
        gradients = (x.numel() + weight.numel()) * x.element_size()
        used = testing.peak_bytes(step) - gradients
        assert used <= plan.workspace_bytes + 4096, f"{plan}: {used} bytes"
        if store:
            assert used >= batch * classes * 4  # the meter can say no


MEMORY = """
import sys, torch, normface_ext as nf
def peak():  # unlike ru_maxrss not inherited from the parent
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
workspace = int(sys.argv[1]) or None
N, D, C = 256, 32, 200_000
torch.manual_seed(0)
x, w = torch.randn(N, D, requires_grad=True), torch.randn(C, D, requires_grad=True)
labels = torch.randint(C, (N,))
def step(x, w, labels, workspace):
    nf.functional.normface_loss(x, w, labels, 30.0, workspace=workspace).backward()
step(x.detach()[:64].requires_grad_(), w.detach()[:5000].requires_grad_(), labels[:64] % 5000, None)
before = peak()
step(x, w, labels, workspace)
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_stays_within_the_budget():
    """N x C would be 205 MB and is what the default budget allows; 16 MiB must mean 16 MiB."""

    def growth(workspace):
        command = [sys.executable, "-c", MEMORY, str(workspace)]
        ran = subprocess.run(command, capture_output=True, text=True, cwd="/", check=True)
        return int(ran.stdout)

    grad_weight, scores, budget = 200_000 * 32 * 4, 256 * 200_000 * 4, 16 << 20
    slack = 24 << 20  # the allocator's, and the matrix products' own packing
    assert growth(budget) <= grad_weight + budget + slack
    assert growth(0) >= scores  # the meter can say no


def test_without_autograd_nothing_is_kept_for_a_backward(monkeypatch):
    """A parameter needs a gradient under no_grad, too, as far as an autograd Function is told."""
    parts, real = [], ops.softmax_loss

    def watched(*arguments):
        made = real(*arguments)
        parts.append(made[2])
        return made

    monkeypatch.setattr(ops, "softmax_loss", watched)
    head, x, labels = nf.NormFaceLoss(6, 20), torch.randn(3, 6, requires_grad=True), torch.arange(3)
    with torch.no_grad():
        quiet = head(x, labels)
    assert torch.equal(quiet, head(x, labels))
    assert parts == [(False, False, False, False), (True, True, False, False)]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype, scale", [(torch.float32, 1e9), (torch.bfloat16, 1e9), (torch.float64, 1e17)])
def test_the_largest_scale(lane, dtype, scale, sign):
    """No row loses its largest term, which would be a loss of 0, nor has one beyond every number."""
    x, weight, labels = lane.randn(40, 16, dtype=dtype), lane.randn(31, 16, dtype=dtype), lane.labels(40, 31)
    weight.requires_grad_()
    options = {"reduction": "none", "eps": 1e-6}
    losses = nf.functional.normface_loss(x, weight, labels, sign * scale, **options)
    losses.sum().backward()
    exact = nf.reference.normface_loss(x.double(), weight.double(), labels, sign * scale, **options)
    rounding = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(losses.double(), exact, rtol=rounding, atol=rounding * scale)
    assert weight.grad.isfinite().all()
