"""What a step costs the host: time of Python, allocations, launches and planning, for ours and for eager.

The time is measured without a profiler, on the CPU with a case so small that its arithmetic does not count,
on CUDA without waiting for the device. Where it goes is counted with torch.profiler, which adds about a
microsecond to every event, and planning, which is plain Python, with cProfile, which doubles it: take the
counts as exact and the microseconds of the parts as an upper bound.
"""

from __future__ import annotations

import cProfile
import functools
import json
import pstats
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from cases import CASIA, SCALE, Case, head, make_inputs
from competitors import BASE, EAGER, OURS, step

import normface_ext as nf

CALLS, PROFILED = 300, 50

#: how the profiler's events begin, in the order in which they are looked for
PARTS = {
    "our ops": ("normface_ext::",),
    "allocations": ("aten::empty", "cudaMalloc"),
    "launches": ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch"),
    "launch attributes": ("cudaFuncSetAttribute",),
    "device queries": ("cudaGetDeviceProperties", "cudaDeviceGetAttribute", "cudaOccupancy"),
    "copies": ("cudaMemcpy", "cudaMemset"),
    "waiting": ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"),
    "other torch operations": ("aten::",),
    "autograd": ("autograd::", ""),
}
PLANNING = "planning"


@dataclass
class Part:
    """`part`: "forward", "forward + backward" or "no grad" for whole calls, else a part of a step."""

    case: str
    provider: str
    part: str
    per_step: float
    us_per_step: float
    how: str = "benchmark"


def calls_of(case: Case, device: str, provider: str) -> dict[str, Callable[[], object]]:
    forward, inputs = BASE[provider].build(case, "fwd+bwd", device), make_inputs(case, device)

    def training() -> None:
        inputs.clear_gradients()
        step(forward, inputs, SCALE, case, "fwd+bwd")

    def building_a_graph() -> None:
        forward(inputs.x, inputs.weight, inputs.labels, SCALE)

    autocast = case.precision.autocast
    if autocast:
        building_a_graph = torch.autocast(device, autocast)(building_a_graph)
    return {
        "forward": building_a_graph,
        "forward + backward": training,
        "no grad": functools.partial(step, forward, inputs, SCALE, case, "fwd"),
    }


def microseconds(call: Callable[[], object], device: str) -> float:
    """Median of the host's time; the device is waited for outside the clock, so that no queue fills up."""
    times = []
    for index in range(CALLS + CALLS // 10):
        start = time.perf_counter()
        call()
        if index >= CALLS // 10:
            times.append(1e6 * (time.perf_counter() - start))
        if device == "cuda":
            torch.cuda.synchronize()
    return statistics.median(times)


def events(call: Callable[[], object], device: str) -> dict[str, tuple[float, float]]:
    """Per step, for each of PARTS: how many events, and the microseconds in them but not in others."""
    wanted = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        wanted.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=wanted) as profile:
        for _ in range(PROFILED):
            call()
    found = dict.fromkeys(PARTS, (0.0, 0.0))
    for event in profile.key_averages():
        if event.device_type == torch.autograd.DeviceType.CPU:
            part = next(p for p, starts in PARTS.items() if event.key.startswith(starts))
            count, us = found[part]
            found[part] = (count + event.count / PROFILED, us + event.self_cpu_time_total / PROFILED)
    return found


def planning(call: Callable[[], object]) -> tuple[float, float]:
    """Calls into the package's planning from outside of it, and their microseconds, per step."""
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(PROFILED):
        call()
    profile.disable()
    package = Path(nf.__file__).parent

    def plans(filename: str) -> bool:
        return Path(filename).is_relative_to(package) and "plan" in Path(filename).name

    count, seconds = 0, 0.0
    for (filename, _, _), (_, _, _, _, callers) in pstats.Stats(profile).stats.items():
        for (caller, _, _), (_, calls, _, cumulative) in callers.items():
            if plans(filename) and not plans(caller):
                count, seconds = count + calls, seconds + cumulative
    return count / PROFILED, 1e6 * seconds / PROFILED


def measure(case: Case, device: str) -> list[Part]:
    found = []
    for provider in (OURS, EAGER):
        calls = calls_of(case, device, provider)
        found += [Part(case.name, provider, n, 1, microseconds(c, device)) for n, c in calls.items()]
        training = calls["forward + backward"]
        parts = events(training, device) | ({PLANNING: planning(training)} if provider == OURS else {})
        found += [Part(case.name, provider, name, *values) for name, values in parts.items() if values[0]]
    return found


def table(parts: list[Part]) -> str:
    lines, last = [], ("", "")
    for part in parts:
        if (part.case, part.provider) != last:
            last = (part.case, part.provider)
            lines += ["", f"{part.case}, {part.provider}", f"{'':26}{'per step':>10}{'us per step':>14}"]
        lines.append(f"{part.part:26}{part.per_step:10.3g}{part.us_per_step:14.1f}")
    return "\n".join(lines)


def run(device: str, common: dict[str, object], out: Path) -> Path:
    """Prints the tables and writes host.jsonl, case by case."""
    cases = [head(8, 16, 32)]
    if device == "cuda":
        cases += [head(256, 512, CASIA, "mixed-bfloat16"), head(256, 512, CASIA)]
    path = out / "host.jsonl"
    path.write_text("")
    for case in cases:
        parts = measure(case, device)
        print(table(parts), flush=True)
        with path.open("a") as file:
            file.writelines(json.dumps(asdict(part) | common) + "\n" for part in parts)
    return path
