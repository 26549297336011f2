"""Workspace memory that cannot be had: the smaller plan takes over, once, and says so."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch

import normface_ext as nf
from normface_ext.engine import calls, memory, sweep
from normface_ext.softmax import ops

REFUSALS = [
    RuntimeError("normface_ext: could not allocate float32 of shape [8]: out of memory"),
    MemoryError("no memory"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
]


@pytest.fixture(autouse=True)
def nothing_refused(monkeypatch):
    monkeypatch.setattr(memory, "_refused", {})


class Hook:
    """The operators, but for sweeps that are to keep E (or all of them), which end in an error."""

    def __init__(self, kernels, error, everything=False):
        self.kernels, self.error, self.everything, self.asked = kernels, error, everything, 0

    def __getattr__(self, name):
        return getattr(self.kernels, name)

    def head_sweep(self, *arguments):
        return self.refusing("head_sweep", arguments)

    def softmax_loss(self, *arguments):
        return self.refusing("softmax_loss", arguments)

    def refusing(self, name, arguments):
        store = arguments[calls.argument_names(name).index("store")]
        if store:
            self.asked += 1
        if store or self.everything:
            raise self.error
        return getattr(self.kernels, name)(*arguments)


def hooked(monkeypatch, error, **options):
    hook = Hook(calls.kernels(), error, **options)
    for caller in (sweep, ops):
        monkeypatch.setattr(caller, "kernels", lambda *tensors: hook)
    return hook


LOSSES = {
    "normface_loss": {"scale": 12.0, "margin": nf.ArcFace(0.2)},
    "c_contrastive_loss": {"neg_margin": 1.5, "active_limit": 0},
    "c_triplet_loss": {"active_limit": 5},  # the lists overflow
}


def step(lane, classes=700, name="normface_loss"):
    x, weight = lane.randn(16, 8, grad=True), lane.randn(classes, 8, grad=True)
    loss = getattr(nf.functional, name)(x, weight, lane.labels(16, classes), **LOSSES[name])
    loss.backward()
    return loss.detach(), x.grad, weight.grad


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("error", REFUSALS, ids=lambda error: type(error).__name__)
def test_the_smaller_plan_takes_over_once(lane, monkeypatch, error, name):
    expected = step(lane, name=name)
    hook = hooked(monkeypatch, error)
    with pytest.warns(RuntimeWarning, match=rf"{name}: the \d+\.\d MiB of the plan that keeps E"):
        first = step(lane, name=name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = step(lane, name=name)
    assert hook.asked == 1, "asked again for what cannot be had"
    for a, b, c in zip(expected, first, second, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
        assert torch.equal(b, c)


def test_what_is_smaller_is_still_asked_for(lane, monkeypatch):
    hook = hooked(monkeypatch, REFUSALS[0])
    for classes, asked in ((700, 1), (701, 1), (200, 2)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            step(lane, classes)
        assert hook.asked == asked


def test_other_errors_are_no_refusal(lane, monkeypatch):
    hook = hooked(monkeypatch, RuntimeError("something else"))
    with pytest.raises(RuntimeError, match=r"^something else$"):
        step(lane)
    assert hook.asked == 1 and not memory._refused


def test_where_nothing_fits_the_error_is_raised(lane, monkeypatch):
    hooked(monkeypatch, REFUSALS[2], everything=True)
    with pytest.warns(RuntimeWarning, match="could not be allocated"), pytest.raises(torch.OutOfMemoryError):
        step(lane)


@pytest.mark.parametrize("options", [{"hardest_only": True}, {"workspace": 20_000}])
def test_what_keeps_nothing_asks_for_nothing(lane, monkeypatch, options):
    hook = hooked(monkeypatch, REFUSALS[0])
    x, weight = lane.randn(16, 8, grad=True), lane.randn(700, 8, grad=True)
    nf.functional.c_triplet_loss(x, weight, lane.labels(16, 700), **options).backward()
    with torch.no_grad():
        nf.functional.c_triplet_loss(x, weight, lane.labels(16, 700))
    assert hook.asked == 0


def test_the_plan_without_e_is_much_smaller():
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.float32), ("cuda", torch.bfloat16)):
        shape = (512, 512, 50_000, dtype, torch.device(device))
        stored = nf.plan(*shape)
        smaller = memory.smaller((*shape, True, 1), 8 << 30)
        assert stored.store and smaller is not None and not smaller.keep
        assert smaller.workspace <= stored.workspace_bytes // 2
        plan = nf.plan(*shape, workspace=smaller.workspace)
        assert not plan.store and plan.workspace_bytes <= smaller.workspace
    tiny = (4, 8, 5, torch.float32, torch.device("cpu"))
    assert memory.smaller((*tiny, True, 1), 1 << 30) is None


def test_an_allocation_that_fails_says_what():
    """More than any address space has: nothing is touched."""
    x = torch.zeros(1 << 23, 1)
    with pytest.raises(RuntimeError, match=r"could not allocate float32 of shape \[8388608, 8388608\]"):
        torch.ops.normface_ext.norm_linear(x, x, None, 1.0, True, 1e-12)


LIMITED = """
import resource, warnings, torch, normface_ext as nf
torch.manual_seed(0)
x, weight = torch.randn(256, 8, requires_grad=True), torch.randn(200_000, 8, requires_grad=True)
labels = torch.randint(200_000, (256,))
results = []
for limited in (False, True):
    if limited:
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (100 << 20), -1))
    x.grad = weight.grad = None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loss = nf.functional.normface_loss(x, weight, labels, 10.0)
        loss.backward()
    assert len(said) == limited and all("could not be allocated" in str(w.message) for w in said), said
    results.append((loss.detach(), x.grad, weight.grad))
for a, b in zip(*results):
    torch.testing.assert_close(a, b)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit of address space is Linux's")
def test_a_process_of_little_memory_goes_on():
    ran = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, cwd="/")
    assert ran.returncode == 0, ran.stderr[-2000:]
