"""What a step says of itself: return_statistics=True of every head."""

import copy
import math

import pytest
import statistics_jobs
import torch
from lanes import DTYPES
from ranks import ranks

import normface_ext as nf
from normface_ext import reference
from normface_ext.engine.calls import plan_device

F = nf.functional
IGNORED = -100
N, D, C = 23, 24, 90


class Shifted(nf.BatchMargin):
    """A psi that no kernel knows."""

    def of(self, rows):
        return lambda cosine: cosine - 0.2 * cosine.square()


#: name -> (function, what stands between labels and options, options)
CASES = {
    "softmax": ("normface_loss", (30.0,), {}),
    "a margin": ("normface_loss", (30.0,), {"margin": nf.ArcFace(0.3)}),
    "straight, the sum": (
        "normface_loss", (30.0,),
        {"margin": nf.CosFace(0.2), "margin_gradient": "straight", "reduction": "sum"},
    ),
    "smoothed": ("normface_loss", (30.0,), {"label_smoothing": 0.2}),
    "filtered": ("normface_loss", (30.0,), {"filter_threshold": 0.3, "reduction": "none"}),
    "beyond the window": ("normface_loss", (300.0,), {}),
    "of norms": ("normface_loss", (30.0,), {"margin": nf.MagFace()}),
    "of torch": ("normface_loss", (30.0,), {"margin": Shifted()}),
    "of torch, smoothed": ("normface_loss", (30.0,), {"margin": Shifted(), "label_smoothing": 0.2}),
    "hard negatives": ("normface_loss", (30.0,), {"margin": nf.MVSoftmax(0.3, 0.2)}),
    "contrastive": ("c_contrastive_loss", (), {"neg_margin": 0.9, "pos_margin": 0.8}),
    "exponential": (
        "c_contrastive_loss", (), {"neg_margin": 0.9, "exp_negative_weight": True, "pos_weight": 0},
    ),
    "contrastive, hardest": (
        "c_contrastive_loss", (), {"neg_margin": 0.9, "pos_margin": 0.8, "hardest_only": True},
    ),
    "one positive": ("c_contrastive_loss", (), {"neg_margin": 0.5, "max_positive_only": True}),
    "outliers": (
        "c_contrastive_loss", (),
        {"neg_margin": 0.8, "positive_outlier_thresh": 0.5, "positive_first": True, "reduction": "none"},
    ),
    "divided": ("c_contrastive_loss", (), {"neg_margin": 1.5, "normalize_negative": 0.1, "neg_weight": 2.0}),
    "positives alone": ("c_contrastive_loss", (), {"neg_margin": 1.5, "neg_weight": 0.0, "pos_margin": 0.9}),
    "triplet": ("c_triplet_loss", (), {"margin": -0.3}),
    "triplet, listed": ("c_triplet_loss", (), {"margin": -0.3, "active_limit": 5, "reduction": "sum"}),
    "triplet, hardest": ("c_triplet_loss", (), {"margin": -0.3, "hardest_only": True}),
    "triplet and centres": (
        "c_triplet_loss", (), {"margin": -0.3, "add_center_loss": True, "positive_first": True},
    ),
    "sigmoid": ("sphereface2_loss", (-8.0,), {"r": 20.0, "m": 0.0, "reduction": "none"}),
}  # fmt: skip


def problem(lane, dtype, classes=C):
    """Some rows near their class, some not; one ignored, which holds NaN."""
    weight, labels = lane.randn(classes, D, dtype=dtype, seed=1), lane.labels(N, classes)
    near = torch.linspace(0, 2.5, N, dtype=torch.float64, device=lane.device)[:, None]
    x = (lane.randn(N, D, dtype=torch.float64) + near * weight[labels].double()).to(dtype)
    labels[4], x[4] = IGNORED, math.nan
    return x, weight, labels


def alike(got, wanted, room):
    """Statistics to a rounding; shares and counts exactly."""
    assert isinstance(got, nf.Statistics) and isinstance(wanted, nf.Statistics)
    for name in ("loss", "target_cosine", "target_angle"):
        mine, true = getattr(got, name), getattr(wanted, name).double().cpu()
        bound = room * max(1.0, abs(float(true))) * (60 if name == "target_angle" else 1)
        assert mine.dtype == torch.float64 and abs(float(mine) - float(true)) <= bound, name
    assert [float(t) for t in got[3:]] == pytest.approx([float(t) for t in wanted[3:]], abs=1e-12)
    assert got.rows.dtype == torch.int64


def of(name, x, weight, labels, module=F, **given):
    function, more, options = CASES[name]
    return getattr(module, function)(
        x, weight, labels, *more, return_statistics=True, **{**copy.deepcopy(options), **given}
    )


