"""How it is measured: time in balanced rounds, memory by the peak beyond inputs and gradients."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from cases import SCALE, Case, Inputs, make_inputs
from competitors import COMPILE, CompileBudget, Forward, build, step

Call = Callable[[], object]


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """p20, median, p80."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[1], statistics.median(values), cuts[7]


def rounds_ms(
    calls: dict[str, Call], inputs: Inputs, budget_s: float, least: int, most: int
) -> dict[str, list[float]]:
    """Milliseconds per call and round, in the order A B C, C B A, A B C, ...

    So drift of the machine meets everyone alike, and round i of one can be compared with round i of
    another. Rounds go on until `budget_s` is over, at least `least`, at most `most`. Gradients are
    cleared before each call, outside the clock.
    """
    clock = _cuda_ms if inputs.x.is_cuda else _cpu_ms
    for call in calls.values():
        inputs.clear_gradients()
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, start = list(calls), time.monotonic()
    gc.collect()
    gc.disable()
    try:
        while len(times[order[0]]) < most:
            rounds = len(times[order[0]])
            if rounds >= least and time.monotonic() - start > budget_s:
                break
            for name in order if rounds % 2 == 0 else reversed(order):
                inputs.clear_gradients()
                times[name].append(clock(calls[name]))
    finally:
        gc.enable()
        inputs.clear_gradients()
    return times


def _cpu_ms(call: Call) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


_flush: list[torch.Tensor] = []


def _cuda_ms(call: Call) -> float:
    """Between CUDA events, with cold caches: a buffer larger than any L2 is overwritten first.

    While the device overwrites, the host already enqueues the call, so launch costs count only as far
    as they exceed that time.
    """
    if not _flush:
        _flush.append(torch.empty(256 << 20, dtype=torch.int8, device="cuda"))
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    _flush[0].zero_()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def peak_extra_mib(name: str, forward: Forward, case: Case, inputs: Inputs, mode: str) -> float | None:
    """MiB in use at the highest point of one call, beyond inputs and gradients; None if not measurable.

    CUDA: torch's allocator counts. CPU: one call in a process of its own, whose resident set is read at
    its peak, so that memory no allocator knows of counts too (resolution about 1 MiB; eager's varies by
    some 20 % with the order of malloc's calls). torch.compile is left out there: the compiler's own
    memory would drown the call's.
    """
    if inputs.x.is_cuda:
        return _cuda_peak(forward, case, inputs, mode)
    return None if name == COMPILE or not sys.platform.startswith("linux") else _cpu_peak(name, case, mode)


def gradient_bytes(inputs: Inputs, mode: str) -> int:
    return sum(t.nbytes for t in inputs.leaves()) if mode == "fwd+bwd" else 0


def _cuda_peak(forward: Forward, case: Case, inputs: Inputs, mode: str) -> float:
    inputs.clear_gradients()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(forward, inputs, SCALE, case, mode)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before - gradient_bytes(inputs, mode)
    inputs.clear_gradients()
    return max(0.0, peak / 2**20)


def _cpu_peak(name: str, case: Case, mode: str) -> float | None:
    """A fork server has imported torch once and run nothing: a fresh process costs milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "normface_ext"])
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_report_peak, args=(theirs, name, case, mode, torch.get_num_threads()))
    child.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(120) else None
    except EOFError:  # the child died, perhaps for want of memory
        return None
    finally:
        child.kill()
        child.join()


def _report_peak(pipe: Connection, name: str, case: Case, mode: str, threads: int) -> None:
    torch.set_num_threads(threads)
    unlimited = CompileBudget(float("inf"))
    tiny = make_inputs(case.tiny(), "cpu")
    step(build(name, case.tiny(), unlimited), tiny, SCALE, case.tiny(), mode)  # threads, lazy imports
    forward, inputs = build(name, case, unlimited), make_inputs(case, "cpu")
    with contextlib.suppress(OSError):  # lets the peak start afresh, where the kernel has this file
        Path("/proc/self/clear_refs").write_text("5")
    before = _status_kib("VmRSS")
    step(forward, inputs, SCALE, case, mode)
    peak = _status_kib("VmHWM") - before - gradient_bytes(inputs, mode) / 1024
    pipe.send(max(0.0, peak / 1024))


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")
