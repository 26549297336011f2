"""c_contrastive_loss and c_triplet_loss in every lane, against the float64 specification."""

import math

import pytest
import torch
from lanes import ODD_SIZES

import normface_ext as nf
from normface_ext import reference
from normface_ext.engine import row_state
from normface_ext.testing import assert_close_to_truth, assert_matches_reference

IGNORE = -100
CONTRASTIVE = {
    "plain": {},
    "wide": {"neg_margin": 2.4, "pos_margin": 0.3, "neg_weight": 0.5, "pos_weight": 3.0},
    "outlier": {"positive_outlier_thresh": 1.9},
    "hardest": {"hardest_only": True, "neg_margin": 1.9},
    "exponential": {"exp_negative_weight": True, "neg_margin": 1.8},
    "hardest exponential": {"hardest_only": True, "exp_negative_weight": True, "neg_margin": 1.8},
    "max positive": {"max_positive_only": True, "neg_margin": 1.7},
    "positive first": {"positive_first": True, "positive_upper_bound": 2.0, "neg_margin": 2.2},
    "normalized": {"normalize_negative": 0.3, "neg_margin": 2.1, "pos_weight": 0.5},
    "normalized exponential": {"normalize_negative": 0.1, "neg_margin": 2.1, "exp_negative_weight": True},
}
TRIPLET = {
    "plain": {"margin": 0.2},
    "wide": {"margin": 2.0, "neg_weight": 0.25},
    "hardest": {"hardest_only": True},
    "center": {"add_center_loss": True, "pos_weight": 0.3},
    "positive first": {"positive_first": True, "positive_upper_bound": 2.0, "add_center_loss": True},
}
CASES = [("c_contrastive_loss", options) for options in CONTRASTIVE.values()]
CASES += [("c_triplet_loss", options) for options in TRIPLET.values()]
NAMES = [f"contrastive {name}" for name in CONTRASTIVE] + [f"triplet {name}" for name in TRIPLET]
every_case = pytest.mark.parametrize(("loss", "options"), CASES, ids=NAMES)
#: The statistics of each.
STATS = {"c_contrastive_loss": "c_contrastive_stats", "c_triplet_loss": "c_triplet_stats"}
#: Each over given distances.
OF_DISTANCES = {"c_contrastive_loss": "contrastive_of_distances", "c_triplet_loss": "triplet_of_distances"}
both = pytest.mark.parametrize("loss", ["c_contrastive_loss", "c_triplet_loss"])
every_reduction = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])


def sample(lane, batch=6, dim=33, classes=41, dtype=torch.float32, weight_dtype=None, grad=True, near=1.0):
    """Features near their agents, so that some hinges are active and some are not."""
    weight = lane.randn(classes, dim, dtype=weight_dtype or dtype, seed=1, grad=grad)
    labels = lane.labels(batch, classes)
    x = weight.detach()[labels].double() + near * lane.randn(batch, dim, dtype=torch.float64)
    return lane.tensor(x, dtype, grad=grad), weight, labels


def held(loss, labels, **options):
    """The loss with the norms held constant: gradients before the radial part is taken out."""

    def function(x, weight):
        before, reference.rows.norm_of = reference.rows.norm_of, lambda *given: before(*given).detach()
        try:
            return getattr(reference, loss)(x, weight, labels, **options)
        finally:
            reference.rows.norm_of = before

    return function


def in_bfloat16(labels, straight):
    """The cosines on tensor cores, whose operands are unit rows in bfloat16, but for the label's agent;
    `straight`: the gradients do not know of the rounding."""

    def operand(rows):
        rounded = rows.bfloat16()
        return rows + (rounded.to(rows) - rows).detach() if straight else rounded

    def function(x, weight, eps=1e-12, normalize_input=True):
        units = [t / reference.rows.norm_of(t, 1, 2, eps) for t in map(reference.rows.widened, (x, weight))]
        others = operand(units[0]) @ operand(units[1]).t()
        here = torch.arange(len(weight), device=x.device) == labels[:, None]
        own = (units[0] * units[1][labels.clamp_min(0)]).sum(1, keepdim=True)
        return torch.where(here, own, others.to(own))

    return function


