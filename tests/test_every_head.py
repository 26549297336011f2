"""Every published head against its formula: at random and at the edges, on every lane, in two shards; and
what each has to have besides."""

from __future__ import annotations

import math
import re
from pathlib import Path

import every_head_jobs as jobs
import pytest
import torch
from dense_head import assert_equal_to_1e10, gradients, problem
from every_head import EVERY
from ranks import ranks

import normface_ext as nf
from normface_ext import reference
from normface_ext.softmax.batch_margins import BatchMargin

every_head = pytest.mark.parametrize("name", EVERY)
LENGTHS = {"random": (1.0, 60.0), "short": (1e-3, 2e-3), "long": (900.0, 1000.0)}
HEADS = (Path(__file__).parent.parent / "docs" / "heads.md").read_text(encoding="utf-8")


def ours(head, lane, labels, dtype=torch.float64):
    """The head as a function of x and weight."""

    def loss(x, weight):
        made = head.make(weight.shape[1], weight.shape[0], dtype).to(lane.device)
        return torch.func.functional_call(made, {"weight": weight}, (x, lane.tensor(labels)))

    return loss


def both(name, lane, x, weight, labels, dtype=torch.float64):
    """[loss, dx, dweight], ours and the formula's, whose arithmetic is float64."""
    found = gradients(
        ours(EVERY[name], lane, labels, dtype), lane.tensor(x, dtype), lane.tensor(weight, dtype)
    )
    rounded = x.to(dtype).double(), weight.to(dtype).double()
    return found, gradients(lambda x, w: EVERY[name].loss(x, w, labels), *rounded)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@every_head
def test_it_is_its_formula(lane, name, lengths):
    """Rows behind their class, past every guard, are among them, and one that is ignored."""
    x, weight, labels = problem(lengths=lengths)
    found, expected = both(name, lane, x, weight, labels)
    for f, e in zip(found, expected, strict=True):
        size = max(1.0, float(e.abs().max()))
        torch.testing.assert_close(f.cpu() / size, e / size, rtol=1e-10, atol=1e-10)
    assert (found[1][labels == -100] == 0).all()


@pytest.mark.parametrize("rows, classes", [(1, 7), (9, 1), (1, 1), (9, 2)])
@every_head
def test_few_rows_and_few_classes(lane, name, rows, classes):
    x, weight, labels = problem(rows=rows, classes=classes)
    if rows == 1:
        labels[0] = classes - 1
    assert_equal_to_1e10(*both(name, lane, x, weight, labels))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@every_head
def test_cosines_of_one_and_minus_one(lane, name, dtype):
    """The label's and others', of every length: the loss is the formula's, and no gradient has no number."""
    weight = torch.tensor([[2.0, 0.0], [5.0, 0.0], [-3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    x = torch.tensor([[4.0, 0.0], [-1.0, 0.0], [1e-3, 0.0], [0.0, -1e3]], dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3])
    found = gradients(
        ours(EVERY[name], lane, labels, dtype), lane.tensor(x, dtype), lane.tensor(weight, dtype)
    )
    expected = EVERY[name].loss(x, weight, labels)
    assert float(found[0]) == pytest.approx(float(expected), rel=1e-9 if dtype == torch.float64 else 1e-5)
    assert all(f.isfinite().all() for f in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@every_head
def test_narrow_features(lane, name, dtype):
    x, weight, labels = problem(
        lengths=(1.0, 3.0) if name in ("sphereface", "long features") else (1.0, 60.0)
    )
    found, expected = both(name, lane, x, weight, labels, dtype)
    tolerance = {torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 0.12}[dtype]
    for f, e in zip(found, expected, strict=True):
        assert (f.cpu().double() - e).norm() <= tolerance * max(e.norm(), 1e-3)


@every_head
def test_squares_that_bfloat16_has_no_number_for(lane, name):
    """Features of length 1e20, whose squares overflow; rows that are ignored may hold anything."""
    x, weight, labels = problem(dtype=torch.bfloat16)
    x, weight = x * 1e20, weight * 1e20
    x[labels == -100] = math.nan
    head = EVERY[name]
    if not head.options().get("normalize_input", True):  # logits of a size that trains
        head = head._replace(scale=1e-20 * head.scale)
    found = gradients(ours(head, lane, labels, torch.bfloat16), lane.tensor(x), lane.tensor(weight))
    expected = head.loss(x.double(), weight.double(), labels)
    assert all(f.isfinite().all() for f in found)
    assert float(found[0]) == pytest.approx(float(expected), rel=5e-2)


@every_head
def test_gradcheck(lane, name):
    x, weight, labels = problem(rows=4, dim=3, classes=4, lengths=(0.5, 1.5), seed=3)
    loss = ours(EVERY[name], lane, labels)
    inputs = lane.tensor(x, grad=True), lane.tensor(weight, grad=True)
    if name in ("adaface", "circle"):  # norms and brackets are weights there: the gradient is not the loss's
        found = torch.autograd.grad(loss(*inputs), inputs)
        leaves = x.requires_grad_(), weight.requires_grad_()
        assert_equal_to_1e10(found, torch.autograd.grad(EVERY[name].loss(*leaves, labels), leaves))
    else:
        assert torch.autograd.gradcheck(loss, inputs, fast_mode=lane.slow)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@every_head
def test_in_two_shards_it_is_the_head_of_one_process(name, lengths):
    x, weight, labels = problem(lengths=lengths)
    loss, dx, dw = gradients(lambda x, w: 2 * EVERY[name].loss(x, w, labels), x, weight)  # halved there
    results = ranks(2).run(jobs.step, name, lengths)
    size = max(1.0, float(dx.abs().max()), float(loss))
    for found in results:
        assert_equal_to_1e10([found[0] / size, found[2] / size], [loss / 2 / size, dw / size])
    assert_equal_to_1e10([torch.cat([found[1] for found in results]) / size], [dx / size])


@every_head
def test_the_specification_is_the_formula(name):
    x, weight, labels = problem()
    head = EVERY[name].make(16, 7)

    def specified(x, w):
        if not EVERY[name].softmax:
            options = {k: v for k, v in vars(head.options).items() if k != "first_bias"}
            return reference.sphereface2_loss(x, w, labels, -1.5, **options)
        given = EVERY[name].options()
        if isinstance(given.get("margin"), BatchMargin):
            given["margin"].eval()
        return reference.normface_loss(x, w, labels, EVERY[name].scale, eps=0.0, **given)

    found = gradients(specified, x, weight)
    assert_equal_to_1e10(found, gradients(lambda x, w: EVERY[name].loss(x, w, labels), x, weight))


@every_head
def test_the_docs_have_a_section(name):
    assert re.search(rf"^#+ {re.escape(EVERY[name].section)}$", HEADS, re.M)


def test_no_head_is_missing():
    """Whatever is exported and is a margin of a published head."""
    ours = {
        name
        for name in nf.__all__
        if isinstance(kind := getattr(nf, name), type)
        and issubclass(kind, nf.softmax.margins.Margin)
        and kind not in (nf.BatchMargin, nf.RowMargin)
    }
    seen = {type(h.options().get("margin")).__name__ for h in EVERY.values()}
    assert ours <= seen, ours - seen
