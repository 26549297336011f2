"""CurricularFace, MV-Softmax and the inter-class filter against the formulas of their released code."""

import functools
import math
import re

import hard_negative_jobs as jobs
import pytest
import torch
import torch.nn.functional as F
from dense_head import OPTIONS, assert_equal_to_1e10, gradients, on, problem
from ranks import ranks

import normface_ext as nf
from normface_ext.engine import native, row_state
from normface_ext.engine.calls import plan_device

M, ALPHA, T = 0.8, 0.05, 0.3

# The released code ------------------------------------------------------------------------------------


class Released:
    """The heads as their authors' forward passes write them: of cosines [N, C] and labels the logits / s.

    Two things are done as they mean them. sqrt(1 - c^2) has no slope at +-1, where theirs is infinite; and
    the label's entry is never one of the hard ones, which they overwrite afterwards.
    """

    def __init__(self, kind):
        self.kind, self.t = kind, torch.zeros(1, dtype=torch.float64)

    def logits(self, cos, labels):
        rows = torch.arange(len(cos))
        own = cos[rows, labels]
        room = 1 - own.square()
        added = own * math.cos(M) - torch.where(room > 0, room.abs(), 1).sqrt() * (room > 0) * math.sin(M)
        name, _, weights = self.kind.partition(" ")
        if name == "curricular":
            threshold = added.detach()
            psi = torch.where(own > math.cos(math.pi - M), added, own - math.sin(math.pi - M) * M)
            with torch.no_grad():
                self.t = own.mean() * ALPHA + (1 - ALPHA) * self.t

            def hard(c):
                return c * (self.t + c)
        elif name == "filter":
            threshold, psi = torch.full_like(own.detach(), T), own

            def hard(c):
                return 0 * c
        else:
            threshold = added.detach() if name == "arc" else own.detach() - M
            psi = torch.where(own > 0, added if name == "arc" else own - M, own)

            def hard(c):
                return c + T if weights == "fixed" else (T + 1) * c + T

        mask = cos > threshold[:, None]
        mask[rows, labels] = False
        changed = torch.where(mask, hard(cos), cos)
        return changed.index_put((rows, labels), psi), mask


