"""Second derivatives are the reference's, whatever needs a gradient, and in bounded memory; where there
are none a sentence says so, never a silent zero."""

import itertools

import pytest
import torch
from ranks import ranks
from second_derivative_jobs import penalties

import normface_ext as nf
from normface_ext import testing
from normface_ext.agents.formula import HingeFormula
from normface_ext.engine import curvature
from normface_ext.sigmoid.formula import SigmoidFormula
from normface_ext.softmax.formula import PartsFormula

F, R = nf.functional, nf.reference
BATCH, CLASSES, DIM = 5, 7, 8
SAMPLE, CLASS = torch.tensor([0.3, 1.0, 0.0, 2.0, 0.7]), torch.linspace(0.5, 2, CLASSES)


def near(x, options):
    return {key: o.to(x) if isinstance(o, torch.Tensor) else o for key, o in options.items()}


def softmax(**options):
    return lambda library: (
        lambda x, w, s, y: library.normface_loss(x, w, y, s, **near(x, options)).square().sum()
    )


def stateful(margin, **options):
    """A margin of its own for each call, so that none sees the state that another moved."""
    return lambda library: lambda x, w, s, y: library.normface_loss(x, w, y, s, margin=margin(), **options)


def learned(margin):
    """The margin's tensor is made of the scale, so that its gradient counts."""
    return lambda library: lambda x, w, s, y: library.normface_loss(x, w, y, s, margin=margin(s / 20, w))


def agents(name, **options):
    return lambda library: (
        lambda x, w, s, y: getattr(library, name)(x, w, y, **near(x, options)).square().sum()
    )


#: name -> library -> (x, weight, scale, labels) -> number
LOSSES = {
    "normalize": lambda lib: lambda x, w, s, y: (lib.normalize(x) * w[:BATCH]).sum().square(),
    "norm": lambda lib: lambda x, w, s, y: lib.normalize(x, p=1, return_norm=True)[1].pow(3).sum() * s,
    "norm_linear": lambda lib: lambda x, w, s, y: lib.norm_linear(x, w, s).pow(3).sum(),
    "normface": softmax(),
    "sum": softmax(reduction="sum"),
    "rows": softmax(reduction="none"),
    "cosface": softmax(margin=nf.CosFace(0.2)),
    "arcface": softmax(margin=nf.ArcFace(0.3)),
    "arcface straight": softmax(margin=nf.ArcFace(0.3), margin_gradient="straight"),
    "arcface easy": softmax(margin=nf.ArcFace(0.3, guard="easy")),
    "combined": softmax(margin=nf.CombinedMargin(1.2, 0.3, 0.1)),
    "weights": softmax(sample_weight=SAMPLE, class_weight=CLASS, margin=nf.CosFace(0.2)),
    "smoothing": softmax(label_smoothing=0.2, reduction="none"),
    "smoothing, weights": softmax(label_smoothing=0.2, class_weight=CLASS, margin=nf.ArcFace(0.2)),
    "filter": softmax(filter_threshold=0.1),
    "learned cosface": learned(lambda m, w: nf.CosFace(m)),
    "learned by class": learned(lambda m, w: nf.ArcFace(m * w.square().mean(1))),
    "learned by row": learned(lambda m, w: nf.RowMargin(1 + m, m * w[:BATCH].square().mean(1), m)),
    "adaface": stateful(nf.AdaFace),
    "magface": stateful(nf.MagFace),
    "curricularface": stateful(nf.CurricularFace),
    "mv_softmax": stateful(lambda: nf.MVSoftmax(0.3, 0.2, kind="arc")),
    "mv_softmax straight": stateful(lambda: nf.MVSoftmax(0.3, 0.2, kind="am"), margin_gradient="straight"),
    "circle": stateful(nf.CircleSoftmax),
    "circle exact": stateful(lambda: nf.CircleSoftmax(detached=False)),
    "sub-centres": lambda lib: (
        lambda x, w, s, y: lib.normface_loss(
            x, torch.cat([w, w.cos()]), y, s, sub_centers=2, margin=nf.ArcFace(0.2)
        )
    ),
    "parts": lambda lib: lambda x, w, s, y: sum(p.pow(3).sum() for p in lib.head_parts(x, w, y, s)[:2]),
    "c_contrastive": agents("c_contrastive_loss", neg_margin=1.9),
    "c_contrastive rows": agents("c_contrastive_loss", neg_margin=1.9, reduction="none"),
    "c_contrastive hardest": agents("c_contrastive_loss", hardest_only=True, max_positive_only=True),
    "c_contrastive exponential": agents("c_contrastive_loss", neg_margin=1.9, exp_negative_weight=True),
    "c_contrastive normalised": agents("c_contrastive_loss", neg_margin=1.9, normalize_negative=0.5),
    "c_triplet": agents("c_triplet_loss", margin=1.2),
    "c_triplet hardest": agents("c_triplet_loss", hardest_only=True, reduction="none"),
    "c_triplet centre": agents("c_triplet_loss", add_center_loss=True, sample_weight=SAMPLE),
    "sphereface2": lambda lib: (
        lambda x, w, s, y: lib.sphereface2_loss(x, w, y, s / 9, sample_weight=SAMPLE.to(x))
    ),
    "sphereface2 straight": lambda lib: (
        lambda x, w, s, y: (
            lib.sphereface2_loss(x, w, y, s / 9, margin_gradient="straight", reduction="none").square().sum()
        )
    ),
    "inner_distance": lambda lib: lambda x, w, s, y: lib.inner_distance(x, w).pow(3).sum(),
    "inner_distance L1": lambda lib: (
        lambda x, w, s, y: lib.inner_distance(x, w, p=1, normalize=True).pow(3).sum()
    ),
    "inner_distance own": lambda lib: (
        lambda x, w, s, y: lib.inner_distance(x, w, labels=y, update_center_only=True).pow(3).sum()
    ),
    "inner_distance L1 own": lambda lib: (
        lambda x, w, s, y: lib.inner_distance(x, w, p=1, labels=y, update_center_only=True).pow(3).sum()
    ),
    "pairs": lambda lib: lambda x, w, s, y: lib.pair_contrastive_loss(x, w[y], y % 2, margin=9.0),
    "triplets": lambda lib: lambda x, w, s, y: lib.triplet_loss(x, w[y], w[y - 1], margin=9.0),
}


