"""Two labels per row, as mixup and cutmix make them: against the sum of two losses, the reference, and on
every lane; of one product and of two."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from lanes import DTYPES

import normface_ext as nf
from normface_ext import reference
from normface_ext.softmax import functions

ROWS, DIM, CLASSES = 12, 16, 9
WIDE = torch.float64

MARGINS = {
    "none": lambda: None,
    "CosFace": lambda: nf.CosFace(0.35),
    "ArcFace": lambda: nf.ArcFace(0.5),
    "CombinedMargin": lambda: nf.CombinedMargin(1.2, 0.3, 0.1),
    "per class": lambda: nf.CosFace(torch.linspace(0, 0.5, CLASSES, dtype=WIDE)),
    "per row": lambda: nf.RowMargin(m2=torch.linspace(0, 0.6, ROWS, dtype=WIDE)),
    "AdaFace": lambda: nf.AdaFace(t_alpha=0.5),
    "MagFace": lambda: nf.MagFace(l_a=1, u_a=9),
    "ElasticArcFace": lambda: nf.ElasticArcFace(),
    "ElasticCosFace+": lambda: nf.ElasticCosFace(plus=True),
    "CurricularFace": lambda: nf.CurricularFace(alpha=0.5),
    "MVSoftmax": lambda: nf.MVSoftmax(),
    "KappaFace": lambda: nf.recipes.KappaFace(torch.arange(1, CLASSES + 1), DIM),
}
#: Margins of numbers, which one product serves.
NUMBERS = [name for name in MARGINS if name not in ("ElasticCosFace+", "CurricularFace", "MVSoftmax")]


def on(lane, margin):
    """A margin with its tensors where the lane is."""
    if isinstance(margin, nf.CosFace) and isinstance(margin.m, torch.Tensor):
        return nf.CosFace(lane.tensor(margin.m))
    if isinstance(margin, nf.RowMargin):
        return nf.RowMargin(m2=lane.tensor(margin.m2))
    return margin.to(lane.device) if isinstance(margin, torch.nn.Module) else margin


@pytest.fixture(params=["one product", "two"])
def products(request, monkeypatch):
    """However small the weight is: by one product for both labels, or with every row twice."""
    monkeypatch.setattr(functions, "SMALL", 0 if request.param == "one product" else 1 << 62)
    return request.param


@pytest.fixture
def one_product(monkeypatch):
    monkeypatch.setattr(functions, "SMALL", 0)


def problem(lane, dtype=WIDE):
    """(x, weight, labels, labels_b, lam): equal labels, ignored ones, lam of 0 and 1, and rows that are
    their first label's, their second's, and the opposite."""
    weight = lane.randn(CLASSES, DIM, dtype=WIDE, seed=1)
    x, labels = lane.randn(ROWS, DIM, dtype=WIDE), lane.labels(ROWS, CLASSES)
    labels_b, lam = lane.labels(ROWS, CLASSES, seed=5).flip(0), torch.linspace(0.05, 0.95, ROWS, dtype=WIDE)
    labels_b[0] = labels[0]
    labels[1], labels_b[2], labels[3], labels_b[3] = -100, -100, -100, -100
    labels[6], labels_b[6], labels[7], labels_b[7], labels[8], labels_b[8] = 1, 2, 3, 4, 5, 6
    x[6], x[7], x[8] = 4 * weight[1], 3 * weight[4], -weight[5]
    lam[4], lam[5] = 1, 0
    made = x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    return *made, labels, labels_b, lane.tensor(lam, torch.float64 if dtype == WIDE else torch.float32)


def loss_and_gradients(loss, *leaves):
    up = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype, device=loss.device).reshape(loss.shape)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, up)]


def assert_close(got, truth, rtol, atol):
    for name, mine, theirs in zip(("loss", "dx", "dweight", "dscale"), got, truth, strict=False):
        scale = max(1.0, float(theirs.abs().max()))

        def said(text, name=name):
            return f"{name}: {text}"

        torch.testing.assert_close(
            mine.double() / scale, theirs.double() / scale, rtol=rtol, atol=atol, msg=said
        )


def eager(x, weight, labels, labels_b, lam, psi=None, scale=16.0):
    """As a mixup recipe has it: one product, two cross entropies of rows without an ignored label."""
    cosine = F.linear(F.normalize(x), F.normalize(weight))

    def part(y):
        own = F.one_hot(y, CLASSES).bool()
        logits = cosine if psi is None else torch.where(own, psi(cosine), cosine)
        return F.cross_entropy(scale * logits, y, reduction="none")

    return (lam * part(labels) + (1 - lam) * part(labels_b)).mean()


@pytest.mark.parametrize("m", [0.0, 0.35])
def test_the_reference_is_eager_mixup(lane, m):
    x, weight, labels, labels_b, lam = problem(lane)
    labels, labels_b = labels.clamp(min=0), labels_b.clamp(min=0)
    made = reference.normface_loss(
        x, weight, labels, 16.0, margin=nf.CosFace(m), labels_b=labels_b, lam=lam, eps=0.0
    )
    torch.testing.assert_close(made, eager(x, weight, labels, labels_b, lam, lambda c: c - m))


@pytest.mark.covering(2)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "batchmean"])
@pytest.mark.parametrize("name", MARGINS)
def test_every_margin_is_the_references(lane, name, reduction, products):
    x, weight, labels, labels_b, lam = problem(lane)
    scale = lane.tensor(16.0, WIDE, grad=True)
    margin = on(lane, MARGINS[name]())
    twin = copy.deepcopy(margin)
    given = {"labels_b": labels_b, "lam": lam, "reduction": reduction}
    torch.manual_seed(0)
    got = nf.functional.normface_loss(x, weight, labels, scale, margin=margin, **given)
    torch.manual_seed(0)
    truth = reference.normface_loss(x, weight, labels, scale, margin=twin, **given)
    leaves = x, weight, scale
    assert_close(loss_and_gradients(got, *leaves), loss_and_gradients(truth, *leaves), 1e-9, 1e-11)
    if isinstance(margin, torch.nn.Module):
        assert all(torch.allclose(a, b) for a, b in zip(margin.buffers(), twin.buffers(), strict=True))


OPTIONS = {
    "straight": {"margin": nf.ArcFace(0.5), "margin_gradient": "straight"},
    "filter": {"filter_threshold": 0.1},
    "smoothing": {"label_smoothing": 0.1, "margin": nf.CosFace(0.2)},
    "class weights": {"class_weight": torch.linspace(0.1, 2, CLASSES, dtype=WIDE)},
    "sample weights": {"sample_weight": torch.linspace(0, 2, ROWS, dtype=WIDE)},
    "all": {
        "class_weight": torch.linspace(0.1, 2, CLASSES, dtype=WIDE),
        "sample_weight": torch.linspace(2, 0, ROWS, dtype=WIDE),
        "label_smoothing": 0.2,
    },
    "recomputed": {"workspace": None},
}


@pytest.mark.covering(2)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_is_the_references(lane, options, products):
    x, weight, labels, labels_b, lam = problem(lane)
    scale = lane.tensor(16.0, WIDE, grad=True)
    given = {k: lane.tensor(v) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    known = {k: v for k, v in given.items() if k != "workspace"}
    if "workspace" in given:
        rows, kind = ROWS if products == "one product" else 2 * ROWS, "cpu" if lane.widens else "cuda"
        given["workspace"] = nf.plan(rows, DIM, CLASSES, WIDE, kind).workspace_bytes - 1
    got = nf.functional.normface_loss(x, weight, labels, scale, labels_b=labels_b, lam=lam, **given)
    truth = reference.normface_loss(x, weight, labels, scale, labels_b=labels_b, lam=lam, **known)
    leaves = x, weight, scale
    assert_close(loss_and_gradients(got, *leaves), loss_and_gradients(truth, *leaves), 1e-9, 1e-11)


SCALES = {
    "number": 16.0,
    "a head's, [1]": torch.tensor([16.0], dtype=WIDE),
    "negative": -16.0,
    "beyond the window": 400.0,
    "whose exponentials no float64 has": 2000.0,
    "of each row": torch.linspace(1, 900, ROWS, dtype=WIDE),
}


@pytest.mark.parametrize("name", SCALES)
def test_every_scale_is_the_references(lane, name, one_product):
    x, weight, labels, labels_b, lam = problem(lane)
    scale = lane.tensor(SCALES[name], WIDE, grad=True)
    given = {"labels_b": labels_b, "lam": lam, "margin": nf.CosFace(0.2)}
    got = nf.functional.normface_loss(x, weight, labels, scale, **given)
    truth = reference.normface_loss(x, weight, labels, scale, **given)
    leaves = x, weight, scale
    assert_close(loss_and_gradients(got, *leaves), loss_and_gradients(truth, *leaves), 1e-9, 1e-11)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_narrower_dtypes(lane, dtype, products):
    """Within what rows twice are given: the same roundings of the operands, and one sum more."""
    x, weight, labels, labels_b, lam = problem(lane, dtype)
    given = {"labels_b": labels_b, "lam": lam, "margin": nf.ArcFace(0.3)}
    got = loss_and_gradients(nf.functional.normface_loss(x, weight, labels, 16.0, **given), x, weight)
    assert [g.dtype for g in got] == [torch.float32, dtype, dtype]
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    truth = loss_and_gradients(reference.normface_loss(*wide, labels, 16.0, **given), *wide)
    tolerance = {torch.float32: 2e-5, torch.float16: 3e-2, torch.bfloat16: 2e-1}[dtype]
    assert_close(got, truth, 0, tolerance)


def test_a_row_that_is_its_second_label_keeps_its_digits(lane, one_product):
    """float32, p of the second label 1 - 2e-12: its loss is right to a few roundings, where torch's own cross
    entropy has 0 left."""
    weight = torch.eye(4, DIM, device=lane.device)
    x, labels = 3 * weight[1:2], torch.tensor([0, 1], device=lane.device)
    given = {"labels_b": labels[1:], "lam": lane.tensor([1e-30])}
    got = nf.functional.normface_loss(x, weight, labels[:1], 28.0, **given)
    truth = lane.tensor(math.log1p(3 * math.exp(-28)), WIDE)
    torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=0)


def test_many_rows_with_one_second_label_add_up_in_float32(lane, one_product):
    """The gradient of a bfloat16 weight is rounded after its rows are added, not with each."""
    rows = 64
    x, weight = lane.randn(rows, DIM, grad=True), lane.randn(5, DIM, seed=1)
    narrow = weight.bfloat16().requires_grad_()
    labels, labels_b = lane.labels(rows, 5), torch.full((rows,), 2, device=lane.device)
    got = nf.functional.normface_loss(
        x, narrow.float().detach().requires_grad_(), labels, 8.0, labels_b=labels_b, lam=0.1
    )
    with_bf16 = nf.functional.normface_loss(x, narrow, labels, 8.0, labels_b=labels_b, lam=0.1)
    (rounded,) = torch.autograd.grad(with_bf16, narrow)
    wide = narrow.detach().double().requires_grad_()
    truth = reference.normface_loss(x.double(), wide, labels, 8.0, labels_b=labels_b, lam=0.1)
    (exact,) = torch.autograd.grad(truth, wide)
    assert (rounded.double() - exact).abs().max() < 2**-6 * exact.abs().max()
    torch.testing.assert_close(got, with_bf16, rtol=0.05, atol=0.05)


@pytest.mark.covering(2)
@pytest.mark.parametrize("name", [n for n in MARGINS if "Elastic" not in n])
def test_lam_of_1_and_0_are_the_plain_calls(lane, name, products):
    x, weight, labels, labels_b, _ = problem(lane)
    for share, alone in ((1.0, labels), (0.0, labels_b)):
        one, two = on(lane, MARGINS[name]()), on(lane, MARGINS[name]())
        got = nf.functional.normface_loss(x, weight, labels, 16.0, margin=one, labels_b=labels_b, lam=share)
        truth = nf.functional.normface_loss(x, weight, alone, 16.0, margin=two)
        assert_close(loss_and_gradients(got, x, weight), loss_and_gradients(truth, x, weight), 1e-11, 1e-12)


@pytest.mark.parametrize("name", ["AdaFace", "CurricularFace"])
def test_a_row_counts_once_in_what_a_margin_keeps(lane, name, products):
    """The same label twice moves the state as the plain call does, whatever lam is; and an ignored one has no
    share of its row."""
    x, weight, labels, _, lam = problem(lane)
    nobody = torch.full_like(labels, -100)
    plain, *others = (on(lane, MARGINS[name]()) for _ in range(4))
    call = nf.functional.normface_loss
    call(x, weight, labels, 16.0, margin=plain)
    call(x, weight, labels, 16.0, margin=others[0], labels_b=labels, lam=lam)
    call(x, weight, labels, 16.0, margin=others[1], labels_b=nobody, lam=0.3)
    call(x, weight, nobody, 16.0, margin=others[2], labels_b=labels, lam=0.3)
    for other in others:
        for mine, theirs in zip(plain.buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=0)


def test_a_draw_is_a_rows_and_not_a_labels(lane, products):
    x, weight, labels, _, lam = problem(lane)
    margin = nf.ElasticArcFace(0.5, 0.1)
    torch.manual_seed(3)
    plain = nf.functional.normface_loss(x, weight, labels, 16.0, margin=margin)
    torch.manual_seed(3)
    twice = nf.functional.normface_loss(x, weight, labels, 16.0, margin=margin, labels_b=labels, lam=lam)
    torch.testing.assert_close(twice, plain, rtol=1e-12, atol=0)


def test_gradcheck(lane, products):
    x, weight, labels, labels_b, lam = problem(lane)
    x, weight = (t.detach()[:, :3].contiguous().requires_grad_() for t in (x, weight))
    scale = lane.tensor(6.0, WIDE, grad=True)
    m = lane.tensor(torch.linspace(0, 0.4, CLASSES, dtype=WIDE), grad=True)

    def loss(x, weight, scale, m):
        return nf.functional.normface_loss(
            x, weight, labels, scale, margin=nf.ArcFace(m), labels_b=labels_b, lam=lam, label_smoothing=0.1
        )

    assert torch.autograd.gradcheck(loss, (x, weight, scale, m), fast_mode=lane.slow)


def test_rows_that_count_nowhere_reach_nothing(lane, products):
    x, weight, labels, labels_b, lam = problem(lane)
    spoilt = x.detach().clone()
    spoilt[3] = torch.nan  # ignored twice
    spoilt.requires_grad_()
    call = nf.functional.normface_loss
    got = call(spoilt, weight, labels, 16.0, labels_b=labels_b, lam=lam)
    truth = call(x, weight, labels, 16.0, labels_b=labels_b, lam=lam)
    got, truth = loss_and_gradients(got, spoilt, weight), loss_and_gradients(truth, x, weight)
    assert all(torch.equal(a, b) for a, b in zip(got, truth, strict=True))
    assert not got[1][3].any()


def test_runs_are_the_same_bits(lane, one_product):
    x, weight, labels, labels_b, lam = problem(lane, torch.float32)
    once, again = (
        loss_and_gradients(
            nf.functional.normface_loss(x, weight, labels, 16.0, labels_b=labels_b, lam=lam), x, weight
        )
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_second_derivatives_are_right_or_raise(lane, products):
    """Rows that stand there twice have those of the plain call."""
    x, weight, labels, labels_b, lam = problem(lane)
    found = []
    for call in (nf.functional.normface_loss, reference.normface_loss):
        loss = call(x, weight, labels, 16.0, labels_b=labels_b, lam=lam)
        (dx,) = torch.autograd.grad(loss, x, create_graph=True)
        if products == "one product" and not found:
            with pytest.raises(RuntimeError, match="second derivatives are not available"):
                dx.square().sum().backward()
            return
        found.append(torch.autograd.grad(dx.square().sum(), (x, weight)))
    assert_close(*found, 1e-8, 1e-10)


# Other heads, and layers ---------------------------------------------------------------------------------

LOSSES = {
    "sphereface2": ("sphereface2_loss", (0.3,), {}),
    "c_contrastive": ("c_contrastive_loss", (), {"neg_margin": 1.9}),
    "c_contrastive, of the batch": (
        "c_contrastive_loss",
        (),
        {"neg_margin": 1.9, "normalize_negative": 2.0, "max_positive_only": True},
    ),
    "c_triplet": ("c_triplet_loss", (), {"add_center_loss": True}),
}


@pytest.mark.covering(2)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "batchmean"])
@pytest.mark.parametrize("name", LOSSES)
def test_other_losses(lane, name, reduction):
    x, weight, labels, labels_b, lam = problem(lane)
    called, more, options = LOSSES[name]
    factor = lane.tensor(torch.linspace(0, 2, ROWS, dtype=WIDE))
    given = {"labels_b": labels_b, "lam": lam, "sample_weight": factor, "reduction": reduction, **options}
    got = getattr(nf.functional, called)(x, weight, labels, *more, **given)
    truth = getattr(reference, called)(x, weight, labels, *more, **given)
    assert_close(loss_and_gradients(got, x, weight), loss_and_gradients(truth, x, weight), 1e-9, 1e-11)


@pytest.mark.parametrize("name", [n for n in LOSSES if "batch" not in n])
def test_other_losses_are_the_sum_of_two(lane, name):
    x, weight, labels, labels_b, lam = problem(lane)
    called, more, options = LOSSES[name]
    loss = getattr(nf.functional, called)
    got = loss(x, weight, labels, *more, labels_b=labels_b, lam=lam, reduction="none", **options)
    one, two = (loss(x, weight, y, *more, reduction="none", **options) for y in (labels, labels_b))
    torch.testing.assert_close(got, lam * one + (1 - lam) * two)


HEADS = {
    "NormFaceLoss": lambda: nf.NormFaceLoss(DIM, CLASSES, scale=16.0, margin=nf.CosFace(0.3)),
    "NormSoftmax": lambda: nf.recipes.NormSoftmax(DIM, CLASSES),
    "LDAM": lambda: nf.recipes.LDAM(DIM, CLASSES, torch.arange(1, CLASSES + 1)),
    "SphereFace2Loss": lambda: nf.SphereFace2Loss(DIM, CLASSES),
    "CContrastiveLoss": lambda: nf.CContrastiveLoss(DIM, CLASSES, neg_margin=1.9),
    "CContrastiveLoss, adaptive": lambda: nf.CContrastiveLoss(DIM, CLASSES, add_intra_mae=True),
    "CTripletLoss": lambda: nf.CTripletLoss(DIM, CLASSES),
}


@pytest.mark.parametrize("name", HEADS)
def test_every_layer_takes_two_labels(name):
    head, x = HEADS[name](), torch.randn(ROWS, DIM)
    labels, labels_b, lam = torch.arange(ROWS) % CLASSES, torch.arange(ROWS) % 4, torch.rand(ROWS)
    head.reduction = "none"
    head.eval()
    expected = lam * head(x, labels) + (1 - lam) * head(x, labels_b)
    head.train()  # what a state moves to is of the next step
    torch.testing.assert_close(head(x, labels, labels_b=labels_b, lam=lam), expected)


def test_without_labels_a_head_wants_neither():
    head = HEADS["NormFaceLoss"]()
    for name, value in (("labels_b", torch.zeros(3, dtype=torch.int64)), ("lam", 0.5)):
        with pytest.raises(ValueError, match=f"expected `labels` together with `{name}`, got None"):
            head(torch.randn(3, DIM), **{name: value})


# Arguments -----------------------------------------------------------------------------------------------

LABELS = torch.tensor([0, 1, 2])
CALLS = {
    "normface_loss": lambda **given: nf.functional.normface_loss(
        torch.randn(3, 4), torch.randn(5, 4), LABELS, 4.0, **given
    ),
    "sphereface2_loss": lambda **given: nf.functional.sphereface2_loss(
        torch.randn(3, 4), torch.randn(5, 4), LABELS, 0.0, **given
    ),
    "c_contrastive_loss": lambda **given: nf.functional.c_contrastive_loss(
        torch.randn(3, 4), torch.randn(5, 4), LABELS, **given
    ),
    "c_triplet_loss": lambda **given: nf.functional.c_triplet_loss(
        torch.randn(3, 4), torch.randn(5, 4), LABELS, **given
    ),
}
WRONG = [
    ({"labels_b": LABELS}, ValueError, "expected `lam` together with `labels_b`, got None"),
    ({"lam": 0.5}, ValueError, "expected `labels_b` together with `lam`, got None"),
    ({"labels_b": LABELS, "lam": 1.5}, ValueError, r"expected `lam` in \[0, 1\], got 1.5"),
    ({"labels_b": LABELS, "lam": float("nan")}, ValueError, r"expected `lam` in \[0, 1\], got nan"),
    ({"labels_b": LABELS, "lam": torch.tensor(-0.5)}, ValueError, r"expected `lam` in \[0, 1\], got -0.5"),
    (
        {"labels_b": LABELS, "lam": torch.tensor([0.5, torch.nan, 0.5])},
        ValueError,
        r"expected `lam` in \[0, 1\], got nan",
    ),
    ({"labels_b": LABELS, "lam": torch.ones(2)}, ValueError, r"`lam` to be .* got shape \[2\]"),
    (
        {"labels_b": LABELS, "lam": torch.ones(3, 1)},
        ValueError,
        r"`lam` to be .* got shape \[3, 1\]",
    ),
    (
        {"labels_b": LABELS, "lam": torch.ones(3, requires_grad=True)},
        ValueError,
        "expected `lam` not to require a gradient",
    ),
    (
        {"labels_b": LABELS, "lam": LABELS},
        TypeError,
        "expected `lam` to be float64",
    ),
    ({"labels_b": LABELS, "lam": "half"}, TypeError, "expected `lam` to be a number, or .* got str"),
    ({"labels_b": LABELS, "lam": True}, TypeError, "expected `lam` to be a number, or .* got bool"),
    ({"labels_b": LABELS[:2], "lam": 0.5}, ValueError, r"expected `labels_b` to have shape \[3\], got \[2\]"),
    ({"labels_b": LABELS.float(), "lam": 0.5}, TypeError, "expected `labels_b` to be int64 or int32"),
    ({"labels_b": LABELS + 3, "lam": 0.5}, IndexError, r"expected `labels_b` in \[0, 5\).*got 5 at row 2"),
    ({"labels_b": [0, 1, 2], "lam": 0.5}, TypeError, "expected `labels_b` to be a Tensor, got list"),
]


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize(("given", "error", "text"), WRONG, ids=[w[2][:60] for w in WRONG])
def test_errors(op, given, error, text):
    with pytest.raises(error, match=f"{op}: .*{text}"):
        CALLS[op](**given)


@pytest.mark.parametrize("lam", [0.25, torch.tensor(0.25), torch.tensor(0.25, dtype=torch.float16)])
@pytest.mark.parametrize("op", CALLS)
def test_a_number_is_a_tensor_of_it(op, lam):
    torch.manual_seed(0)
    made = CALLS[op](labels_b=LABELS.int() + 1, lam=lam)
    torch.manual_seed(0)
    assert torch.equal(made, CALLS[op](labels_b=LABELS + 1, lam=torch.full((3,), 0.25)))


def test_check_finite_looks_at_rows_of_either_label():
    x = torch.randn(3, 4)
    x[1] = torch.nan
    nobody, weight = torch.full((3,), -100), torch.randn(5, 4)
    call = nf.functional.normface_loss
    some = LABELS.clone()
    some[1] = -100
    call(x, weight, some, 4.0, labels_b=some, lam=0.5, check_finite=True)
    for first, second in ((nobody, LABELS), (LABELS, nobody)):
        with pytest.raises(ValueError, match="expected `x` to be finite, got NaN or infinity in row 1"):
            call(x, weight, first, 4.0, labels_b=second, lam=0.5, check_finite=True)
