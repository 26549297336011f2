"""functional.inner_distance and the pair losses in every lane, against the float64 specification."""

import math

import pytest
import torch
from lanes import DTYPES, ODD_SIZES

import normface_ext as nf
from normface_ext import reference
from normface_ext.testing import assert_close_to_truth, assert_matches_reference

both_p = pytest.mark.parametrize("p", [1, 2])
SHAPES = [(5, 33, 7), (1, 1, 1), (4, 8, 1), (1, 64, 33), (33, 31, 32), (3, 257, 65), (70, 20, 130)]  # N, D, C


def sample(lane, batch=6, dim=33, classes=41, dtype=torch.float32, weight_dtype=None, grad=True):
    x = lane.randn(batch, dim, dtype=dtype, grad=grad)
    weight = lane.randn(classes, dim, dtype=weight_dtype or dtype, seed=1, grad=grad)
    return x, weight, lane.labels(batch, classes)


def check(lane, x, weight, labels=None, name="inner_distance", **options):
    """Gradients of the squared distance are small differences of sums: their terms are the standard."""
    if labels is not None:
        options |= {"labels": labels, "update_center_only": True}
    rounds = not lane.widens and x.dtype.itemsize == 2

    def apart(x, w):  # every sum by itself, none taken from another
        return reference.inner_distance(x.abs() + 1, -w.abs() - 1, **options)

    assert_matches_reference(
        lambda x, w: nf.functional.inner_distance(x, w, **options),
        lambda x, w: reference.inner_distance(x, w, **options),
        [x, weight],
        name,
        terms=apart,
        dim=None,
        **({"factor": 4.0} if rounds else {}),
    )


@pytest.mark.covering(2)
@both_p
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(lane, shape, dtype, p):
    x, weight, _ = sample(lane, *shape, dtype=dtype)
    check(lane, x, weight, p=p)
    assert nf.functional.inner_distance(x, weight, p=p).dtype == dtype


@both_p
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("own_only", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_options(lane, dtype, own_only, normalize, p):
    x, weight, labels = sample(lane, dtype=dtype)
    labels[4] = labels[2]  # two rows of one agent
    check(lane, x, weight, labels if own_only else None, p=p, normalize=normalize)


@both_p
@pytest.mark.parametrize("size", ODD_SIZES)
def test_odd_sizes(lane, size, p):
    for batch, dim, classes in ((size, 17, 3), (3, size, 5), (3, 17, size)):
        x, weight, labels = sample(lane, batch, dim, classes)
        check(lane, x, weight, p=p, name=f"N={batch}, D={dim}, C={classes}")
        check(lane, x, weight, labels % classes, p=p, name=f"own, N={batch}, D={dim}, C={classes}")


@pytest.mark.parametrize(
    "dtypes",
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)],
)
@both_p
def test_mixed_dtypes(lane, dtypes, p):
    x, weight, _ = sample(lane, dtype=dtypes[0], weight_dtype=dtypes[1])
    check(lane, x, weight, p=p)


@both_p
@pytest.mark.parametrize("own_only", [True, False])
def test_gradcheck(lane, own_only, p):
    x, weight, labels = sample(lane, 3, 4, 5, torch.float64)
    options = {"labels": labels, "update_center_only": True} if own_only else {}

    def features(x):
        return nf.functional.inner_distance(x, weight.detach(), p=p, normalize=True, **options)

    def agents(w):
        out = nf.functional.inner_distance(x.detach(), w, p=p, normalize=True, **options)
        return out.gather(1, labels[:, None]) if own_only else out

    assert torch.autograd.gradcheck(features, (x,), fast_mode=lane.slow)
    assert torch.autograd.gradcheck(agents, (weight,), fast_mode=lane.slow)


@both_p
def test_opcheck(lane, p):
    x, weight, labels = sample(lane, grad=False)
    namespace = nf.engine.library.namespace()
    tests = ("test_schema", "test_faketensor")
    for need_near in (False, True):
        torch.library.opcheck(namespace.inner_distance.default, (x, weight, need_near, p), test_utils=tests)
    _, near = namespace.inner_distance(x, weight, True, p)
    for own in (None, labels):
        torch.library.opcheck(
            namespace.inner_distance_backward.default,
            (lane.randn(6, 41), near, x, weight, own, True, True, p),
            test_utils=tests,
        )
    torch.library.opcheck(namespace.pair_distance.default, (x, x + 1, p), test_utils=tests)
    torch.library.opcheck(
        namespace.pair_distance_backward.default, (lane.randn(6), x, x + 1, True, False, p), test_utils=tests
    )