def leaves_of(lane, dtype=torch.float64):
    return {
        "x": lane.randn(BATCH, DIM, dtype=dtype),
        "weight": lane.randn(CLASSES, DIM, seed=1, dtype=dtype),
        "scale": lane.tensor(4.0, dtype),
    }


def second(loss, leaves, trained, labels, penalised=None):
    """The gradients of a loss with penalties on its gradients, those of the latter alone."""
    leaves = {key: t.detach().clone().requires_grad_(key in trained) for key, t in leaves.items()}
    value = loss(*leaves.values(), labels)
    wanted = [leaves[key] for key in penalised or trained]
    first = torch.autograd.grad(value, wanted, create_graph=True, allow_unused=True)
    # With a factor that has a gradient of its own.
    penalty = sum((g.square() * value).sum() for g in first if g is not None)
    by = [leaves[key] for key in trained]
    return torch.autograd.grad(penalty, by, allow_unused=True)


def same(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None) or not (b if a is None else a).any()
        if a is not None and b is not None:
            torch.testing.assert_close(a, b.to(a.dtype))


@pytest.mark.parametrize("name", LOSSES)
def test_of_every_op_they_are_the_references(lane, name):
    leaves, labels = leaves_of(lane), lane.labels(BATCH, CLASSES)
    got, expected = (second(LOSSES[name](library), leaves, leaves, labels) for library in (F, R))
    same(got, expected)


ALONE = [c for n in (1, 2) for c in itertools.combinations(("x", "weight", "scale"), n)]


@pytest.mark.parametrize(
    "name", ["arcface", "smoothing, weights", "learned by class", "parts", "c_triplet", "sphereface2"]
)
@pytest.mark.parametrize("trained", ALONE, ids="+".join)
def test_with_the_rest_frozen(lane, name, trained):
    leaves, labels = leaves_of(lane), lane.labels(BATCH, CLASSES)
    for penalised in trained:
        if penalised == "scale" and name == "c_triplet":
            continue
        got, expected = (
            second(LOSSES[name](library), leaves, trained, labels, [penalised]) for library in (F, R)
        )
        same(got, expected)


STRIDED = {"contiguous": lambda t: t, "transposed": lambda t: t.t().contiguous().t()}


@pytest.mark.parametrize("name", ["norm_linear", "cosface", "c_contrastive", "sphereface2", "inner_distance"])
@pytest.mark.parametrize("layouts", list(itertools.product(STRIDED, STRIDED)), ids="+".join)
def test_of_strided_operands(lane, name, layouts):
    leaves, labels = leaves_of(lane), lane.labels(BATCH, CLASSES)
    expected = second(LOSSES[name](R), leaves, leaves, labels)
    for key, layout in zip(("x", "weight"), layouts, strict=True):
        leaves[key] = STRIDED[layout](leaves[key])
    same(second(LOSSES[name](F), leaves, leaves, labels), expected)