@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_they_are_those_of_the_reference(lane, name, dtype):
    x, weight, labels = problem(lane, dtype)
    loss, got = of(name, x, weight, labels)
    wanted_loss, wanted = of(name, x.double(), weight.double(), labels, reference)
    narrow = dtype.itemsize == 2 and not lane.widens
    room = {torch.float64: 1e-11, torch.float32: 2e-5}.get(dtype, 1e-2 if narrow else 2e-5)
    alike(got, wanted, room)
    assert 0 < got.accuracy < 1 and got.rows == N - 1
    assert loss.shape == wanted_loss.shape
    for value in got:
        assert value.dim() == 0 and not value.requires_grad and value.device == x.device


def test_both_sides_of_active_are_seen(lane):
    x, weight, labels = problem(lane, torch.float64)
    seen = {name: float(of(name, x, weight, labels)[1].active) for name in CASES}
    some = [name for name, share in seen.items() if 0 < share < 1]
    assert len(some) >= 2 * len(CASES) // 3, seen
    for function in ("normface_loss", "c_contrastive_loss", "c_triplet_loss", "sphereface2_loss"):
        assert any(CASES[name][0] == function for name in some), seen


@pytest.mark.covering(1)
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_the_same_bits(lane, name):
    given = problem(lane, torch.float32)
    function, more, options = CASES[name]

    def step(**asked):
        x, weight = (t.clone().requires_grad_() for t in given[:2])
        result = getattr(F, function)(x, weight, given[2], *more, **copy.deepcopy(options), **asked)
        loss = result[0] if asked else result
        return loss.detach(), *torch.autograd.grad(loss.sum(), (x, weight))

    for plain, beside in zip(step(), step(return_statistics=True), strict=True):
        assert torch.equal(plain, beside)


@pytest.mark.parametrize("name", ["smoothed", "of torch", "divided", "triplet", "sigmoid"])
def test_weights_do_not_weigh(lane, name):
    """But for a weight of 0, which takes a row out, and for what is divided by a weighted mean."""
    x, weight, labels = problem(lane, torch.float64)
    factors = lane.randn(N, dtype=torch.float64, seed=3).abs() + 0.1
    factors[7], x[7] = 0, math.inf
    _, got = of(name, x, weight, labels, sample_weight=factors)
    alike(got, of(name, x, weight, labels, reference, sample_weight=factors)[1], 1e-11)
    if name != "divided":
        without = labels.clone()
        without[7] = IGNORED
        alike(got, of(name, x, weight, without)[1], 1e-11)
    assert got.rows == N - 2


@pytest.mark.parametrize("name", ["softmax", "smoothed", "a margin", "of torch"])
def test_class_weights_are_of_the_loss_alone(lane, name):
    x, weight, labels = problem(lane, torch.float64)
    factors = lane.randn(C, dtype=torch.float64, seed=3).abs()
    _, got = of(name, x, weight, labels, class_weight=factors)
    alike(got, of(name, x, weight, labels, reference, class_weight=factors)[1], 1e-11)
    plain = of(name, x, weight, labels)[1]
    assert got.loss != plain.loss and got[1:] == plain[1:]


@pytest.mark.covering(1)
@pytest.mark.parametrize("name", CASES)
def test_no_rows(lane, name):
    x, weight, labels = problem(lane, torch.float32)
    for given in ((x, torch.full_like(labels, IGNORED)), (x[:0], labels[:0])):
        _, got = of(name, given[0], weight, given[1])
        assert [float(value) for value in got] == [0.0] * 6


@pytest.mark.covering(1)
@pytest.mark.parametrize("name", CASES)
def test_one_class(lane, name):
    x, weight, labels = problem(lane, torch.float64, classes=1)
    _, got = of(name, x, weight, labels)
    alike(got, of(name, x, weight, labels, reference)[1], 1e-11)
    assert got.accuracy == 1