@both_p
def test_l1_and_l2_by_hand(lane, p):
    x, weight = lane.tensor([[1.0, -2.0]], grad=True), lane.tensor([[0.0, 1.0], [1.0, -2.0]], grad=True)
    d = nf.functional.inner_distance(x, weight, p=p)
    assert d.tolist() == ([[4.0, 0.0]] if p == 1 else [[10.0, 0.0]])
    d.backward(lane.tensor([[1.0, 5.0]]))
    expected = [1.0, -1.0] if p == 1 else [2.0, -6.0]
    assert x.grad.tolist() == [expected]
    assert weight.grad.tolist() == [[-v for v in expected], [0.0, 0.0]]


# Cancellation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [0.0, 1e-6, 1e-3, 0.1, 0.3, 1.0])
def test_near_rows_keep_their_digits(lane, gap, dtype):
    """|x|^2 + |w|^2 - 2 <x, w> alone would return rounding, or less than 0, where x and w are near."""
    weight = lane.randn(9, 50, dtype=dtype) * 30
    x = weight[:5] + gap * lane.randn(5, 50, dtype=dtype, seed=2)
    got = nf.functional.inner_distance(x, weight)
    truth = (x.double()[:, None] - weight.double()).square().sum(2)
    assert (got >= 0).all()
    error = ((got.double() - truth).abs() / truth.clamp_min(1e-300)).max()
    assert error <= 64 * torch.finfo(dtype).eps
    if gap == 0:
        assert (got.diagonal() == 0).all()


def test_rows_far_from_the_origin(lane):
    """An offset common to all rows: every cell is near, and every cell is right."""
    x, weight = lane.randn(5, 20) + 1000, lane.randn(40, 20, seed=1) + 1000
    got = nf.functional.inner_distance(x, weight)
    truth = (x.double()[:, None] - weight.double()).square().sum(2)
    assert ((got.double() - truth).abs() <= 1e-6 * truth).all()


def test_huge_rows(lane):
    """Squares past float32's range: infinity where the distance is, the distance where it is not."""
    x = lane.tensor([[1e20, 0.0], [1e20, 1.0]])
    weight = lane.tensor([[1e20, 3.0], [-1e20, 0.0]])
    assert nf.functional.inner_distance(x, weight).tolist() == [[9.0, math.inf], [4.0, math.inf]]
    assert nf.functional.inner_distance(x, weight, p=1)[:, 0].tolist() == [3.0, 2.0]


@both_p
def test_nan_stays_where_it_is(lane, p):
    x, weight, _ = sample(lane, grad=False)
    x[2, 5], weight[7, 0] = math.nan, math.inf
    got = nf.functional.inner_distance(x, weight, p=p)
    clean = torch.ones_like(got, dtype=torch.bool)
    clean[2] = clean[:, 7] = False
    assert got[clean].isfinite().all() and got[2].isnan().all()
    assert (got[torch.arange(6, device=x.device) != 2, 7] == math.inf).all()


# update_center_only ---------------------------------------------------------------------------------


@both_p
def test_update_center_only(lane, p):
    """The agent moves by its own rows; the features feel every agent."""
    x, weight, labels = sample(lane, dtype=torch.float64)
    g = lane.randn(6, 41, dtype=torch.float64, seed=3)
    out = nf.functional.inner_distance(x, weight, p=p, labels=labels, update_center_only=True)
    dx, dw = torch.autograd.grad(out, (x, weight), g)
    full_x, full_w = torch.autograd.grad(nf.functional.inner_distance(x, weight, p=p), (x, weight), g)
    own = torch.nn.functional.one_hot(labels, 41).bool()
    _, own_w = torch.autograd.grad(nf.functional.inner_distance(x, weight, p=p), (x, weight), g * own)
    assert torch.allclose(dx, full_x) and torch.allclose(dw, own_w) and not torch.allclose(dw, full_w)
    assert (dw[~own.any(0)] == 0).all()


# Around it ------------------------------------------------------------------------------------------


@both_p
def test_empty(lane, p):
    x, weight = lane.randn(0, 6, grad=True), lane.randn(4, 6, grad=True)
    out = nf.functional.inner_distance(x, weight, p=p)
    out.sum().backward()
    assert out.shape == (0, 4) and x.grad.shape == (0, 6) and (weight.grad == 0).all()
    x, weight = lane.randn(3, 0, grad=True), lane.randn(2, 0, grad=True)
    out = nf.functional.inner_distance(x, weight, p=p)
    out.sum().backward()
    assert (out == 0).all() and out.shape == (3, 2) and weight.grad.shape == (2, 0)