@pytest.mark.parametrize("name", ["smoothing, weights", "filter", "c_triplet hardest", "sphereface2"])
@pytest.mark.parametrize("workspace", [0, 3000, 1 << 20])
def test_whatever_the_tiles(lane, monkeypatch, name, workspace):
    monkeypatch.setattr(curvature, "_ROWS", 2)
    monkeypatch.setattr(curvature, "_ENOUGH", workspace)
    leaves, labels = leaves_of(lane), lane.labels(BATCH, CLASSES)
    same(*(second(LOSSES[name](library), leaves, leaves, labels) for library in (F, R)))


HAIR = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 5e-3}
NARROW = [
    (name, dtype)
    for name in ("arcface", "parts", "c_triplet", "sphereface2", "inner_distance")
    for dtype in HAIR
    if dtype != torch.float16 or name in ("arcface", "c_triplet", "sphereface2")  # whose values it holds
]


@pytest.mark.parametrize(("name", "dtype"), NARROW, ids=str)
def test_in_narrower_dtypes(lane, name, dtype):
    narrow, labels = leaves_of(lane, dtype), lane.labels(BATCH, CLASSES)
    if dtype.itemsize == 2:
        narrow["scale"] = narrow["scale"].float()
    got = second(LOSSES[name](F), narrow, narrow, labels)
    wide = {key: t.double() for key, t in narrow.items()}
    expected = second(LOSSES[name](R), wide, wide, labels)
    for a, b, leaf in zip(got, expected, narrow.values(), strict=True):
        if b is not None:
            assert a.dtype == leaf.dtype
            assert (a.double() - b).norm() <= HAIR[dtype] * b.norm()


@pytest.mark.parametrize("name", ["smoothing, weights", "arcface", "c_contrastive", "sphereface2"])
def test_what_does_not_count_reaches_nothing(lane, name):
    leaves, labels = leaves_of(lane), lane.labels(BATCH, CLASSES)
    labels[3] = -100
    expected = second(LOSSES[name](R), leaves, leaves, labels)
    leaves["x"][3] = torch.nan
    got = second(LOSSES[name](F), leaves, leaves, labels)
    same(got, expected)
    assert (got[0][3] == 0).all()


@pytest.mark.parametrize("scale", [-7.0, 90.0, 2000.0])
def test_at_any_scale(lane, scale):
    leaves, labels = leaves_of(lane), lane.labels(BATCH, CLASSES)
    leaves["scale"].fill_(scale)
    leaves["weight"][labels[0]] = 3 * leaves["x"][0]  # a target far above the others
    for name in ("normface", "combined", "filter"):
        got, expected = (second(LOSSES[name](library), leaves, leaves, labels) for library in (F, R))
        for a, b in zip(got, expected, strict=True):
            assert (a - b).norm() <= 1e-9 * b.norm()


@pytest.mark.parametrize("given", ["label", "weight"])
@pytest.mark.parametrize("name", ["rows", "sub-centres", "filter", "parts", "sphereface2", "c_triplet"])
def test_a_row_that_does_not_count_at_a_scale_beyond_exp(lane, name, given):
    """What stands in its place has logits, too, whose exponential no number holds."""
    leaves, labels = leaves_of(lane), lane.labels(BATCH, CLASSES)
    leaves["scale"].fill_(2000.0)
    leaves["weight"][3] = 1
    weighed = given == "weight" and name == "rows"
    if not weighed:
        labels[2] = -100
    loss = softmax(reduction="none", sample_weight=SAMPLE) if weighed else LOSSES[name]
    got, expected = (second(loss(library), leaves, leaves, labels) for library in (F, R))
    for a, b in zip(got, expected, strict=True):
        if b is not None:
            assert (a - b).norm() <= 1e-9 * b.norm()


def test_of_no_rows_and_of_one_class(lane):
    leaves = leaves_of(lane)
    none = {**leaves, "x": leaves["x"][:0]}
    got = second(softmax(reduction="sum")(F), none, none, lane.tensor([]).long())
    assert got[0].shape == (0, DIM) and not got[1].any() and not got[2].any()
    one, labels = {**leaves, "weight": leaves["weight"][:1]}, lane.tensor([0] * BATCH)
    for name in ("normface", "c_triplet", "sphereface2"):
        same(*(second(LOSSES[name](library), one, one, labels) for library in (F, R)))


def test_gradgradcheck(lane):
    leaves = [
        t.requires_grad_()
        for t in (lane.randn(3, 4, dtype=torch.float64), lane.randn(5, 4, seed=1, dtype=torch.float64))
    ]
    labels, scale = lane.labels(3, 5), lane.tensor(4.0, torch.float64, grad=True)
    for call in (
        lambda x, w, s: F.normface_loss(x, w, labels, s, margin=nf.ArcFace(0.2), label_smoothing=0.1),
        lambda x, w, s: F.head_parts(x, w, labels, s)[:2],
        lambda x, w, s: F.sphereface2_loss(x, w, labels, s / 9, reduction="none"),
    ):
        assert torch.autograd.gradgradcheck(call, (*leaves, scale), fast_mode=True)


