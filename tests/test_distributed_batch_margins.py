"""Margins that look at the batch in a class-parallel head: it equals the head of one process."""

from __future__ import annotations

import functools

import batch_margin_jobs as jobs
import pytest
import torch
from dense_head import OPTIONS, allowed, assert_equal_to_1e10, problem
from ranks import ranks

import normface_ext as nf

#: Margins that do not depend on which rank draws.
MARGINS = {
    "adaface": functools.partial(nf.AdaFace, t_alpha=0.25),
    "magface": nf.MagFace,
    "elastic": functools.partial(nf.ElasticArcFace, std=0.0),
    "curricular": functools.partial(nf.CurricularFace, alpha=0.25),
    "mv_arc": nf.MVSoftmax,
    "mv_am": functools.partial(nf.MVSoftmax, kind="am", adaptive=False),
}


def alone(make, options, straight, weights):
    x, weight, labels = problem()
    margin = make()
    x.requires_grad_()
    weight.requires_grad_()
    loss = nf.functional.normface_loss(
        x, weight, labels, 16.0, margin=margin, margin_gradient=straight, sample_weight=weights, **options
    )
    upstream = torch.linspace(0.5, 1.5, len(x), dtype=torch.float64)
    loss.backward(upstream if loss.dim() else upstream[0])
    return loss.detach(), x.grad, weight.grad, [float(b) for b in margin.buffers()]


@pytest.mark.covering(1)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("straight", ["exact", "straight"])
@pytest.mark.parametrize("backbone", ["sum", "mean"])
@pytest.mark.parametrize("margin", MARGINS)
def test_it_is_the_head_of_one_process(margin, backbone, straight, options):
    options = dict(allowed(MARGINS[margin](), options))
    weights = options.pop("sample_weight", None)
    make = MARGINS[margin]
    loss, dx, dweight, state = alone(make, options, straight, weights)
    results = ranks(3).run(jobs.step, make, options, straight, backbone, weights)
    found_loss = torch.cat([r[0] for r in results]) if loss.dim() else results[0][0]
    found_dx = torch.cat([r[1] for r in results]) / (3 if backbone == "mean" else 1)
    assert_equal_to_1e10([found_loss, found_dx, results[0][2]], [loss, dx, dweight])
    for other in results:
        assert other[3] == pytest.approx(state, rel=1e-13)
        assert loss.dim() or torch.equal(other[0], results[0][0])
        assert torch.equal(other[2], results[0][2])


def test_all_ranks_know_all_draws():
    losses = ranks(3).run(jobs.draws)
    assert torch.equal(losses[0], losses[1]) and torch.equal(losses[0], losses[2])


def test_a_function_of_the_cosines_is_one_sentence():
    for said in ranks(3).run(jobs.sentence):
        assert said.startswith(
            "distributed.normface_loss: expected a `margin` that the kernels apply, got Elastic"
        )
