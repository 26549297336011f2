"""What the head can do, two at a time: sub-centres, two labels, statistics, lengths, margins, derivatives."""

import itertools

import pytest
import torch

import normface_ext as nf
from normface_ext import reference

F = nf.functional
N, D, C = 24, 12, 40

MARGINS = {
    "none": lambda: None,
    "arc": lambda: nf.ArcFace(0.3),
    "per class": lambda: nf.CosFace(torch.linspace(0.1, 0.4, C, dtype=torch.float64)),
    "hard negatives": lambda: nf.MVSoftmax(0.2, 0.2),
    "circle": lambda: nf.CircleSoftmax(0.25),
    "by norms": lambda: nf.MagFace(0.2, 0.5, 1.0, 8.0, 2.0),
}
OPTIONS = {
    "plain": {},
    "long features": {"normalize_input": False},
    "filtered": {"filter_threshold": 0.4},
    "weights, batchmean": {"reduction": "batchmean", "sample_weight": True, "class_weight": True},
}


def problem(lane, centers):
    """Rows near one of the centres of their class, an ignored one among them."""
    weight = lane.randn(C * centers, D, dtype=torch.float64, seed=1)
    labels = lane.labels(N, C)
    near = weight.view(C, centers, D)[labels].mean(1)
    x = 2 * near + lane.randn(N, D, dtype=torch.float64)
    labels[3] = -100
    return x.detach().requires_grad_(), weight.detach().requires_grad_(), labels


def given(lane, margin, options):
    torch.manual_seed(0)
    told = {"margin": MARGINS[margin](), **OPTIONS[options]}
    if isinstance(told["margin"], nf.CosFace):
        told["margin"] = nf.CosFace(lane.tensor(told["margin"].m))
    for name, size in (("sample_weight", N), ("class_weight", C)):
        if name in told:
            told[name] = lane.tensor(torch.rand(size, dtype=torch.float64) + 0.5)
    return told


def allowed(margin, options):
    return not (options == "filtered" and margin in ("hard negatives", "circle"))


COMBINED = [c for c in itertools.product((1, 3), MARGINS, OPTIONS) if allowed(*c[1:])]


@pytest.mark.parametrize(("centers", "margin", "options"), COMBINED)
def test_statistics(lane, centers, margin, options):
    x, weight, labels = problem(lane, centers)
    told = given(lane, margin, options)
    found = [
        of.normface_loss(x, weight, labels, 9.0, sub_centers=centers, return_statistics=True, **told)
        for of in (F, reference)
    ]
    (loss, now), (expected, then) = found
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(tuple(now), tuple(then))
    assert 0 < now.accuracy < 1


@pytest.mark.parametrize("one_product", [True, False])
@pytest.mark.parametrize(("centers", "margin", "options"), COMBINED)
def test_two_labels(lane, monkeypatch, centers, margin, options, one_product):
    from normface_ext.softmax import functions

    monkeypatch.setattr(functions, "SMALL", 0 if one_product else 1 << 30)
    x, weight, labels = problem(lane, centers)
    other, lam = lane.labels(N, C, seed=5), lane.tensor(torch.rand(N, dtype=torch.float64))
    told = given(lane, margin, options)

    def gradients(of):
        loss = of.normface_loss(x, weight, labels, 9.0, sub_centers=centers, labels_b=other, lam=lam, **told)
        return loss, *torch.autograd.grad(loss, (x, weight))

    torch.testing.assert_close(gradients(F), gradients(reference))


@pytest.mark.parametrize(("centers", "margin", "options"), COMBINED)
def test_gradients_of_gradients(lane, centers, margin, options):
    x, weight, labels = problem(lane, centers)
    told = given(lane, margin, options)

    def penalty(of):
        loss = of.normface_loss(x, weight, labels, 9.0, sub_centers=centers, **told)
        first = torch.autograd.grad(loss, (x, weight), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), (x, weight))

    torch.testing.assert_close(penalty(F), penalty(reference))


@pytest.mark.parametrize("form", ["C", "A"])
@pytest.mark.parametrize("gradient", ["exact", "straight"])
def test_gradients_of_gradients_of_sigmoids(lane, form, gradient):
    x, weight, labels = problem(lane, 1)

    def penalty(of):
        options = {"form": form, "m": 0.2, "margin_gradient": gradient}
        loss = of.sphereface2_loss(x, weight, labels, -0.4, **options)
        first = torch.autograd.grad(loss, (x, weight), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), (x, weight))

    torch.testing.assert_close(penalty(F), penalty(reference))


def test_statistics_have_one_label(lane):
    x, weight, labels = problem(lane, 1)
    for name, more in (("normface_loss", (9.0,)), ("c_triplet_loss", ()), ("sphereface2_loss", (0.0,))):
        with pytest.raises(ValueError, match=f"{name}: expected `return_statistics` False with `labels_b`"):
            getattr(F, name)(x, weight, labels, *more, labels_b=labels, lam=0.5, return_statistics=True)


@pytest.mark.parametrize("centers", [1, 3])
@pytest.mark.parametrize("normalize_input", [True, False])
def test_deployed_as_it_was_trained(centers, normalize_input):
    torch.manual_seed(0)
    head = nf.NormFaceLoss(D, C, scale=9.0, sub_centers=centers, normalize_input=normalize_input).double()
    x = torch.randn(N, D, dtype=torch.float64)
    ready = nf.export_ready(head)
    assert f"{D}, {C}" in repr(ready)
    torch.testing.assert_close(ready(x), head(x))
    torch.testing.assert_close(torch.jit.script(ready)(x), head(x))
    program = torch.export.export(torch.nn.Sequential(head), (x,))
    assert "normface_ext" not in str(program.graph)
    torch.testing.assert_close(program.module()(x), head(x))


@pytest.mark.parametrize("centers", [1, 3])
def test_transforms(centers):
    torch.manual_seed(0)
    weight = torch.randn(C * centers, D, dtype=torch.float64)
    x, labels = torch.randn(N, D, dtype=torch.float64), torch.randint(C, (N,))
    other = torch.randint(C, (N,))
    for more in ({}, {"labels_b": other, "lam": 0.3}, {"normalize_input": False}):

        def loss(of, x, more=more):
            return of.normface_loss(x, weight, labels, 9.0, sub_centers=centers, **more)

        for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd):
            found, expected = (transform(lambda t, of=of: loss(of, t))(x) for of in (F, reference))
            torch.testing.assert_close(found, expected)
