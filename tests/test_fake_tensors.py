"""Tensors without values, fake or of the device meta: forward and backward give shapes, and read nothing."""

from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import normface_ext as nf

F = nf.functional

#: name -> (x, weight, labels, **options) -> outcome; the options are those of the losses over agents
CALLS = {
    "normalize": lambda x, w, y: F.normalize(x),
    "norm_linear": lambda x, w, y: F.norm_linear(x, w, 2.0),
    "normface_loss": lambda x, w, y: F.normface_loss(x, w, y, 8.0),
    "smoothing": lambda x, w, y: F.normface_loss(x, w, y, 8.0, label_smoothing=0.1, reduction="none"),
    "inner_distance": lambda x, w, y: F.inner_distance(x, w),
    "own agents": lambda x, w, y: F.inner_distance(x, w, labels=y, update_center_only=True),
    "pair_contrastive_loss": lambda x, w, y: F.pair_contrastive_loss(x, x + 1, y),
    "triplet_loss": lambda x, w, y: F.triplet_loss(x, x + 1, x - 1),
}
AGENTS = {
    "": {},
    "hardest": {"hardest_only": True},
    "list": {"active_limit": 3},
    "dense": {"active_limit": 0},
}
for loss in ("c_contrastive_loss", "c_triplet_loss"):
    for name, options in AGENTS.items():
        CALLS[f"{loss} {name}"] = lambda x, w, y, loss=loss, options=options: getattr(F, loss)(
            x, w, y, **options
        )
CALLS["general_contrastive_loss"] = lambda x, w, y: nf.caffe.general_contrastive_loss(x @ w.t(), y)
CALLS["general_triplet_loss"] = lambda x, w, y: nf.caffe.general_triplet_loss(x @ w.t(), y)
CALLS["exponential"] = lambda x, w, y: F.c_contrastive_loss(x, w, y, exp_negative_weight=True, active_limit=3)


@pytest.mark.parametrize("stats", ["c_contrastive_stats", "c_triplet_stats"])
def test_statistics_without_values(stats):
    x, w, y = (
        torch.empty(4, 5, device="meta"),
        torch.empty(7, 5, device="meta"),
        torch.empty(4, device="meta"),
    )
    assert getattr(F, stats)(x, w, y.long()).shape == (2,)


@pytest.mark.parametrize("kind", ["fake", "meta"])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("classes", [8, 16, 1000])
def test_shapes_without_values(kind, name, classes):
    with FakeTensorMode() if kind == "fake" else nullcontext():
        device = "cpu" if kind == "fake" else "meta"
        x = torch.empty(4, 5, device=device, requires_grad=True)
        w = torch.empty(classes, 5, device=device, requires_grad=True)
        y = torch.empty(4, dtype=torch.int64, device=device)
        out = CALLS[name](x, w, y)
        loss = out[0] if isinstance(out, tuple) else out
        loss.sum().backward()
        assert x.grad.shape == x.shape and x.grad.device == x.device
        if w.grad is not None:
            assert w.grad.shape == w.shape
    real = CALLS[name](torch.randn(4, 5), torch.randn(classes, 5), torch.tensor([0, 1, 1, 0]))
    assert [t.shape for t in (out if isinstance(out, tuple) else (out,))] == [
        t.shape for t in (real if isinstance(real, tuple) else (real,))
    ]


def test_modules_under_fake_mode():
    with FakeTensorMode():
        x, y = torch.empty(4, 5, requires_grad=True), torch.empty(4, dtype=torch.int64)
        for module in (nf.NormFaceLoss(5, 20), nf.CContrastiveLoss(5, 20), nf.CTripletLoss(5, 20)):
            module(x, y).backward()
            assert module.weight.grad.shape == module.weight.shape
        module.renormalize_()


def test_labels_with_values_are_still_checked():
    x, w = torch.randn(2, 5), torch.randn(3, 5)
    for call in (F.normface_loss, F.c_contrastive_loss):
        with pytest.raises(IndexError, match="at row 1"):
            call(x, w, torch.tensor([0, 3]), *([8.0] if call is F.normface_loss else []))
