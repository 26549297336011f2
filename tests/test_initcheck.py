"""scripts/initcheck.py leaves out one kind of report and no other."""

from __future__ import annotations

import sys

import initcheck
import pytest

COPY = """\
========= Host API memory access error at host access to 0x7f2fd6a00000 of size 13736 bytes
=========     Uninitialized access at 0x7f2fd6a00000 on access by cudaMemcpy source
=========     Saved host backtrace up to driver entry point at error
=========         Host Frame:  [0x2e8fa0] in libcuda.so.1
=========         Host Frame: cudaMemcpyAsync [0x72d56] in libcudart.so.13
=========         Host Frame: at::native::copy_(at::Tensor&, at::Tensor const&, bool) [0x1] in libtorch_cpu.so
=========         Host Frame: at::_ops::_to_copy::call(at::Tensor const&) [0x2b] in libtorch_cpu.so
========="""
READ = """\
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void exponentiate_kernel<float, float>(const T1 *)+0x1b0
=========     by thread (3,0,0) in block (1,0,0)
=========     Access to 0x7f2fd6a0000c is at byte 12 of an allocation
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: at::_ops::_to_copy::call(at::Tensor const&) [0x2b] in libtorch_cpu.so
========="""
OTHERS = {
    "a read in a kernel": READ,
    "a copy that torch did not make for Tensor.to": COPY.replace("_to_copy", "clone"),
    "a copy that this extension asked for": COPY.replace(
        "libcudart.so.13", "libcudart.so.13\n=========         Host Frame: [0x1] in /x/normface_ext/_cuda.so"
    ),
    "a copy whose destination is the trouble": COPY.replace("cudaMemcpy source", "cudaMemcpy destination"),
    "another error of a copy": COPY.replace("Uninitialized access", "Out of bounds access"),
    "something of the tool": "========= Internal Sanitizer Error: the device is not supported\n=========",
}


def tool(reports: list[str], *, summary: int | None = None, status: int = 9) -> list[str]:
    """A command that says what compute-sanitizer says, the program's own line among it."""
    count = len(reports) if summary is None else summary
    lines = ["========= COMPUTE-SANITIZER", *reports, "every kernel on cuda: 5 cases, all agree with float64"]
    lines.append(f"========= ERROR SUMMARY: {count} errors")
    code = f"import sys; print({chr(10).join(lines)!r}); sys.exit({status})"
    return [sys.executable, "-c", code]


def test_copies_of_what_cublas_wrote_are_left_out(capfd: pytest.CaptureFixture) -> None:
    assert initcheck.main(tool([COPY, COPY.replace("13736", "462"), COPY])) == 0
    said = capfd.readouterr().out
    assert "5 cases, all agree" in said and "Host API" not in said
    assert said.endswith("initcheck: 0 findings, 3 copies of what cuBLAS wrote left out\n")


@pytest.mark.parametrize("report", OTHERS.values(), ids=OTHERS)
def test_everything_else_is_a_finding(report: str, capfd: pytest.CaptureFixture) -> None:
    assert initcheck.main(tool([COPY, report, COPY])) == 1
    said = capfd.readouterr().out
    assert report.splitlines()[0] in said and "initcheck: 1 findings, 2 copies" in said


def test_nothing_reported_is_fine() -> None:
    assert initcheck.main(tool([], status=0)) == 0


@pytest.mark.parametrize("status", [1, 3, -11])
def test_a_program_that_failed_is_a_finding(status: int) -> None:
    assert initcheck.main(tool([COPY], status=status % 256)) == 1


def test_reports_that_are_not_understood_are_a_finding(capfd: pytest.CaptureFixture) -> None:
    assert initcheck.main(tool([COPY], summary=2)) == 1
    assert "expected the 2 reports of the summary in the output, got 1" in capfd.readouterr().out
