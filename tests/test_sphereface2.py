"""SphereFace2 against the formula of its paper, written once more; and against that of its released code."""

import copy
import math
import re

import pytest
import sigmoid_jobs as jobs
import torch
import torch.nn.functional as F
from dense_head import assert_equal_to_1e10, gradients, on, problem
from kernel_cases import engine_ops
from ranks import ranks

import normface_ext as nf
from normface_ext.engine import row_state
from normface_ext.engine.calls import plan_device

B = torch.tensor([-1.5], dtype=torch.float64)
WEIGHTS = torch.tensor([1.0, 0, 2, 0.5, 1, 1, 0, 3, 1], dtype=torch.float64)
FORMS = {
    "paper": {},
    "wespeaker": {"r": 32.0, "m": 0.2, "loss_weight": 1.0},
    "OpenSphere": {"margin_gradient": "straight"},
    "no bend": {"t": 1, "r": 16.0, "alpha": 0.3},
    "even power": {"t": 4, "m": 0.0},
    "a strong bend": {"t": 13, "margin_gradient": "straight"},
    "angle": {"form": "A", "r": 32.0, "m": 0.15, "loss_weight": 1.0},
    "large angle": {"form": "A", "m": 2.0, "r": 8.0, "t": 2},
    "straight angle": {"form": "A", "margin_gradient": "straight"},
}
every_form = pytest.mark.parametrize("form", FORMS)
OPTIONS = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "sample_weight": {"sample_weight": WEIGHTS},
    "weighted none": {"sample_weight": WEIGHTS, "reduction": "none"},
}


def plus(z):
    """ln(1 + e^z) from the side on which e^z is small, and its slope."""
    return torch.where(z > 0, z, 0) + torch.log1p(torch.exp(-z.abs()))


def expected_loss(
    x, weight, labels, b, *, alpha=0.7, r=40.0, m=0.4, t=3, form="C", loss_weight=None,
    margin_gradient="exact", reduction="mean", sample_weight=None,
):  # fmt: skip
    """One product of h per power, one sigmoid question per class; rows left out that do not count."""
    factors = torch.ones(len(x), dtype=torch.float64) if sample_weight is None else sample_weight
    kept = (labels != -100) & (factors != 0)
    y = F.one_hot(labels[kept], len(weight)).bool()
    cos = F.normalize(x[kept]) @ F.normalize(weight).T

    def g(c):
        g = torch.ones_like(c)
        for _ in range(t):
            g = g * (c + 1) / 2
        g = 2 * g - 1
        return g.detach() - cos.detach() + cos if margin_gradient == "straight" else g

    if form == "C":
        positive, negative = r * (g(cos) - m) + b, r * (g(cos) + m) + b
    else:
        inside = cos.abs() < 1  # at the ends the square root has no slope that is a number
        sin = torch.where(inside, 1 - cos.square(), 1).sqrt() * inside
        th, mmm = math.cos(math.pi - m), 1 + math.cos(math.pi - m)
        added = torch.where(cos > th, cos * math.cos(m) - sin * math.sin(m), cos - mmm)
        positive, negative = r * g(added) + b, r * g(cos * math.cos(m) + sin * math.sin(m)) + b
    each = torch.where(y, alpha * plus(-positive), (1 - alpha) * plus(negative)).sum(1)
    each = (50 / r if loss_weight is None else loss_weight) * each * factors[kept]
    if reduction == "none":
        return torch.zeros(len(x), dtype=each.dtype).index_put((kept.nonzero()[:, 0],), each)
    return each.sum() if reduction == "sum" else each.sum() / factors[kept].sum()


def ours(labels, **options):
    return lambda x, w, b: nf.functional.sphereface2_loss(x, w, labels, b, **options)


def moved(lane, *tensors):
    return [lane.tensor(t) for t in tensors]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@every_form
def test_it_is_the_formula(lane, form, options):
    x, weight, labels = problem()
    given = {**FORMS[form], **options}
    expected = gradients(lambda x, w, b: expected_loss(x, w, labels, b, **given), x, weight, B)
    found = gradients(ours(lane.tensor(labels), **on(lane, given)), *moved(lane, x, weight, B))
    assert_equal_to_1e10(found, expected)
    assert found[1].isfinite().all() and (found[1][labels == -100] == 0).all()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@every_form