@both_p
def test_strided_operands_and_nothing_changed(lane, p):
    x, weight, labels = sample(lane, grad=False)
    strided = x.t().contiguous().t()
    before = [t.clone() for t in (x, weight, labels)]
    g = lane.randn(41, 6, seed=5).t()
    results = []
    for features in (x, strided):
        leaf, agents = features.detach().requires_grad_(), weight.detach().requires_grad_()
        out = nf.functional.inner_distance(leaf, agents, p=p, labels=labels, update_center_only=True)
        results.append([out, *torch.autograd.grad(out, (leaf, agents), g)])
    for packed, apart in zip(*results, strict=True):
        assert torch.equal(packed, apart)
    for now, then in zip((x, weight, labels), before, strict=True):
        assert torch.equal(now, then)


@both_p
def test_runs_are_bit_identical(lane, p):
    x, weight, _ = sample(lane, 9, 40, 300)
    runs = []
    for _ in range(3):
        out = nf.functional.inner_distance(x, weight, p=p)
        runs.append([out, *torch.autograd.grad(out, (x, weight), out.detach() / 7)])
    for other in runs[1:]:
        for one, same in zip(runs[0], other, strict=True):
            assert torch.equal(one, same)


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_only_wanted_gradients(lane, wanted):
    x, weight, _ = sample(lane, grad=False)
    check(lane, x.requires_grad_(wanted[0]), weight.requires_grad_(wanted[1]))


@pytest.mark.covering(1)
@both_p
def test_compiled_equals_eager(lane, compile_fully, p):
    def step(x, weight):
        return nf.functional.inner_distance(x, weight, p=p, normalize=True).square().mean()

    compiled = compile_fully(step)
    for batch in (6, 9):
        runs = []
        for function in (step, compiled):
            x, weight, _ = sample(lane, batch)
            function(x, weight).backward()
            runs.append([x.grad, weight.grad])
        for eager, got in zip(*runs, strict=True):
            assert torch.equal(got, eager)


def test_errors():
    x, w, y = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 4])
    d = nf.functional.inner_distance
    with pytest.raises(ValueError, match=r"^inner_distance: expected `weight` to be \[C, 4\] to match `x`"):
        d(x, torch.randn(5, 3))
    with pytest.raises(ValueError, match="expected `p` to be 1 or 2, got 3"):
        d(x, w, p=3)
    with pytest.raises(TypeError, match="expected `x` to be float64, float32"):
        d(x.long(), w)
    with pytest.raises(TypeError, match="both float64 or both not"):
        d(x.double(), w)
    with pytest.raises(ValueError, match="expected `labels` together with `update_center_only`"):
        d(x, w, update_center_only=True)
    with pytest.raises(ValueError, match="expected `labels` together with `update_center_only`"):
        d(x, w, labels=y)
    with pytest.raises(TypeError, match=r"expected `labels` to be int64 or int32, got torch.float32"):
        d(x, w, labels=y.float(), update_center_only=True)
    with pytest.raises(IndexError, match=r"expected `labels` in \[0, 5\), got 5 at row 2"):
        d(x, w, labels=torch.tensor([0, 1, 5]), update_center_only=True)
    with pytest.raises(ValueError, match="expected `eps` to be finite"):
        d(x, w, eps=math.nan)


def test_module(lane):
    layer = nf.InnerDistance(8, 5, p=2, normalize=True).to(lane.device)
    assert torch.allclose(layer.weight.norm(dim=1), torch.ones(5, device=lane.device), atol=1e-6)
    x = lane.randn(3, 8)
    assert torch.equal(layer(x), nf.functional.inner_distance(x, layer.weight, normalize=True))
    labels = lane.labels(3, 5)
    layer.update_center_only = True
    layer(x, labels).sum().backward()
    assert (layer.weight.grad[[1, 2, 3]].abs().sum(1) > 0).sum() <= 1
    assert repr(layer) == "InnerDistance(8, 5, normalize=True, update_center_only=True)"
    with pytest.raises(ValueError, match=r"^InnerDistance: expected `out_features` >= 1, got 0$"):
        nf.InnerDistance(8, 0)


