"""Gradients of a head's weight that add up in place, and what never lies in memory."""

from __future__ import annotations

import pytest
import torch
from kernel_cases.softmax import CHOICES, PLAIN
from lanes import LANES
from torch import nn
from torch.profiler import ProfilerActivity, profile

import normface_ext as nf
from normface_ext.engine.plan import asking
from normface_ext.optim import FusedAdamW, FusedSGD, accumulate_in_place

CLASSES, DIM, BATCH = 45, 24, 10
#: All that share one backward, with what else they want.
HEADS = {
    "normface": (nf.NormFaceLoss, {"scale": 14.0, "margin": nf.ArcFace(0.2)}),
    "smoothed": (nf.NormFaceLoss, {"scale": 14.0, "label_smoothing": 0.1}),
    "sub-centres": (nf.NormFaceLoss, {"scale": 14.0, "sub_centers": 3}),
    "opened": (nf.NormFaceLoss, {"scale": 14.0, "margin": nf.AdaFace()}),
    "sphereface2": (nf.SphereFace2Loss, {}),
    "contrastive": (nf.CContrastiveLoss, {"neg_margin": 1.5}),
    "triplet": (nf.CTripletLoss, {}),
}


def head_of(lane, name, dtype=torch.float32):
    kind, options = HEADS[name]
    torch.manual_seed(2)
    return kind(DIM, CLASSES, dtype=dtype, device=lane.device, **options).eval()  # no state of the batches


def batch_of(lane, k, dtype=torch.float32):
    return lane.randn(BATCH, DIM, dtype=dtype, seed=k, grad=True), lane.labels(BATCH, CLASSES, seed=k)


def summed(lane, head, dtype=torch.float32, passes=3):
    """The gradients after several backward passes, and whether the weight's stayed where it was."""
    places, dx = set(), []
    for k in range(passes):
        x, labels = batch_of(lane, k, dtype)
        head(x, labels).backward()
        places.add(head.weight.grad.data_ptr())
        dx.append(x.grad)
    return head.weight.grad, dx, len(places) == 1