def test_the_reference_is_the_formula(form, options):
    x, weight, labels = problem()
    given = {**FORMS[form], **options}
    expected = gradients(lambda x, w, b: expected_loss(x, w, labels, b, **given), x, weight, B)
    found = gradients(lambda x, w, b: nf.reference.sphereface2_loss(x, w, labels, b, **given), x, weight, B)
    assert_equal_to_1e10(found, expected)


def test_by_hand():
    """Cosines 0.6 (the label's), 0 and -1: h is 0.8, 0.5 and 0."""
    weight = torch.tensor([[0.6, 0.8], [0.0, 2.0], [-5.0, 0.0]], dtype=torch.float64)
    x, label = torch.tensor([[3.0, 0.0]], dtype=torch.float64), torch.tensor([0])
    loss = nf.functional.sphereface2_loss(x, weight, label, 0.5, r=4.0, m=0.25, loss_weight=2, eps=0.0)
    target = 4 * (2 * 0.512 - 1 - 0.25) + 0.5
    others = [4 * (2 * 0.125 - 1 + 0.25) + 0.5, 4 * (-1 + 0.25) + 0.5]
    by_hand = 0.7 * math.log1p(math.exp(-target)) + 0.3 * sum(math.log1p(math.exp(z)) for z in others)
    assert float(loss) == pytest.approx(2 * by_hand, rel=1e-14)


