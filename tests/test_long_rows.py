"""Few long rows, many rows of one class, many near cells: what CUDA kernels split over blocks."""

from __future__ import annotations

import pytest
import torch
from kernel_cases.softmax import CHOICES, PLAIN
from lanes import LANES
from test_head_kernels import choose, launches
from test_listed_pairs import pairs
from test_normface_loss import check, sample

import normface_ext as nf
from normface_ext import reference
from normface_ext.engine import calls

ORDERS = ("forward", "reverse", "3")


@pytest.fixture(params=[lane for lane in LANES if not lane.widens], ids=lambda lane: lane.name)
def cuda_lane(request):
    """The lanes that run CUDA kernels."""
    with request.param.active() as lane:
        yield lane


def in_every_order(monkeypatch, function):
    """What blocks, warps and lanes find does not depend on who comes first: bit by bit."""
    runs = []
    for order in ORDERS:
        monkeypatch.setenv("NORMFACE_EMULATION_ORDER", order)
        runs.append(function())
    for other in runs[1:]:
        for one, same in zip(runs[0], other, strict=True):
            assert torch.equal(one, same)
    return runs[0]


def step(function, *leaves):
    given = [t.detach().requires_grad_() for t in leaves]
    loss = function(*given)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), given)]


def close(got, truth, bound=2e-5):
    for name, a, b in zip(("value", "first", "second", "third"), got, truth, strict=False):
        error = float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))
        assert error < bound, f"{name}: {error:.2e}"
    assert len(got) == len(truth)


def emulated() -> object:
    found = [lane for lane in LANES if lane.name == "emulated"]
    if not found:
        pytest.skip("no lane `emulated`")
    return found[0]


# Rows longer than they are many ----------------------------------------------------------------------


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 3e-5), (torch.bfloat16, 5e-2)], ids=str
)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("chunk", [None, 1100])
def test_a_few_rows_over_many_classes(cuda_lane, monkeypatch, dtype, bound, batch, chunk):
    """Outside the window of the fixed shift: the largest logit of a row comes from several blocks."""
    if chunk is not None:
        choose(monkeypatch, "library", chunk, again=True)
    x, weight, labels = sample(cuda_lane, batch, 16, 2500, dtype)
    labels = labels[:batch]

    def run():
        return step(lambda x, w: nf.functional.normface_loss(x, w, labels, 100.0), x, weight)

    truth = step(lambda x, w: reference.normface_loss(x, w, labels, 100.0), x.double(), weight.double())
    close(in_every_order(monkeypatch, run), truth, bound)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("limit", [0, 7, 2500])
def test_the_active_ones_of_long_rows(cuda_lane, monkeypatch, batch, limit):
    """Lists that overflow and lists that do not, with a row that does not count: in the classes' order."""
    x, weight, labels = sample(cuda_lane, batch, 16, 2500)
    labels = labels[:batch].clone()
    if batch > 1:
        labels[1] = -100
    options = {"neg_margin": 1.0, "active_limit": limit, "reduction": "sum"}

    def run():
        return step(lambda x, w: nf.functional.c_contrastive_loss(x, w, labels, **options), x, weight)

    truth_options = {name: value for name, value in options.items() if name != "active_limit"}
    truth = step(
        lambda x, w: reference.c_contrastive_loss(x, w, labels, **truth_options), x.double(), weight.double()
    )
    close(in_every_order(monkeypatch, run), truth)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_hardest_of_long_rows(cuda_lane, monkeypatch, batch):
    """Of equal ones the first, wherever the blocks part."""
    x, weight, labels = sample(cuda_lane, batch, 16, 2500)
    labels = labels[:batch]
    with torch.no_grad():
        for place in (700, 1300, 2400):
            weight[place] = 2 * x[0]

    def run():
        return step(
            lambda x, w: nf.functional.c_triplet_loss(x, w, labels, hardest_only=True, reduction="sum"),
            x,
            weight,
        )

    got = in_every_order(monkeypatch, run)
    moved = got[2][[700, 1300, 2400]].norm(dim=1) > 0
    truth = step(
        lambda x, w: reference.c_triplet_loss(x, w, labels, hardest_only=True, reduction="sum"),
        x.double(),
        weight.double(),
    )
    close(got[:2], truth[:2])
    assert not moved[1:].any()


