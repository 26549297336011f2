"""Every product that may be chosen for the head on CUDA, whatever would be chosen by itself."""

from __future__ import annotations

import ctypes
import importlib

import pytest
import test_class_shards
import torch
from emulation import build
from kernel_cases.softmax import CHOICES, PLAIN, choices
from lanes import LANES
from test_normface_loss import IGNORE, check, sample

import normface_ext as nf
from normface_ext import testing
from normface_ext.engine import native

SWEEPS, SWEEP_COLUMNS = ("single sweep", "wgmma sweep"), 256
planning = importlib.import_module("normface_ext.engine.plan")  # the package has a function of that name


@pytest.fixture(params=[lane for lane in LANES if not lane.widens], ids=lambda lane: lane.name)
def cuda_lane(request):
    """The lanes that run CUDA kernels."""
    with request.param.active() as lane:
        yield lane


def choose(monkeypatch, choice, chunk, *, again=False):
    """From now on this product; without E kept (`again`) `chunk` classes at a time."""
    product, store = (CHOICES | PLAIN)[choice]
    monkeypatch.setattr(planning, "_asked", planning._Asked(product, store and not again, chunk))


@pytest.mark.covering(1)
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize(
    ("batch", "dim", "classes", "chunk"),
    [(3, 8, 5, 5), (129, 64, 33, 20), (7, 72, 260, 131), (5, 256, 130, 128), (33, 264, 40, 9)],
)
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float16, torch.float16)], ids=str)
def test_every_choice(cuda_lane, monkeypatch, choice, batch, dim, classes, chunk, dtypes):
    if choice in SWEEPS:
        dim = min(dim, SWEEP_COLUMNS)
    choose(monkeypatch, choice, chunk)
    x, weight, labels = sample(cuda_lane, batch, dim, classes, *dtypes)
    labels[batch // 2] = IGNORE
    labels[: batch // 3] = classes - 1  # many rows of one class
    check(cuda_lane, x, weight, labels, cuda_lane.tensor(30.0, grad=True), margin=nf.CosFace(0.2))


@pytest.mark.slow
@pytest.mark.parametrize("dim", [16, 72, 256])
@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_a_ring_of_stages_goes_round(cuda_lane, monkeypatch, dim, order):
    """Blocks of many steps in both directions, and in backward of more than one tile."""
    monkeypatch.setenv("NORMFACE_EMULATION_ORDER", order)
    choose(monkeypatch, "wgmma sweep", 800)
    x, weight, labels = sample(cuda_lane, 300, dim, 800, torch.bfloat16, torch.float32)
    each = torch.linspace(20.0, 30.0, 300)  # stages of rows that are not alike
    each[:128] = 25.0
    assert_options_hold(x, weight, labels, {"margin": nf.CosFace(0.2)}, 3e-3, cuda_lane.tensor(each))


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    ("choice", "dtype"),
    [(choice, dtype) for dtype in (torch.float32, torch.float64) for choice in choices(dtype)],
    ids=str,
)
@pytest.mark.parametrize(
    ("batch", "dim", "classes", "chunk"),
    [(3, 8, 5, 5), (129, 32, 33, 20), (7, 132, 260, 131), (5, 256, 130, 129), (33, 512, 40, 9)],
)
def test_every_choice_of_wide_operands(cuda_lane, monkeypatch, choice, dtype, batch, dim, classes, chunk):
    choose(monkeypatch, choice, chunk)
    x, weight, labels = sample(cuda_lane, batch, dim, classes, dtype)
    labels[batch // 2] = IGNORE
    labels[: batch // 3] = classes - 1
    check(cuda_lane, x, weight, labels, 30.0, margin=nf.CosFace(0.2))
    if dtype == torch.float32:  # no fixed shift
        check(cuda_lane, x, weight, labels, 100.0, reduction="none")


@pytest.mark.parametrize("choice", PLAIN)
def test_every_choice_of_wide_operands_with_every_option(cuda_lane, monkeypatch, choice):
    choose(monkeypatch, choice, 40)
    x, weight, labels = sample(cuda_lane, 9, 48, 70)
    options = {
        "label_smoothing": 0.2,
        "class_weight": cuda_lane.tensor(torch.rand(70) + 0.5),
        "sample_weight": cuda_lane.tensor(torch.rand(9)),
    }
    assert_options_hold(x, weight, labels, options, 1e-5)


@pytest.mark.covering(1)
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("scale", [0.0, -9.0, 100.0])
def test_any_scale(cuda_lane, monkeypatch, choice, scale):
    """Within the window of the fixed shift and outside, known to the host and not."""
    choose(monkeypatch, choice, 24)
    x, weight, labels = sample(cuda_lane, 6, 40, 70, torch.bfloat16, torch.float32)
    check(cuda_lane, x, weight, labels, scale, reduction="none")
    check(cuda_lane, x, weight, labels, cuda_lane.tensor(scale, grad=True), margin=nf.ArcFace(0.3))


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("classes", [1, 3])
def test_a_chunk_of_nothing_but_targets(cuda_lane, monkeypatch, choice, classes):
    """Outside the window of the fixed shift it leaves kappa at -inf."""
    choose(monkeypatch, choice, 1)
    x, weight, labels = sample(cuda_lane, 5, 16, classes, torch.bfloat16, torch.float32)
    check(cuda_lane, x, weight, labels, 100.0, reduction="none")


@pytest.mark.parametrize("choice", CHOICES)
def test_smoothing_and_class_weights(cuda_lane, monkeypatch, choice):
    choose(monkeypatch, choice, 40)
    x, weight, labels = sample(cuda_lane, 9, 48, 70, torch.float16, torch.float32)
    options = {
        "label_smoothing": 0.2,
        "class_weight": cuda_lane.tensor(torch.rand(70) + 0.5),
        "sample_weight": cuda_lane.tensor(torch.rand(9)),
    }
    assert_options_hold(x, weight, labels, options, 1e-2)


def assert_options_hold(x, weight, labels, options, bound, scale=20.0):
    """Loss and gradients against the reference in float64, by the norm of the difference."""
    results = []
    for function, dtype in ((nf.functional, None), (nf.reference, torch.float64)):
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, weight)]
        loss = function.normface_loss(*leaves, labels, scale, **options)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for name, got, truth in zip(("loss", "dx", "dw"), *results, strict=True):
        error = float((got.double() - truth).norm() / truth.norm())
        assert error < bound, f"{name}: {error:.2e}"


@pytest.mark.parametrize("choice", CHOICES)
def test_runs_are_bit_identical(cuda_lane, monkeypatch, choice):
    """Whoever comes last adds up, in an order that does not depend on it."""
    choose(monkeypatch, choice, 100)
    x, weight, labels = sample(cuda_lane, 140, 16, 200, torch.bfloat16)
    runs = []
    for order in ("forward", "reverse", "3"):
        monkeypatch.setenv("NORMFACE_EMULATION_ORDER", order)
        loss = nf.functional.normface_loss(x, weight, labels, 30.0)
        runs.append([loss.detach(), *torch.autograd.grad(loss, (x, weight))])
    for other in runs[1:]:
        for one, same in zip(runs[0], other, strict=True):
            assert torch.equal(one, same)


@pytest.mark.covering(1)
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_only_wanted_gradients(cuda_lane, monkeypatch, choice, wanted):
    choose(monkeypatch, choice, 17)
    x, weight, labels = sample(cuda_lane, 5, 24, 31, torch.bfloat16, grad=False)
    x.requires_grad_(wanted[0])
    weight.requires_grad_(wanted[1])
    check(cuda_lane, x, weight, labels, 30.0)


@pytest.mark.parametrize("choice", CHOICES)
def test_a_weight_that_begins_anywhere(cuda_lane, monkeypatch, choice):
    """Views need not begin at a multiple of 16 bytes."""
    choose(monkeypatch, choice, 17)
    x, weight, labels = sample(cuda_lane, 5, 24, 31, torch.bfloat16, grad=False)
    place = torch.zeros(31 * 24 + 1, dtype=weight.dtype, device=weight.device)
    moved = place[1:].view(31, 24).copy_(weight)
    gradients = []
    for w in (weight, moved):
        leaf = w.detach().requires_grad_()
        assert leaf.data_ptr() == w.data_ptr()
        gradients.append(torch.autograd.grad(nf.functional.normface_loss(x, leaf, labels, 30.0), leaf)[0])
    torch.testing.assert_close(*gradients, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("choice", CHOICES)
def test_an_empty_batch(cuda_lane, monkeypatch, choice):
    choose(monkeypatch, choice, 3)
    x, weight, _ = sample(cuda_lane, 0, 16, 7, torch.bfloat16)
    loss = nf.functional.normface_loss(x, weight, cuda_lane.tensor([], torch.int64), 30.0)
    loss.backward()
    assert loss == 0 and (weight.grad == 0).all() and x.grad.shape == (0, 16)


@pytest.mark.covering(1)
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("scale", [12.0, 100.0])
def test_shards_add_up_to_the_whole(cuda_lane, monkeypatch, choice, scale):
    """Targets on other shards, a shard without classes, a shift that is given."""
    monkeypatch.setattr(test_class_shards, "DIM", 16)
    choose(monkeypatch, choice, 4)
    x, weight, labels = test_class_shards.make(cuda_lane, torch.bfloat16)
    given = x, weight, labels, cuda_lane.tensor(scale), cuda_lane.tensor(1.7)
    expected = test_class_shards.whole(*given)
    got = test_class_shards.sharded(*given, shift=scale > 80)
    for name, a, b in zip(("loss", "dx", "dweight", "dscale"), got, expected, strict=True):
        error = float((a.double() - b.double()).norm() / b.double().norm())
        assert error < 1e-2, f"{name}: {error:.2e}"


@pytest.mark.parametrize("choice", SWEEPS)
def test_the_single_sweep_keeps_its_word(cuda_lane, monkeypatch, choice):
    """Peak memory beyond inputs and gradients."""
    if cuda_lane.device.type == "cuda":
        pytest.skip("test_gpu.py measures the card's memory")
    batch, dim, classes = 20, 40, 700
    choose(monkeypatch, choice, classes)
    name, *_ = planning._asked
    said = native.workspace_bytes(name, native.Step(batch, dim, classes, 2), planning.EMULATED, classes)
    x, weight, labels = sample(cuda_lane, batch, dim, classes, torch.bfloat16)

    def step():
        nf.functional.normface_loss(x, weight, labels, 30.0).backward()
        x.grad = weight.grad = None

    step()
    used = testing.peak_bytes(step) - (x.numel() + weight.numel()) * 2
    assert said / 3 <= used <= said + 4096, f"{said} said: {used} bytes"


# Launches -------------------------------------------------------------------------------------------


def launches(function) -> list[str]:
    """The kernels that function() launches, products of torch among them (emulated lane)."""
    library = ctypes.CDLL(str(build.build("emulation")))
    library.nf_emulation_launched.restype = ctypes.c_char_p
    library.nf_emulation_launched()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        function()
    products = [event.name for event in profiler.events() if event.name == "aten::mm"]
    return library.nf_emulation_launched().decode().split() + products


@pytest.mark.skipif(build.unavailable() is not None, reason=f"{build.unavailable()}")
@pytest.mark.parametrize(
    ("dtype", "choice", "most"),
    [
        (torch.bfloat16, None, 6),
        (torch.bfloat16, "single sweep", 6),
        (torch.bfloat16, "wgmma sweep", 7),
        (torch.float32, None, 6),
        (torch.float32, "tf32x3", 7),
        (torch.float64, None, 6),
    ],
    ids=str,
)
def test_a_small_step_is_few_launches(monkeypatch, dtype, choice, most):
    """Forward and backward in one chunk, the scale a number. (zero_, copies and so on would show as well.)"""
    lane = next(lane for lane in LANES if lane.name == "emulated")
    if choice is not None:
        choose(monkeypatch, choice, 300)
    with lane.active():
        x, weight, labels = sample(lane, 20, 32, 300, dtype, None if dtype.itemsize == 8 else torch.float32)
        upstream = torch.ones(())

        def step():
            loss = nf.functional.normface_loss(x, weight, labels, 30.0, margin=nf.CosFace(0.2))
            torch.autograd.grad(loss, (x, weight), upstream)

        names = launches(step)
    assert len(names) <= most, names
    assert "finish_loss" in names and "row_gradients" in names  # the meter sees both directions