@pytest.mark.parametrize("name", HEADS)
def test_the_sum_is_that_of_autograd(lane, name):
    head = head_of(lane, name)
    expected, expected_dx, _ = summed(lane, head)
    head.zero_grad()
    with accumulate_in_place(nn.ModuleList([head])):
        found, dx, stayed = summed(lane, head)
    assert stayed
    # The hinges' own gradient may follow the list of the active ones, in another order.
    if name in ("contrastive", "triplet"):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(found, expected)
    for a, b in zip(dx, expected_dx, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_other_dtypes(lane, dtype):
    head = head_of(lane, "normface", dtype)
    expected, *_ = summed(lane, head, dtype)
    head.zero_grad()
    with accumulate_in_place(head):
        found, _, stayed = summed(lane, head, dtype)
    assert stayed and torch.equal(found, expected)


@pytest.fixture(params=[lane for lane in LANES if not lane.widens], ids=lambda lane: lane.name)
def cuda_lane(request):
    with request.param.active() as lane:
        yield lane


@pytest.mark.covering(1)
@pytest.mark.parametrize("choice", [*CHOICES, *(f"wide {name}" for name in PLAIN)])
@pytest.mark.parametrize(("batch", "dim", "classes"), [(17, 40, 101), (33, 72, 260)])
def test_every_product_of_cuda(cuda_lane, choice, batch, dim, classes):
    """Part of the classes at a time, from E that was kept and from E that is made again."""
    lane = cuda_lane
    wide = choice.startswith("wide ")
    product, store = PLAIN[choice[5:]] if wide else CHOICES[choice]
    weight = lane.randn(classes, dim, grad=True)
    given = lane.randn(batch, dim, dtype=torch.float32 if wide else torch.bfloat16)
    labels, workspace = lane.labels(batch, classes), 160_000

    def backward():
        nf.functional.normface_loss(given, weight, labels, 20.0, workspace=workspace).backward()

    class Head(nf.NormFaceLoss):
        """Whose weight is this one."""

    head = Head(dim, classes, scale=20.0, device=lane.device)
    head.weight = nn.Parameter(weight.detach())
    weight = head.weight
    with asking(product, store=store, chunk=None if store else 48):
        backward()
        once = weight.grad.clone()
        with accumulate_in_place(head):
            backward()
            torch.testing.assert_close(weight.grad, 2 * once, rtol=1e-5, atol=1e-7)
        weight.grad = None
        before = weight.detach().clone()
        optimizer = FusedSGD(head, lr=0.5)
        backward()
        optimizer.step()
    torch.testing.assert_close(weight.detach(), before - 0.5 * once, rtol=1e-5, atol=1e-6)


def test_autograd_keeps_its_meaning(lane):
    head, plain = head_of(lane, "normface"), head_of(lane, "normface")
    with accumulate_in_place(head):
        x, labels = batch_of(lane, 0)
        head(x, labels).backward()
        (asked,) = torch.autograd.grad(head(x, labels), head.weight)
        (expected,) = torch.autograd.grad(plain(x, labels), plain.weight)
        assert torch.equal(asked, expected)
        kept = head.weight.grad
        before = kept.clone()
        torch.autograd.grad(head(x, labels), x)
        head(x, labels).backward(inputs=[x])
        assert torch.equal(kept, before)
        seen = []
        handle = head.weight.register_hook(lambda gradient: seen.append(gradient.clone()))
        head(x, labels).backward()
        assert torch.equal(seen[0], expected) and torch.equal(head.weight.grad, before + expected)
        handle.remove()
        gradient = torch.autograd.grad(head(x, labels), head.weight, create_graph=True)[0]
        gradient.sum().backward()  # a second derivative


def test_it_ends(lane):
    head = head_of(lane, "normface")
    handle = accumulate_in_place(head)
    x, labels = batch_of(lane, 0)
    head(x, labels).backward()
    first = head.weight.grad
    handle.remove()
    handle.remove()
    assert type(first) is torch.Tensor
    optimizer = FusedSGD(head)
    with pytest.raises(ValueError, match="got one that is updated in backward"):
        accumulate_in_place(head)
    optimizer.release()
    with pytest.raises(ValueError, match="expected `head` to be or to contain a head"):
        accumulate_in_place(nn.Linear(2, 2))


def test_the_graph_knows_that_the_sum_was_written(lane):
    head = head_of(lane, "normface")
    with accumulate_in_place(head):
        x, labels = batch_of(lane, 0)
        head(x, labels).backward()
        factor = torch.ones_like(head.weight, requires_grad=True)
        product = (head.weight.grad * factor).sum()
        head(*batch_of(lane, 1)).backward()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


def largest_allocation(call):
    """Bytes of the largest tensor that is made meanwhile."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    events = found.profiler.kineto_results.events()
    return max((event.nbytes() for event in events if event.name() == "[memory]"), default=0)


@pytest.fixture(params=[lane for lane in LANES if lane.where == "cpu"], ids=lambda lane: lane.name)
def profiled_lane(request):
    """Where the profile of the CPU's allocator sees everything."""
    with request.param.active() as lane:
        yield lane


@pytest.mark.parametrize("kind", ["plain", "accumulated", "sgd", "adamw"])
def test_no_gradient_lies_in_memory(profiled_lane, kind):
    lane = profiled_lane
    classes = 4_000 if lane.slow else 40_000
    head = nf.NormFaceLoss(64, classes, scale=20.0, workspace=1 << 20 if lane.slow else 4 << 20)
    x, labels = lane.randn(4, 64, grad=True), lane.labels(4, classes)
    head(x, labels).backward()  # threads, and for the sum a first gradient
    held: object = None
    if kind == "accumulated":
        held = accumulate_in_place(head)
    elif kind != "plain":
        head.zero_grad()
        held = FusedSGD(head, momentum=0.9) if kind == "sgd" else FusedAdamW(head)
        head(x, labels).backward()  # makes the optimizer's state
        held.step()
    loss = head(x, labels)
    most = largest_allocation(loss.backward)
    if kind == "plain":
        assert most >= head.weight.nbytes
    else:
        assert 0 < most < head.weight.nbytes / 2
    del held
