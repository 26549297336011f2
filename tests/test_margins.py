"""Margins: numbers of the head, of classes and of rows, with gradients; guards; the straight gradient."""

import copy
import dataclasses
import io
import math

import pytest
import torch
from lanes import DTYPES

import normface_ext as nf
from normface_ext import reference
from normface_ext.engine.dtypes import accumulator
from normface_ext.softmax.margins import Margin

F = nf.functional
GUARDS = [None, "shift", "join", "easy", "none"]
WIDE = [torch.float64, torch.float32]
BATCH, DIM, CLASSES = 7, 16, 5


def problem(lane, dtype=torch.float64, batch=BATCH):
    x = lane.randn(batch, DIM, dtype=dtype, grad=True)
    weight = lane.randn(CLASSES, DIM, dtype=dtype, seed=1, grad=True)
    labels = lane.labels(batch, CLASSES)
    if batch:
        labels[batch // 2] = -100
    return x, weight, labels


def rows_at(cosines, dtype=torch.float64):
    """Features whose cosine with class 0 of two orthogonal classes is what is asked for."""
    c = torch.as_tensor(cosines, dtype=torch.float64)
    return torch.stack([c, (1 - c * c).clamp_min(0).sqrt()], 1).to(dtype)


def psi_by_hand(theta, m1, m2, m3, guard):
    """One angle, in plain Python."""
    c, angle = math.cos(theta), m1 * theta + m2
    if guard is None:
        guard = "shift" if m1 == 1 else "join"
    if guard == "easy" and c <= 0:
        return c - m3
    if guard in ("shift", "join") and angle > math.pi:
        if guard == "shift":
            return c - m2 * math.sin(m2) - m3
        begin = (math.pi - m2) / m1  # where the angle is pi, and psi -1
        return -1 + (c - math.cos(begin)) - m3
    return math.cos(angle) - m3


def loss_by_hand(x, weight, labels, s, psi):
    """Per row, with psi(theta of the target, row); by acos, which is exact away from +-1."""
    cos = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(weight).t()
    kept = labels >= 0
    safe = labels.clamp_min(0)[:, None]
    target = psi(cos.gather(1, safe).squeeze(1).clamp(-1, 1).acos())
    column = s[:, None] if isinstance(s, torch.Tensor) and s.dim() else s
    losses = torch.nn.functional.cross_entropy(
        column * cos.scatter(1, safe, target[:, None]), safe.squeeze(1), reduction="none"
    )
    return torch.where(kept, losses, 0).sum() / kept.sum()


# The formula ------------------------------------------------------------------------------------------

NUMBERS = [
    (1.0, 0.5, 0.0),
    (1.0, 3.0, 0.1),
    (0.9, 0.4, 0.15),
    (0.5, 0.0, 0.0),
    (4.0, 0.0, 0.0),
    (1.35, 0.2, 0.2),
]


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("numbers", NUMBERS, ids=str)
def test_psi_is_the_formula_in_plain_python(lane, numbers, guard):
    angles = [0.05 + 0.1 * k for k in range(31)]
    x = lane.tensor(rows_at([math.cos(a) for a in angles]))
    weight, labels = lane.tensor(torch.eye(2).double()), lane.tensor([0] * len(angles))
    s = 3.0
    losses = F.normface_loss(
        x, weight, labels, s, margin=nf.CombinedMargin(*numbers, guard=guard), reduction="none", eps=0
    )
    for angle, loss in zip(angles, losses.tolist(), strict=True):
        psi = psi_by_hand(angle, *numbers, guard)
        assert loss == pytest.approx(math.log1p(math.exp(s * (math.sin(angle) - psi))), rel=1e-9), angle


@pytest.mark.parametrize("m1", [0.3, 0.9, 1.0, 2.5])
@pytest.mark.parametrize("m2", [0.0, 0.7, 3.0])
def test_the_join_has_no_jump(m1, m2):
    begin = (math.pi - m2) / m1
    if begin >= math.pi:
        return
    margin = nf.CombinedMargin(m1, m2, guard="join")
    below, above = reference.margin(torch.tensor([begin - 1e-7, begin + 1e-7]).double().cos(), margin)
    assert abs(float(below - above)) < 1e-6


@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("numbers", [*NUMBERS, (1.0, 0.0, 0.0)], ids=str)
def test_everything_is_finite_at_the_ends(lane, dtype, guard, numbers):
    x = lane.tensor(rows_at([1.0, -1.0, 0.0, 1.0, -1.0], dtype), grad=True)
    weight = lane.tensor(torch.eye(2), dtype, grad=True)
    m = [lane.tensor(float(v), torch.float64, grad=True) for v in numbers]
    loss = F.normface_loss(
        x, weight, lane.tensor([0, 0, 0, 1, 1]), 16.0, margin=nf.CombinedMargin(*m, guard=guard)
    )
    for gradient in torch.autograd.grad(loss, [x, weight, *m]):
        assert gradient.isfinite().all()


# Numbers that are tensors -------------------------------------------------------------------------------

KINDS = ["numbers", "0-d", "per class", "per row", "mixed"]


def tensors_of(lane, kind, numbers, dtype):
    """A margin, its leaves, and what every row has of m1, m2 and m3."""
    labels = problem(lane)[2].clamp_min(0)

    def spread(value, count):
        steps = torch.linspace(0.9, 1.1, count, dtype=torch.float64)
        return lane.tensor(value * steps + 0.01, dtype, grad=True)

    made, rows = [], []
    for place, value in enumerate(numbers):
        how = ("0-d", "per class", "numbers")[place] if kind == "mixed" else kind
        if how == "numbers":
            made.append(value)
            rows.append(torch.full((BATCH,), value, dtype=torch.float64, device=labels.device))
        elif how == "0-d":
            made.append(lane.tensor(value, dtype, grad=True))
            rows.append(made[-1].double().expand(BATCH))
        elif how == "per class":
            made.append(spread(value, CLASSES))
            rows.append(made[-1].double()[labels])
        else:
            made.append(spread(value, BATCH))
            rows.append(made[-1].double())
    make = nf.RowMargin if kind == "per row" else nf.CombinedMargin
    return make(*made), [m for m in made if isinstance(m, torch.Tensor)], rows


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_every_number_against_acos(lane, kind, dtype):
    x, weight, labels = problem(lane, dtype)
    margin, leaves, (m1, m2, m3) = tensors_of(lane, kind, (0.8, 0.2, 0.15), dtype)
    s = lane.tensor(torch.linspace(4, 9, BATCH), dtype, grad=True)
    loss = F.normface_loss(x, weight, labels, s, margin=margin)
    truth = loss_by_hand(
        x.double(), weight.double(), labels, s.double(), lambda theta: (m1 * theta + m2).cos() - m3
    )
    tolerance = {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 1e-6}
    torch.testing.assert_close(loss.double(), truth, **tolerance)
    given = [x, weight, s, *leaves]
    for leaf, a, b in zip(
        given, torch.autograd.grad(loss, given), torch.autograd.grad(truth, given), strict=True
    ):
        assert a.dtype == leaf.dtype and a.shape == leaf.shape
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.covering(2)
@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("gradient", ["exact", "straight"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_guards_with_tensors_are_those_of_the_reference(lane, dtype, guard, gradient):
    """Numbers of every row, some of them negative, over angles on both sides of pi."""
    x, weight, labels = problem(lane, dtype)
    wide = accumulator(dtype)
    numbers = ([1, 1, 1.5, 0.7, 1, 3, 2], [0.5, 2.8, -0.4, 0.3, 0, 3.3, 1], [0, 0.1, -0.2, 0.3, 0, 0.1, 0.2])
    m = [lane.tensor([float(v) for v in values], torch.float64, grad=True) for values in numbers]
    results = []
    for module, kind in ((F, dtype), (reference, torch.float64)):
        a, b = (t.detach().to(kind).requires_grad_() for t in (x, weight))
        loss = module.normface_loss(
            a, b, labels, 6.0, margin=nf.RowMargin(*m, guard=guard), margin_gradient=gradient, reduction="sum"
        )
        leaves = [a, b] if gradient == "straight" else [a, b, *m]
        assert gradient == "exact" or not any(
            g is not None for g in torch.autograd.grad(loss, m, retain_graph=True, allow_unused=True)
        )
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    tolerance = {torch.float64: 1e-10, torch.float32: 3e-5}.get(wide if dtype == wide else dtype, 6e-2)
    for got, truth in zip(*results, strict=True):
        scale = max(1.0, float(truth.detach().abs().max()))
        torch.testing.assert_close(got.double(), truth.double(), rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("kind", ["0-d", "per class", "per row"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_gradcheck(lane, kind, smoothing):
    x, weight, labels = problem(lane)
    count = {"0-d": (), "per class": (CLASSES,), "per row": (BATCH,)}[kind]
    make = nf.RowMargin if kind == "per row" else nf.CombinedMargin
    m = [lane.tensor(torch.full(count, v).double(), grad=True) for v in (1.1, 0.3, 0.2)]

    def loss(x, weight, *m):
        return F.normface_loss(x, weight, labels, 5.0, margin=make(*m), label_smoothing=smoothing)

    assert torch.autograd.gradcheck(loss, (x, weight, *m))


def test_the_straight_gradient_shifts_the_cosine_by_a_constant(lane):
    x, weight, labels = problem(lane)
    margin = nf.ArcFace(0.5)
    straight = F.normface_loss(x, weight, labels, 8.0, margin=margin, margin_gradient="straight")
    assert straight == F.normface_loss(x, weight, labels, 8.0, margin=margin)
    with torch.no_grad():
        cos = F.norm_linear(x, weight)
        own = cos.gather(1, labels.clamp_min(0)[:, None]).squeeze(1)
        shift = own - (own.acos() + 0.5).cos()
    constant = F.normface_loss(x, weight, labels, 8.0, margin=nf.RowMargin(m3=shift))
    for a, b in zip(
        torch.autograd.grad(straight, (x, weight)), torch.autograd.grad(constant, (x, weight)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_learned_margin_of_zero_has_its_slope(lane):
    """At m2 = 0 psi is the cosine to the last digit, and moves with m2 all the same."""
    x, weight, labels = problem(lane)
    m = lane.tensor(0.0, torch.float64, grad=True)
    loss = F.normface_loss(x, weight, labels, 8.0, margin=nf.ArcFace(m))
    assert loss == F.normface_loss(x, weight, labels, 8.0)
    (slope,) = torch.autograd.grad(loss, m)
    step = 1e-6
    above, below = (
        F.normface_loss(x, weight, labels, 8.0, margin=nf.RowMargin(m2=lane.tensor(d, torch.float64)))
        for d in (step, -step)
    )
    assert float(slope.detach()) == pytest.approx(float((above - below).detach()) / (2 * step), rel=1e-6)


def test_rows_that_do_not_count_give_nothing_to_their_class(lane):
    x, weight, labels = problem(lane)
    m = lane.randn(CLASSES, dtype=torch.float64, seed=3).abs().mul(0.1).requires_grad_()
    rows = lane.randn(BATCH, dtype=torch.float64, seed=4).abs().mul(0.1)
    rows[BATCH // 2] = math.nan
    rows.requires_grad_()
    dirty = x.detach().clone()
    dirty[BATCH // 2] = math.nan
    loss = F.normface_loss(dirty, weight, labels, 8.0, margin=nf.CosFace(m))
    assert loss == F.normface_loss(x, weight, labels, 8.0, margin=nf.CosFace(m))
    (of_class,) = torch.autograd.grad(loss, m)
    (of_row,) = torch.autograd.grad(
        F.normface_loss(x, weight, labels, 8.0, margin=nf.RowMargin(m2=rows)), rows
    )
    assert of_row[BATCH // 2] == 0 and of_row.isfinite().all()
    absent = [c for c in range(CLASSES) if c not in labels.tolist()]
    assert (of_class[absent] == 0).all() and of_class.isfinite().all()
    nobody = torch.full_like(labels, -100)
    assert (
        torch.autograd.grad(F.normface_loss(x, weight, nobody, 8.0, margin=nf.CosFace(m)), m)[0] == 0
    ).all()


def test_gradients_of_classes_repeat_bit_by_bit(lane):
    x, weight, labels = problem(lane, torch.float32, batch=64)
    m = lane.tensor(torch.full((CLASSES,), 0.3), torch.float32, grad=True)
    first, second = (
        torch.autograd.grad(F.normface_loss(x, weight, labels, 8.0, margin=nf.ArcFace(m)), m)[0]
        for _ in range(2)
    )
    assert torch.equal(first, second)


def test_an_empty_batch_and_a_single_class(lane):
    x, weight, labels = problem(lane, batch=0)
    m = lane.tensor(torch.full((CLASSES,), 0.3), torch.float64, grad=True)
    loss = F.normface_loss(x, weight, labels, 8.0, margin=nf.ArcFace(m))
    assert loss == 0 and (torch.autograd.grad(loss, m)[0] == 0).all()
    x = lane.randn(3, DIM, grad=True)
    one = lane.tensor([0.4], torch.float32, grad=True)
    loss = F.normface_loss(x, weight.float()[:1], lane.tensor([0, 0, 0]), 8.0, margin=nf.ArcFace(one))
    assert loss == 0 and (torch.autograd.grad(loss, one)[0] == 0).all()


# The scale of a row ---------------------------------------------------------------------------------------


@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [16, 72, 264])
@pytest.mark.parametrize(
    "span", [(1.0, 30.0), (200.0, 900.0), (-5.0, 500.0)], ids=["inside", "outside", "both"]
)
def test_a_scale_of_each_row_is_each_rows_own_scale(lane, dtype, dim, span):
    """Inside the window of the fixed shift, outside of it, and some rows here and some there."""
    x, weight = lane.randn(BATCH, dim, dtype=dtype, grad=True), lane.randn(131, dim, dtype=dtype, grad=True)
    labels = lane.labels(BATCH, 131)
    scale = lane.tensor(torch.linspace(*span, BATCH), accumulator(dtype), grad=True)
    each = F.normface_loss(x, weight, labels, scale, margin=nf.CosFace(0.1), reduction="none")
    got = torch.autograd.grad(each.sum(), (x, weight, scale))
    dw = torch.zeros_like(weight, dtype=torch.float64)
    for i in range(BATCH):
        s = scale[i].detach().requires_grad_()
        row = x[i : i + 1].detach().requires_grad_()
        alone = F.normface_loss(row, weight, labels[i : i + 1], s, margin=nf.CosFace(0.1))
        dx, of_weight, ds = torch.autograd.grad(alone, (row, weight, s))
        dw += of_weight.double()
        tight = {torch.float64: 1e-11, torch.float32: 1e-4}.get(dtype, 3e-2)
        for name, a, b in (("loss", each[i], alone), ("dx", got[0][i], dx[0]), ("ds", got[2][i], ds)):
            size = max(1.0, float(b.detach().abs().max()))
            assert float((a.detach().double() - b.detach().double()).abs().max()) <= tight * size, (i, name)
    size = max(1.0, float(dw.abs().max()))
    assert float((got[1].double() - dw).abs().max()) <= 4 * tight * size


# The values -----------------------------------------------------------------------------------------------


def test_equality_is_that_of_numbers_guards_and_identities():
    m = torch.tensor([0.1, 0.2])
    assert nf.CosFace(0.3) == nf.CombinedMargin(m3=0.3) and nf.ArcFace(0.5) == nf.CombinedMargin(m2=0.5)
    assert nf.CosFace(m) == nf.CombinedMargin(m3=m) and hash(nf.CosFace(m)) == hash(nf.CombinedMargin(m3=m))
    assert nf.CosFace(m) != nf.CosFace(m.clone())
    assert nf.ArcFace(0.5) != nf.ArcFace(0.5, guard="easy") == nf.CombinedMargin(m2=0.5, guard="easy")
    assert nf.RowMargin(m3=m) != nf.CombinedMargin(m3=m)


def test_repr_shows_a_guard_that_was_given_and_the_shape_of_tensors():
    assert repr(nf.ArcFace()) == "ArcFace(m=0.5)"
    assert repr(nf.ArcFace(0.4, guard="easy")) == "ArcFace(m=0.4, guard='easy')"
    assert repr(nf.CombinedMargin(m2=torch.zeros(3))) == "CombinedMargin(m1=1.0, m2=<tensor [3]>, m3=0.0)"


MARGINS = [
    nf.CosFace(0.2),
    nf.ArcFace(0.4, guard="join"),
    nf.CombinedMargin(0.9, 0.4, 0.15),
    nf.RowMargin(m2=torch.tensor([0.1, 0.2])),
    nf.CosFace(torch.tensor(0.3)),
]


@pytest.mark.parametrize("margin", MARGINS, ids=repr)
def test_margins_are_replaced_copied_and_saved(margin):
    name = dataclasses.fields(margin)[0].name
    assert getattr(dataclasses.replace(margin, **{name: 0.7}), name) == 0.7
    file = io.BytesIO()
    torch.save({"margin": margin}, file)
    file.seek(0)
    for other in (torch.load(file, weights_only=True)["margin"], copy.deepcopy(margin)):
        assert type(other) is type(margin) and repr(other) == repr(margin)
        for a, b in zip(other.numbers(), margin.numbers(), strict=True):
            assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: nf.ArcFace(0.5, guard="hard"), ValueError, "ArcFace: expected `guard` to be one of shift"),
        (lambda: nf.CombinedMargin(-1.0), ValueError, "CombinedMargin: expected `m1` to be finite and > 0"),
        (
            lambda: nf.RowMargin(math.inf),
            ValueError,
            "RowMargin: expected `m1` to be finite and > 0, got inf",
        ),
        (lambda: nf.CosFace(torch.zeros(2, 2)), ValueError, "CosFace: expected `m` to be a number, a 0-d"),
        (lambda: nf.CosFace(torch.zeros(2).long()), TypeError, "CosFace: expected `m` to be float64"),
    ],
)
def test_bad_values_are_named_where_they_are_made(make, error, text):
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize(
    ("margin", "text"),
    [
        (nf.CosFace(torch.zeros(4)), r"`margin.m3` to have shape \[5\], a number per class, got \[4\]"),
        (nf.RowMargin(m2=torch.zeros(5)), r"`margin.m2` to have shape \[7\], a number per row, got \[5\]"),
        (nf.ArcFace(torch.zeros(5, device="meta")), "`margin.m2` on the device of `labels`"),
    ],
    ids=["classes", "rows", "device"],
)
def test_bad_tensors_are_named_where_they_are_used(margin, text):
    x, weight, labels = torch.randn(7, 4), torch.randn(5, 4), torch.zeros(7).long()
    with pytest.raises(ValueError, match=f"normface_loss: expected {text}"):
        F.normface_loss(x, weight, labels, 8.0, margin=margin)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", ["0-d", "per class", "per row"])
def test_compiled(lane, compile_fully, kind, dynamic):
    x, weight, labels = problem(lane, torch.float32)
    count = {"0-d": (), "per class": (CLASSES,), "per row": (BATCH,)}[kind]
    make = nf.RowMargin if kind == "per row" else nf.CombinedMargin
    m2 = lane.tensor(torch.full(count, 0.3), torch.float32, grad=True)

    def loss(x, weight, labels, m2):
        return F.normface_loss(x, weight, labels, 8.0, margin=make(m2=m2, guard="join"))

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (BATCH, BATCH - 2):
        given = (
            x.detach()[:rows].requires_grad_(),
            weight,
            labels[:rows],
            m2.detach()[:rows].requires_grad_() if kind == "per row" else m2,
        )
        traced, eager = compiled(*given), loss(*given)
        torch.testing.assert_close(traced, eager)
        leaves = [t for t in given if t.requires_grad]
        for a, b in zip(torch.autograd.grad(traced, leaves), torch.autograd.grad(eager, leaves), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", [name for name, margin in reference.MARGINS.items() if margin is not None])
@pytest.mark.parametrize("per_class", [False, True])
def test_the_slopes_in_every_number_of_every_margin(lane, name, per_class):
    """Of each field of each margin of the specification's table, given as a tensor with gradient."""
    margin = reference.MARGINS[name]
    fields = [f.name for f in dataclasses.fields(margin) if f.name != "guard"]
    x, weight, labels = problem(lane)
    results = []
    for module in (F, reference):
        given = {
            field: torch.full((CLASSES,) if per_class else (), float(getattr(margin, field)))
            .to(lane.device, torch.float64)
            .requires_grad_()
            for field in fields
        }
        loss = module.normface_loss(x, weight, labels, 9.0, margin=dataclasses.replace(margin, **given))
        results.append([loss, *torch.autograd.grad(loss, [x, weight, *given.values()])])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_a_margin_without_a_formula_is_refused():
    with pytest.raises(TypeError, match="Nameless: expected `formula` to be the number of its formula"):
        type("Nameless", (Margin,), {})


def test_a_number_that_is_no_formula_shows(lane):
    class Unknown(nf.CombinedMargin):
        formula = 98

    x, weight, labels = problem(lane)
    assert F.normface_loss(x, weight, labels, 9.0, margin=Unknown(m2=0.1)).isnan()
