"""dW by wgmma where a block has several tiles, the ring of stages goes round, and rows of W need care."""

from __future__ import annotations

import importlib

import pytest
import torch
from lanes import LANES

import normface_ext as nf

planning = importlib.import_module("normface_ext.engine.plan")  # the package has a function of that name


@pytest.fixture(params=[lane for lane in LANES if not lane.widens], ids=lambda lane: lane.name)
def cuda_lane(request):
    """The lanes that run CUDA kernels."""
    with request.param.active() as lane:
        yield lane


def gradient(product, x, weight, labels, **options):
    leaf = weight.detach().requires_grad_()
    with planning.asking(product, store=True):
        loss = nf.functional.normface_loss(x, leaf, labels, 20.0, **options)
        return torch.autograd.grad(loss, leaf)[0].double()


# The emulated device has three multiprocessors, and tiles of 64, 128 and 256 classes by the columns.
SHAPES = [(196, 264, 200), (7, 512, 130), (70, 256, 420), (40, 128, 780)]


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tiles_one_after_another(cuda_lane, shape, dtype, request):
    """As by the library, to the order of the sums: the same E meets the same features."""
    batch, dim, classes = shape
    x, weight = cuda_lane.randn(batch, dim, dtype=torch.bfloat16), cuda_lane.randn(classes, dim, seed=1)
    # Rows of norms far apart; one that is so small that its 1 / norm says too little, one that has none.
    weight[classes // 2] *= 3e3
    if dtype == torch.float32:
        weight[classes - 2] *= 1e-33
    else:
        weight[3] = 0.0
    weight = weight.to(dtype)
    labels = cuda_lane.labels(batch, classes)
    labels[: batch // 4] = torch.arange(batch // 4) % classes  # more of a tile than are added to at a time
    labels[batch // 2 : batch // 2 + batch // 8] = classes - 1
    class_weight = torch.rand(classes, generator=torch.Generator().manual_seed(2)) + 0.5
    options = {
        "label_smoothing": 0.1,
        "class_weight": cuda_lane.tensor(class_weight),
        "eps": 0.0 if dtype == torch.float32 else 1e-12,
    }
    got, expected = (
        gradient(product, x, weight, labels, **options) for product in ("sm90_weight_gradient", "sm90_scores")
    )
    assert torch.isfinite(expected).all()
    last = {torch.float32: 2**-20, torch.bfloat16: 2**-7, torch.float16: 2**-9}[dtype]
    bound = last * expected.norm(dim=1)
    assert ((got - expected).norm(dim=1) <= bound).all()