def with_cosine(function, cosine):
    def changed(*tensors):
        before, reference.agents.cosine = reference.agents.cosine, cosine
        try:
            return function(*tensors)
        finally:
            reference.agents.cosine = before

    return changed


def check(lane, loss, x, weight, labels, name=None, *, floor=16.0, limit=None, workspace=None, **options):
    def formula(x, w):
        return getattr(reference, loss)(x, w, labels, **options)

    terms, how = held(loss, labels, **options), {}
    if not lane.widens and min(x.dtype.itemsize, weight.dtype.itemsize) == 2:
        # The truth is of the cosines that rounded operands have: rounding must not decide what is active.
        # Every rounding counts once in either, but not the same way: one sample can be three times worse.
        straight = in_bfloat16(labels, True)
        how = {"plain": with_cosine(formula, in_bfloat16(labels, False)), "factor": 3.0, "scalar_factor": 8.0}
        formula, terms = with_cosine(formula, straight), with_cosine(terms, straight)
    assert_matches_reference(
        lambda x, w: getattr(nf.functional, loss)(
            x, w, labels, active_limit=limit, workspace=workspace, **options
        ),
        formula,
        [x, weight],
        name or loss,
        terms=terms,
        floor=floor,
        **how,
    )


# Options --------------------------------------------------------------------------------------------


@pytest.mark.covering(2)
@every_reduction
@every_case
@pytest.mark.parametrize("limit", [None, 0, 3, 40])
def test_options(lane, loss, options, limit, reduction):
    """Any list length gives the same numbers: lists, overflowing lists, no lists."""
    x, weight, labels = sample(lane)
    labels[3] = IGNORE
    check(lane, loss, x, weight, labels, limit=limit, reduction=reduction, **options)


@pytest.mark.covering(2)
@every_case
@pytest.mark.parametrize("limit", [0, 8])
def test_gradcheck(lane, loss, options, limit):
    x, weight, labels = sample(lane, 4, 5, 9, torch.float64)
    labels[2] = IGNORE

    def function(x, weight):
        return getattr(nf.functional, loss)(
            x, weight, labels, eps=0.01, reduction="none", active_limit=limit, **options
        )

    if "normalize_negative" in options:  # its divisor counts as a constant
        options = {**options, "normalize_negative": 1e6}
    assert torch.autograd.gradcheck(function, (x, weight), fast_mode=lane.slow)


@pytest.mark.parametrize("exponential", [True, False])
@pytest.mark.parametrize("partial", [True, False])
@pytest.mark.parametrize("sink", ["active", "hardest"])
def test_opcheck(lane, sink, partial, exponential):
    x, weight, labels = sample(lane, dtype=torch.bfloat16, grad=False)
    op, capacity = nf.engine.library.namespace(), 5 if sink == "active" else 1
    term = row_state.TERMS["exponential_hinge" if exponential else "hinge"]

    def checked(op, *arguments):
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
        return op(*arguments)

    for shard in (weight, weight[:0]) if partial else (weight,):
        given = labels if len(shard) else torch.full_like(labels, -1)
        options = (IGNORE, 1e-12, partial)
        cosine = checked(op.target_cosine.default, x, shard, given, *options)
        for known in (cosine, None):
            options = (None, 1.9, False, IGNORE, 1e-12, partial)
            _, threshold = checked(op.hinge_threshold.default, x, shard, given, known, *options)
        options = (False, False, False, False, row_state.SINKS[sink], capacity)
        options += (IGNORE, 1.0, 1e-12, max(1, len(shard)), term, -1.0, 1.0, 1)
        options += (1 << 20, "auto", torch.float32, partial)
        inputs = (x, shard, given, None, threshold, *[None] * 4)
        rows, inverse, *_, listed, found = op.head_sweep(*inputs, *options)
        g = lane.randn(6), lane.randn(6, seed=1)
        slopes = checked(op.hinge_slopes.default, rows, *g, True, term)
        arguments = (rows, slopes, given, listed, found, 1, len(shard), sink == "hardest", term)
        pairs = checked(op.hinge_pairs.default, *arguments)
        arguments = (*pairs, inverse, True, False, 1e-12, partial)
        checked(op.cosine_pairs_backward.default, x, shard, *arguments)


