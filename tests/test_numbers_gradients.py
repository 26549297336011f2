"""First gradients are the same however they are asked for; what they are summed from is rounded once."""

import itertools

import pytest
import torch
from lanes import DTYPES

import normface_ext as nf
from normface_ext import reference

F = nf.functional
both_p = pytest.mark.parametrize("p", [1, 2])


def error_of(got, truth):
    return ((got.double() - truth.double()).norm() / truth.double().norm()).item()


def gradients(call, tensors, upstream, *, create_graph=False):
    """Of `tensors`, whose strides stay; where there is to be a graph, the gradients have one."""
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]
    return leaves, torch.autograd.grad(call(*leaves), leaves, upstream, create_graph=create_graph)


# With a graph or without ------------------------------------------------------------------------------

#: name -> (call, of how many of x, weight, scale)
TWICE = {
    "normalize": (lambda x: F.normalize(x), 1),
    "normalize, p=1": (lambda x: F.normalize(x, p=1), 1),
    "channels": (lambda x: F.normalize(x, dim=0), 1),
    "norm": (lambda x: F.normalize(x, return_norm=True)[1], 1),
    "norm_linear": (lambda x, w, s: F.norm_linear(x, w, s), 3),
    "raw features": (lambda x, w, s: F.norm_linear(x, w, s, normalize_input=False), 3),
}
every_call = pytest.mark.parametrize("name", TWICE)


@every_call
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["plain", "zero", "huge", "tiny", "spike"])
def test_a_graph_changes_no_first_gradient(lane, name, dtype, kind):
    call, count = TWICE[name]
    x = lane.rows(5, 33, dtype, kinds=("plain", kind))
    given = [x, lane.rows(7, 33, dtype, kinds=(kind, "plain"), seed=1), lane.tensor(2.0, torch.float32)][
        :count
    ]
    out = call(*given)
    upstream = lane.randn(*out.shape, dtype=out.dtype, seed=3)
    _, plain = gradients(call, given, upstream)
    _, graphed = gradients(call, given, upstream, create_graph=True)
    for a, b in zip(plain, graphed, strict=True):
        assert b.requires_grad and torch.equal(a, b.detach())


#: name -> (call, how many powers of a row's magnitude its second derivative loses)
CURVED = {
    "normalize": (lambda x, w: F.normalize(x, eps=0.0), 2),
    "normalize, p=1": (lambda x, w: F.normalize(x, p=1, eps=0.0), 2),
    "norm": (lambda x, w: F.normalize(x, eps=0.0, return_norm=True)[1], 1),
    "norm_linear": (lambda x, w: F.norm_linear(x, w, 2.0, eps=0.0), 2),
}


@pytest.mark.parametrize("name", CURVED)
@pytest.mark.parametrize("power", [-60, 70])
def test_second_derivatives_at_any_magnitude(lane, name, power):
    call, lost = CURVED[name]
    weight, along = lane.randn(3, 6, seed=1), lane.randn(4, 6, seed=4)
    seen = []
    for factor in (1.0, 2.0**power):
        x = (lane.randn(4, 6) * factor).requires_grad_()
        out = call(x, weight)
        (dx,) = torch.autograd.grad(out, x, factor * lane.randn(*out.shape, seed=3), create_graph=True)
        (second,) = torch.autograd.grad((dx * along).sum(), x)
        seen.append(second.double() * factor ** (lost - 1))
    assert error_of(seen[1], seen[0]) < 1e-4


# Strides ----------------------------------------------------------------------------------------------

LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.t().contiguous().t(),
    "every other": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "expanded": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize(("of_x", "of_weight"), list(itertools.product(LAYOUTS, LAYOUTS)))
def test_second_derivatives_of_strided_operands(lane, of_x, of_weight):
    double = torch.float64
    x = LAYOUTS[of_x](lane.randn(5, 4, dtype=double)).detach().requires_grad_()
    weight = LAYOUTS[of_weight](lane.randn(7, 4, dtype=double, seed=1)).detach().requires_grad_()
    scale = lane.tensor(2.0, double, grad=True)
    upstream = lane.randn(5, 7, dtype=double, seed=2)

    def penalty(library):
        leaves = (x, weight, scale)
        first = torch.autograd.grad(
            (library.norm_linear(*leaves) * upstream).sum(), leaves, create_graph=True
        )
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    for got, truth in zip(penalty(F), penalty(reference), strict=True):
        torch.testing.assert_close(got, truth)


@pytest.mark.parametrize("trained", ["x", "weight"])
@pytest.mark.parametrize("normalize_input", [True, False])
def test_second_derivatives_where_one_side_is_frozen(lane, trained, normalize_input):
    """Raw features enter linearly: their second derivative is 0, and not an error."""
    double = torch.float64
    x = lane.randn(3, 4, dtype=double, grad=trained == "x")
    weight = lane.randn(5, 4, dtype=double, seed=1, grad=trained == "weight")
    leaf = x if trained == "x" else weight
    upstream = lane.randn(3, 5, dtype=torch.float64, seed=7)
    out = F.norm_linear(x, weight, 2.0, normalize_input=normalize_input)
    (first,) = torch.autograd.grad(out, leaf, upstream, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), leaf)
    if trained == "x" and not normalize_input:
        assert (second == 0).all()
    else:
        truth = reference.norm_linear(x, weight, 2.0, normalize_input=normalize_input)
        (expected,) = torch.autograd.grad(truth, leaf, upstream, create_graph=True)
        torch.testing.assert_close(second, torch.autograd.grad(expected.square().sum(), leaf)[0])


