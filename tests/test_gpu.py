"""What only a GPU can show: streams, graphs, host waits, other devices, repeatability. Values and
gradients on CUDA are checked by the op tests' "cuda" lane."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
import torch
from test_head_kernels import CHOICES, choose

import normface_ext as nf

if not (torch.cuda.is_available() and nf.build_info()["cuda_loaded"]):
    pytest.skip("no GPU, or the CUDA kernels are not loaded", allow_module_level=True)

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def nothing_is_left_of_other_tests() -> None:
    """What torch's allocator keeps for reuse counts as taken, for the plan and for free memory."""
    gc.collect()
    torch.cuda.empty_cache()


def head_inputs(dtype: torch.dtype = torch.float32, device: torch.device = CUDA) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(65, 48, generator=generator).to(device, dtype).requires_grad_()
    w = torch.randn(1003, 48, generator=generator).to(device, dtype).requires_grad_()
    s = torch.tensor(30.0, device=device, requires_grad=True)
    labels = torch.randint(1003, (65,), generator=generator).to(device)
    return [x, w, s, labels]


def step(x: torch.Tensor, w: torch.Tensor, s: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
    """Loss and all gradients; every op takes part."""
    loss = nf.functional.normface_loss(x, w, labels, s, margin=nf.ArcFace(0.3))
    loss = loss + nf.functional.norm_linear(x, w, s).square().mean()
    loss = loss + nf.functional.normalize(x, return_norm=True)[1].sum()
    return [loss.detach(), *torch.autograd.grad(loss, (x, w, s))]


def assert_same(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    for left, right in zip(a, b, strict=True):
        assert torch.equal(left.cpu(), right.cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_runs_repeat_bit_by_bit(dtype: torch.dtype) -> None:
    inputs = head_inputs(dtype)
    first = step(*inputs)
    for _ in range(5):
        assert_same(first, step(*inputs))


@pytest.fixture
def waiting_is_an_error() -> Iterator[Callable[[], None]]:
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def test_the_host_never_waits(waiting_is_an_error: Callable[[], None]) -> None:
    inputs = head_inputs()
    step(*inputs)  # what is loaded lazily may wait, once
    waiting_is_an_error()
    step(*inputs)
    with pytest.raises(RuntimeError):  # the mode does catch a wait
        inputs[0].sum().item()


def on_side_stream(run: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Work before the op on this stream alone: an op on another stream would read too early.
        torch.cuda._sleep(20_000_000)
        result = run()
    torch.cuda.current_stream().wait_stream(stream)
    return result


def test_ops_follow_the_current_stream() -> None:
    inputs = head_inputs()
    expected = step(*inputs)
    late = [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs[:3]]

    def run() -> list[torch.Tensor]:
        with torch.no_grad():
            for target, source in zip(late, inputs[:3], strict=True):
                target.copy_(source)  # behind the sleep
        return step(*late, inputs[3])

    with torch.no_grad():
        for target in late:
            target.fill_(1.0)
    assert_same(expected, on_side_stream(run))


@pytest.mark.parametrize("workspace", [None, 3_000_000])
def test_a_captured_graph_replays(workspace: int | None) -> None:
    x, w, s, labels = head_inputs()

    def run() -> list[torch.Tensor]:
        loss = nf.functional.normface_loss(x, w, labels, s, workspace=workspace)
        return [loss.detach(), *torch.autograd.grad(loss, (x, w, s))]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
        s.fill_(200.0)  # outside the fixed shift's window: decided on the device, at replay
        labels.copy_(labels.flip(0))
    graph.replay()
    replayed = [t.clone() for t in captured]
    assert_same(run(), replayed)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU only")
def test_tensors_on_a_second_device() -> None:
    assert_same(step(*head_inputs()), step(*head_inputs(device=torch.device("cuda:1"))))


@pytest.mark.slow  # 35 GiB are written and read for each
@pytest.mark.parametrize("choice", [*CHOICES, "plain", "tf32x3"])
def test_offsets_beyond_32_bits(monkeypatch: pytest.MonkeyPatch, choice: str) -> None:
    """N * C > 2**32, stored in one piece or in chunks of that size: all kernels agree with small chunks."""
    rows, classes, dim = 4200, 1_050_000, 16
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GiB of free GPU memory")
    dtype = torch.bfloat16 if choice in CHOICES else torch.float32
    x = torch.randn(rows, dim, device=CUDA, dtype=dtype, requires_grad=True)
    w = torch.randn(classes, dim, device=CUDA, dtype=dtype, requires_grad=True)
    labels = torch.randint(classes, (rows,), device=CUDA)
    results = []
    for name, chunk in ((choice, classes), ("library", 50_000)):
        choose(monkeypatch, name, chunk, again=name != choice)
        loss = nf.functional.normface_loss(x, w, labels, 10.0)
        results.append([loss.detach(), *torch.autograd.grad(loss, (x, w))])
    for whole, chunks in zip(*results, strict=True):
        assert torch.isfinite(whole).all()
        error = (whole.float() - chunks.float()).norm() / whole.float().norm()
        assert error < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(256, 512, 30_000), (512, 128, 200_000), (64, 40, 100_003)], ids=str)
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_card_holds_no_more_than_the_plan_said(
    dtype: torch.dtype, shape: tuple[int, int, int], share: float
) -> None:
    """Peak memory of a step beyond inputs and gradients, with everything stored and with half of that."""
    batch, dim, classes = shape
    x = torch.randn(batch, dim, device=CUDA, dtype=dtype, requires_grad=True)
    w = torch.randn(classes, dim, device=CUDA, dtype=dtype, requires_grad=True)
    labels = torch.randint(classes, (batch,), device=CUDA)
    budget = int(share * nf.plan(*shape, dtype, CUDA, workspace=1 << 40).workspace_bytes)
    plan = nf.plan(*shape, dtype, CUDA, workspace=budget)

    def run() -> None:
        loss = nf.functional.normface_loss(x, w, labels, 30.0, workspace=budget)
        torch.autograd.grad(loss, (x, w))

    run()  # cuBLAS takes its workspace once, and keeps it
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    gradients = (x.numel() + w.numel()) * x.element_size()
    used = torch.cuda.max_memory_allocated() - before - gradients
    slack = 32 * 512 + (1 << 20)  # the allocator rounds each tensor up
    assert used <= plan.workspace_bytes + slack, f"{plan}: {used} bytes"
    assert used >= plan.workspace_bytes // 8, f"{plan}: {used} bytes"  # the meter can say no


def test_a_small_step_is_few_kernels() -> None:
    """As test_head_kernels.py counts launches, but of the real thing: cuBLAS may split a product in two."""
    x, w, _, labels = head_inputs(torch.bfloat16)
    upstream = torch.ones((), device=CUDA)

    def run() -> None:
        loss = nf.functional.normface_loss(x, w, labels, 30.0)
        torch.autograd.grad(loss, (x, w), upstream)

    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    kernels = [event.name for event in profiler.events() if event.device_type.name == "CUDA"]
    assert 4 <= len(kernels) <= 7, kernels