def test_by_hand(lane):
    """Three agents on the axes and one against; distances 0, 2, 2, 4 from the first."""
    weight = lane.tensor([[2.0, 0, 0], [0, 3, 0], [0, 0, 1], [-1, 0, 0]], grad=True)
    x = lane.tensor([[5.0, 0, 0], [5, 0, 0]], grad=True)
    labels = lane.tensor([0, 1])
    loss = nf.functional.c_contrastive_loss(x, weight, labels, neg_margin=3.0, reduction="none")
    assert loss.tolist() == pytest.approx([1 + 1, 2 + 3 + 1], abs=1e-6)
    loss = nf.functional.c_contrastive_loss(
        x, weight, labels, neg_margin=3.0, reduction="none", hardest_only=True
    )
    assert loss.tolist() == pytest.approx([1, 2 + 3], abs=1e-6)
    loss = nf.functional.c_triplet_loss(x, weight, labels, margin=0.5)
    stats = nf.functional.c_triplet_stats(x, weight, labels, margin=0.5)
    assert float(loss.detach()) == pytest.approx((0 + 2.5 + 0.5) / 2, abs=1e-6)
    assert stats.tolist() == pytest.approx([1.0, (8 / 3 + 6 / 3) / 2], abs=1e-6)
    loss.backward()
    # Row 1: d_y is in two active terms, which pull along +e2 twice, and push from e1 (radial) and e3.
    assert x.grad[0].abs().max() == 0
    assert x.grad[1].tolist() == pytest.approx([0, -2 * 2 / 5 / 2, 2 / 5 / 2], abs=1e-6)


def test_the_paper_s_formula_in_numpy(lane):
    """Independent of the reference: double loops over d = |x/|x| - w/|w||^2."""
    x, weight, labels = sample(lane, 5, 7, 9, torch.float64, grad=False)
    xn, wn = (t.cpu().numpy() / t.cpu().norm(dim=1, keepdim=True).numpy() for t in (x, weight))
    contrastive = triplet = 0.0
    for i, y in enumerate(labels.tolist()):
        d = ((xn[i] - wn) ** 2).sum(1)
        contrastive += max(0, d[y] - 0.1)
        for j in range(9):
            if j != y:
                contrastive += max(0, 1.9 - d[j])
                triplet += max(0, 0.9 + d[y] - d[j])
    got = nf.functional.c_contrastive_loss(x, weight, labels, pos_margin=0.1, neg_margin=1.9)
    assert float(got) == pytest.approx(contrastive / 5, rel=1e-12)
    assert float(nf.functional.c_triplet_loss(x, weight, labels, margin=0.9)) == pytest.approx(
        triplet / 5, rel=1e-12
    )


# Sizes and dtypes -----------------------------------------------------------------------------------


@pytest.mark.covering(1)
@both
@pytest.mark.parametrize("size", ODD_SIZES)
def test_odd_sizes(lane, size, loss):
    for batch, dim, classes in ((size, 17, 3), (3, size, 5), (3, 17, size)):
        x, weight, labels = sample(lane, batch, dim, classes)
        for limit in (0, 300):
            if dim == 1:
                check_on_a_line(loss, x, weight, labels % classes, limit)
            else:
                check(
                    lane, loss, x, weight, labels % classes, f"N={batch}, D={dim}, C={classes}", limit=limit
                )