# Extremes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("b", [0.0, -3000.0, 3000.0])
@pytest.mark.parametrize("t", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_cosines_of_one_and_minus_one(lane, dtype, t, b):
    """The label's and others', where z is far beyond what e^z has a number for, too."""
    weight = torch.tensor([[2.0, 0.0], [5.0, 0.0], [-3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    x = torch.tensor([[4.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [0.0, -2.0]], dtype=torch.float64)
    labels, bias = torch.tensor([0, 1, 2, 3]), torch.tensor([b], dtype=torch.float64)
    for r in (40.0, 3000.0):
        found = gradients(
            ours(lane.tensor(labels), r=r, t=t), *moved(lane, x.to(dtype), weight.to(dtype), bias)
        )
        expected = gradients(lambda x, w, b, r=r: expected_loss(x, w, labels, b, r=r, t=t), x, weight, bias)
        assert all(f.isfinite().all() for f in found)
        tolerance = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype]
        for f, e in zip(found, expected, strict=True):
            torch.testing.assert_close(f.cpu().double(), e, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("z", [-700.0, -90.0, -87.0, -30.0, -1.0, -1e-3, 0.0, 1.0, 30.0, 100.0, 1e5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_no_digit_of_the_softplus_is_lost(lane, dtype, z):
    """What the term makes of two other classes at whatever cosine, where r is 0: relative to itself."""
    x, weight = lane.tensor(torch.eye(3)[:1], dtype), lane.tensor(torch.eye(3), dtype)
    numbers = lane.tensor(torch.tensor([0.0, z, 1.0, 0.0], dtype=torch.float64))
    swept, _, _ = engine_ops.sweep(
        engine_ops.arguments(x, weight, lane.tensor([0]), term=row_state.TERMS["sigmoid"], numbers=numbers)
    )
    e = math.exp(-abs(z))
    exact = [max(z, 0.0) + math.log1p(e), (1 if z > 0 else e) / (1 + e)]
    # In float32 what is below the normal range may be 0.
    near = {"rel": 4e-16, "abs": 0} if dtype == torch.float64 else {"rel": 4e-6, "abs": 3e-38}
    found = swept.rows[[row_state.SUM, row_state.SECOND_SUM], 0].tolist()
    assert found == pytest.approx([2 * v for v in exact], **near)


@pytest.mark.parametrize("classes", [1, 2])
def test_few_classes(lane, classes):
    x, weight, labels = problem(classes=classes)
    expected = gradients(lambda x, w, b: expected_loss(x, w, labels, b), x, weight, B)
    found = gradients(ours(lane.tensor(labels)), *moved(lane, x, weight, B))
    assert_equal_to_1e10(found, expected)


def test_no_row_counts(lane):
    x, weight, _ = problem()
    labels = torch.full((9,), -100)
    for rows in (9, 0):
        found = gradients(ours(lane.tensor(labels[:rows])), *moved(lane, x[:rows], weight, B))
        assert all((f == 0).all() for f in found)


def test_what_does_not_count_reaches_nothing(lane):
    """Features that are NaN in rows that are ignored or weigh nothing."""
    x, weight, labels = problem()
    options = {"sample_weight": WEIGHTS}
    clean = gradients(ours(lane.tensor(labels), **on(lane, options)), *moved(lane, x, weight, B))
    x[(labels == -100) | (WEIGHTS == 0)] = math.nan
    dirty = gradients(ours(lane.tensor(labels), **on(lane, options)), *moved(lane, x, weight, B))
    assert all(torch.equal(c, d) for c, d in zip(clean, dirty, strict=True))


@pytest.mark.parametrize("more", [0, 2000, None])
@every_form
def test_whatever_the_workspace(lane, form, more):
    """Coefficients stored or made again, classes at once or in chunks."""
    x, weight, labels = problem(rows=11, classes=40)
    workspace = None
    if more is not None:
        with pytest.raises(ValueError, match="at least") as refused:
            nf.plan(11, 16, 40, torch.float64, plan_device(lane.tensor(x)), workspace=0)
        workspace = more + int(re.search(r"at least (\d+) bytes", str(refused.value))[1])
    expected = gradients(lambda x, w, b: expected_loss(x, w, labels, b, **FORMS[form]), x, weight, B)
    found = gradients(
        ours(lane.tensor(labels), workspace=workspace, **FORMS[form]), *moved(lane, x, weight, B)
    )
    assert_equal_to_1e10(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@every_form
def test_narrow_features(lane, form, dtype):
    x, weight, labels = problem(dtype=dtype)
    expected = gradients(
        lambda x, w, b: expected_loss(x, w, labels, b, **FORMS[form]), x.double(), weight.double(), B
    )
    found = gradients(ours(lane.tensor(labels), **FORMS[form]), *moved(lane, x, weight, B.float()))
    assert [f.dtype for f in found] == [torch.float32, dtype, dtype, torch.float32]
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 8e-2}[dtype]
    for f, e in zip(found, expected, strict=True):
        assert (f.cpu().double() - e).norm() <= tolerance * e.norm()


# Derivatives ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [1, 2, 3])
def test_gradcheck(lane, t):
    """The kernels once, the reference twice."""
    x, weight, labels = problem(rows=4, dim=5, classes=4)
    options = {"r": 3.0, "t": t, "reduction": "sum"}
    inputs = [lane.tensor(v, grad=True) for v in (x, weight, B)]
    assert torch.autograd.gradcheck(ours(lane.tensor(labels), **options), inputs)
    plain = [v.requires_grad_() for v in (x, weight, B.clone())]
    assert torch.autograd.gradgradcheck(
        lambda x, w, b: nf.reference.sphereface2_loss(x, w, labels, b, **options), plain
    )


@pytest.mark.parametrize("place", range(3))
def test_one_gradient_alone(lane, place):
    x, weight, labels = problem()
    inputs = [lane.tensor(v, grad=i == place) for i, v in enumerate((x, weight, B))]
    loss = ours(lane.tensor(labels))(*inputs)
    (alone,) = torch.autograd.grad(loss, inputs[place], create_graph=True)
    expected = gradients(lambda x, w, b: expected_loss(x, w, labels, b), x, weight, B)
    assert_equal_to_1e10([alone.detach() / 2], [expected[1 + place]])  # `gradients` halves it


# The layer --------------------------------------------------------------------------------------------


def test_the_layer_is_the_function_with_a_b_of_its_own():
    x, weight, labels = problem()
    head = jobs.head_of(torch.float64, {"r": 20.0})
    assert torch.equal(head(x, labels), nf.functional.sphereface2_loss(x, weight, labels, B, r=20.0))
    assert {name: tuple(p.shape) for name, p in head.named_parameters()} == {"weight": (7, 16), "bias": (1,)}
    assert repr(head) == "SphereFace2Loss(16, 7, r=20.0, first_bias=-1.5)"
    head.t = 1
    assert torch.equal(head(x, labels), nf.functional.sphereface2_loss(x, weight, labels, B, r=20.0, t=1))


def test_a_state_dict():
    head, other = (nf.SphereFace2Loss(16, 7, first_bias=b) for b in (0.25, None))
    assert sorted(head.state_dict()) == ["bias", "weight"]
    other.load_state_dict(head.state_dict())
    x, _, labels = problem(dtype=torch.float32)
    assert torch.equal(head(x, labels), other(x, labels)) and other.bias.item() == 0.25
    assert torch.equal(copy.deepcopy(head)(x, labels), head(x, labels))
    other.reset_parameters()
    assert other.bias.item() != 0.25


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_b_stays_wide(dtype):
    head = nf.SphereFace2Loss(16, 7).to(dtype)
    assert head.weight.dtype == dtype and head.bias.dtype == torch.float32
    assert nf.SphereFace2Loss(16, 7, dtype=dtype).bias.dtype == torch.float32


@pytest.mark.parametrize(
    "classes, options",
    [
        (2, {}),
        (7, {}),
        (10_000, {}),
        (8, {"alpha": 0.999}),
        (3, {"alpha": 2 / 3, "r": 4000.0}),
        (9, {"t": 1}),
    ],
)
def test_b_starts_where_a_row_of_cosines_0_does_not_pull_it(classes, options):
    """As OpenSphere's does, whose formula this is not."""
    head = nf.SphereFace2Loss(2, classes, dtype=torch.float64, **options)
    cos = torch.zeros(classes, dtype=torch.float64)
    b = head.bias.detach().clone().requires_grad_()
    g = head.r * (2 * ((cos + 1) / 2) ** head.t - 1)
    loss = (
        head.alpha * plus(head.r * head.m - g[0] - b)
        + (1 - head.alpha) * plus(g[1:] + head.r * head.m + b).sum()
    )
    (slope,) = torch.autograd.grad(loss.sum(), b)
    assert abs(float(slope)) <= 1e-10
    assert nf.SphereFace2Loss(2, 1).bias.item() == 0.0


def test_trained_it_finds_its_classes():
    torch.manual_seed(0)
    centers, labels = 3 * torch.randn(5, 8), torch.arange(200) % 5
    x = centers[labels] + torch.randn(200, 8)
    head = nf.SphereFace2Loss(8, 5)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.5)
    for _ in range(100):
        optimizer.zero_grad()
        head(x, labels).backward()
        optimizer.step()
    assert (nf.functional.nearest_class(x, head.weight)[0] == labels).float().mean() > 0.95


@every_form
def test_compiled_without_a_break(form, compile_fully):
    head = jobs.head_of(torch.float64, FORMS[form])
    x, _, labels = problem()
    results = []
    for step in (head, compile_fully(head)):
        given = x.clone().requires_grad_()
        head.zero_grad()
        loss = step(given, labels)
        loss.backward()
        results.append([loss.detach(), given.grad, head.weight.grad, head.bias.grad])
    assert_equal_to_1e10(*results)


def test_exported():
    head = nf.SphereFace2Loss(16, 7, dtype=torch.float64).eval()
    x, _, labels = problem()
    program = torch.export.export(head, (x, labels))
    torch.testing.assert_close(program.module()(x, labels), head(x, labels))


# Class-parallel ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [7, 2])  # ranks without classes
@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("form", ["paper", "OpenSphere"])
def test_class_parallel_it_is_the_head_of_one_process(form, reduction, weights, classes):
    options = {**FORMS[form], "reduction": reduction}
    results = ranks(3).run(jobs.step, options, weights, torch.float64, classes)
    x, _, labels = problem(classes=classes)
    head = jobs.head_of(torch.float64, options, classes)
    x.requires_grad_()
    loss = head(x, labels, weights)
    loss.backward(torch.arange(1.0, 10).double() if loss.dim() else None)
    for found in results:
        assert_equal_to_1e10(found[2:], [head.weight.grad, head.bias.grad])
        if reduction != "none":
            assert_equal_to_1e10([found[0]], [loss.detach()])
    if reduction == "none":
        assert_equal_to_1e10([torch.cat([found[0] for found in results])], [loss.detach()])
    assert_equal_to_1e10([torch.cat([found[1] for found in results])], [x.grad])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_class_parallel_in_fewer_bits(dtype):
    results = ranks(3).run(jobs.step, {}, None, dtype)
    x, weight, labels = problem(dtype=dtype)
    expected = expected_loss(x.double(), weight.double(), labels, B)
    for found in results:
        assert float(found[0]) == pytest.approx(float(expected), rel=1e-5 if dtype == torch.float32 else 2e-2)
        assert found[1].dtype == found[2].dtype == dtype and found[3].dtype == torch.float32


def test_beside_the_class_parallel_loss():
    found = ranks(3).run(jobs.beside)
    x, weight, labels = problem()
    expected = nf.functional.sphereface2_loss(x.repeat(3, 1), weight, labels.repeat(3), 0.25)
    for rank in found:
        assert rank["keys"] == ["weight", "bias"] and "expected `sample_rate` to be 1" in rank["sampled"]
        assert torch.equal(rank["meta"][0], found[0]["meta"][0]) and "classes" in rank["meta"][2]
        torch.testing.assert_close(rank["meta"][0].norm(dim=1), torch.ones(7))
        assert rank["meta"][1].item() == nf.SphereFace2Loss(16, 7).bias.item()
        assert "sphereface2_loss: second derivatives" in rank["second"]
        assert_equal_to_1e10([rank["function"]], [expected])


# Sentences --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, error",
    [
        ({"t": 0}, ValueError),
        ({"t": 2.5}, TypeError),
        ({"t": True}, TypeError),
        ({"t": 1 << 25}, ValueError),
        ({"r": 0.0}, ValueError),
        ({"m": -0.1}, ValueError),
        ({"alpha": 1.0}, ValueError),
        ({"loss_weight": 0.0}, ValueError),
        ({"margin_gradient": "bent"}, ValueError),
        ({"first_bias": math.inf}, ValueError),
    ],
    ids=str,
)
def test_options_are_checked(options, error):
    (name,) = options
    with pytest.raises(error, match=rf"^SphereFace2Loss: expected `{name}` .*, got"):
        nf.SphereFace2Loss(16, 7, **options)


@pytest.mark.parametrize(
    "bias, error, said",
    [
        ("x", TypeError, "a number or a tensor of one element, got str"),
        (math.nan, ValueError, "finite, got nan"),
        (torch.zeros(2), ValueError, r"a number or a tensor of one element, got shape \[2\]"),
        (torch.zeros(1, dtype=torch.int64), TypeError, "float64, float32, float16 or bfloat16"),
        (torch.zeros(1, device="meta"), ValueError, "on the device of `x`"),
    ],
    ids=["text", "nan", "two", "whole", "elsewhere"],
)
def test_b_is_checked(bias, error, said):
    with pytest.raises(error, match=rf"^sphereface2_loss: expected `bias` .*{said}"):
        nf.functional.sphereface2_loss(*problem(), bias)


def test_check_finite():
    x, weight, labels = problem()
    options = {"check_finite": True}
    with pytest.raises(ValueError, match=r"^sphereface2_loss: expected `bias` to be finite"):
        nf.functional.sphereface2_loss(x, weight, labels, torch.tensor(math.nan), **options)
    x[2, 0] = math.nan
    with pytest.raises(ValueError, match=r"^sphereface2_loss: expected `x` to be finite.* 2"):
        nf.functional.sphereface2_loss(x, weight, labels, 0.0, **options)


def test_the_term_is_the_engines():
    assert row_state.TERMS["sigmoid"] == 4