@pytest.mark.parametrize("name", ["softmax", "contrastive", "triplet, hardest", "sigmoid"])
@pytest.mark.parametrize("where", ["row", "class", "label"])
def test_nan_is_no_hit_and_shows(lane, name, where):
    x, weight, labels = problem(lane, torch.float32)
    labels[labels != IGNORED] = 3
    if where == "row":
        x[20] = math.nan
    else:
        weight[3 if where == "label" else 60] = math.nan
    _, got = of(name, x, weight, labels)
    cosines = reference.cosine(x, weight)[labels != IGNORED]
    hit = ~(~(cosines <= cosines[:, 3:4])).scatter(1, torch.full((N - 1, 1), 3, device=x.device), False).any(
        1
    )
    assert float(got.accuracy) == pytest.approx(float(hit.double().mean()), abs=1e-12)
    assert got.target_cosine.isnan() == (where != "class") and got.rows == N - 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hits_are_those_of_the_head(lane, dtype):
    """Also where the label's class is there twice."""
    x, weight, labels = problem(lane, dtype)
    if dtype == torch.float64 or lane.widens:
        weight[C // 2 :] = weight[: C // 2].clone()
    head = nf.NormFaceLoss(D, C, margin=nf.ArcFace(0.3), dtype=dtype).to(lane.device)
    with torch.no_grad():
        head.weight.copy_(weight)
    for _ in range(2):
        assert head(x, labels, return_statistics=True)[1].accuracy == head.accuracy(x, labels, topk=(1,))[0]


def layers(lane, dtype=torch.float32):
    made = [
        nf.NormFaceLoss(D, C, scale=9.0, margin=nf.ArcFace(0.3), dtype=dtype),
        nf.NormFaceLoss(D, C, scale=9.0, margin=nf.AdaFace(), dtype=dtype),
        nf.CContrastiveLoss(D, C, neg_margin=0.9, add_intra_mae=True, dtype=dtype),
        nf.CTripletLoss(D, C, margin=-0.3, dtype=dtype),
        nf.SphereFace2Loss(D, C, dtype=dtype),
    ]
    return [layer.to(lane.device) for layer in made]


def test_layers_give_them_too(lane):
    x, weight, labels = problem(lane, torch.float32)
    for layer in layers(lane):
        with torch.no_grad():
            layer.weight.copy_(weight)
        beside = copy.deepcopy(layer)
        loss, got = layer(x, labels, return_statistics=True)
        assert torch.equal(loss, beside(x, labels)) and isinstance(loss, torch.Tensor)
        assert float(got.loss) == pytest.approx(float(loss.detach()), rel=1e-6)
        factors = torch.ones(N, device=lane.device)
        assert copy.deepcopy(layer)(x, labels, factors, return_statistics=True)[1][1:] == got[1:]
        # A state moves once.
        assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), beside.buffers(), strict=True))


def test_wrong_calls():
    head, x, labels = nf.NormFaceLoss(4, 7), torch.ones(1, 4), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(
        TypeError, match=r"NormFaceLoss: expected `return_statistics` to be True or False, got 1"
    ):
        head(x, labels, return_statistics=1)
    with pytest.raises(
        ValueError, match=r"NormFaceLoss: expected `labels` together with `return_statistics`"
    ):
        head(x, return_statistics=True)
    for loss, more in (("normface_loss", (1.0,)), ("c_triplet_loss", ()), ("sphereface2_loss", (0.0,))):
        with pytest.raises(
            TypeError, match=f"{loss}: expected `return_statistics` to be True or False, got None"
        ):
            getattr(F, loss)(x, head.weight, labels, *more, return_statistics=None)


def test_no_matrix_of_all_cosines():
    """Beyond what the step itself holds, on the CPU's kernels."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, 16, generator=generator) for rows in (64, 20_000))
    labels = torch.randint(20_000, (64,), generator=generator)
    for name in ("softmax", "triplet", "sigmoid"):
        function, more, options = CASES[name]
        plain = nf.testing.peak_bytes(lambda: getattr(F, function)(x, weight, labels, *more, **options))  # noqa: B023
        beside = nf.testing.peak_bytes(lambda: of(name, x, weight, labels))  # noqa: B023
        assert beside - plain < 64 * 20_000 * 4 / 20


def test_in_16_bits_by_autocast(lane):
    """Inside autocast a hit is one of its products; on the CPU nothing is lowered."""
    x, weight, labels = problem(lane, torch.float32)
    kind = plan_device(x).type if lane.device.type == "cuda" else "cpu"
    with torch.autocast(kind, torch.bfloat16):
        _, got = of("softmax", x, weight, labels)
    alike(got, of("softmax", x, weight, labels, reference)[1], 1e-2)


def test_compiled_into_one_graph(lane, compile_fully):
    x, weight, labels = problem(lane, torch.float32)
    for layer in layers(lane):
        with torch.no_grad():
            layer.weight.copy_(weight)
        eager, given = copy.deepcopy(layer), x.clone().requires_grad_()
        loss, got = compile_fully(layer)(given, labels, return_statistics=True)
        wanted_loss, wanted = eager(x, labels, return_statistics=True)
        assert torch.equal(loss, wanted_loss) and all(map(torch.equal, got, wanted))
        loss.backward()
        assert given.grad is not None and not any(value.requires_grad for value in got)


@pytest.mark.parametrize("world", [2, 3])
def test_of_the_rows_of_all_ranks(world):
    for got, wanted, losses in ranks(world).run(statistics_jobs.all_heads):
        assert losses[0] == losses[1]
        for name, ours in got.items():
            alike(ours, wanted[name], 1e-12)
            assert ours.rows == statistics_jobs.ROWS - 1


def test_of_the_classes_drawn():
    """A step of sampled classes: rows and angles are of all, and fewer others are nearer than the label's."""
    for sampled, whole in ranks(2).run(statistics_jobs.sampled):
        assert torch.allclose(torch.stack(sampled[1:3]), torch.stack(whole[1:3]), rtol=1e-12)
        assert sampled.rows == whole.rows and sampled.accuracy >= whole.accuracy
        assert sampled.loss < whole.loss


def test_one_more_collective():
    for calls, more in ranks(2).run(statistics_jobs.collectives_of_a_step):
        assert more[: len(calls) - 1] == calls[:-1] and len(more) == len(calls) + 1
