"""Ops without second derivatives say so, however and by whatever they are asked for: never a silent zero."""

import itertools

import pytest
import torch
from ranks import ranks
from second_derivative_jobs import penalties

import normface_ext as nf

F = nf.functional

#: name -> (x, weight, labels) -> number. The sentence begins with the name.
OPS = {
    "normface_loss": lambda x, w, y: F.normface_loss(x, w, y, 4.0),
    "c_contrastive_loss": lambda x, w, y: F.c_contrastive_loss(x, w, y),
    "c_triplet_loss": lambda x, w, y: F.c_triplet_loss(x, w, y),
    "inner_distance": lambda x, w, y: F.inner_distance(x, w).square().sum(),
    "pair_distance": lambda x, w, y: F.triplet_loss(x, w[y], w[y - 1], margin=9.0),
}
STRIDED = {"contiguous": lambda t: t, "transposed": lambda t: t.t().contiguous().t()}


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("trained", [("x",), ("weight",), ("x", "weight")], ids="+".join)
@pytest.mark.parametrize("layouts", list(itertools.product(STRIDED, STRIDED)), ids="+".join)
def test_a_penalty_on_a_gradient_raises(lane, name, trained, layouts):
    leaves = {"x": lane.randn(5, 8), "weight": lane.randn(7, 8, seed=1)}
    leaves = {
        key: STRIDED[layout](t).detach() for (key, t), layout in zip(leaves.items(), layouts, strict=True)
    }
    for key in trained:
        leaves[key].requires_grad_()
    labels = lane.labels(5, 7)
    for penalised in trained:
        for asked in (penalised, *trained):
            loss = OPS[name](*leaves.values(), labels)
            (first,) = torch.autograd.grad(loss, leaves[penalised], create_graph=True)
            with pytest.raises(RuntimeError, match=f"^{name}: second derivatives are not available"):
                torch.autograd.grad(loss + first.square().sum(), leaves[asked], retain_graph=True)
            with pytest.raises(RuntimeError, match=f"^{name}: second derivatives are not available"):
                (loss + first.square().sum()).backward()


def test_a_first_gradient_with_a_graph_is_the_same(lane):
    x, weight, labels = lane.randn(5, 8, grad=True), lane.randn(7, 8, seed=1, grad=True), lane.labels(5, 7)
    for name, call in OPS.items():
        plain, graphed = (
            torch.autograd.grad(call(x, weight, labels), (x, weight), create_graph=graph)
            for graph in (False, True)
        )
        for a, b in zip(plain, graphed, strict=True):
            assert torch.equal(a, b.detach()), name


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
