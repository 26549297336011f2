"""Runs a small case of every op and every kernel, forward and backward, and compares with float64.

    python scripts/every_kernel.py                       on the GPU
    python scripts/every_kernel.py --device emulated     the CUDA kernels on the CPU (tests/emulation)
    python scripts/every_kernel.py --device cpu          the CPU kernels

It is also what compute-sanitizer is pointed at: sizes are odd on purpose, and a tool that finds nothing has
watched the right numbers being made. ``--unwritten-is-nan`` fills fresh memory with NaN, so that an element
that no kernel writes, one that only cuBLAS should write among them, is a wrong result. The tables are in
scripts/kernel_cases.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from kernel_cases import DTYPES, TABLES, Case
from kernel_cases.softmax import CHOICES, PLAIN
from torch import Tensor

from normface_ext.engine import native

#: By the norm of the difference; a 16-bit operand is good for its own rounding.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "emulated", "cpu"], default="cuda")
    parser.add_argument("--select", metavar="TEXT", default="", help="only cases with this in their name")
    dtypes = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, default=dtypes)
    parser.add_argument("--unwritten-is-nan", action="store_true")
    return parser.parse_args(argv)


def unwritten_is_nan() -> None:
    """From now on aten::empty, from which all memory of the kernels comes, fills it with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


@contextmanager
def kernels_of(device: str) -> Iterator[str]:
    """The operators of the device are in use; gives the name of torch's device."""
    if device != "emulated":
        yield device
        return
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    from lanes import load

    from normface_ext.engine import library

    with library.use_namespace(load("normface_emulation")):
        yield "cpu"


def complaint(case: Case, device: str, tolerance: float) -> str | None:
    """What is wrong with a case, if anything is."""
    truth = case.truth(*(t.double() if t.is_floating_point() else t for t in case.inputs))
    results = case.ours(*(t.to(device) for t in case.inputs))
    for index, (got, right) in enumerate(zip(results, truth, strict=True)):
        found = on_host(got, index in case.by_library)
        if not right.is_floating_point():  # classes
            if not torch.equal(found, right):
                return f"result {index}: {int((found != right).sum())} of {right.numel()} are wrong"
            continue
        found = found.double()
        error = float((found - right).norm() / right.norm().clamp_min(1e-30))
        if not error <= tolerance:
            return f"result {index}: relative error {error:.2e} above {tolerance:.0e}"
    return None


def on_host(result: Tensor, by_library: bool) -> Tensor:
    """What a kernel of ours wrote is read by a kernel before it is copied, so that initcheck reports what is
    missing of it as a read on the device. scripts/initcheck.py counts on that."""
    return (result if by_library else result.detach() + 0).cpu()


def unseen() -> list[str]:
    """What cases call the products that no GPU has run yet."""
    names = {product.name for product in native.PRODUCTS if product.results is None}
    return sorted(names) + [choice for choice, (product, _) in (CHOICES | PLAIN).items() if product in names]


def run(device: str, dtypes: list[torch.dtype], select: str = "") -> tuple[int, int]:
    """(cases, of them wrong) on a device that `kernels_of` has made ready; a line for each wrong one.
    Products that no GPU has run come last: a kernel that traps ends the process's use of the device."""
    count = wrong = 0
    new = unseen()
    for last in (False, True):
        if last and count:
            print(f"{count} cases, {wrong} of them wrong; then what no GPU has run", flush=True)
        for dtype in dtypes:
            for table in TABLES.values():
                for case in table(dtype):
                    if select not in case.name or any(f"by {name}" in case.name for name in new) != last:
                        continue
                    count += 1
                    if found := complaint(case, device, TOLERANCE[dtype]):
                        wrong += 1
                        print(f"WRONG {case.name}, {dtype}: {found}", flush=True)
    return count, wrong


def main() -> int:
    options = arguments()
    if options.unwritten_is_nan:
        unwritten_is_nan()
    with kernels_of(options.device) as device:
        dtypes = [getattr(torch, name) for name in options.dtypes]
        count, wrong = run(device, dtypes, options.select)
        if device == "cuda":
            torch.cuda.synchronize()
    if count == 0:
        raise SystemExit(f"every_kernel: no case has {options.select!r} in its name")
    agreed = "all agree" if wrong == 0 else f"{wrong} DO NOT AGREE"
    print(f"every kernel on {options.device}: {count} cases, {agreed} with float64")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