def check_on_a_line(loss, x, weight, labels, limit):
    """One column: every gradient is radial, and what the projection leaves of it is its rounding."""
    value = getattr(nf.functional, loss)(x, weight, labels, active_limit=limit)
    truth = getattr(reference, loss)(x.detach().double(), weight.detach().double(), labels)
    assert_close_to_truth(value, truth, None, loss, floor=32)
    gradients = torch.autograd.grad(value, (x, weight))
    for gradient, rows in zip(gradients, (x, weight), strict=True):
        radial = (
            2.0 * len(weight) / rows.detach().abs()
        )  # at most two of every class, in the mean over the rows
        assert (gradient.abs() <= 8 * torch.finfo(x.dtype).eps * radial).all()


@both
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float16),
    ],
    ids=lambda dtypes: "-".join(str(dtype).removeprefix("torch.") for dtype in dtypes),
)
@pytest.mark.parametrize("limit", [0, 40])
def test_dtypes(lane, dtypes, limit, loss):
    x, weight, labels = sample(lane, dtype=dtypes[0], weight_dtype=dtypes[1])
    check(lane, loss, x, weight, labels, limit=limit)
    check(lane, loss, x, weight, labels, limit=limit, hardest_only=True, reduction="none")
    value = getattr(nf.functional, loss)(x, weight, labels)
    assert value.dtype == (torch.float64 if dtypes[0] == torch.float64 else torch.float32)


@both
@every_reduction
def test_empty_batch_and_no_features(lane, reduction, loss):
    for limit in (None, 0, 3):
        x, weight = lane.randn(0, 6, grad=True), lane.randn(4, 6, grad=True)
        labels, options = lane.tensor([], torch.int64), {"reduction": reduction, "active_limit": limit}
        value = getattr(nf.functional, loss)(x, weight, labels, **options)
        stats = getattr(nf.functional, STATS[loss])(x, weight, labels, **options)
        value.sum().backward()
        assert value.sum() == 0 and x.grad.shape == (0, 6) and (weight.grad == 0).all() and (stats == 0).all()
    x, weight = lane.randn(3, 0, grad=True), lane.randn(2, 0, grad=True)
    value = getattr(nf.functional, loss)(x, weight, lane.tensor([0, 1, 1]))
    value.backward()
    assert value.isfinite() and weight.grad.shape == (2, 0)


@both
def test_one_class(lane, loss):
    x, weight, _ = sample(lane, 3, 5, 1)
    labels = lane.tensor([0, 0, 0])
    for options in ({}, {"hardest_only": True}):
        check(lane, loss, x, weight, labels, reduction="none", **options)


@both
def test_chunks_do_not_matter(lane, loss):
    classes = 17 if lane.slow else 70
    x, weight, labels = sample(lane, 7, 20, classes, dtype=torch.float64)
    device = nf.engine.calls.plan_device(x)
    with pytest.raises(ValueError) as raised:
        nf.plan(7, 20, classes, torch.float64, device, workspace=0)
    least = int(str(raised.value).split("at least ")[1].split()[0])
    values = []
    for workspace in (least, least + 2000, None):
        for options in ({}, {"hardest_only": True}, {"active_limit": 0}):
            value = getattr(nf.functional, loss)(x, weight, labels, workspace=workspace, **options)
            values.append(torch.stack([value, *(g.sum() for g in torch.autograd.grad(value, (x, weight)))]))
        check(lane, loss, x, weight, labels, workspace=workspace, limit=40)
    for other in values[3:]:
        assert min(float((other - first).abs().max()) for first in values[:3]) < 1e-9


