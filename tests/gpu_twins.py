"""The right twins of the emulation's faults on a GPU: what their test files share."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from emulation import build

needs_nvcc = pytest.mark.skipif(build.nvcc() is None, reason="nvcc not found")
ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def check_alone(library: str, module: str) -> None:
    """``module.check_on_gpu()`` in a process of its own: there the names belong to CUDA's kernels."""
    build.build_faults_with_nvcc(library)
    ran = subprocess.run(
        [sys.executable, "-c", f"import {module}; {module}.check_on_gpu()"],
        capture_output=True,
        text=True,
        cwd=build.HERE.parent,
    )
    assert ran.returncode == 0, ran.stderr


def load(library: str) -> None:
    """In that process: what build.load gives is nvcc's build."""
    torch.ops.load_library(build.OUTPUT / "nvcc" / f"{library}.so")
    build.load = lambda library: getattr(torch.ops, build.NAMESPACES[library])  # type: ignore[assignment]