def test_third_derivatives(lane):
    x, weight = (lane.randn(n, 4, dtype=torch.float64, seed=n, grad=True) for n in (3, 5))

    def third(library):
        value = library.norm_linear(x, weight, 2.0).sin().sum() + library.normalize(x, eps=0.1).exp().sum()
        for _ in range(2):
            first = torch.autograd.grad(value, (x, weight), create_graph=True)
            value = sum(g.square().sum() for g in first)
        return torch.autograd.grad(value, (x, weight))

    for got, truth in zip(third(F), third(reference), strict=True):
        torch.testing.assert_close(got, truth)


# Sums of what was rounded -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("apart", [1.0, 0.1, 0.01])
def test_the_anchor_of_a_triplet_is_rounded_once(lane, dtype, apart):
    a, n = lane.randn(16, 64, dtype=dtype), lane.randn(16, 64, dtype=dtype, seed=1)
    p = lane.tensor(n.float() + apart * lane.randn(16, 64, seed=2), dtype)

    def anchor(library, wide):
        leaf = a.detach().to(wide, copy=True).requires_grad_()
        library.triplet_loss(leaf, p.to(wide), n.to(wide), margin=100.0, reduction="sum").backward()
        assert leaf.grad.dtype == wide
        return leaf.grad

    truth = anchor(reference, torch.float64)
    plain = error_of(anchor(reference, dtype), truth)
    assert error_of(anchor(F, dtype), truth) <= 4 * plain + torch.finfo(dtype).eps / 2


#: What lies where: rows far from the origin by a common offset, in clusters, beside one that is far away.
PLACES = {
    "origin": lambda t: t,
    "offset 30": lambda t: t + 30,
    "offset 1000": lambda t: t + 1000,
    "offset 10000": lambda t: t + 10_000,
    "clusters": lambda t: t + 1000 * (torch.arange(len(t), device=t.device) % 2 * 2 - 1)[:, None],
    "one outlier": lambda t: t + 100 + 1e5 * (torch.arange(len(t), device=t.device) == 2)[:, None],
}


#: 16-bit numbers of 10,000 lie 8 or 64 apart, and 1e5 is no float16.
FINE = [torch.float64, torch.float32]
SPREADS = [(d, p) for d in DTYPES for p in PLACES if d in FINE or p not in ("offset 10000", "one outlier")]


@both_p
@pytest.mark.parametrize(("dtype", "place"), SPREADS, ids=str)
@pytest.mark.parametrize("own_only", [False, True])
def test_gradients_of_distances_do_not_cancel(lane, place, dtype, own_only, p):
    """They are as exact as the distances, which come from the differences, wherever the origin is."""
    x = lane.tensor(PLACES[place](lane.randn(12, 20, dtype=torch.float64)), dtype)
    weight = lane.tensor(PLACES[place](lane.randn(70, 20, dtype=torch.float64, seed=1)), dtype)
    upstream = lane.randn(12, 70, dtype=dtype, seed=2)
    if place == "clusters":  # what is far counts nothing: no large gradient hides the small ones
        upstream = upstream * ((x.float() - weight.float()[:, None]).abs().sum(2).t() < 1e3)
    labels = lane.labels(12, 70)
    options = {"p": p, "labels": labels, "update_center_only": True} if own_only else {"p": p}

    def both(library, wide):
        leaves = [t.detach().to(wide, copy=True).requires_grad_() for t in (x, weight)]
        out = library.inner_distance(*leaves, **options)
        out.backward(upstream.to(wide))
        return [leaf.grad for leaf in leaves]

    wider = torch.float32 if dtype.itemsize == 2 else dtype
    rounding = torch.finfo(dtype).eps if dtype.itemsize == 2 else 0.0
    for name, got, plain, truth in zip(
        ("dx", "dW"), both(F, dtype), both(reference, wider), both(reference, torch.float64), strict=True
    ):
        allowed = 4 * error_of(plain, truth) + rounding + 8 * torch.finfo(wider).eps
        assert error_of(got, truth) <= allowed, f"{name}: {error_of(got, truth):.1e}, {allowed:.1e} allowed"


def test_near_cells_beside_far_ones(lane):
    """Rows at their agents among others, over tile edges: each cell is counted once, by one of two ways."""
    for batch, dim, classes in ((3, 5, 31), (65, 7, 33), (5, 70, 64), (70, 3, 130)):
        weight = lane.randn(classes, dim)
        labels = lane.labels(batch, classes)
        x = weight[labels] + 0.01 * lane.randn(batch, dim, seed=1)
        g = lane.randn(batch, classes, seed=2)
        _, got = gradients(lambda x, w: F.inner_distance(x, w), (x, weight), g)
        wide = [t.double() for t in (x, weight)]
        _, truth = gradients(lambda x, w: reference.inner_distance(x, w), wide, g.double())
        for a, b in zip(got, truth, strict=True):
            assert error_of(a, b) < 2e-6


@both_p
def test_distances_in_place(lane, p):
    """What backward keeps is its own: the distances may be changed."""
    x, weight = lane.randn(4, 5, grad=True), lane.randn(6, 5, seed=1, grad=True)
    F.inner_distance(x, weight, p=p).mul_(2).sum().backward()
    expected = torch.autograd.grad(2 * F.inner_distance(x, weight, p=p).sum(), (x, weight))
    assert torch.equal(x.grad, expected[0]) and torch.equal(weight.grad, expected[1])
