"""nf.graphed on a GPU: every head's step as two CUDA graphs, against the head itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import normface_ext as nf

if not (torch.cuda.is_available() and nf.build_info()["cuda_loaded"]):
    pytest.skip("no GPU, or the CUDA kernels are not loaded", allow_module_level=True)

N, D, C = 64, 48, 1003
HEADS = {
    "plain": lambda: nf.NormFaceLoss(D, C, scale=30.0),
    "learned scale": lambda: nf.NormFaceLoss(D, C, learn_scale=True, margin=nf.ArcFace(0.3)),
    "smoothing": lambda: nf.NormFaceLoss(D, C, label_smoothing=0.1),
    "a margin with a state": lambda: nf.NormFaceLoss(D, C, margin=nf.AdaFace()),
    "hard negatives": lambda: nf.NormFaceLoss(D, C, margin=nf.CurricularFace()),
    "sub-centres": lambda: nf.NormFaceLoss(D, C, sub_centers=3),
    "checked": lambda: nf.NormFaceLoss(D, C, check_finite=True),
    "sphereface2": lambda: nf.SphereFace2Loss(D, C),
    "contrastive": lambda: nf.CContrastiveLoss(D, C),
    "triplet, hardest": lambda: nf.CTripletLoss(D, C, hardest_only=True),
}
every_head = pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)


def batch(seed: int, rows: int = N) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, D, generator=generator)
    return x.cuda().requires_grad_(), torch.randint(C, (rows,), generator=generator).cuda()


def twins(make) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    one, other = make().cuda(), make().cuda()
    other.load_state_dict(one.state_dict())
    return one, other


def stepped(loss_of, head: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().requires_grad_()
    loss = loss_of(x, labels)
    loss.backward()
    return [loss.detach(), x.grad, *(p.grad for p in head.parameters())]


@every_head
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
def test_steps_are_those_of_the_head(make, autocast):
    head, twin = twins(make)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (head, twin)]
    with torch.autocast("cuda", dtype=autocast, enabled=autocast is not None):
        loss_of = nf.graphed(head, *batch(0))
        for seed in range(1, 5):
            ours, theirs = stepped(loss_of, head, *batch(seed)), stepped(twin, twin, *batch(seed))
            for one, other in zip(ours, theirs, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()


def test_a_step_is_two_launches_of_graphs():
    head = nf.NormFaceLoss(D, C, learn_scale=True).cuda()
    loss_of = nf.graphed(head, *batch(0))
    x, labels = batch(1)
    loss_of(x, labels).backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        loss_of(x, labels).backward()
    names = [event.name for event in profiler.events()]
    assert names.count("cudaGraphLaunch") == 2, names


@pytest.mark.parametrize("set_to_none", [None, True, False])
def test_gradients_accumulate(set_to_none):
    head, twin = twins(HEADS["learned scale"])
    loss_of = nf.graphed(head, *batch(0))
    for seed in range(1, 4):
        for one, other in zip(stepped(loss_of, head, *batch(seed)), stepped(twin, twin, *batch(seed)),
                              strict=True):  # fmt: skip
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
        if set_to_none is not None:
            for module in (head, twin):
                module.zero_grad(set_to_none=set_to_none)


def test_with_a_loss_scaler():
    head, twin = twins(HEADS["learned scale"])
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    with torch.autocast("cuda", dtype=torch.float16):
        loss_of = nf.graphed(head, *batch(0))
        for module, function in ((head, loss_of), (twin, twin)):
            scaler.scale(function(*batch(1))).backward()
            assert all(torch.isfinite(p.grad).all() for p in module.parameters())
    for one, other in zip(head.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-3)


def test_a_smaller_batch_and_no_gradient_go_by_the_head():
    head = nf.NormFaceLoss(D, C).cuda()
    loss_of = nf.graphed(head, *batch(0))
    assert torch.equal(loss_of(*batch(1, 17)), head(*batch(1, 17)))
    with torch.no_grad():
        assert torch.equal(loss_of(*batch(1)), head(*batch(1)))
