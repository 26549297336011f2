"""How one competitor is measured, inside the process that `processes.py` gives it.

Time: a turn is one call that is not timed and then timed ones, TURN_MS long together or one call. Memory:
the peak of the first call beyond inputs and gradients. Gradients are cleared before each call, outside the
clock.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import floor
import torch
import truth
from cases import SCALE, Case, Inputs, make_inputs
from competitors import step
from peers import PROVIDERS

Call = Callable[[], object]
TURN_MS = 20.0  # the threads of the competitor before, still spinning, have gone to sleep by then
FLOOR = "floor"


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """p20, median, p80."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[1], statistics.median(values), cuts[7]


class Measured:
    """A competitor, or the floor, on one case; every method is asked for by its name, over a pipe."""

    def __init__(self, name: str, case: Case, mode: str, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.name, self.case, self.mode, self.device = name, case, mode, device
        self.inputs: Inputs | None = None
        self.call: Call

    def first(self) -> float | None:
        """Builds and calls once; gives the MiB in use at the highest point, None if not measurable.

        CUDA: torch's allocator counts. CPU: this process is fresh, and its resident set is read at its
        peak, so that memory no allocator knows of counts too (resolution about 1 MiB; eager's varies by
        some 20 % with the order of malloc's calls). torch.compile is left out there: the compiler's own
        memory would drown the call's.
        """
        if self.name == FLOOR:
            self.call = floor.cpu_call(self.case, self._ready(), self.mode)
            self.call()
            return None
        provider, tiny = PROVIDERS[self.name], self.case.tiny()
        if not provider.compiles:  # threads, lazy imports
            forward = provider.build(tiny, self.mode, self.device)
            step(forward, make_inputs(tiny, self.device), SCALE, tiny, self.mode)
        self.forward = provider.build(self.case, self.mode, self.device)
        self.call = lambda: step(self.forward, self._ready(), SCALE, self.case, self.mode)
        if self.device == "cuda" and provider.compiles:
            self.call()  # what is compiled at the first call may need memory of its own
        if self.device == "cpu" and provider.compiles:
            self.call()
            return None
        return extra_mib(self.call, self._ready(), self.device, gradients=self.mode == "fwd+bwd")

    def errors(self, right: Path) -> dict[str, float]:
        """Against the float64 values in that file; with the scale as a tensor too, if it can learn."""
        values = torch.load(right, mmap=True)
        return truth.errors(
            self.forward, self._ready(), SCALE, self.case, values,
            learn_scale=PROVIDERS[self.name].learns_scale,
        )  # fmt: skip

    def turn(self) -> float:
        """Median milliseconds of the timed calls of one turn."""
        inputs = self._ready()
        clock = _cuda_ms if self.device == "cuda" else _cpu_ms
        gc.collect()
        gc.disable()
        try:
            times = []
            for _ in ("warm", "timed"):
                times.clear()
                start = time.perf_counter()
                while not times or 1e3 * (time.perf_counter() - start) < TURN_MS:
                    inputs.clear_gradients()
                    times.append(clock(self.call))
        finally:
            gc.enable()
            inputs.clear_gradients()
        # The others need the memory; on the CPU, making inputs again would take long.
        if self.device == "cuda":
            del inputs
            self.inputs = None
            _flush.clear()
            torch.cuda.empty_cache()
        return statistics.median(times)

    def _ready(self) -> Inputs:
        if self.inputs is None:
            self.inputs = make_inputs(self.case, self.device)
        return self.inputs


def extra_mib(call: Call, inputs: Inputs, device: str, *, gradients: bool = True) -> float | None:
    """The peak of a call beyond its inputs and, where it makes them, gradients; None if not measurable."""
    if device == "cpu" and not sys.platform.startswith("linux"):
        call()
        return None
    inputs.clear_gradients()
    extra = (_cuda_peak if device == "cuda" else _cpu_peak)(call, inputs)
    made = sum(t.nbytes for t in inputs.leaves()) if gradients else 0
    return max(0.0, (extra - made) / 2**20)


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
    _flush[0].zero_()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def _cuda_peak(call: Call, inputs: Inputs) -> int:
    inputs.clear_gradients()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    inputs.clear_gradients()
    return torch.cuda.max_memory_allocated() - before


def _cpu_peak(call: Call, inputs: Inputs) -> int:
    with contextlib.suppress(AttributeError):  # glibc's: what earlier calls have freed would be used again
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):  # lets the peak start afresh, where the kernel has this file
        Path("/proc/self/clear_refs").write_text("5")
    before = _status_kib("VmRSS")
    call()
    peak = _status_kib("VmHWM")
    inputs.clear_gradients()
    return 1024 * (peak - before)


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")
