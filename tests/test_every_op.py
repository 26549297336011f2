"""Every op of csrc/schemas.h runs here, in every lane, forward and backward, in every dtype: the least that
plain `pytest` touches. An op without a call fails by name. What each op must do is in its own test file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import test_class_shards
import torch
import touched
from lanes import DTYPES
from torch.utils._python_dispatch import TorchDispatchMode

import normface_ext as nf
from normface_ext import reference
from normface_ext.testing import random_like, value_and_gradients

NAMES = touched.ops()
#: Of the rows' state: no operand is in the storage dtype.
WIDE = {"hinge_pairs", "hinge_slopes"}
#: Of the norm of a result: a few roundings of the dtype, times what cosines and hinges make of them.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}

#: A name, the call, and the tensors that get gradients; `module` is nf.functional or nf.reference.
Call = tuple[str, Callable[..., torch.Tensor], list[torch.Tensor]]


def calls(lane, dtype, batch=6, dim=24, classes=40) -> Iterator[Call]:
    """Public calls that reach every op but that of a class shard, each with its gradients."""
    x = lane.randn(batch, dim, dtype=dtype, grad=True)
    weight = lane.randn(classes, dim, dtype=dtype, seed=1, grad=True)
    wide = torch.promote_types(dtype, torch.float32)
    scale = lane.tensor(7.0, dtype=wide, grad=True)
    labels = lane.labels(batch, classes)
    other = lane.randn(batch, dim, dtype=dtype, seed=2, grad=True)
    third = lane.randn(batch, dim, dtype=dtype, seed=3, grad=True)
    for p in (1, 2):
        yield f"normalize p={p}", lambda m, x, p=p: m.normalize(x, 1, p), [x]
        yield f"inner_distance p={p}", lambda m, x, w, p=p: m.inner_distance(x, w, p=p), [x, weight]
    yield "norm_linear", lambda m, x, w, s: m.norm_linear(x, w, s), [x, weight, scale]
    for margin in (None, nf.ArcFace(0.3)):
        yield (
            f"normface_loss {margin}",
            lambda m, x, w, s, margin=margin: m.normface_loss(x, w, labels, s, margin=margin),
            [x, weight, scale],
        )
    yield (
        "normface_loss of two centres",
        lambda m, x, w, s: m.normface_loss(x, w, labels // 2, s, sub_centers=2),
        [x, weight, scale],
    )
    # No list of active classes, and one that all fit in: two ways back.
    for limit in (0, classes):
        ours = {"active_limit": limit}
        yield (
            f"c_contrastive_loss, {limit} listed",
            lambda m, x, w, given=ours: m.c_contrastive_loss(
                x, w, labels, neg_margin=2.2, **(given if m is nf.functional else {})
            ),
            [x, weight],
        )
        yield (
            f"c_triplet_loss, {limit} listed",
            lambda m, x, w, given=ours: m.c_triplet_loss(
                x, w, labels, margin=0.9, **(given if m is nf.functional else {})
            ),
            [x, weight],
        )
    yield "triplet_loss", lambda m, a, p, n: m.triplet_loss(a, p, n, margin=9.0), [x, other, third]


def assert_close(name: str, got: torch.Tensor, truth: torch.Tensor, tolerance: float) -> None:
    truth = truth.double()
    error = float((got.double() - truth).norm() / truth.norm())
    assert error <= tolerance, f"{name}: relative error {error:.2e} above {tolerance:.0e}"


def check(call: Call, tolerance: float) -> None:
    """Value and gradients against the specification in float64."""
    name, function, tensors = call
    outputs, _ = value_and_gradients(lambda *given: function(reference, *given), tensors)
    upstream = random_like(outputs)
    results = [
        value_and_gradients(lambda *given, m=module: function(m, *given), tensors, upstream, dtype=dtype)
        for module, dtype in ((nf.functional, None), (reference, torch.float64))
    ]
    for part, label in ((0, "output"), (1, "gradient")):
        for i, (got, truth) in enumerate(zip(results[0][part], results[1][part], strict=True)):
            assert_close(f"{name}, {label} {i}", got, truth, tolerance)


class Recorder(TorchDispatchMode):
    """The ops of a namespace that ran while it was on and had a tensor of the dtype."""

    def __init__(self, namespace: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.namespace, self.dtype, self.seen = namespace, dtype, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == self.namespace:
            given = [*args, *(kwargs or {}).values()]
            if any(isinstance(value, torch.Tensor) and value.dtype == self.dtype for value in given):
                self.seen.add(func._schema.name.partition("::")[2])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_op_forward_and_backward(lane, dtype, request):
    assert not request.node.get_closest_marker("slow"), "plain pytest must run this"
    with Recorder(lane.namespace, dtype) as recorder:
        for call in calls(lane, dtype):
            check(call, TOLERANCES[dtype])
        given = lane.randn(6, 24, dtype=dtype), lane.randn(40, 24, dtype=dtype, seed=1)
        assert (nf.functional.target_rank(*given, lane.labels(6, 40)) < 40).all()
        # Shards of the classes, whose shift is shared: against the whole head.
        x, weight, labels = test_class_shards.make(lane, dtype)
        wide = torch.promote_types(dtype, torch.float32)
        scale, upstream = lane.tensor(12.0, wide), lane.tensor(1.7, wide)
        got = test_class_shards.sharded(x, weight, labels, scale, upstream, shift=True)
        truth = [t if t is labels else t.double() for t in (x, weight, labels, scale, upstream)]
        expected = test_class_shards.whole(*truth)
        for name, one, whole in zip(("loss", "dx", "dweight", "dscale"), got, expected, strict=True):
            assert_close(f"shards, {name}", one, whole, TOLERANCES[dtype])
        # A gradient that is not kept: two passes that add up in place.
        head = nf.NormFaceLoss(24, 40, scale=7.0, dtype=dtype, device=lane.device)
        truth = head.weight.detach().double().requires_grad_()
        with nf.optim.accumulate_in_place(head):
            for seed in (4, 5):
                x, labels = lane.randn(6, 24, dtype=dtype, seed=seed), lane.labels(6, 40, seed=seed)
                head(x, labels).backward()
                reference.normface_loss(x.double(), truth, labels, 7.0).backward()
        assert_close("two passes in place", head.weight.grad, truth.grad, TOLERANCES[dtype])
    assert recorder.seen == (NAMES - WIDE if dtype.itemsize == 2 else NAMES)


def test_the_recorder_can_say_no(lane):
    with Recorder(lane.namespace, torch.float16) as recorder:
        nf.functional.normalize(lane.randn(2, 3))
        assert recorder.seen == set()
        nf.functional.normalize(lane.randn(2, 3, dtype=torch.float16))
    assert recorder.seen == {"normalize"}


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_on_several_threads(lane, threads):
    """Sizes that are worth dividing; a worker of `pytest -n` may have one core, so the count is set here."""
    if lane.slow or lane.device.type != "cpu":
        pytest.skip("the threads of the CPU kernels")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for call in calls(lane, torch.float32, batch=48, dim=80, classes=700):
            check(call, TOLERANCES[torch.float32])
    finally:
        torch.set_num_threads(before)