# Exact sparsity -------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("limit", [0, 60])
def test_what_is_inactive_has_no_gradient_at_all(lane, limit, loss):
    x, weight, labels = sample(lane, 5, 64, 60, near=0.2)
    value = getattr(nf.functional, loss)(x, weight, labels, active_limit=limit)
    value.backward()
    d = 2 - 2 * reference.cosine(x.detach(), weight.detach())
    target = d.gather(1, labels[:, None])
    active = d < (1.0 if loss == "c_contrastive_loss" else target + 0.8)
    if loss == "c_contrastive_loss":
        active[torch.arange(5, device=x.device), labels] = True
    touched = active.any(0)
    assert 0 < touched.sum() < 20
    touched[labels] |= loss == "c_contrastive_loss"
    assert (weight.grad[~touched & ~torch.isin(torch.arange(60, device=x.device), labels)] == 0).all()


@both
def test_lists_and_sweeps_are_chosen_by_what_is_active(lane, loss, monkeypatch):
    x, weight, labels = sample(lane)
    calls = []
    for name in ("head_backward", "cosine_pairs_backward"):
        real = getattr(nf.engine.library.namespace(), name)
        monkeypatch.setattr(
            nf.engine.library.namespace(),
            name,
            lambda *a, n=name, r=real: calls.append(n) or r(*a),
            raising=False,
        )
    options = {"neg_margin": 3.9} if loss == "c_contrastive_loss" else {"margin": 3.9}
    for limit in (40, 5, 0):
        getattr(nf.functional, loss)(x, weight, labels, active_limit=limit, **options).backward()
    getattr(nf.functional, loss)(x, weight, labels, hardest_only=True, **options).backward()
    assert calls == [
        "cosine_pairs_backward",
        "head_backward",
        "head_backward",
        "cosine_pairs_backward",
    ]


@both
@pytest.mark.parametrize("limit", [0, 40])
def test_runs_are_bit_identical(lane, limit, loss):
    x, weight, labels = sample(lane, 9, 40, 300)
    runs = []
    for _ in range(3):
        value = getattr(nf.functional, loss)(x, weight, labels, active_limit=limit)
        runs.append([value, *torch.autograd.grad(value, (x, weight))])
    for other in runs[1:]:
        for one, same in zip(runs[0], other, strict=True):
            assert torch.equal(one, same)


# Ignored rows, NaN, magnitudes ----------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("limit", [0, 40])
def test_ignored_rows_reach_nothing(lane, loss, options, limit):
    x, weight, labels = sample(lane)
    labels[2] = IGNORE
    results = []
    for poison in (0.0, math.nan, math.inf):
        rows = x.detach().clone()
        rows[2] += poison
        leaves = [rows.requires_grad_(), weight.detach().clone().requires_grad_()]
        value = getattr(nf.functional, loss)(*leaves, labels, active_limit=limit, **options)
        stats = getattr(nf.functional, STATS[loss])(*leaves, labels, active_limit=limit, **options)
        value.backward()
        assert (leaves[0].grad[2] == 0).all()
        results.append([value, stats, *(leaf.grad for leaf in leaves)])
    for other in results[1:]:
        for one, same in zip(results[0], other, strict=True):
            assert torch.equal(one, same)
    kept = labels != IGNORE
    shorter = getattr(nf.functional, loss)(x[kept], weight, labels[kept], active_limit=limit, **options)
    assert torch.allclose(results[0][0], shorter, rtol=1e-6)


@both
def test_all_ignored_is_zero(lane, loss):
    x, weight, labels = sample(lane)
    labels.fill_(IGNORE)
    value = getattr(nf.functional, loss)(x, weight, labels)
    stats = getattr(nf.functional, STATS[loss])(x, weight, labels)
    value.backward()
    assert value == 0 and (stats == 0).all() and (x.grad == 0).all() and (weight.grad == 0).all()


