"""The products for compute capability 9.0 and the kernels that only pass over memory: right or wrong, and how
far from the device's floor.

    python scripts/hopper.py --out FOLDER         on an H100 or H200, under two minutes: FOLDER/hopper.jsonl
    python scripts/hopper.py --device emulated    right or wrong alone, on the CPU (tests/emulation)

A new product is never chosen by itself until such a run, and its file under benchmarks/results, says that it
is right and faster (csrc/engine/products.h: `results`). A kernel's floor is the longest of its arithmetic,
its traffic and its exponentials at the device's rates (csrc/engine/rates.h); float32 is three products of
tf32, each at half the rate of 16 bits.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import every_kernel
import torch
from kernel_cases.softmax import CHOICES, PLAIN
from torch import Tensor

import normface_ext as nf
from normface_ext.engine import native
from normface_ext.engine.plan import asking

ROOT = Path(__file__).resolve().parent.parent
#: Products that no GPU has seen yet, by how their names begin.
NEW = ("sm90_", "sm80_tf32x3")


class Shape(NamedTuple):
    batch: int
    dim: int
    classes: int
    features: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        kind = str(self.features).removeprefix("torch.")
        return f"{self.batch} x {self.dim}, {f'{self.classes:,} classes' if self.classes else 'rows'}, {kind}"


SHAPES = [
    Shape(1024, 512, 1_000_000),
    Shape(1024, 256, 1_000_000),
    Shape(1024, 128, 1_000_000),
    Shape(256, 512, 85_742),
    Shape(256, 512, 10_572),
    Shape(256, 512, 85_742, torch.float32),
]


#: Of nf.functional.normalize.
ROWS = [Shape(100_000, 512, 0, torch.float32), Shape(100_000, 512, 0), Shape(1_000_000, 128, 0)]


class Work(NamedTuple):
    """Of one call of a kernel, all classes in it."""

    flops: float
    bytes: float
    exponentials: float = 0.0


def _of_scores(s: Shape) -> Work:
    cells, item = s.batch * s.classes, s.features.itemsize
    return Work(2 * cells * s.dim, item * (s.classes * s.dim + cells), cells)


def _of_sums(s: Shape) -> Work:
    return _of_scores(s)._replace(exponentials=0.0)


def _of_gradient(s: Shape) -> Work:
    cells = s.batch * s.classes
    return Work(2 * cells * s.dim, s.features.itemsize * cells + 8 * s.classes * s.dim)


def _of_sweep(s: Shape) -> Work:
    cells = s.batch * s.classes
    return Work(4 * cells * s.dim, 4 * s.classes * s.dim, cells)


def _of_sweep_gradient(s: Shape) -> Work:
    cells = s.batch * s.classes
    return Work(4 * cells * s.dim, 10 * s.classes * s.dim, cells)


def _of_prepare(s: Shape) -> Work:
    item = s.features.itemsize
    return Work(0, (4 + (2 * item if item == 2 else item)) * s.classes * s.dim)  # 16 bits: for S, and for E


def _of_class_gradients(s: Shape) -> Work:
    return Work(0, 12 * s.classes * s.dim)


def _of_normalize(s: Shape) -> Work:
    return Work(0, 2 * s.features.itemsize * s.batch * s.dim)


def _of_normalize_backward(s: Shape) -> Work:
    return Work(0, 3 * s.features.itemsize * s.batch * s.dim)


#: What kernels do, by a pattern of their names. The weight is of float32.
KERNELS: dict[str, Callable[[Shape], Work]] = {
    r"\bclass_gradients_kernel\b": _of_class_gradients,
    r"\bprepare_kernel\b": _of_prepare,
    r"\bunit_rows_kernel\b": _of_normalize,
    r"\bnormalize_rows_backward_kernel\b": _of_normalize_backward,
    r"\b(sm90_|tf32_)?scores?_kernel\b": _of_scores,
    r"\btf32_sums_kernel\b": _of_sums,
    r"\b(sm90_|tf32_)?(weight_)?gradient_kernel\b": _of_gradient,
    r"\b(sm90_)?single_sweep_kernel\b": _of_sweep,
    r"\b(sm90_)?sweep_gradient_kernel\b": _of_sweep_gradient,
}


#: Three products of tf32 for one of float32, each at half of the rate of 16 bits.
TF32X3 = 6.0


def kernel_is_tf32x3(kernel: str) -> bool:
    return re.search(r"\btf32_\w+_kernel\b", kernel) is not None


def work_of(kernel: str, shape: Shape) -> Work | None:
    return next((work(shape) for pattern, work in KERNELS.items() if re.search(pattern, kernel)), None)


@dataclass(frozen=True)
class Row:
    """``kernel`` is "step" for forward and backward together, of which the floor is not known."""

    device: str
    shape: str
    product: str
    kernel: str
    ms: float
    tflops: float | None = None
    gbytes: float | None = None
    of_floor: float | None = None

    def __str__(self) -> str:
        said = f"{self.shape}  {self.product}  {self.kernel}: {self.ms:.3f} ms"
        if self.of_floor is not None:
            said += f", {self.tflops:.0f} TFLOP/s, {self.gbytes:.0f} GB/s, {self.of_floor:.0%} of the floor"
        return said


def row(device: str, shape: Shape, product: str, kernel: str, ms: float) -> Row:
    work = work_of(kernel, shape)
    if work is None:
        return Row(device, str(shape), product, kernel, ms)
    rates, seconds = native.rates(True, device), ms * 1e-3
    at = {name: rates[name][0] for name in ("library16", "bandwidth", "exponentials")}
    products = TF32X3 if kernel_is_tf32x3(kernel) else 1.0
    floor = max(
        products * work.flops / at["library16"],
        work.bytes / at["bandwidth"],
        work.exponentials / at["exponentials"],
    )
    return Row(
        device,
        str(shape),
        product,
        kernel,
        ms,
        work.flops / seconds / 1e12,
        work.bytes / seconds / 1e9,
        floor / seconds,
    )


def new_choices() -> dict[str, tuple[str, bool]]:
    return {name: choice for name, choice in (CHOICES | PLAIN).items() if choice[0].startswith(NEW)}


def right_or_wrong(device: str) -> bool:
    """A line for each new choice; whether all are right."""
    good = True
    for choice, (product, store) in new_choices().items():
        dtypes = [torch.float32] if choice in PLAIN else [torch.float16, torch.bfloat16]
        count, wrong = every_kernel.run(device, dtypes, f"by {choice},")
        state = "no case" if count == 0 else "right" if wrong == 0 else f"WRONG in {wrong}"
        print(f"{product}, E {'kept' if store else 'made again'}: {state} of {count} cases", flush=True)
        good = good and count > 0 and wrong == 0
    return good


def step_of(shape: Shape, device: str) -> Callable[[], None]:
    generator = torch.Generator(device).manual_seed(1)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    x = randn(shape.batch, shape.dim).to(shape.features).requires_grad_()
    if shape.classes == 0:
        upstream = randn(shape.batch, shape.dim).to(shape.features)

        def normalize() -> None:
            x.grad = None
            nf.functional.normalize(x).backward(upstream)

        return normalize
    w = randn(shape.classes, shape.dim).requires_grad_()
    y = torch.randint(shape.classes, (shape.batch,), generator=generator, device=device)

    def step() -> None:
        x.grad = w.grad = None
        # As under autocast: the products' operands are those of the features.
        nf.functional.normface_loss(x, w, y, 64.0, margin=nf.CosFace(0.35)).backward()

    return step


def products_for(shape: Shape) -> Iterator[tuple[str, bool | None]]:
    """("auto", None) and what is new for such features, with E kept or not."""
    yield "auto", None
    wide = shape.features == torch.float32
    for choice, (product, store) in new_choices().items() if shape.classes else ():
        if (choice in PLAIN) == wide:
            yield product, store


def by(product: str, store: bool | None) -> AbstractContextManager[None]:
    return nullcontext() if product == "auto" else asking(product, store=store)


def takes(step: Callable[[], None], product: str, store: bool | None) -> bool:
    """Whether a product takes the shape, at its first call."""
    try:
        with by(product, store):
            step()
    except RuntimeError as error:
        if "expected a `product` that takes" in str(error):
            return False
        raise
    return True


def timed(call: Callable[[], None]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def kernel_times(events: Iterable[Any], calls: int) -> dict[str, float]:
    """Milliseconds a call, by the kernel's name, of a profile's events."""
    times: dict[str, float] = {}
    for event in events:
        if str(event.device_type) == "DeviceType.CUDA":
            name = re.sub(r"\(anonymous namespace\)::|^void ", "", event.key)
            times[name] = times.get(name, 0.0) + event.self_device_time_total / 1e3 / calls
    return times


def measure(shape: Shape, device: str) -> Iterator[Row]:
    """The step by each product, in turns; then its kernels."""
    step, turns, calls = step_of(shape, "cuda"), 7, 3
    ways = [way for way in products_for(shape) if takes(step, *way)]
    times: dict[tuple[str, bool | None], list[float]] = {way: [] for way in ways}
    for _ in range(turns):
        for product, store in ways:
            with by(product, store):
                times[product, store].append(timed(step))
    for product, store in ways:
        yield row(device, shape, product, "step", statistics.median(times[product, store]))
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with by(product, store), torch.profiler.profile(activities=activities) as profile:
            for _ in range(calls):
                step()
            torch.cuda.synchronize()
        for kernel, ms in sorted(kernel_times(profile.key_averages(), calls).items(), key=lambda of: -of[1]):
            if ms > 0.005:
                yield row(device, shape, product, kernel, ms)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "emulated"], default="cuda")
    parser.add_argument("--out", type=Path, help="folder for hopper.jsonl")
    options = parser.parse_args(argv)
    if options.device == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        print(f"hopper: {torch.cuda.get_device_name()} is of another architecture")
        return 0
    with every_kernel.kernels_of(options.device) as device:
        good = right_or_wrong(device)
    print(f"hopper: {len(new_choices())} choices, {'all right' if good else 'SOME ARE WRONG'}", flush=True)
    if options.device != "cuda":
        return 0 if good else 1
    name = torch.cuda.get_device_name()
    for shape in [*ROWS, *SHAPES]:
        for found in measure(shape, name):
            print(found, flush=True)
            if options.out:
                options.out.mkdir(parents=True, exist_ok=True)
                with (options.out / "hopper.jsonl").open("a") as stream:
                    stream.write(json.dumps(asdict(found)) + "\n")
        torch.cuda.empty_cache()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