def test_long_rows_are_shared_by_blocks():
    """The names of what only a split row needs, so that the tests above are about it."""
    lane = emulated()
    with lane.active():
        x, weight, labels = sample(lane, 3, 16, 2500)
        names = launches(
            lambda: nf.functional.c_contrastive_loss(x, weight, labels[:3], neg_margin=1.0, active_limit=9)
        )
        assert "count_active" in names and "list_active" in names
        x, weight, labels = sample(lane, 30, 16, 2500)
        names = launches(
            lambda: nf.functional.c_contrastive_loss(x, weight, labels, neg_margin=1.0, active_limit=9)
        )
        assert "count_active" not in names and "list_active" in names


# Many rows of one class -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("choice", [*CHOICES, *(f"wide {name}" for name in PLAIN)])
@pytest.mark.parametrize("share", ["all", "half", "a few classes"])
def test_a_class_that_owns_the_batch(cuda_lane, monkeypatch, choice, share):
    batch, dim, classes = 300, 24, 21
    narrow = not choice.startswith("wide ")
    choose(monkeypatch, choice.removeprefix("wide "), 13)
    x, weight, labels = sample(
        cuda_lane, batch, dim, classes, torch.bfloat16 if narrow else torch.float32, torch.float32
    )
    labels[:] = {"all": 4 + 0 * labels, "half": torch.where(labels % 2 == 0, 4, labels).to(labels.device),
                 "a few classes": labels % 3}[share]  # fmt: skip
    labels[7] = -100
    check(cuda_lane, x, weight, labels, 20.0)

    def run():
        return step(lambda x, w: nf.functional.normface_loss(x, w, labels, 20.0), x, weight)

    in_every_order(monkeypatch, run)


@pytest.mark.slow
def test_hot_classes_over_several_chunks_of_rows(cuda_lane):
    """1024 rows are looked through at a time: a class that is hot in one chunk, in another and in none."""
    batch, dim, classes = 2100, 8, 40
    x, weight, labels = sample(cuda_lane, batch, dim, classes)
    labels[:1024] = torch.where(labels[:1024] < 20, 3, labels[:1024])
    labels[1024:2048] = labels[1024:2048].clamp_min(4)
    labels[1030:1036] = 3
    labels[2048:] = 3
    check(cuda_lane, x, weight, labels, 20.0)


def test_only_a_large_batch_is_searched_for_hot_classes():
    lane = emulated()

    def names(batch):
        x, weight, labels = sample(lane, batch, 16, 21)
        return launches(lambda: step(lambda x, w: nf.functional.normface_loss(x, w, labels, 20.0), x, weight))

    with lane.active():
        assert "hot_targets" in names(129) and "hot_targets" not in names(128)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("p", [1, 2])