@both
def test_nan_shows_in_its_row_and_in_no_other(lane, loss):
    x, weight, labels = sample(lane, grad=False)
    poisoned = x.clone()
    poisoned[2, 5] = math.nan
    for options in ({}, {"hardest_only": True}):
        function = getattr(nf.functional, loss)
        clean = function(x, weight, labels, reduction="none", **options)
        losses = function(poisoned, weight, labels, reduction="none", **options)
        assert losses.isnan().tolist() == [False, False, True, False, False, False]
        assert torch.equal(losses.nan_to_num(0)[[0, 1, 3, 4, 5]], clean[[0, 1, 3, 4, 5]])
        bad = weight.clone()
        bad[20, 0] = math.nan
        others = (labels != 20).tolist()
        assert function(x, bad, labels, reduction="none", **options).isnan().tolist() == [
            o or True for o in others
        ]


@both
@pytest.mark.parametrize("limit", [0, 40])
def test_rows_of_any_magnitude(lane, limit, loss):
    x = lane.rows(8, 40, kinds=("plain", "huge", "zero", "tiny"), grad=True)
    weight = lane.rows(9, 40, kinds=("huge", "ones", "plain", "zero"), seed=1, grad=True)
    labels = lane.labels(8, 9)
    value = getattr(nf.functional, loss)(x, weight, labels, reduction="none", active_limit=limit)
    truth = getattr(reference, loss)(x.double(), weight.double(), labels, reduction="none")
    assert_close_to_truth(value, truth, None, loss, floor=32)
    value.sum().backward()
    assert x.grad.isfinite().all() and weight.grad.isfinite().all()


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("limit", [0, 40])
def test_zero_rows_have_finite_gradients(lane, limit, dtype, loss):
    """One padded row or one dead agent must not poison the step, in float16 neither."""
    narrow = (
        dtype.itemsize == 2 and not lane.widens
    )  # tensor cores: coefficients and what they meet in bfloat16
    eps = torch.finfo(torch.bfloat16 if narrow else dtype).eps
    x = lane.rows(4, 9, dtype, kinds=("zero", "plain"), grad=True)
    weight = lane.rows(4, 9, dtype, kinds=("plain", "zero"), seed=1, grad=True)
    margin = {"neg_margin" if loss == "c_contrastive_loss" else "margin": 2.5}
    value = getattr(nf.functional, loss)(x, weight, lane.tensor([0, 1, 2, 3]), active_limit=limit, **margin)
    value.backward()
    largest = torch.finfo(dtype).max
    assert torch.isfinite(value) and torch.isfinite(x.grad).all() and torch.isfinite(weight.grad).all()
    # g / sqrt(eps) in every dtype that has it
    for grad, row in ((x.grad, 0), (weight.grad, 1)):
        assert grad[row].abs().max() == largest if dtype == torch.float16 else grad[row].abs().max() > 1e5
    truth = [t.detach().double().requires_grad_() for t in (x, weight)]
    getattr(reference, loss)(*truth, lane.tensor([0, 1, 2, 3]), **margin).backward()
    for grad, exact in zip((x.grad, weight.grad), truth, strict=True):
        expected = exact.grad.clamp(-largest, largest)
        assert torch.allclose(grad.double(), expected, rtol=4 * eps, atol=1e-4)


@both
def test_collapsed_onto_the_agents(lane, loss):
    """x = its agent: d = 0 to the last digits, and nothing pulls."""
    _, weight, labels = sample(lane, grad=False)
    x = lane.tensor(3 * weight[labels], grad=True)
    weight.requires_grad_()
    options = {"neg_margin": 0.1} if loss == "c_contrastive_loss" else {"margin": 0.1}
    value = getattr(nf.functional, loss)(x, weight, labels, reduction="none", **options)
    assert (value >= 0).all() and value.max() < 1e-6
    value.sum().backward()
    assert x.grad.abs().max() < 1e-5


# Statistics, tensors, state -------------------------------------------------------------------------