def test_a_head_with_everything_learned(lane):
    margin = nf.ArcFace(torch.nn.Parameter(lane.tensor(0.2, torch.float64)))
    head = nf.NormFaceLoss(DIM, CLASSES, scale=8.0, learn_scale=True, margin=margin, dtype=torch.float64)
    head.to(lane.device)
    x, labels = lane.randn(BATCH, DIM, dtype=torch.float64, grad=True), lane.labels(BATCH, CLASSES)
    found = []
    for call in (
        head,
        lambda x, y: R.normface_loss(x, head.weight, y, head.bounded_scale(), margin=head.margin),
    ):
        loss = call(x, labels)
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        found.append(torch.autograd.grad(loss + 10 * first.square().sum(), (x, *head.parameters())))
    same(*found)


@pytest.mark.slow
def test_no_matrix_of_the_batch_and_the_classes_is_held():
    """Of 39 MiB here; the weight's gradients, the penalty's and torch's own sum of two are of its size."""
    x, weight = torch.randn(512, 16, requires_grad=True), torch.randn(20000, 16, requires_grad=True)
    labels, workspace = torch.randint(20000, (512,)), 4 << 20

    def step():
        loss = F.normface_loss(x, weight, labels, 16.0, workspace=workspace)
        first = torch.autograd.grad(loss, (x, weight), create_graph=True)
        torch.autograd.grad(sum(g.square().sum() for g in first), (x, weight))

    held = testing.peak_bytes(step)
    assert held < workspace + 5 * 4 * (x.numel() + weight.numel())


@pytest.mark.parametrize(
    "name", ["normface", "parts", "c_contrastive", "c_triplet", "sphereface2", "inner_distance L1"]
)
def test_third_derivatives_raise(lane, name):
    leaves, labels = leaves_of(lane), lane.labels(BATCH, CLASSES)
    x, w, s = (t.requires_grad_() for t in leaves.values())
    value = LOSSES[name](F)(x, w, s, labels)
    (first,) = torch.autograd.grad(value, x, create_graph=True)
    (again,) = torch.autograd.grad(first.pow(3).sum(), x, create_graph=True)
    for leaf in (x, w):
        with pytest.raises(RuntimeError, match=r"^\w+: third derivatives are not available"):
            torch.autograd.grad(again.square().sum(), leaf, retain_graph=True)


@pytest.mark.parametrize(
    ("formula", "name"),
    [(PartsFormula, "normface"), (HingeFormula, "c_triplet"), (SigmoidFormula, "sphereface2")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_term_that_no_formula_knows_raises(monkeypatch, lane, formula, name):
    monkeypatch.setattr(formula, "TERMS", ())
    leaves, labels = leaves_of(lane), lane.labels(BATCH, CLASSES)
    with pytest.raises(RuntimeError, match=r"^\w+: second derivatives are not available"):
        second(LOSSES[name](F), leaves, ["x"], labels)


def test_a_first_gradient_with_a_graph_is_the_same(lane):
    leaves, labels = leaves_of(lane, torch.float32), lane.labels(BATCH, CLASSES)
    x, w, s = (t.requires_grad_() for t in leaves.values())
    for name, loss in LOSSES.items():
        if "weights" in name or "learned" in name or name.startswith("mv_"):
            continue  # float32 numbers of their own
        plain, graphed = (
            torch.autograd.grad(loss(F)(x, w, s, labels), (x, w), create_graph=graph, allow_unused=True)
            for graph in (False, True)
        )
        for a, b in zip(plain, graphed, strict=True):
            assert (a is None and b is None) or torch.equal(a, b.detach()), name


@pytest.mark.parametrize("agents", [False, True])
@pytest.mark.parametrize("loss", ["general_contrastive_loss", "general_triplet_loss"])
def test_a_penalty_on_caffes_own_gradient_raises(lane, loss, agents):
    x, labels = lane.randn(5, 7, grad=True), lane.labels(5, 7)
    weight = lane.randn(7, 7, seed=1, grad=True) if agents else None
    for asked in (x, weight)[: 1 + agents]:
        distances = F.inner_distance(F.normalize(x), weight, normalize=True) if agents else x
        value, _ = getattr(nf.caffe, loss)(distances, labels)
        (first,) = torch.autograd.grad(value, x, create_graph=True)
        with pytest.raises(RuntimeError, match=": second derivatives are not available"):
            torch.autograd.grad(value + first.square().sum(), asked)


def test_a_penalty_on_a_gradient_of_shards_raises():
    for said in ranks(2).run(penalties):
        for (name, question), sentence in said.items():
            expected = f"{name.split(',')[0]}: second derivatives are not available"
            assert sentence is not None and sentence.startswith(expected), (name, question, sentence)
