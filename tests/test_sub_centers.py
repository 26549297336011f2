"""Classes of several centres: every function of the softmax head on the cosine of the nearest one."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from dense_head import assert_equal_to_1e10, gradients
from kernel_cases import engine_ops
from lanes import DTYPES, LANES

import normface_ext as nf
from normface_ext import reference
from normface_ext.engine import library
from normface_ext.engine.calls import plan_device
from normface_ext.testing import peak_bytes

IGNORE = -100


def sample(lane, batch, dim, classes, centers, dtype=torch.float64, seed=0):
    """Features near a centre of their class, the others being near one another too: who wins, varies."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(classes * centers, dim, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (batch,), generator=generator)
    row = labels * centers + torch.randint(centers, (batch,), generator=generator)
    x = weight[row] + 1.5 * torch.randn(batch, dim, generator=generator, dtype=torch.float64)
    if batch > 2:
        labels[batch // 2] = IGNORE
    return lane.tensor(x, dtype), lane.tensor(weight, dtype), lane.tensor(labels)


def dense(x, weight, labels, scale, centers, psi=lambda c, y: c, f=lambda c: c, class_weight=None):
    """As the papers' code has it: F.linear, a maximum, F.cross_entropy; mean over the rows that count."""
    kept = labels != IGNORE
    y = labels[kept]
    every = F.linear(F.normalize(x[kept]), F.normalize(weight))
    cosine = every.unflatten(1, (-1, centers)).max(2).values
    own = cosine.gather(1, y[:, None])[:, 0]
    logits = f(cosine).scatter(1, y[:, None], psi(own, y)[:, None])
    return F.cross_entropy(scale * logits, y, weight=class_weight)


def arc(c, m):
    return torch.cos(c.acos() + m)


#: name -> (keywords of normface_loss, those of `dense`), from the number of classes.
HEADS = {
    "plain": lambda n: ({}, {}),
    "arcface": lambda n: ({"margin": nf.ArcFace(0.3)}, {"psi": lambda c, y: arc(c, 0.3)}),
    "margins of classes": lambda n: (
        {"margin": nf.CosFace(torch.linspace(0.1, 0.6, n, dtype=torch.float64))},
        {"psi": lambda c, y: c - torch.linspace(0.1, 0.6, n, dtype=torch.float64)[y]},
    ),
    "filter": lambda n: ({"filter_threshold": 0.3}, {"f": lambda c: torch.where(c > 0.3, 0.0, c)}),
    "class weights": lambda n: (
        {"class_weight": torch.linspace(0.5, 2, n, dtype=torch.float64)},
        {"class_weight": torch.linspace(0.5, 2, n, dtype=torch.float64)},
    ),
}


def on(lane, options):
    moved = {k: lane.tensor(v) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    margin = moved.get("margin")
    if isinstance(margin, nf.CosFace) and isinstance(margin.m, torch.Tensor):
        moved["margin"] = nf.CosFace(lane.tensor(margin.m))
    return moved


@pytest.mark.covering(2)
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("centers", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("classes", [1, 7, 43])
@pytest.mark.parametrize("scale", [8.0, 900.0], ids=["fixed shift", "largest logit"])
@pytest.mark.parametrize("keep", [True, False], ids=["stored", "again"])
def test_the_formula(lane, kind, centers, classes, scale, keep):
    ours, theirs = HEADS[kind](classes)
    x, weight, labels = sample(lane, 9, 12, classes, centers)
    # What is least for three classes at once: tiles that nothing is a multiple of.
    workspace = None if keep else chunked(x, classes, centers)
    found = gradients(
        lambda x, w, s: nf.functional.normface_loss(
            x, w, labels, s, sub_centers=centers, workspace=workspace, **on(lane, ours)
        ),
        x,
        weight,
        lane.tensor(scale, torch.float64),
    )
    expected = gradients(
        lambda x, w, s: dense(x, w, labels.cpu(), s, centers, **theirs),
        x.cpu(),
        weight.cpu(),
        torch.tensor(scale, dtype=torch.float64),
    )
    assert_equal_to_1e10(found, expected)


def chunked(x, classes, centers):
    """A budget for some classes at once, E not being kept."""
    given = engine_ops.arguments(
        x, x.new_empty(classes * centers, x.shape[1]), x, class_chunk=3 * centers, centers=centers
    )
    return engine_ops.budget(given)["workspace"]


def batch_margins():
    return {
        "adaface": nf.AdaFace(),
        "magface": nf.MagFace(),
        "curricularface": nf.CurricularFace(),
        "mv": nf.MVSoftmax(),
    }


@pytest.mark.parametrize("name", batch_margins())
@pytest.mark.parametrize("gradient", ["exact", "straight"])
def test_margins_that_look_at_the_batch(lane, name, gradient):
    """They see the cosine of the nearest centre, as the specification does."""
    x, weight, labels = sample(lane, 11, 12, 7, 3)
    options = {"sub_centers": 3, "margin_gradient": gradient, "reduction": "none"}
    found, expected = (
        gradients(
            lambda x, w, module=module: module.normface_loss(
                x, w, labels, 16.0, margin=batch_margins()[name].to(lane.device), **options
            ),
            x,
            weight,
        )
        for module in (nf.functional, reference)
    )
    assert_equal_to_1e10(found, [each.cpu().double() for each in expected])


@pytest.mark.parametrize("centers", [2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_narrow_types(lane, centers, dtype):
    """No further from the specification in float64 than plain torch in that dtype, and a hair."""
    x, weight, labels = sample(lane, 17, 40, 23, centers, dtype)
    options = {"sub_centers": centers, "margin": nf.CosFace(0.2)}

    def of(module, *tensors, scale):
        function = lambda x, w, s: module.normface_loss(x, w, labels, s, **options)  # noqa: E731
        return [each.double().cpu() for each in gradients(function, *tensors, scale)]

    scale = lane.tensor(16.0, torch.float64 if dtype == torch.float64 else torch.float32)
    truth = of(reference, x.double(), weight.double(), scale=scale.double())
    found = of(nf.functional, x, weight, scale=scale)
    plain = of(reference, x, weight, scale=scale)
    # A near tie may be decided otherwise: 16-bit operands on CUDA. Such a row's gradient is another centre's.
    hair = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    for f, p, t in zip(found, plain, truth, strict=True):
        assert (f - t).norm() <= 2 * (p - t).norm() + hair * t.norm().clamp_min(1e-2)


def twins(lane, centers):
    """Classes of equal centres, of vectors whose products have no rounding."""
    signs = torch.tensor([[int(b) for b in f"{n:04b}"] for n in range(1, 8)]) - 0.5
    x = torch.tensor([[int(b) for b in f"{n:04b}"] for n in range(4, 13)]) - 0.5
    labels = lane.tensor(torch.arange(9) % 7)
    return lane.tensor(x.double()), lane.tensor(signs.double().repeat_interleave(centers, 0)), labels


@pytest.mark.parametrize("centers", [2, 3, 5])
def test_of_equal_centres_the_first_has_the_gradient(lane, centers):
    x, weight, labels = twins(lane, centers)
    options = {"eps": 0.0, "margin": nf.ArcFace(0.2)}
    found = gradients(
        lambda x, w: nf.functional.normface_loss(x, w, labels, 12.0, sub_centers=centers, **options),
        x,
        weight,
    )
    expected = gradients(
        lambda x, w: nf.functional.normface_loss(x, w, labels, 12.0, **options), x, weight[::centers]
    )
    of_class = found[2].view(7, centers, -1)
    assert not of_class[:, 1:].any()
    assert_equal_to_1e10([found[0], found[1], of_class[:, 0]], [each.cpu() for each in expected])
    head = nf.NormFaceLoss(4, 7, sub_centers=centers, dtype=torch.float64, device=lane.device, eps=0.0)
    head.weight.data.copy_(weight)
    assert not head.centers_of(x, labels).any()


@pytest.mark.parametrize("batch, dim, classes", [(9, 12, 7), (33, 130, 40), (2, 5, 133)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equal_centres_have_equal_cosines(batch, dim, classes, dtype):
    """On the CPU, whatever the numbers are, at sizes whose products make equal columns alike."""
    lane = LANES[0]
    x, weight, labels = sample(lane, batch, dim, classes, 1, dtype)
    for centers in (2, 3, 5):
        equal = weight.repeat_interleave(centers, 0).requires_grad_()
        nf.functional.normface_loss(x, equal, labels, 12.0, sub_centers=centers).backward()
        assert not equal.grad.view(classes, centers, -1)[:, 1:].any()


@pytest.mark.parametrize("centers", [2, 3])
def test_cosines_of_one_and_minus_one(lane, centers):
    """A feature is one of its class's centres, or opposite to one of another: finite as specified."""
    x, weight, labels = sample(lane, 8, 12, 4, centers)
    labels = lane.tensor(torch.arange(8) % 4)
    x = weight.view(4, centers, -1)[labels, centers - 1].clone()
    x[4:] = -weight.view(4, centers, -1)[(labels[4:] + 1) % 4, 0]
    options = {"sub_centers": centers, "margin": nf.ArcFace(0.5)}
    found, expected = (
        gradients(lambda x, w, m=module: m.normface_loss(x, w, labels, 64.0, **options), x, weight)
        for module in (nf.functional, reference)
    )
    assert all(each.isfinite().all() for each in found)
    assert_equal_to_1e10([found[0]], [expected[0].cpu()])


@pytest.mark.parametrize("ignored", [2, 5, -2, -1, None])
def test_the_ignored_index_is_a_class_and_no_row(lane, ignored):
    """It may be any number: of a row of the weight, of a class, and what stands for one that is not here."""
    x, weight, labels = sample(lane, 12, 12, 6, 3)
    labels = lane.tensor(torch.arange(12) % 6)
    if ignored is not None:
        labels[3] = ignored
    options = {"sub_centers": 3, "ignore_index": ignored, "reduction": "none"}
    found, expected = (
        gradients(lambda x, w, m=module: m.normface_loss(x, w, labels, 16.0, **options), x, weight)
        for module in (nf.functional, reference)
    )
    assert_equal_to_1e10(found, [each.cpu() for each in expected])
    rank = nf.functional.target_rank(x, weight, labels, sub_centers=3, ignore_index=ignored)
    assert torch.equal(rank, reference.target_rank(x, weight, labels, sub_centers=3, ignore_index=ignored))


def test_no_row_counts(lane):
    x, weight, labels = sample(lane, 5, 12, 4, 3)
    x[:] = math.nan
    found = gradients(
        lambda x, w: nf.functional.normface_loss(x, w, torch.full_like(labels, IGNORE), 16.0, sub_centers=3),
        x,
        weight,
    )
    assert not any(each.any() for each in found)


def test_what_an_ignored_row_holds_reaches_nothing(lane):
    x, weight, labels = sample(lane, 9, 12, 4, 3)

    def of(x):
        return gradients(
            lambda x, w: nf.functional.normface_loss(x, w, labels, 16.0, sub_centers=3), x, weight
        )

    expected = of(x)
    x[4] = math.nan
    assert all(torch.equal(a, b) for a, b in zip(of(x), expected, strict=True))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_centre_that_is_no_number_shows(lane, place):
    """NaN is larger than any cosine, wherever it stands among its class's."""
    x, weight, labels = sample(lane, 6, 12, 4, 3)
    weight[3 + place] = math.nan
    loss = nf.functional.normface_loss(x, weight, labels, 16.0, sub_centers=3, reduction="none")
    assert loss[labels != IGNORE].isnan().all()


def test_weights_and_parts(lane):
    x, weight, labels = sample(lane, 9, 12, 7, 3)
    sample_weight = lane.tensor(torch.linspace(0, 2, 9, dtype=torch.float64))
    class_weight = lane.tensor(torch.linspace(0.5, 2, 7, dtype=torch.float64))
    options = {"sub_centers": 3, "sample_weight": sample_weight, "class_weight": class_weight}
    found, expected = (
        gradients(lambda x, w, m=module: m.normface_loss(x, w, labels, 16.0, **options), x, weight)
        for module in (nf.functional, reference)
    )
    assert_equal_to_1e10(found, [each.cpu() for each in expected])

    def of_parts(module, x, w):
        parts = module.head_parts(x, w, labels, 16.0, sub_centers=3)
        return parts.target_cosine.sin() + parts.log_sum_others.cos()

    found, expected = (
        gradients(lambda x, w, m=module: of_parts(m, x, w), x, weight)
        for module in (nf.functional, reference)
    )
    assert_equal_to_1e10(found, [each.cpu() for each in expected])


@pytest.mark.parametrize("centers", [1, 2, 3, 8])
@pytest.mark.parametrize("classes", [1, 7, 150])
def test_ranks_and_nearest_classes(lane, centers, classes):
    x, weight, labels = sample(lane, 13, 12, classes, centers)
    for name, arguments in (("nearest_class", ()), ("target_rank", (labels,))):
        ours, truth = (
            getattr(module, name)(x, weight, *arguments, sub_centers=centers)
            for module in (nf.functional, reference)
        )
        for o, t in zip(ours, truth, strict=True):
            torch.testing.assert_close(o, t, rtol=1e-10, atol=1e-10)


def test_the_centre_of_a_label(lane):
    x, weight, labels = sample(lane, 13, 12, 7, 4)
    head = nf.NormFaceLoss(12, 7, sub_centers=4, dtype=torch.float64, device=lane.device)
    head.weight.data.copy_(weight)
    cosine = (F.normalize(x) @ F.normalize(weight).T).view(13, 7, 4)
    expected = cosine[torch.arange(13), labels.clamp_min(0)].argmax(1)
    found = head.centers_of(x, labels)
    assert torch.equal(found, torch.where(labels == IGNORE, -1, expected))
    assert found.dtype == torch.int64
    one = nf.NormFaceLoss(12, 7, dtype=torch.float64, device=lane.device)
    assert torch.equal(one.centers_of(x, labels), torch.where(labels == IGNORE, -1, 0))


def test_gradients_are_those_of_the_value(lane):
    x, weight, labels = sample(lane, 4, 5, 3, 3)
    assert torch.autograd.gradcheck(
        lambda x, w, s: nf.functional.normface_loss(
            x, w, labels, s, sub_centers=3, margin=nf.ArcFace(0.2), reduction="none"
        ),
        (x.requires_grad_(), weight.requires_grad_(), lane.tensor(7.0, torch.float64, grad=True)),
    )


def test_a_class_is_never_split(lane):
    """Chunks are whole classes, whatever the budget; what is least is for one class."""
    with pytest.raises(ValueError, match=r"expected `workspace` of at least (\d+) bytes") as caught:
        nf.plan(32, 64, 50, device=plan_device(lane.tensor(0)), workspace=1, sub_centers=7)
    least = int(str(caught.value).split("at least ")[1].split()[0])
    for workspace in (least, 2 * least, 9 * least, None):
        plan = nf.plan(32, 64, 50, device=plan_device(lane.tensor(0)), workspace=workspace, sub_centers=7)
        assert plan.chunks == -(-50 // plan.class_chunk) and plan.workspace_bytes <= (workspace or 1 << 40)
    x, weight, labels = sample(lane, 32, 64, 50, 7, torch.float32)
    options = {"sub_centers": 7, "reduction": "none"}
    small = nf.functional.normface_loss(x, weight, labels, 20.0, workspace=least, **options)
    torch.testing.assert_close(small, nf.functional.normface_loss(x, weight, labels, 20.0, **options))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch, dim, classes, centers", [(20, 16, 60, 3), (9, 40, 30, 8), (17, 8, 10, 70)])
@pytest.mark.parametrize("part", [0.0, 0.5, 1.0])
def test_no_more_memory_than_the_plan_says(lane, dtype, batch, dim, classes, centers, part):
    x, weight, labels = sample(lane, batch, dim, classes, centers, dtype)
    x.requires_grad_(), weight.requires_grad_()
    step = batch, dim, classes, dtype, plan_device(x)
    stored = nf.plan(*step, workspace=1 << 40, sub_centers=centers)
    with pytest.raises(ValueError, match="of at least") as caught:
        nf.plan(*step, workspace=1, sub_centers=centers)
    least = int(str(caught.value).split("at least ")[1].split()[0])
    budget = int(least + part * (stored.workspace_bytes - least))
    plan = nf.plan(*step, workspace=budget, sub_centers=centers)
    assert stored.store and (plan.store or part < 1)

    def run():
        options = {"workspace": budget, "sub_centers": centers}
        nf.functional.normface_loss(x, weight, labels, 30.0, **options).backward()
        x.grad = weight.grad = None

    run()
    gradients = (x.numel() + weight.numel()) * x.element_size()
    # On the CPU a product of 16-bit factors has them widened first: csrc/cuda/products/cublas.h.
    rows = plan.class_chunk * centers
    factors = max((batch + rows) * dim, batch * rows + rows * dim, batch * (rows + dim))
    widened = 4 * factors if lane.emulates and dtype == torch.bfloat16 else 0
    assert peak_bytes(run) - gradients <= plan.workspace_bytes + widened + 4096, str(plan)


def test_which_products_can(capsys):
    """On CUDA those alone that write the scores, and the plan says so."""
    plan = nf.plan(512, 128, 10_000, torch.bfloat16, "cuda", sub_centers=3)
    assert plan.product == "cublas"
    print(plan)
    assert capsys.readouterr().out.count("of which those of a class's centers are compared") >= 3
    assert nf.plan(512, 128, 10_000, torch.bfloat16, "cuda").product != "cublas"


def test_opcheck_of_the_label_s_row(lane):
    x, weight, labels = sample(lane, 5, 8, 4, 3)
    namespace = library.namespace()
    op = namespace.target_center.default
    torch.library.opcheck(op, (x, weight, labels, IGNORE, 1e-12, False, 3))
    found = op(x, weight, labels, IGNORE, 1e-12, False, 3)
    assert torch.equal(found[labels == IGNORE], lane.tensor([-2]))
    elsewhere = op(x, weight, torch.full_like(labels, -1), IGNORE, 1e-12, True, 3)
    assert torch.equal(elsewhere, torch.full_like(labels, -1))


#: What the ops themselves refuse: arguments, and the sentence.
REFUSED = {
    "rows that are no classes": ({"centers": 5}, "expected `centers` of at least 1 that divides the 12 rows"),
    "none": ({"centers": 0}, "expected `centers` of at least 1 that divides the 12 rows"),
    "a list": ({"centers": 3, "sink": 1, "capacity": 2}, "expected neither a `sink` nor `need_class_sum`"),
    "smoothing": ({"centers": 3, "need_class_sum": True}, "expected neither a `sink` nor `need_class_sum`"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_op_refuses(lane, name):
    change, sentence = REFUSED[name]
    x, weight, labels = sample(lane, 5, 8, 4, 3)
    given = engine_ops.arguments(x, weight, labels)
    engine_ops.call("head_sweep", given)
    with pytest.raises(RuntimeError, match=sentence):
        engine_ops.call("head_sweep", {**given, **change})


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"sub_centers": 0}, ValueError, "expected `sub_centers` >= 1, got 0"),
        ({"sub_centers": True}, TypeError, "expected `sub_centers` to be an int, got bool"),
        ({"sub_centers": 2.0}, TypeError, "expected `sub_centers` to be an int, got float"),
        ({"sub_centers": 5}, ValueError, "expected `weight` to have sub_centers=5 rows for each class"),
        (
            {"sub_centers": 3, "label_smoothing": 0.1},
            ValueError,
            "expected `label_smoothing` 0 with `sub_centers`",
        ),
    ],
)
def test_what_a_user_is_told(lane, arguments, error, sentence):
    x, weight, labels = sample(lane, 5, 8, 4, 3)
    with pytest.raises(error, match=f"normface_loss: {sentence}"):
        nf.functional.normface_loss(x, weight, labels, 8.0, **arguments)


def test_a_label_is_a_class():
    x, weight = torch.randn(2, 8), torch.randn(12, 8)
    with pytest.raises(IndexError, match=r"expected `labels` in \[0, 4\)"):
        nf.functional.normface_loss(x, weight, torch.tensor([0, 4]), 8.0, sub_centers=3)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_without_a_break(lane, compile_fully, dynamic):
    torch._dynamo.config.automatic_dynamic_shapes = dynamic
    compiled = compile_fully(
        lambda x, w, y: nf.functional.normface_loss(x, w, y, 12.0, sub_centers=3, margin=nf.CosFace(0.2))
    )
    for batch in (6, 9):
        x, weight, labels = sample(lane, batch, 12, 7, 3)
        given = functools.partial(compiled, y=labels)
        truth = functools.partial(dense, labels=labels.cpu(), scale=12.0, centers=3, psi=lambda c, y: c - 0.2)
        assert_equal_to_1e10(gradients(given, x, weight), gradients(truth, x.cpu(), weight.cpu()))


def test_the_same_bits_every_time(lane):
    x, weight, labels = sample(lane, 33, 24, 40, 3, torch.float32)
    runs = [
        gradients(lambda x, w: nf.functional.normface_loss(x, w, labels, 30.0, sub_centers=3), x, weight)
        for _ in range(3)
    ]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