@every_case
def test_stats(lane, loss, options):
    x, weight, labels = sample(lane)
    value = getattr(nf.functional, loss)(x, weight, labels, **options)
    stats = getattr(nf.functional, STATS[loss])(x, weight, labels, **options)
    assert not stats.requires_grad and stats.dtype == torch.float32
    d = 2 - 2 * reference.cosine(x.double(), weight.double()).detach()
    own = torch.nn.functional.one_hot(labels, 41).bool()
    if loss == "c_contrastive_loss":
        positive = (d[own] - options.get("pos_margin", 0)).clamp(0, options.get("positive_outlier_thresh", 4))
        others = (options.get("neg_margin", 1.0) - d[~own]).clamp_min(0)
    else:
        positive, others = d[own], d[~own]
    expected = [float(positive.mean()), float(others.mean())]
    assert stats.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-7)
    same = getattr(reference, STATS[loss])(x.double(), weight.double(), labels, **options)
    assert same.tolist() == pytest.approx(expected, rel=1e-9) and not same.requires_grad
    given = getattr(reference, OF_DISTANCES[loss])(d, labels, **options)
    assert float(given) == pytest.approx(float(value), rel=1e-5)


@both
def test_given_distances(lane, loss):
    x, weight, labels = sample(lane, dtype=torch.float64)
    labels[1] = IGNORE
    d = (2 - 2 * reference.cosine(x, weight)).detach().requires_grad_()
    of_distances = getattr(reference, OF_DISTANCES[loss])
    value = of_distances(d, labels)
    assert float(value) == pytest.approx(float(getattr(nf.functional, loss)(x, weight, labels)), rel=1e-12)
    assert torch.autograd.gradcheck(lambda d: of_distances(d, labels), (d,))


def test_margin_as_a_tensor(lane):
    x, weight, labels = sample(lane)
    fixed = nf.functional.c_contrastive_loss(x, weight, labels, neg_margin=1.75)
    given = nf.functional.c_contrastive_loss(x, weight, labels, neg_margin=lane.tensor(1.75))
    assert torch.equal(fixed, given)


def test_intra_mae_is_a_buffer(lane):
    x, weight, labels = sample(lane, grad=False)
    module = nf.CContrastiveLoss(33, 41, add_intra_mae=True, neg_margin=1.8).to(lane.device)
    with torch.no_grad():
        module.weight.copy_(weight)
    mean, cap = 0.0, 1.2
    for _ in range(3):
        expected = nf.functional.c_contrastive_loss(x, weight, labels, neg_margin=1.8 + mean)
        stats = nf.functional.c_contrastive_stats(x, weight, labels, neg_margin=1.8 + mean)
        assert module.stats(x, labels).tolist() == pytest.approx(stats.tolist(), rel=1e-5)
        assert float(module(x, labels)) == pytest.approx(float(expected), rel=1e-6)
        mean = min(cap, 0.99 * mean + 0.01 * float(stats[0]))
        assert float(module.intra_mae) == pytest.approx(mean, rel=1e-5)
    assert float(module.intra_mae) == pytest.approx(mean, rel=1e-5) and mean > 0
    copy = nf.CContrastiveLoss(33, 41, add_intra_mae=True).to(lane.device)
    copy.load_state_dict(module.state_dict())
    assert torch.equal(copy.intra_mae, module.intra_mae)
    module.eval()
    module(x, labels)
    assert torch.equal(copy.intra_mae, module.intra_mae)
    module.train()
    module.max_negative_margin = mean / 2
    module(x, labels)
    assert float(module.intra_mae) == pytest.approx(mean / 2)
    assert "intra_mae" not in nf.CContrastiveLoss(3, 4).state_dict()


def test_modules(lane):
    x, _, labels = sample(lane, grad=False)
    for module, loss in ((nf.CContrastiveLoss, "c_contrastive_loss"), (nf.CTripletLoss, "c_triplet_loss")):
        layer = module(33, 41).to(lane.device)
        value = layer(x, labels)
        value.backward()
        assert torch.equal(value, getattr(nf.functional, loss)(x, layer.weight, labels))
        assert layer.weight.grad.abs().max() > 0
        stats = layer.stats(x, labels)
        assert torch.equal(stats, getattr(nf.functional, STATS[loss])(x, layer.weight, labels))
        assert "33, 41" in repr(layer)


