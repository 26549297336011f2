"""Margins of tensors in the class-parallel head: values and gradients are those of one process."""

from __future__ import annotations

import margin_jobs as jobs
import pytest
import torch
from distributed_jobs import problem
from ranks import ranks

import normface_ext as nf


def alone(kind, reduction, gradient="exact"):
    x, weight, labels = problem(jobs.CLASSES, jobs.BATCH, torch.float64)
    labels[3] = -100
    x.requires_grad_(), weight.requires_grad_()
    numbers = jobs.tensors(kind)
    loss = nf.functional.normface_loss(
        x,
        weight,
        labels,
        9.0,
        margin=jobs.margin_of(kind, numbers),
        margin_gradient=gradient,
        reduction=reduction,
    )
    loss.backward(torch.arange(jobs.BATCH, dtype=torch.float64) if reduction == "none" else None)
    return loss.detach(), x.grad, weight.grad, [m.grad for m in numbers if isinstance(m, torch.Tensor)]


def compare(results, expected, kind, factor=1):
    loss, dx, dweight, of_margin = expected
    close = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(torch.cat([r[1] for r in results]), factor * dx, **close)
    for got, _, got_weight, got_margin in results:
        if loss.dim() == 0:
            torch.testing.assert_close(got, loss, **close)
        torch.testing.assert_close(got_weight, dweight, **close)
        if kind != "per row":  # every rank has the whole gradient
            for a, b in zip(got_margin, of_margin, strict=True):
                torch.testing.assert_close(a, b, **close)
    if kind == "per row":
        for place, b in enumerate(of_margin):
            got = torch.cat([r[3][place] for r in results])
            torch.testing.assert_close(got, factor * b, **close)


@pytest.mark.parametrize("kind", jobs.KINDS)
def test_gradients_are_those_of_one_process(kind):
    results = ranks(2).run(jobs.loss_and_gradients, kind, False, "sum", "mean")
    compare(results, alone(kind, "mean"), kind)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("kind", jobs.KINDS)
def test_ranks_of_different_batches(kind, reduction):
    results = ranks(3).run(jobs.loss_and_gradients, kind, True, "sum", reduction)
    compare(results, alone(kind, reduction), kind)


def test_numbers_of_rows_are_averaged_as_their_features_are():
    """Both come from the backbone, whose gradients are divided by the number of ranks afterwards."""
    results = ranks(2).run(jobs.loss_and_gradients, "per row", True, "mean", "mean")
    compare(results, alone("per row", "mean"), "per row", factor=2)


def test_the_straight_gradient():
    results = ranks(2).run(jobs.loss_and_gradients, "number", True, "sum", "mean", "straight")
    compare(results, alone("number", "mean", "straight"), "number")


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("rows", "expected `margin.m2` to have shape [14], a number per row, got [15]"),
        ("classes", "expected `margin.m3` to have shape [10], a number per class, got [6]"),
        (
            "scales",
            "expected `scale` to be a float or a floating tensor of one element, got torch.float32 of"
            " shape [14]",
        ),
    ],
)
def test_what_is_refused(kind, sentence):
    assert ranks(2).run(jobs.refused, kind) == [f"distributed.normface_loss: {sentence}"] * 2
