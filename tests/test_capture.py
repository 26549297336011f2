"""What a CUDA graph cannot capture, looked for without a GPU: in its second call, forward or backward, no op
asks a device, waits or allocates by itself.

The emulation's CUDA runtime (emulation/cuda_runtime.h) has the calls that the sources may make and no others:
a source that allocates or copies by itself does not compile there. What is left are questions, which it
counts, and torch's own ops, of which only those that do nothing but launch may be dispatched.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from emulation import build
from kernel_cases import TABLES
from lanes import LANES
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import normface_ext as nf
from normface_ext.engine import checks

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=f"{build.unavailable()}")

#: Ops of torch that a capture may meet: kernels, memory from torch's own pool, and views. None reads a value.
LAUNCHES = {
    "_to_copy", "abs", "add", "bitwise_and", "clamp", "clamp_min", "clone", "copy_", "detach", "div",
    "eq", "expand", "fill_", "full_like", "ge", "gt", "le", "log_sigmoid_backward",
    "log_sigmoid_forward", "logical_and_", "mul", "nan_to_num", "ne", "neg", "new_ones", "new_zeros",
    "ones_like", "pow", "rsub", "scalar_tensor", "select", "slice", "sqrt", "squeeze", "stack", "sub",
    "sum", "unbind", "unsqueeze", "view", "where", "zeros", "zeros_like",
}  # fmt: skip


class OnCard(nn.Parameter):
    """A learned scale that is no plain Parameter of the CPU, whose value may be looked at."""


class Recorder(TorchDispatchMode):
    """The ops of torch that are dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "aten":
            self.names.add(name)
        return func(*args, **(kwargs or {}))


def library() -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(build.build("emulation")))
    loaded.nf_emulation_asked.restype = ctypes.c_char_p
    loaded.nf_emulation_launched.restype = ctypes.c_char_p
    return loaded


def second_call(function: Callable[[], object]) -> tuple[list[str], list[str], set[str]]:
    """(what the runtime was asked, the kernels launched, the ops of torch dispatched) by the second call."""
    counts = library()
    function()
    counts.nf_emulation_asked(), counts.nf_emulation_launched()
    with Recorder() as recorder:
        function()
    return (
        counts.nf_emulation_asked().decode().split(),
        counts.nf_emulation_launched().decode().split(),
        recorder.names,
    )


def assert_can_be_captured(function: Callable[[], object]) -> None:
    asked, launched, dispatched = second_call(function)
    assert asked == [] and launched, (asked, launched)
    assert dispatched - LAUNCHES == set()


@pytest.fixture
def capturing(monkeypatch):
    """The emulated lane, as Python is while a graph is captured: nobody may read a value."""
    monkeypatch.setattr(checks, "capturing", lambda value: True)
    with next(lane for lane in LANES if lane.name == "emulated").active() as lane:
        yield lane


HEADS = {
    "plain": lambda: nf.NormFaceLoss(40, 65, scale=30.0),
    "learned scale and margin": lambda: nf.NormFaceLoss(40, 65, learn_scale=True, margin=nf.ArcFace(0.3)),
    "smoothing": lambda: nf.NormFaceLoss(40, 65, label_smoothing=0.1),
    "weighted": lambda: nf.NormFaceLoss(40, 65, class_weight=torch.rand(65) + 0.5),
    "a margin with a state": lambda: nf.NormFaceLoss(40, 65, margin=nf.AdaFace()),
    "hard negatives": lambda: nf.NormFaceLoss(40, 65, margin=nf.CurricularFace()),
    "sub-centres": lambda: nf.NormFaceLoss(40, 65, sub_centers=3),
    "sphereface2": lambda: nf.SphereFace2Loss(40, 65),
    "contrastive": lambda: nf.CContrastiveLoss(40, 65),
    "triplet, hardest": lambda: nf.CTripletLoss(40, 65, hardest_only=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)
def test_a_step_of_a_head_only_launches(capturing, make, dtype):
    """More than 128 rows, so that every launch of a large batch is made."""
    head = make()
    if isinstance(getattr(head, "scale", None), nn.Parameter):
        head.scale.__class__ = OnCard
    x = capturing.randn(130, 40, dtype=dtype, grad=True)
    labels = capturing.labels(130, 65)
    leaves = [x, *head.parameters()]
    assert_can_be_captured(lambda: torch.autograd.grad(head(x, labels).sum(), leaves))


@pytest.mark.slow
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_op_only_launches(capturing, table, dtype):
    """All of scripts/kernel_cases, forward and backward, in each product that may be asked for."""
    for case in TABLES[table](dtype):
        if "active_limit" in case.name:  # the length of a list is read, which is off in a capture
            continue
        if " in backward by " in case.name:  # refused: a replay would repeat this very step's numbers
            with pytest.raises(RuntimeError, match="expected a backward that no CUDA graph captures"):
                case.ours(*case.inputs)
            continue
        asked, launched, _ = second_call(lambda case=case: case.ours(*case.inputs))
        assert asked == [] and launched, (case.name, asked)


def test_a_large_block_of_shared_memory_is_asked_for_once(capturing):
    """The counter counts: in a process of its own, so that nothing has been asked before."""
    script = """
import ctypes, sys
import torch
from lanes import LANES
from emulation import build
import normface_ext as nf
from normface_ext.engine.plan import asking
counts = ctypes.CDLL(str(build.build("emulation")))
counts.nf_emulation_asked.restype = ctypes.c_char_p
x = torch.randn(5, 264, dtype=torch.bfloat16, requires_grad=True)
w = torch.randn(40, 264, dtype=torch.bfloat16, requires_grad=True)
with next(lane for lane in LANES if lane.name == "emulated").active(), asking("sm80_weight_gradient"):
    for _ in range(2):
        nf.functional.normface_loss(x, w, torch.arange(5), 30.0).backward()
        print("asked", *counts.nf_emulation_asked().decode().split())
"""
    ran = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=build.HERE.parent,
        env={**os.environ, "PYTHONPATH": str(build.HERE.parent)},
    )
    first, second = re.findall(r"^asked(.*)$", ran.stdout, re.MULTILINE) or pytest.fail(ran.stderr)
    assert first.split().count("cudaGetDeviceProperties") == 1
    assert 1 <= first.split().count("cudaFuncSetAttribute") <= 3
    assert second.split() == []


@pytest.mark.parametrize(
    "name", ["item", "nonzero", "_local_scalar_dense", "equal", "masked_select", "unique_dim"]
)
def test_what_waits_is_not_among_what_launches(name):
    assert name not in LAUNCHES


def test_the_sources_know_no_other_call_of_the_runtime():
    """Of all that is compiled by nvcc: launches, errors, the current device, the two questions, and once in a
    process where the driver's function is that describes a matrix, which is arithmetic of the host."""
    known = {
        "cudaLaunchKernelEx",
        "cudaGetDriverEntryPoint",
        "cudaGetDriverEntryPointByVersion",
        "cudaSetDevice",
        "cudaGetLastError",
        "cudaGetErrorName",
        "cudaGetErrorString",
        "cudaGetDeviceProperties",
        "cudaFuncSetAttribute",
    }
    found: set[str] = set()
    for path in (build.CSRC / "cuda").rglob("*"):
        if path.is_file():
            found |= set(re.findall(r"\b(cuda[A-Z]\w*|cu[A-Z]\w*)\s*\(", path.read_text()))
    assert "cudaFuncSetAttribute" in found and found - known == set()
