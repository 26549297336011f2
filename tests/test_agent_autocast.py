"""Autocast on CUDA and the losses over agents: a machine without CUDA proves it on emulated kernels."""

import pytest
import torch

import normface_ext as nf
from normface_ext.agents import functions
from normface_ext.engine import calls

F = nf.functional


@pytest.fixture
def autocast():
    """As torch.autocast("cuda", bfloat16), which a machine without CUDA switches off."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    yield
    torch.set_autocast_enabled("cuda", before[0])
    torch.set_autocast_dtype("cuda", before[1])


@pytest.mark.parametrize("loss", ["c_contrastive_loss", "c_triplet_loss"])
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("float16", "float32"), ("float64", "float64")])
def test_autocast_on_cuda_is_for_the_operands(lane, loss, dtypes, autocast, monkeypatch):
    dtypes = [getattr(torch, name) for name in dtypes]
    x = lane.randn(7, 6, dtype=dtypes[0], grad=True)
    weight, labels = lane.randn(9, 6, dtype=dtypes[1], seed=1, grad=True), lane.labels(7, 9)
    value = getattr(F, loss)(x, weight, labels)
    value.backward()
    assert (x.grad.dtype, weight.grad.dtype) == tuple(dtypes)
    assert value.dtype == (torch.float64 if dtypes[0] == torch.float64 else torch.float32)
    lowered = calls.plan_device(x).type == "cuda" and dtypes[0] != torch.float64
    operands = torch.bfloat16 if lowered else dtypes[0]
    assert calls.product_dtype(x, weight) == operands
    torch.set_autocast_enabled("cuda", False)
    assert calls.product_dtype(x, weight) == dtypes[0]
    plain = [t.detach().clone().requires_grad_() for t in (x, weight)]
    without = getattr(F, loss)(*plain, labels)
    without.backward()
    assert torch.equal(without, value) != lowered
    # The very products, asked for without autocast.
    monkeypatch.setattr(functions, "product_dtype", lambda *given: operands)
    given = [t.detach().clone().requires_grad_() for t in (x, weight)]
    expected = getattr(F, loss)(*given, labels)
    expected.backward()
    assert torch.equal(value, expected)
    for got, same, exact in zip((x, weight), given, plain, strict=True):
        assert torch.equal(got.grad, same.grad)
        torch.testing.assert_close(got.grad, exact.grad, rtol=0.05, atol=0.02 * float(exact.grad.abs().max()))
