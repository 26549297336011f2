"""Two labels per row in the steps of a training: compiled, under autocast, with checkpoints, in 16 bits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import normface_ext as nf
from normface_ext.softmax import functions

ROWS, DIM, CLASSES = 12, 16, 9
LABELS, LABELS_B = torch.arange(ROWS) % CLASSES, torch.arange(ROWS) % 4

HEADS = {
    "ArcFace": lambda: nf.NormFaceLoss(DIM, CLASSES, scale=16.0, margin=nf.ArcFace(0.3)),
    "AdaFace": lambda: nf.NormFaceLoss(DIM, CLASSES, scale=16.0, margin=nf.AdaFace(), learn_scale=True),
    "CurricularFace": lambda: nf.NormFaceLoss(DIM, CLASSES, scale=16.0, margin=nf.CurricularFace()),
    "SphereFace2": lambda: nf.SphereFace2Loss(DIM, CLASSES),
    "CContrastive": lambda: nf.CContrastiveLoss(DIM, CLASSES, neg_margin=1.9, reduction="batchmean"),
}


@pytest.fixture(params=["one product", "two"])
def products(request, monkeypatch):
    monkeypatch.setattr(functions, "SMALL", 0 if request.param == "one product" else 1 << 62)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_a_step_compiles_without_a_break(name, dynamic, products):
    torch._dynamo.reset()
    head, twin = HEADS[name](), None
    twin = copy.deepcopy(head)
    step = torch.compile(
        lambda *given, **more: head(*given, **more), fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    for rows in (ROWS, ROWS - 3):
        x, lam = torch.randn(rows, DIM, requires_grad=True), torch.rand(rows)
        same = x.detach().clone().requires_grad_()
        given = {"labels_b": LABELS_B[:rows], "lam": lam}
        loss, expected = step(x, LABELS[:rows], **given), twin(same, LABELS[:rows], **given)
        loss.backward()
        expected.backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(x.grad, same.grad)
        torch.testing.assert_close(head.weight.grad, twin.weight.grad)


def test_autocast_on_cuda_is_for_the_operands(lane, products, monkeypatch):
    """As the plain call, whose products are in bfloat16 there; the loss stays float32."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.bfloat16)
    x, weight = lane.randn(ROWS, DIM, grad=True), lane.randn(CLASSES, DIM, seed=1, grad=True)
    labels, labels_b = lane.tensor(LABELS), lane.tensor(LABELS_B)
    loss = nf.functional.normface_loss(x, weight, labels, 16.0, labels_b=labels_b, lam=0.3)
    loss.backward()
    assert loss.dtype == x.grad.dtype == weight.grad.dtype == torch.float32
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    truth = nf.reference.normface_loss(*wide, labels, 16.0, labels_b=labels_b, lam=0.3)
    truth.backward()
    torch.testing.assert_close(loss.double(), truth, rtol=2e-2, atol=0)
    for mine, exact in zip((x, weight), wide, strict=True):
        assert (mine.grad - exact.grad).abs().max() < 0.1 * exact.grad.abs().max()


@pytest.mark.parametrize("name", ["AdaFace", "CurricularFace", "CContrastive"])
def test_a_checkpoint_moves_a_state_once(name, products):
    """A forward that a backward runs again has the state that it had."""
    head = HEADS[name]()
    if name == "CContrastive":
        head.add_intra_mae = True
    twin = copy.deepcopy(head)
    x = torch.randn(ROWS, DIM)
    lam = torch.full((ROWS,), 0.3)
    plain, again = (x.clone().requires_grad_() for _ in range(2))
    twin(plain, LABELS, labels_b=LABELS_B, lam=lam).backward()
    checkpoint(
        lambda rows: head(rows, LABELS, labels_b=LABELS_B, lam=lam), again, use_reentrant=False
    ).backward()
    torch.testing.assert_close(again.grad, plain.grad)
    for mine, theirs in zip(head.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_zero_row_of_halves_has_a_finite_gradient(lane, products):
    """Its gradient, 1 / sqrt(eps) long, is held at the largest half, as in the plain call."""
    x = lane.randn(ROWS, DIM, dtype=torch.float16)
    x[2] = 0
    x.requires_grad_()
    weight = lane.randn(CLASSES, DIM, dtype=torch.float16, seed=1, grad=True)
    loss = nf.functional.normface_loss(
        x, weight, lane.tensor(LABELS), 16.0, labels_b=lane.tensor(LABELS_B), lam=0.3
    )
    loss.backward()
    assert x.grad.isfinite().all() and x.grad[2].abs().max() > 1e4


def test_without_gradient_nothing_is_kept(lane, products):
    x, weight = lane.randn(ROWS, DIM), lane.randn(CLASSES, DIM, seed=1, grad=True)
    given = {"labels_b": lane.tensor(LABELS_B), "lam": 0.3}
    with torch.no_grad():
        loss = nf.functional.normface_loss(x, weight, lane.tensor(LABELS), 16.0, **given)
    assert not loss.requires_grad
    frozen = nf.functional.normface_loss(x, weight.detach(), lane.tensor(LABELS), 16.0, **given)
    assert not frozen.requires_grad and torch.equal(loss, frozen)


@pytest.mark.parametrize("needed", ["x", "weight"])
def test_one_of_both_gradients_alone(lane, needed, products):
    x, weight = lane.randn(ROWS, DIM, grad=True), lane.randn(CLASSES, DIM, seed=1, grad=True)
    given = {"labels_b": lane.tensor(LABELS_B), "lam": 0.3}
    call = nf.functional.normface_loss
    both = torch.autograd.grad(call(x, weight, lane.tensor(LABELS), 16.0, **given), (x, weight))
    alone = x if needed == "x" else x.detach(), weight if needed == "weight" else weight.detach()
    (got,) = torch.autograd.grad(
        call(*alone, lane.tensor(LABELS), 16.0, **given), alone[0] if needed == "x" else alone[1]
    )
    torch.testing.assert_close(got, both[0] if needed == "x" else both[1])


def test_no_rows(lane, products):
    x, weight = lane.randn(0, DIM, grad=True), lane.randn(CLASSES, DIM, seed=1, grad=True)
    none = lane.tensor([]).long()
    loss = nf.functional.normface_loss(x, weight, none, 16.0, labels_b=none, lam=0.3)
    loss.backward()
    assert loss == 0 and x.grad.shape == x.shape and not weight.grad.any()


@pytest.mark.parametrize("lam", [0.1, 0.4, 0.6, 0.9])
def test_one_row_is_one_row_in_a_state(lane, lam, products):
    """A spread takes two: of one row with both its labels there is none, whatever lam's digits."""
    margin = nf.AdaFace(t_alpha=0.5).to(lane.device)
    x, weight = lane.randn(1, DIM), lane.randn(CLASSES, DIM, seed=1)
    given = {"labels_b": lane.tensor([2]), "lam": lam, "margin": margin}
    nf.functional.normface_loss(x, weight, lane.tensor([1]), 16.0, **given)
    assert margin.std == nf.AdaFace().std