#: What is tested by name -> what is asked of our loss for it, anew for every test.
KINDS = {
    "curricular": lambda: {"margin": nf.CurricularFace(M, ALPHA)},
    "arc adaptive": lambda: {"margin": nf.MVSoftmax(M, T)},
    "arc fixed": lambda: {"margin": nf.MVSoftmax(M, T, adaptive=False)},
    "am adaptive": lambda: {"margin": nf.MVSoftmax(M, T, kind="am")},
    "am fixed": lambda: {"margin": nf.MVSoftmax(M, T, "am", False)},
    "filter": lambda: {"filter_threshold": T},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def asked(kind, lane=None):
    given = KINDS[kind]()
    if lane is not None and "margin" in given:
        given["margin"].to(lane.device)
    return given


def expected_loss(
    released, x, weight, labels, scale, *, reduction="mean", class_weight=None, sample_weight=None
):
    weights = torch.ones(len(x), dtype=torch.float64) if sample_weight is None else sample_weight.double()
    kept = (labels != -100) & (weights != 0)
    y = labels[kept]
    logits, _ = released.logits(F.linear(F.normalize(x[kept]), F.normalize(weight)), y)
    scales = scale[kept, None] if isinstance(scale, torch.Tensor) and scale.dim() == 1 else scale
    each = F.cross_entropy(scales * logits, y, weight=class_weight, reduction="none") * weights[kept]
    if reduction == "none":
        return torch.zeros(len(x), dtype=each.dtype).index_put((kept.nonzero()[:, 0],), each)
    if reduction == "sum":
        return each.sum()
    of_class = 1.0 if class_weight is None else class_weight[y]
    return each.sum() / (weights[kept] * of_class).sum()


@pytest.mark.covering(2)
@pytest.mark.parametrize("scale", [16.0, 1000.0])  # inside the fixed shift's window, and outside
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@every_kind
def test_it_is_the_released_code(lane, kind, options, scale):
    """Over steps, so that the state is followed too."""
    given, released = asked(kind, lane), Released(kind)
    options = {k: v for k, v in options.items() if k != "label_smoothing"}
    for step in range(2):
        x, weight, labels = problem(seed=step)
        expected = gradients(
            lambda x, w, y=labels: expected_loss(released, x, w, y, scale, **options), x, weight
        )
        found = gradients(
            lambda x, w, y=labels: nf.functional.normface_loss(
                x, w, lane.tensor(y), scale, **given, **on(lane, options)
            ),
            lane.tensor(x),
            lane.tensor(weight),
        )
        assert_equal_to_1e10(found, expected)
        if kind == "curricular":
            assert_equal_to_1e10([given["margin"].t], [released.t])


@every_kind
def test_both_sides_are_met(kind):
    """What the test above relies on: hard classes and others, targets past every guard and before it."""
    x, weight, labels = problem()
    kept = labels != -100
    cos = F.linear(F.normalize(x[kept]), F.normalize(weight))
    own = cos[torch.arange(len(cos)), labels[kept]]
    _, mask = Released(kind).logits(cos, labels[kept])
    assert mask.any() and not mask.all()
    assert (own <= math.cos(math.pi - M)).any() and (own > 0).any()


@every_kind
def test_the_gradient_of_the_scale(lane, kind):
    """Of one scale and of one per row: the second sum is that of E f."""
    x, weight, labels = problem()
    for scale in (torch.tensor(16.0), torch.linspace(4, 30, 9)):
        scale = scale.double()
        expected = gradients(
            lambda x, w, s: expected_loss(Released(kind), x, w, labels, s, reduction="sum"), x, weight, scale
        )
        found = gradients(
            lambda x, w, s: nf.functional.normface_loss(
                x, w, lane.tensor(labels), s, reduction="sum", **asked(kind, lane)
            ),
            *(lane.tensor(t) for t in (x, weight, scale)),
        )
        assert_equal_to_1e10(found, expected)


@every_kind
def test_straight_is_about_the_target(lane, kind):
    """The same loss; d psi / d c is 1, and the others keep their slopes."""
    x, weight, labels = problem()

    class Straight(Released):
        def logits(self, cos, labels):
            logits, mask = super().logits(cos, labels)
            rows = torch.arange(len(cos))
            own = cos[rows, labels]
            psi = logits[rows, labels]
            return logits.index_put((rows, labels), own + (psi - own).detach()), mask

    expected = gradients(lambda x, w: expected_loss(Straight(kind), x, w, labels, 16.0), x, weight)
    found = gradients(
        lambda x, w: nf.functional.normface_loss(
            x, w, lane.tensor(labels), 16.0, margin_gradient="straight", **asked(kind, lane)
        ),
        lane.tensor(x),
        lane.tensor(weight),
    )
    assert_equal_to_1e10(found, expected)


def test_by_hand():
    """Cosines 0.6 (the label's), 0.7 (hard), -0.28; t after the step is 0.06."""
    angles = torch.tensor([math.acos(0.6), -math.acos(0.7), math.acos(-0.28)], dtype=torch.float64)
    weight = torch.stack([angles.cos(), angles.sin()], 1)
    x, label = torch.tensor([[3.0, 0.0]], dtype=torch.float64), torch.tensor([0])
    psi = math.cos(math.acos(0.6) + 0.5)
    others = {
        nf.CurricularFace(0.5, alpha=0.1): [0.7 * (0.06 + 0.7), -0.28],
        nf.MVSoftmax(0.5, t=0.2): [1.2 * 0.7 + 0.2, -0.28],
        nf.MVSoftmax(0.5, t=0.2, adaptive=False): [0.7 + 0.2, -0.28],
    }
    for margin, f in others.items():
        loss = nf.functional.normface_loss(x, weight, label, 8.0, margin=margin)
        assert float(loss) == pytest.approx(math.log1p(sum(math.exp(8 * (c - psi)) for c in f)), rel=1e-12)
    loss = nf.functional.normface_loss(x, weight, label, 8.0, filter_threshold=0.4)
    assert float(loss) == pytest.approx(math.log1p(math.exp(-8 * 0.6) + math.exp(8 * (-0.28 - 0.6))))


# Extremes ---------------------------------------------------------------------------------------------


@every_kind
def test_cosines_of_one_and_minus_one(lane, kind):
    """The label's and others'. The released code has a NaN for it: its square root has an infinite slope."""
    weight = torch.tensor([[2.0, 0.0], [5.0, 0.0], [-3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    x = torch.tensor([[4.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [0.0, -2.0]], dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3])
    for scale in (8.0, 64.0, 3000.0):
        for dtype in (torch.float64, torch.float32):
            found = gradients(
                lambda x, w, s=scale: nf.functional.normface_loss(
                    x, w, lane.tensor(labels), s, **asked(kind, lane)
                ),
                lane.tensor(x, dtype),
                lane.tensor(weight, dtype),
            )
            expected = gradients(
                lambda x, w, s=scale: nf.reference.normface_loss(x, w, labels, s, **asked(kind)), x, weight
            )
            assert all(f.isfinite().all() for f in found)
            torch.testing.assert_close(found[0].cpu().double(), expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("classes", [1, 2])
@every_kind
def test_few_classes(lane, kind, classes):
    x, weight, labels = problem(classes=classes)
    found = gradients(
        lambda x, w: nf.functional.normface_loss(x, w, lane.tensor(labels), 16.0, **asked(kind, lane)),
        lane.tensor(x),
        lane.tensor(weight),
    )
    expected = gradients(
        lambda x, w: (
            expected_loss(Released(kind), x, w, labels, 16.0) if classes > 1 else 0 * (x.sum() + w.sum())
        ),
        x,
        weight,
    )
    assert_equal_to_1e10(found, expected)


@every_kind
def test_none_is_hard_and_all_are(lane, kind):
    """Rows at their class, far from all others; and rows behind it, with all others before them."""
    weight = torch.eye(6, dtype=torch.float64)[:5]
    labels = torch.arange(5)
    spread = torch.full((5, 6), 0.55, dtype=torch.float64)
    for x, number in ((weight + 1e-3, 0), (spread - 3 * weight, 4)):
        cos = F.linear(F.normalize(x), F.normalize(weight))
        given = asked(kind, lane)
        if kind == "filter" and number:
            given = {"filter_threshold": -0.9}
        elif "margin" in given:
            _, mask = Released(kind).logits(cos, labels)
            assert (mask.sum(1) == number).all()
        found = gradients(
            lambda x, w, given=given: nf.functional.normface_loss(x, w, lane.tensor(labels), 16.0, **given),
            lane.tensor(x),
            lane.tensor(weight),
        )
        expected = gradients(
            lambda x, w, given=given: nf.reference.normface_loss(
                x, w, labels, 16.0, **(given if kind == "filter" else asked(kind))
            ),
            x,
            weight,
        )
        assert_equal_to_1e10(found, expected)
        if kind == "filter" and number:  # nothing pushes
            assert float(found[0]) == pytest.approx(
                float(torch.log1p(4 * (-16 * cos.diagonal()).exp()).mean()), rel=1e-12
            )


@pytest.mark.parametrize("more", [0, 2000, None])
@pytest.mark.parametrize("scale", [16.0, 1000.0])
@every_kind
def test_whatever_the_workspace(lane, kind, scale, more):
    """Coefficients stored or made again, classes at once or in chunks."""
    x, weight, labels = problem(rows=11, classes=40)
    workspace = None
    if more is not None:
        with pytest.raises(ValueError, match="at least") as refused:
            nf.plan(11, 16, 40, torch.float64, plan_device(lane.tensor(x)), workspace=0)
        workspace = more + int(re.search(r"at least (\d+) bytes", str(refused.value))[1])
    expected = gradients(lambda x, w: expected_loss(Released(kind), x, w, labels, scale), x, weight)
    found = gradients(
        lambda x, w: nf.functional.normface_loss(
            x, w, lane.tensor(labels), scale, workspace=workspace, **asked(kind, lane)
        ),
        lane.tensor(x),
        lane.tensor(weight),
    )
    assert_equal_to_1e10(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@every_kind
def test_narrow_features(lane, kind, dtype):
    x, weight, labels = problem(dtype=dtype)
    given = asked(kind, lane)
    expected = gradients(
        lambda x, w: expected_loss(Released(kind), x, w, labels, 64.0), x.double(), weight.double()
    )
    found = gradients(
        lambda x, w: nf.functional.normface_loss(x, w, lane.tensor(labels), 64.0, **given),
        lane.tensor(x),
        lane.tensor(weight),
    )
    assert [found[0].dtype, found[1].dtype, found[2].dtype] == [torch.float32, dtype, dtype]
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}[dtype]
    for f, e in zip(found, expected, strict=True):
        assert (f.cpu().double() - e).norm() <= tolerance * e.norm()


# The range of the fixed shift -------------------------------------------------------------------------


class Seen(nf.BatchMargin):
    """What another margin says, kept."""

    hard_negatives = True

    def __init__(self, margin):
        super().__init__()
        self.margin = margin

    def of(self, rows):
        self.found = self.margin.of(rows)
        return self.found


def said(kind, t=0.0):
    if kind == "filter":
        from normface_ext.softmax.hard_negatives import filtered

        return filtered(nf.CosFace(0.0), T, torch.zeros(1, dtype=torch.int64))
    seen = Seen(KINDS[kind]()["margin"])
    if kind == "curricular":
        seen.margin.eval().t.fill_(t)
    nf.functional.normface_loss(*problem(), 16.0, margin=seen)
    return seen.found


@pytest.mark.parametrize("t", [-1.0, -0.3, 0.0, 0.4, 1.0])
@every_kind
def test_no_logit_is_out_of_its_range(kind, t):
    """For every cosine, threshold and t that can be; the upper end is reached, or nearly."""
    found = said(kind, t)
    cosines = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    thresholds = torch.linspace(-1.01, 1, 41, dtype=torch.float64)
    if kind == "filter":
        thresholds = found.threshold
    f = nf.reference.hard_negatives(cosines.expand(len(thresholds), -1), found._replace(threshold=thresholds))
    assert f.min() >= found.lowest and f.max() <= found.highest + 1e-12
    if kind != "curricular" or t == 1:
        assert f.max() > found.highest - 1e-3


@every_kind
def test_the_window_of_the_fixed_shift_goes_by_the_range(kind):
    found = said(kind)
    ends = found.lowest, found.highest
    reach = max(map(abs, ends))
    room = 690 + 709 - math.log(7) - (math.log(4 * reach) if reach > 1 else 0)
    inside, outside = room / (found.highest - found.lowest) * torch.tensor([0.999, 1.001]).double()
    assert native.has_fixed_shift(float(inside), 7, True, *ends)
    assert not native.has_fixed_shift(float(outside), 7, True, *ends)
    x, weight, labels = problem()
    for scale in (float(inside), float(outside)):
        assert_equal_to_1e10(
            gradients(
                lambda x, w, s=scale: nf.functional.normface_loss(x, w, labels, s, **asked(kind)), x, weight
            ),
            gradients(lambda x, w, s=scale: expected_loss(Released(kind), x, w, labels, s), x, weight),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [3, 40])
def test_collapsed_rows_at_the_end_of_the_window_have_gradients(lane, dtype, classes):
    """All logits are the largest that f can be: what their slopes make of the sums is a number still."""

    class Steep(nf.BatchMargin):
        hard_negatives = True

        def of(self, rows):
            threshold = torch.full_like(rows.cosine, -2.0)
            return nf.HardNegatives(nf.CosFace(0.35), threshold, (1.0, 1.0, 0.0), (2.0, 1.0), highest=2.0)

    scale = 1.0
    for step in (8.0, 1.0, 0.125, 0.0078125):
        while native.has_fixed_shift(scale + step, classes, False, -1.0, 2.0):
            scale += step
    row = torch.arange(1.0, 17.0).to(dtype)
    x = lane.tensor(row.repeat(4, 1), grad=True)
    weight = lane.tensor(row.repeat(classes, 1), grad=True)
    labels = lane.tensor([0, 1, 2, 0])
    loss = nf.functional.normface_loss(x, weight, labels, scale, margin=Steep())
    loss.backward()
    expected = scale * (2 - 0.65) + math.log(classes - 1)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5 if dtype == torch.float32 else 1e-2)
    for grad in (x.grad, weight.grad):  # every direction is radial
        assert grad.double().abs().max() <= 16 * scale * torch.finfo(dtype).eps


# CurricularFace's state -------------------------------------------------------------------------------


def step(margin, cosines, labels=None, **options):
    """One forward of rows whose label's cosines are these."""
    own = torch.tensor(cosines, dtype=torch.float64)
    x = torch.stack([own, (1 - own.square()).clamp_min(0).sqrt()], 1)
    labels = torch.zeros(len(cosines)).long() if labels is None else torch.tensor(labels)
    return nf.functional.normface_loss(x, torch.eye(2).double(), labels, 16.0, margin=margin, **options)


def test_t_moves_before_it_is_used():
    margin = nf.CurricularFace(alpha=0.25)
    assert float(margin.t) == 0.0
    step(margin, [0.6, 0.2])
    assert float(margin.t) == pytest.approx(0.25 * 0.4, rel=1e-14)
    step(margin, [-0.5])
    assert float(margin.t) == pytest.approx(0.75 * 0.1 - 0.25 * 0.5, rel=1e-14)
    frozen = nf.CurricularFace(alpha=0.25).eval()
    frozen.t.copy_(margin.t)
    assert float(step(nf.CurricularFace(alpha=1.0), [0.6])) == pytest.approx(float(step(at(0.6), [0.6])))
    step(frozen, [0.9])
    assert torch.equal(frozen.t, margin.t)


def at(t):
    margin = nf.CurricularFace().eval()
    margin.t.fill_(t)
    return margin


def test_rows_that_do_not_count_do_not_move_t():
    margin, alone = nf.CurricularFace(alpha=0.25), nf.CurricularFace(alpha=0.25)
    weights = torch.tensor([1.0, 2.0, 1.0, 0.0])
    loss = step(margin, [0.6, math.nan, 0.2, math.nan], [0, -100, 0, 0], sample_weight=weights)
    assert loss == step(alone, [0.6, 0.2])
    assert torch.equal(margin.t, alone.t)
    step(margin, [0.9], [-100])
    assert step(margin, []) == 0
    assert torch.equal(margin.t, alone.t)


def test_a_row_that_is_not_finite_spoils_its_own_step():
    margin, alone = nf.CurricularFace(alpha=0.25), nf.CurricularFace(alpha=0.25)
    assert step(margin, [0.6, math.nan, 0.2]).isnan()
    step(alone, [0.6, 0.2])
    assert torch.equal(margin.t, alone.t)


def test_weights_of_rows_are_none_of_t():
    """As in the released code, the mean is over rows, whatever they weigh in the loss."""
    margin, plain = nf.CurricularFace(alpha=0.25), nf.CurricularFace(alpha=0.25)
    step(margin, [0.6, 0.2], sample_weight=torch.tensor([1.0, 5.0]), class_weight=torch.tensor([3.0, 1.0]))
    step(plain, [0.6, 0.2])
    assert torch.equal(margin.t, plain.t)


def test_all_ranks_have_one_t_if_asked():
    local, together = (ranks(3).run(jobs.state, sync) for sync in ("local", "global"))
    whole, alone = nf.CurricularFace(alpha=0.25), nf.CurricularFace(alpha=0.25)
    for seed in (0, 1):
        x, weight, labels = problem(seed=seed)
        nf.functional.normface_loss(x, weight, labels, 16.0, margin=whole)
        nf.functional.normface_loss(x[jobs.ROWS[0]], weight, labels[jobs.ROWS[0]], 16.0, margin=alone)
    assert together == pytest.approx([float(whole.t)] * 3, rel=1e-14)
    assert local[0] == float(alone.t) and local[2] == 0.0


def test_the_t_of_a_released_checkpoint():
    """With the margin that it is of; another leaves it in the report."""
    state = {"kernel": torch.randn(16, 7), "t": torch.tensor([0.25])}
    head, report = nf.load_head(state, margin=nf.CurricularFace(), layout="features_first")
    assert float(head.margin.t) == 0.25 and report.stored == {"t": 0.25}
    head, report = nf.load_head(state, margin=nf.AdaFace(), layout="features_first")
    assert float(head.margin.mean) == 20.0 and report.stored == {"t": 0.25}


# Class-parallel ---------------------------------------------------------------------------------------


@pytest.mark.covering(1)
@pytest.mark.parametrize("scale", [16.0, 1000.0])
@pytest.mark.parametrize("options", [{}, {"class_weight": torch.linspace(0.5, 2, 7).double()}])
@pytest.mark.parametrize("sync", ["local", "global"])
@every_kind
def test_class_parallel_it_is_the_head_of_one_process(kind, scale, options, sync):
    given = KINDS[kind]()
    make = None
    if kind == "filter":
        options = {**options, "filter_threshold": T}
    else:
        make = curricular_of(sync) if kind == "curricular" else mv_of(kind)
    results = ranks(3).run(jobs.step, make, scale, options)
    x, weight, labels = problem()
    s = torch.tensor([scale], dtype=torch.float64)
    loss, dx, dw, ds = gradients(
        lambda x, w, s: nf.functional.normface_loss(x, w, labels, s, **{**given, **options}) * 2, x, weight, s
    )  # `gradients` halves it
    for found in results:
        assert_equal_to_1e10([found[0], found[2], found[3]], [loss / 2, dw, ds])
        assert found[4] == pytest.approx([float(b) for m in given.values() for b in state_of(m)], rel=1e-13)
    assert_equal_to_1e10([torch.cat([found[1] for found in results])], [dx])


def state_of(margin):
    return margin.buffers() if isinstance(margin, nf.BatchMargin) else []


def curricular_of(sync):
    """Sent to other processes, as no lambda can be."""
    return functools.partial(nf.CurricularFace, M, ALPHA, sync)


def mv_of(kind):
    kind, weights = kind.split()
    return functools.partial(nf.MVSoftmax, M, T, kind, weights == "adaptive")


def test_class_parallel_float32_at_a_scale_without_a_fixed_shift():
    """64, as it is used: logits reach from -64 to 128."""
    assert not native.has_fixed_shift(64.0, 7, False, -1.0, 2.0)
    results = ranks(3).run(jobs.step, curricular_of("local"), 64.0, {}, torch.float32)
    x, weight, labels = problem(dtype=torch.float32)
    expected = expected_loss(Released("curricular"), x.double(), weight.double(), labels, 64.0)
    for found in results:
        assert float(found[0]) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("make", [curricular_of("local"), mv_of("am fixed")])
def test_among_sampled_classes(make):
    for whole, part in ranks(3).run(jobs.sampled, make):
        assert_equal_to_1e10([part], [whole])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_regularizer_beside_hard_negatives(reduction):
    x, weight, labels = problem()
    expected = nf.functional.normface_loss(x, weight, labels, 16.0, margin=jobs.Pulled(), reduction=reduction)
    found = ranks(3).run(jobs.pulled, reduction)
    found = torch.cat(found) if reduction == "none" else found[1]
    assert_equal_to_1e10([found], [expected])


def test_norms_and_hard_negatives_in_a_class_parallel_head():
    sentence = "expected a `margin` that uses norms or has hard negatives, and not both, got Both()"
    assert all(sentence in said for said in ranks(3).run(jobs.refused))


# Derivatives ------------------------------------------------------------------------------------------


@every_kind
def test_the_reference_to_any_order(kind):
    x, weight, labels = problem(rows=4, dim=5, classes=4)
    given = asked(kind)
    if "margin" in given:
        given["margin"].eval()
        for t in given["margin"].buffers():
            t.fill_(0.3)

    def loss(x, w):
        return nf.reference.normface_loss(x, w, labels, 6.0, reduction="sum", **given)

    # Threshold and t are constants of the formula, which finite differences move.
    kept = labels != -100
    cos = F.linear(F.normalize(x), F.normalize(weight))
    own = cos.gather(1, labels.clamp_min(0)[:, None]).squeeze(1)
    gaps = (cos - own[:, None] * (kind != "filter") - T * (kind == "filter"))[kept].abs()
    assert gaps[gaps > 0].min() > 1e-4
    inputs = x.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


# What is beside the loss ------------------------------------------------------------------------------


@every_kind
def test_logits_and_classes_are_those_of_any_head(kind):
    x, _, _ = problem()
    head = nf.NormFaceLoss(16, 7, scale=16.0, dtype=torch.float64, **asked(kind))
    plain = nf.NormFaceLoss(16, 7, scale=16.0, dtype=torch.float64)
    plain.weight.data.copy_(head.weight.data)
    assert torch.equal(head(x), plain(x)) and torch.equal(head.predict(x), plain.predict(x))


@every_kind
def test_compiled_without_a_break(kind, compile_fully):
    """Values and gradients; outside the window of the fixed shift as well."""
    for scale in (16.0, 1000.0):
        head = nf.NormFaceLoss(16, 7, scale=scale, dtype=torch.float64, **asked(kind)).eval()
        x, _, labels = problem()
        results = []
        for step in (head, compile_fully(head)):
            given = x.clone().requires_grad_()
            head.zero_grad()
            loss = step(given, labels)
            loss.backward()
            results.append([loss.detach(), given.grad, head.weight.grad])
        assert_equal_to_1e10(*results)


@pytest.mark.parametrize("kind", ["arc", "am"])
def test_made_within_a_compiled_step(kind, compile_fully):
    """As an argument of the function it may be made where it is used."""

    def loss(x, weight, labels):
        return nf.functional.normface_loss(x, weight, labels, 16.0, margin=nf.MVSoftmax(0.3, kind=kind))

    torch.testing.assert_close(compile_fully(loss)(*problem()), loss(*problem()))


@every_kind
def test_exported(kind):
    head = nf.NormFaceLoss(16, 7, scale=16.0, dtype=torch.float64, **asked(kind)).eval()
    x, _, labels = problem()
    program = torch.export.export(head, (x, labels))
    torch.testing.assert_close(program.module()(x, labels), head(x, labels))


def test_the_filter_beside_any_margin(lane):
    """One of numbers, one of the batch's, and one that is a function of the target cosines."""
    x, weight, labels = problem()
    for make in (lambda: nf.ArcFace(0.5), nf.MagFace, lambda: nf.ElasticArcFace(std=0.0, plus=True)):
        found = gradients(
            lambda x, w, make=make: nf.functional.normface_loss(
                x, w, lane.tensor(labels), 16.0, margin=make(), filter_threshold=0.1
            ),
            lane.tensor(x),
            lane.tensor(weight),
        )
        expected = gradients(
            lambda x, w, make=make: nf.reference.normface_loss(
                x, w, labels, 16.0, margin=make(), filter_threshold=0.1
            ),
            x,
            weight,
        )
        assert_equal_to_1e10(found, expected)
        without = nf.functional.normface_loss(x, weight, labels, 16.0, margin=make())
        assert (found[0].cpu() - without).abs() > 1e-3


# A margin of one's own --------------------------------------------------------------------------------


class Circle(nf.BatchMargin):
    """Circle loss on classes, its others' side: s ([c + m]_+)(c - m) with the bracket detached."""

    hard_negatives = True

    def of(self, rows):
        m = 0.25
        return nf.HardNegatives(
            nf.CosFace(0.35),
            torch.full_like(rows.cosine, -m),
            (1.0, 0.0, -m * m),
            (1.0, torch.full_like(rows.cosine[:1], m)),
            below=0.0,
            highest=1 - m * m,
            lowest=-m * m,
        )


def test_a_slope_that_is_not_the_derivative(lane):
    x, weight, labels = problem()
    kept = labels != -100

    def loss(x, w):
        cos = F.linear(F.normalize(x[kept]), F.normalize(w))
        logits = (cos.detach() + 0.25).clamp_min(0) * (cos - 0.25)
        rows, y = torch.arange(len(cos)), labels[kept]
        logits = logits.index_put((rows, y), cos[rows, y] - 0.35)
        return F.cross_entropy(100 * logits, y)

    expected = gradients(loss, x, weight)
    for made in (nf.functional, nf.reference):
        found = gradients(
            lambda x, w, made=made: made.normface_loss(x, w, lane.tensor(labels), 100.0, margin=Circle()),
            lane.tensor(x),
            lane.tensor(weight),
        )
        assert_equal_to_1e10(found, expected)


GOOD = nf.HardNegatives(nf.CosFace(0.3), torch.zeros(9), (0.0, 1.0, 0.0), (0.0, 1.0))


@pytest.mark.parametrize(
    "found, error, sentence",
    [
        (nf.CosFace(0.3), TypeError, "expected `Mine.of` to return HardNegatives, got CosFace"),
        (None, TypeError, "expected `Mine.of` to return HardNegatives, got None"),
        (GOOD._replace(target=nf.AdaFace()), TypeError, "expected the `target` of Mine.of to be a margin of"),
        (GOOD._replace(threshold=0.3), TypeError, "the threshold of Mine.of` to return a floating tensor"),
        (GOOD._replace(threshold=torch.zeros(8)), ValueError, r"shape \[9\], got shape \[8\]"),
        (GOOD._replace(lowest=1.0), ValueError, "expected `lowest` < `highest` of Mine.of, got 1 and 1"),
        (GOOD._replace(highest=math.inf), ValueError, "expected `highest of Mine.of` to be finite, got inf"),
        (GOOD._replace(below="1"), TypeError, "expected `below of Mine.of` to be a number, got str"),
        (GOOD._replace(logit=(1.0, 0.0)), ValueError, "`logit of Mine.of` to be 3 numbers, got 2"),
        (GOOD._replace(slope=(0.0, 1.0, 0.0)), ValueError, "`slope of Mine.of` to be 2 numbers, got 3"),
        (GOOD._replace(slope=1.0), ValueError, "`slope of Mine.of` to be 2 numbers, got 1.0"),
        (
            GOOD._replace(slope=(0.0, "1")),
            TypeError,
            "`slope of Mine.of` to be numbers or tensors of one, got",
        ),
        (GOOD._replace(logit=(0.0, math.nan, 0.0)), ValueError, "`logit of Mine.of` to be finite, got nan"),
        (
            GOOD._replace(slope=(0.0, torch.zeros(2))),
            ValueError,
            r"of one element, got torch.float32 of shape \[2\]",
        ),
        (GOOD._replace(slope=(0.0, torch.tensor(1))), ValueError, "of one element, got torch.int64 of shape"),
        (
            GOOD._replace(slope=(0.0, torch.ones(1, device="meta"))),
            ValueError,
            r"`slope of Mine.of` on the device of `x` \(cpu\), got meta",
        ),
    ],
)
def test_what_such_a_margin_returns(found, error, sentence):
    class Mine(nf.BatchMargin):
        hard_negatives = True

        def of(self, rows):
            return found

    with pytest.raises(error, match=sentence):
        nf.functional.normface_loss(*problem(), 16.0, margin=Mine())


def test_hard_negatives_are_announced():
    class Mine(nf.BatchMargin):
        def of(self, rows):
            return GOOD

    with pytest.raises(TypeError, match=r"expected `Mine.of` to return a margin of numbers.*HardNegatives"):
        nf.functional.normface_loss(*problem(), 16.0, margin=Mine())


# Sentences --------------------------------------------------------------------------------------------


@every_kind
def test_label_smoothing_is_refused(kind):
    """By the function, the constructor, and the attribute, which stays as it was."""
    name = type(asked(kind).get("margin")).__name__ if kind != "filter" else "a `filter_threshold`"
    sentence = f"expected `label_smoothing` 0 with {name}, which changes the logits .*, got 0.1"
    with pytest.raises(ValueError, match=f"^normface_loss: {sentence}"):
        nf.functional.normface_loss(*problem(), 16.0, label_smoothing=0.1, **asked(kind))
    with pytest.raises(ValueError, match=f"^NormFaceLoss: {sentence}"):
        nf.NormFaceLoss(16, 7, label_smoothing=0.1, **asked(kind))
    head = nf.NormFaceLoss(16, 7, **asked(kind))
    with pytest.raises(ValueError, match=f"^NormFaceLoss: {sentence}"):
        head.label_smoothing = 0.1
    assert head.label_smoothing == 0.0
    smooth = nf.NormFaceLoss(16, 7, label_smoothing=0.1)
    with pytest.raises(ValueError, match=f"^NormFaceLoss: {sentence}"):
        for option, value in asked(kind).items():
            setattr(smooth, option, value)
    assert smooth.margin is None and smooth.filter_threshold is None


def test_one_threshold_at_a_time():
    sentence = (
        "expected `filter_threshold` None with CurricularFace, which has a threshold of its own, got 0.4"
    )
    with pytest.raises(ValueError, match=f"^normface_loss: {sentence}"):
        nf.functional.normface_loss(*problem(), 16.0, margin=nf.CurricularFace(), filter_threshold=0.4)
    head = nf.NormFaceLoss(16, 7, margin=nf.CurricularFace())
    with pytest.raises(ValueError, match=f"^NormFaceLoss: {sentence}"):
        head.filter_threshold = 0.4


@pytest.mark.parametrize(
    "value, error, got",
    [
        (1.5, ValueError, "1.5"),
        (math.nan, ValueError, "nan"),
        ("x", TypeError, "str"),
        (True, TypeError, "bool"),
    ],
)
def test_a_filter_is_a_cosine(value, error, got):
    with pytest.raises(error, match=rf"expected `filter_threshold` .*, got {got}"):
        nf.functional.normface_loss(*problem(), 16.0, filter_threshold=value)


def test_the_filter_is_an_attribute_and_shown():
    head = nf.NormFaceLoss(16, 7, filter_threshold=0.4)
    assert head.filter_threshold == 0.4 and "filter_threshold=0.4" in repr(head)
    head.filter_threshold = None
    assert "filter_threshold" not in repr(head)


def test_terms_are_those_of_the_engine():
    assert row_state.TERMS["hard_negatives"] == 1
