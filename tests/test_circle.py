"""Circle loss at class level: whose brackets have a slope, and how far its logits reach."""

import math

import pytest
import torch
import torch.nn.functional as F
from dense_head import OPTIONS, assert_equal_to_1e10, gradients, on, problem

import normface_ext as nf
from normface_ext.engine import native


def released(x, weight, labels, scale, m, *, detached=True, straight=False, reduction="mean",
             class_weight=None, sample_weight=None):  # fmt: skip
    """FaceX-Zoo's and fast-reid's: alpha_p and alpha_n are weights."""
    weights = torch.ones(len(x), dtype=torch.float64) if sample_weight is None else sample_weight
    kept = (labels != -100) & (weights != 0)
    y, cos = labels[kept], F.linear(F.normalize(x[kept]), F.normalize(weight))
    alpha_p, alpha_n = (1 + m - cos).clamp_min(0), (cos + m).clamp_min(0)
    if detached:
        alpha_p, alpha_n = alpha_p.detach(), alpha_n.detach()
    positive = alpha_p * (cos - (1 - m))
    if straight:
        positive = cos + (positive - cos).detach()
    logits = scale * torch.where(F.one_hot(y, len(weight)).bool(), positive, alpha_n * (cos - m))
    each = F.cross_entropy(logits, y, weight=class_weight, reduction="none") * weights[kept]
    if reduction == "none":
        return torch.zeros(len(x), dtype=each.dtype).index_put((kept.nonzero()[:, 0],), each)
    of_class = 1.0 if class_weight is None else class_weight[y]
    return each.sum() if reduction == "sum" else each.sum() / (weights[kept] * of_class).sum()


@pytest.mark.covering(2)
@pytest.mark.parametrize("detached", [True, False])
@pytest.mark.parametrize("m", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("scale", [16.0, 256.0, 1500.0])  # inside the fixed shift's window, and outside
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_it_is_the_released_code(lane, options, scale, m, detached):
    x, weight, labels = problem()
    options = {k: v for k, v in options.items() if k != "label_smoothing"}
    expected = gradients(
        lambda x, w: released(x, w, labels, scale, m, detached=detached, **options), x, weight
    )
    margin = nf.CircleSoftmax(m, detached)
    found = gradients(
        lambda x, w: nf.functional.normface_loss(
            x, w, lane.tensor(labels), scale, margin=margin, **on(lane, options)
        ),
        lane.tensor(x),
        lane.tensor(weight),
    )
    assert_equal_to_1e10(found, expected)
    for sum_of in ({"reduction": "sum"}, {"margin_gradient": "straight"}):
        again = nf.functional.normface_loss(x, weight, labels, scale, margin=margin, **sum_of)
        specified = nf.reference.normface_loss(x, weight, labels, scale, margin=margin, **sum_of)
        torch.testing.assert_close(again, specified, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("detached", [True, False])
@pytest.mark.parametrize("scale", [16.0, 256.0])
def test_a_penalty_on_gradients_is_the_released_codes(lane, scale, detached):
    """The brackets are constants in second derivatives as they are in first ones."""
    x, weight, labels = problem()

    def penalty(loss):
        return lambda *given: sum(
            g.square().sum() for g in torch.autograd.grad(loss(*given), given, create_graph=True)
        )

    expected = gradients(
        penalty(lambda x, w: released(x, w, labels, scale, 0.25, detached=detached)), x, weight
    )
    margin = nf.CircleSoftmax(0.25, detached)
    found = gradients(
        penalty(lambda x, w: nf.functional.normface_loss(x, w, lane.tensor(labels), scale, margin=margin)),
        lane.tensor(x),
        lane.tensor(weight),
    )
    assert_equal_to_1e10(found, expected)


def test_straight_is_about_the_target(lane):
    x, weight, labels = problem()
    expected = gradients(lambda x, w: released(x, w, labels, 64.0, 0.25, straight=True), x, weight)
    found = gradients(
        lambda x, w: nf.functional.normface_loss(
            x, w, lane.tensor(labels), 64.0, margin=nf.CircleSoftmax(), margin_gradient="straight"
        ),
        lane.tensor(x),
        lane.tensor(weight),
    )
    assert_equal_to_1e10(found, expected)


def test_differentiated_brackets_have_the_gradient_of_the_loss(lane):
    x, weight, labels = problem(rows=4, dim=3, classes=4, seed=3)

    def loss(x, w):
        return nf.functional.normface_loss(
            x, w, lane.tensor(labels), 9.0, margin=nf.CircleSoftmax(detached=False)
        )

    inputs = lane.tensor(x, grad=True), lane.tensor(weight, grad=True)
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=lane.slow)


@pytest.mark.parametrize("m", [0.0, 0.25, 0.6, 1.0])
def test_no_logit_is_out_of_its_range(m):
    class Seen(nf.BatchMargin):
        hard_negatives = True

        def of(self, rows):
            self.found = nf.CircleSoftmax(m).of(rows)
            return self.found

    seen = Seen()
    nf.functional.normface_loss(*problem(), 16.0, margin=seen)
    cosines = torch.linspace(-1, 1, 2001, dtype=torch.float64)[None]
    f = nf.reference.hard_negatives(cosines, seen.found._replace(threshold=seen.found.threshold[:1]))
    assert float(f.min()) == pytest.approx(seen.found.lowest, abs=1e-6)
    assert float(f.max()) == pytest.approx(seen.found.highest, abs=1e-6)


def test_its_own_scale_is_beyond_the_fixed_shift_of_float32():
    """Logits from -16 to 240, the label's down to -1008: every row's largest is looked for first."""
    assert not native.has_fixed_shift(256.0, 7, False, -0.0625, 0.9375)
    x, weight, labels = problem(dtype=torch.float32)
    head = nf.NormFaceLoss(16, 7, margin=nf.CircleSoftmax())
    assert head.scale == 256.0
    head.weight.data.copy_(weight)
    expected = released(x.double(), weight.double(), labels, 256.0, 0.25)
    assert float(head(x, labels)) == pytest.approx(float(expected), rel=1e-5)


def test_it_does_not_ask_for_the_target_cosines():
    class Told(nf.CircleSoftmax):
        def of(self, rows):
            assert rows.cosine is None
            return super().of(rows)

    for function in (nf.functional.normface_loss, nf.reference.normface_loss):
        assert math.isfinite(function(*problem(), 64.0, margin=Told()))


def test_label_smoothing_is_refused():
    with pytest.raises(ValueError, match="expected `label_smoothing` 0 with CircleSoftmax"):
        nf.functional.normface_loss(*problem(), 64.0, margin=nf.CircleSoftmax(), label_smoothing=0.1)
