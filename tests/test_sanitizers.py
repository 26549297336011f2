"""The op tests once more, on the CPU kernels and the emulated CUDA kernels under the sanitizers.

AddressSanitizer must be in a process from its beginning, so they run in a child. Its threads also
start from the other end: what depends on their order shows here if not there.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
from emulation import build

LIBRARIES = ["cpu", "emulation"]


@pytest.mark.slow
@pytest.mark.skipif(build.unavailable() is not None, reason=f"{build.unavailable()}")
@pytest.mark.skipif(build.SANITIZED, reason="this is the child")
@pytest.mark.parametrize("library", LIBRARIES)
def test_op_tests_pass_under_the_sanitizers(library: str) -> None:
    build.build(library, sanitize=True)
    namespace = build.NAMESPACES[library]
    command = [sys.executable, "-m", "pytest", "-q", "--all", "--maxfail=3", "-p", "no:cacheprovider"]
    child = subprocess.run(
        [*command, "-k", namespace, "."],
        capture_output=True,
        text=True,
        cwd=build.HERE.parent,  # what `.` above is
        env={
            **build.sanitizer_environment(),
            "NORMFACE_TEST_NAMESPACES": namespace,
            "NORMFACE_EMULATION_ORDER": "reverse",
        },
    )
    # 5 means that not one test was found: the lane would be asleep, not clean.
    assert child.returncode == 0, child.stdout[-8000:] + child.stderr[-8000:]