def test_own_rows_of_one_agent(cuda_lane, monkeypatch, p, dtype):
    x, weight, labels = sample(cuda_lane, 400, 9, 5, dtype)
    labels[30:390] = 2

    def run():
        return step(
            lambda x, w: nf.functional.inner_distance(x, w, labels=labels, update_center_only=True, p=p),
            x,
            weight,
        )

    def truth(x, w):
        return reference.inner_distance(x, w, labels=labels, update_center_only=True, p=p)

    exact = step(truth, x.double(), weight.double())
    close(in_every_order(monkeypatch, run)[2:], exact[2:], 1e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_listed_pairs_of_one_class(cuda_lane, monkeypatch, dtype):
    """More entries than a run has, beside classes with a few; runs begin anywhere in the list's places."""
    batch, dim, classes, listed = 290, 9, 12, 2
    x, weight = cuda_lane.randn(batch, dim, dtype=dtype), cuda_lane.randn(classes, dim, dtype=dtype, seed=1)
    chosen = torch.randint(classes + 1, (batch, listed), generator=torch.Generator().manual_seed(2))
    chosen[:, 0] = 5
    chosen[::3, 1] = 8
    chosen = cuda_lane.tensor(chosen)
    factors = cuda_lane.randn(
        batch, listed, dtype=torch.float64 if dtype == torch.float64 else torch.float32, seed=3
    )
    got = in_every_order(monkeypatch, lambda: pairs(x, weight, chosen, factors))
    # The specification has a class past the last for what is none.
    leaves = [t.double().requires_grad_() for t in (x, weight)]
    unit = [t / t.norm(dim=1, keepdim=True) for t in leaves]
    used = torch.where(chosen < classes, factors.double(), 0)
    cosines = (unit[0][:, None] * unit[1][chosen.clamp(max=classes - 1)]).sum(2)
    truth = torch.autograd.grad((used * cosines).sum(), leaves)
    close(got, truth, 1e-2 if dtype == torch.bfloat16 else 1e-5)


# Sums over everything ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_scale_of_many_features(cuda_lane, monkeypatch, dtype):
    x, weight, _ = sample(cuda_lane, 700, 64, 5, dtype)
    s = cuda_lane.tensor(7.0, torch.float64 if dtype == torch.float64 else torch.float32)

    def run():
        return step(nf.functional.norm_linear, x, weight, s)

    got = in_every_order(monkeypatch, run)
    truth = step(reference.norm_linear, x.double(), weight.double(), s.double())
    close(got[3:], truth[3:], 2e-2 if dtype == torch.bfloat16 else 1e-5)
    if cuda_lane.emulates:
        assert {"dot", "add_dots"} <= set(launches(run))


def test_smoothing_of_many_rows(cuda_lane, monkeypatch):
    x, weight, labels = sample(cuda_lane, 200, 24, 70)

    def run():
        return step(
            lambda x, w: nf.functional.normface_loss(x, w, labels, 20.0, label_smoothing=0.3), x, weight
        )

    truth = step(
        lambda x, w: reference.normface_loss(x, w, labels, 20.0, label_smoothing=0.3),
        x.double(),
        weight.double(),
    )
    close(in_every_order(monkeypatch, run), truth)


# Near cells -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("near", ["all", "one in 50", "none"])
@pytest.mark.parametrize("shape", [(70, 33, 130), (3, 40, 257)], ids=str)
def test_near_cells_of_distances(cuda_lane, dtype, near, shape):
    """Features behind a ReLU are all near one another. The value is that of the differences, the marks those
    of the CPU's kernel."""
    batch, dim, classes = shape
    weight = cuda_lane.randn(classes, dim, dtype=dtype, seed=1)
    x = cuda_lane.randn(batch, dim, dtype=dtype)
    if near == "all":
        x, weight = 5 + 0.1 * x, 5 + 0.1 * weight
    elif near == "one in 50":
        for i in range(0, batch, 5):
            weight[i * 7 % classes] = x[i] * 1.01
    with torch.no_grad():
        got, marks = calls.kernels(x, weight).inner_distance(x, weight, True, 2)
        _, expected = torch.ops.normface_ext.inner_distance(x.cpu(), weight.cpu(), True, 2)
    exact = reference.inner_distance(x.double(), weight.double())
    eps = torch.finfo(dtype).eps
    bound = 8 * eps * (x.double().square().sum(1)[:, None] + weight.double().square().sum(1))
    small = exact < 0.12 * (bound / (8 * eps))
    assert ((got.double() - exact).abs() <= bound).all()
    assert ((got.double() - exact).abs() <= 8 * eps * exact + 1e-30)[small].all()
    assert torch.equal(marks.cpu(), expected)
    assert bool(small.all()) == (near == "all") and bool(small.any()) == (near != "none")
