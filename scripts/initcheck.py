"""Runs compute-sanitizer's initcheck and leaves out the one report that is known to be a false alarm.

    python scripts/initcheck.py compute-sanitizer --tool initcheck ... python scripts/every_kernel.py

cuBLAS' kernels are excluded from the check by name: they store in ways that it does not see. So a matrix
that cuBLAS alone wrote passes for unwritten, and copying it to the host is reported. A report is left out
only if all of this holds:

- it is about a copy by the host, not about a read in a kernel
- what is unwritten is the source of the copy
- the copy was made by torch's ``Tensor.to`` (``_to_copy`` is in the backtrace)
- nothing of this extension is in the backtrace

every_kernel.py copies only such matrices directly; what our kernels wrote is read by a kernel first, and a
hole in it is reported as a read on the device, which stays. And whether cuBLAS wrote all of its matrix is
shown without this tool: ``every_kernel.py --unwritten-is-nan``.

The exit status is 0 if nothing else was reported and the program ended well.
"""

from __future__ import annotations

import re
import subprocess
import sys

#: compute-sanitizer's --error-exitcode: what it found decides below, not this.
FOUND = 9
PREFIX = "========= "
OUR_LIBRARIES = re.compile(r"normface_ext\S*/_(cuda|C)\b")


def reports(log: str) -> list[str]:
    """The reports: each begins at the first indent and has more lines, indented further."""
    found: list[list[str]] = []
    for line in log.splitlines():
        text = line.removeprefix(PREFIX)
        if text == line or text.startswith(("COMPUTE-SANITIZER", "ERROR SUMMARY", "Target application")):
            continue
        if text.startswith(" ") and found:
            found[-1].append(text)
        elif text.strip():
            found.append([text])
    return ["\n".join(lines) for lines in found]


def is_false_alarm(report: str) -> bool:
    first, *rest = report.splitlines()
    body = "\n".join(rest)
    return (
        first.startswith("Host API memory access error at host access to ")
        and re.search(r"Uninitialized access at \S+ on access by cudaMemc\w+ source", body) is not None
        and "_to_copy" in body
        and OUR_LIBRARIES.search(body) is None
    )


def run(command: list[str]) -> tuple[int, str]:
    """(exit status, all output); what the program says, not the tool, is shown as it comes."""
    log = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            log.append(line)
            if not line.startswith(PREFIX.strip()):
                print(line, end="", flush=True)
    return process.returncode, "".join(log)


def main(command: list[str]) -> int:
    status, log = run(command)
    found = reports(log)
    left = [report for report in found if not is_false_alarm(report)]
    for report in left:
        print(f"{PREFIX}{report}")
    # The tool says how many it made; another count means that they look otherwise than `reports` thinks.
    summary = re.search(r"ERROR SUMMARY: (\d+) error", log)
    claimed = int(summary[1]) if summary else -1
    if claimed != len(found):
        print(f"initcheck: expected the {claimed} reports of the summary in the output, got {len(found)}")
        return 1
    print(f"initcheck: {len(left)} findings, {len(found) - len(left)} copies of what cuBLAS wrote left out")
    return 1 if left or status not in (0, FOUND) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