# Pairs and triplets of rows -------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pair_contrastive(lane, dtype, reduction):
    a, b = (lane.randn(9, 31, dtype=dtype, seed=s, grad=True) for s in (0, 1))
    same = lane.tensor([True, False, False] * 3)
    for given in (same, same.long()):
        assert_matches_reference(
            lambda a, b, given=given: nf.functional.pair_contrastive_loss(
                a, b, given, margin=9.0, reduction=reduction
            ),
            lambda a, b: reference.pair_contrastive_loss(a, b, same, margin=9.0, reduction=reduction),
            [a, b],
            "pair_contrastive_loss",
        )


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_triplet(lane, dtype, reduction):
    rows = [lane.randn(9, 33, dtype=dtype, seed=s, grad=True) for s in range(3)]
    assert_matches_reference(
        lambda *r: nf.functional.triplet_loss(*r, margin=3.0, reduction=reduction),
        lambda *r: reference.triplet_loss(*r, margin=3.0, reduction=reduction),
        rows,
        "triplet_loss",
        floor=64,  # of the two distances, not of their difference
    )


def test_pair_losses_by_hand(lane):
    a, b = lane.tensor([[3.0, 0.0], [0.0, 0.0]]), lane.tensor([[0.0, 4.0], [0.0, 0.5]])
    loss = nf.functional.pair_contrastive_loss(a, b, lane.tensor([1, 0]), margin=1.5, reduction="none")
    assert loss.tolist() == [12.5, 0.5]
    loss = nf.functional.triplet_loss(a, b, b + 1, margin=1.0, reduction="none")
    # |a-p|^2 = 25, 0.25; |a-n|^2 = 4 + 25, 1 + 2.25
    assert loss.tolist() == [0.0, 0.0]
    assert nf.functional.triplet_loss(a, b, b, margin=1.0).item() == 1.0
    module = nf.PairContrastiveLoss(margin=1.5)
    assert float(module(a, b, lane.tensor([1, 0]))) == 6.5
    assert float(nf.TripletLoss(margin=1.0)(a, b, b)) == 1.0


def test_equal_rows_have_finite_gradients(lane):
    a = lane.randn(4, 9, grad=True)
    nf.functional.pair_contrastive_loss(a, a.detach(), lane.tensor([0, 1, 0, 1])).backward()
    assert (a.grad == 0).all()


@both_p
def test_pair_gradcheck(lane, p):
    a, b = (lane.randn(3, 5, dtype=torch.float64, seed=s, grad=True) for s in (0, 1))
    pair = nf.distances.ops.pair_distance
    assert torch.autograd.gradcheck(lambda a, b: pair(a, b, p), (a, b), fast_mode=lane.slow)


def test_pair_empty_and_nan(lane):
    empty = lane.randn(0, 5, grad=True)
    loss = nf.functional.triplet_loss(empty, empty, empty)
    loss.backward()
    assert loss == 0 and empty.grad.shape == (0, 5)
    a = lane.randn(3, 5)
    a[1, 2] = math.nan
    losses = nf.functional.triplet_loss(a, a + 1, a - 1, reduction="none")
    assert losses.isnan().tolist() == [False, True, False]


def test_pair_errors():
    a, same = torch.randn(3, 4), torch.tensor([0, 1, 1])
    with pytest.raises(ValueError, match=r"^pair_contrastive_loss: expected `b` to have shape \[3, 4\]"):
        nf.functional.pair_contrastive_loss(a, torch.randn(3, 5), same)
    with pytest.raises(TypeError, match=r"expected `same` to be bool, int64 or int32, got torch.float32"):
        nf.functional.pair_contrastive_loss(a, a, same.float())
    with pytest.raises(ValueError, match="expected `same` to hold 0 and 1"):
        nf.functional.pair_contrastive_loss(a, a, same + 1)
    with pytest.raises(ValueError, match="expected `margin` to be finite, got nan"):
        nf.functional.pair_contrastive_loss(a, a, same, margin=math.nan)
    with pytest.raises(ValueError, match="expected `reduction` to be one of"):
        nf.functional.triplet_loss(a, a, a, reduction="max")
    with pytest.raises(TypeError, match="expected `negative` to be float64 only together"):
        nf.functional.triplet_loss(a, a, a.double())


def test_pair_distance_is_right_in_16_bit(lane):
    a, b = (lane.randn(5, 300, dtype=torch.float16, seed=s) for s in (0, 1))
    got = nf.distances.ops.pair_distance(a, b, 2)
    assert got.dtype == torch.float32
    assert_close_to_truth(got, (a.double() - b.double()).square().sum(1), None, "pair_distance")