@pytest.mark.covering(1)
@both
@pytest.mark.parametrize("hardest", [True, False])
def test_compiled_equals_eager(lane, compile_fully, hardest, loss):
    def step(x, weight, labels):
        return getattr(nf.functional, loss)(x, weight, labels, hardest_only=hardest)

    compiled = compile_fully(step)
    for batch in (6, 9):
        runs = []
        for function in (step, compiled):
            x, weight, labels = sample(lane, batch)
            value = function(x, weight, labels)
            value.backward()
            runs.append([value.detach(), x.grad, weight.grad])
        for eager, got in zip(*runs, strict=True):
            assert torch.allclose(got, eager, rtol=1e-5, atol=1e-6)


@both
@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("limit", [0, 40])
def test_only_wanted_gradients(lane, wanted, limit, loss):
    x, weight, labels = sample(lane, grad=False)
    check(lane, loss, x.requires_grad_(wanted[0]), weight.requires_grad_(wanted[1]), labels, limit=limit)


@both
def test_nothing_is_changed(lane, loss):
    x, weight, labels = sample(lane)
    labels[1] = IGNORE
    before = [t.detach().clone() for t in (x, weight, labels)]
    versions = [t._version for t in (x, weight, labels)]
    for options in ({}, {"active_limit": 0}, {"hardest_only": True}):
        getattr(nf.functional, loss)(x, weight, labels, **options).backward()
    for now, then, version in zip((x, weight, labels), before, versions, strict=True):
        assert torch.equal(now.detach(), then) and now._version == version


@both
def test_errors(loss):
    x, w, y = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 4])
    f = getattr(nf.functional, loss)
    margin = "neg_margin" if loss == "c_contrastive_loss" else "margin"
    with pytest.raises(ValueError, match=rf"^{loss}: expected `weight` to be \[C, 4\] to match `x`"):
        f(x, torch.randn(5, 3), y)
    with pytest.raises(TypeError, match=r"expected `labels` to be int64 or int32, got torch.float32"):
        f(x, w, y.float())
    with pytest.raises(IndexError, match=r"expected `labels` in \[0, 5\) .*got 5 at row 2"):
        f(x, w, torch.tensor([0, 1, 5]))
    with pytest.raises(ValueError, match=f"expected `{margin}` to be finite, got nan"):
        f(x, w, y, **{margin: math.nan})
    with pytest.raises(TypeError, match=f"expected `{margin}` to be a number, got str"):
        f(x, w, y, **{margin: "1"})
    with pytest.raises(TypeError, match=f"^{loss}: got an unexpected keyword argument `mode`"):
        f(x, w, y, mode="caffe")
    with pytest.raises(TypeError, match="expected `weight` to be a Tensor, got NoneType"):
        f(x, None, y)
    with pytest.raises(ValueError, match="expected `reduction` to be one of"):
        f(x, w, y, reduction="max")
    with pytest.raises(ValueError, match="expected `active_limit` >= 0, got -1"):
        f(x, w, y, active_limit=-1)
    with pytest.raises(TypeError, match="both float64 or both not"):
        f(x.double(), w, y)
    with pytest.raises(IndexError, match="got -100 at row 0"):
        f(x, w, torch.tensor([-100, 1, 2]), ignore_index=None)


def test_contrastive_errors():
    x, w, y = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 4])
    f = nf.functional.c_contrastive_loss
    with pytest.raises(ValueError, match="expected `normalize_negative` to be finite and > 0, got 0"):
        f(x, w, y, normalize_negative=0.0)
    with pytest.raises(ValueError, match="expected `neg_margin` to be a number or a 0-d floating tensor"):
        f(x, w, y, neg_margin=torch.ones(3))
