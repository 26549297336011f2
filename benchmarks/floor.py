"""The floor: the least time the machine needs for the same work, to hold every time against.

CPU: measured in the same rounds as everyone else. A head costs three matrix products (one for the forward
alone), run here bare, tile by tile, into memory that is there already; a normalisation costs one pass
over its tensors.

CUDA: computed from what this very card reaches in a large matrix product and in a copy. The larger of
arithmetic, memory traffic and exponentials counts, as if they overlapped perfectly:
    stored E:   3 products | 2 bytes x (1 write + 2 reads) per logit, weights | 1 exp per logit
    recompute:  4 products | weights only                                     | 2 exp per logit
and the better of the two is the floor. Weights: both passes read a 16-bit copy, fp32 ones are read and
copied first, and one gradient is written.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from cases import Case, Inputs

MUFU_PER_SM = 16 * 1.7e9  # exponentials per second and multiprocessor (at 1.7 GHz)


def cpu_call(case: Case, inputs: Inputs, mode: str) -> Callable[[], object]:
    x = inputs.x.detach()
    if case.kind == "normalize":
        out, upstream = torch.empty_like(x), inputs.upstream
        if mode == "fwd":
            return lambda: out.copy_(x)
        return lambda: (out.copy_(x), torch.add(x, upstream, out=out))  # reads x; reads x and g

    x, weight = x.float(), inputs.weight.detach().float()  # as 16-bit operands are computed, too
    width, workers = 512, torch.get_num_threads()
    dw = torch.empty_like(weight)
    starts = range(0, case.classes, width)
    tiles, dx = torch.empty(workers, case.batch * width), torch.zeros(workers, *x.shape)

    def products(worker: int) -> None:
        for start in starts[worker::workers]:
            w = weight[start : start + width]
            scores = tiles[worker, : case.batch * w.shape[0]].view(case.batch, w.shape[0])
            torch.mm(x, w.t(), out=scores)
            if mode == "fwd+bwd":
                dx[worker].addmm_(scores, w)
                torch.mm(scores.t(), x, out=dw[start : start + width])

    pool = _single_threaded_workers(workers)
    return lambda: list(pool.map(products, range(workers)))


@functools.cache
def _single_threaded_workers(count: int) -> ThreadPoolExecutor:
    """Threads that each run one tile at a time, so that no product waits for the slower core."""
    ready = threading.Barrier(count)
    pool = ThreadPoolExecutor(count, initializer=lambda: torch.set_num_threads(1))
    list(pool.map(lambda _: ready.wait(), range(count)))  # starts them all
    torch.set_num_threads(count)  # theirs are set per thread; this also restores what new threads get
    return pool


def cuda_ms(case: Case, mode: str) -> float:
    backward = mode == "fwd+bwd"
    features, weights, _ = case.precision
    bandwidth = copy_bytes_per_s()
    if case.kind == "normalize":
        return 1e3 * (5 if backward else 2) * features.itemsize * case.batch * case.dim / bandwidth
    operand = case.precision.operand
    logits = case.batch * case.classes
    elements = case.classes * case.dim
    product = 2 * logits * case.dim / matmul_flops(operand)
    exponential = logits / (MUFU_PER_SM * torch.cuda.get_device_properties(0).multi_processor_count)
    copied = weights.itemsize + operand.itemsize if operand != weights else 0
    read = elements * (copied + (2 if backward else 1) * operand.itemsize)
    traffic = (read + (elements * weights.itemsize if backward else 0)) / bandwidth
    if case.kind == "norm_linear":
        out = (2 if backward else 1) * logits * operand.itemsize / bandwidth
        return 1e3 * max((3 if backward else 1) * product, traffic + out)
    if not backward:
        return 1e3 * max(product, traffic, exponential)
    stored = max(3 * product, traffic + 3 * logits * operand.itemsize / bandwidth, exponential)
    return 1e3 * min(stored, max(4 * product, traffic, 2 * exponential))


def _best_seconds(call: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(10):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) / 1e3)
    return best


@functools.cache
def matmul_flops(dtype: torch.dtype) -> float:
    size = 8192 if dtype.itemsize < 4 else 4096
    a = torch.randn(size, size, device="cuda", dtype=dtype)
    out = torch.empty_like(a)
    return 2 * size**3 / _best_seconds(lambda: torch.mm(a, a, out=out))


@functools.cache
def copy_bytes_per_s() -> float:
    a = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    out = torch.empty_like(a)
    return 2 * a.nbytes / _best_seconds(lambda: out.copy_(a))
