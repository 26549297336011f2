"""Loads the compiled libraries, once, and says what was built and what was loaded.

Loading `_C` (engine/native.py) registers the schemas and the CPU kernels; `_cuda.so` adds the CUDA kernels.
The import works on every machine: what is missing is named when it is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._ops import _OpNamespace

from . import native

_CUDA_LIBRARY = native.FOLDER / "_cuda.so"


def _load_cuda() -> str | None:
    """Loads the CUDA kernels, or returns the reason why they are not loaded."""
    if not _CUDA_LIBRARY.exists():
        return "`_cuda` was not built (no CUDA toolkit was found, or NORMFACE_CUDA=0 was set)"
    if torch.version.cuda is None:
        return f"`_cuda` was built but not loaded: this torch, {torch.__version__}, is built without CUDA"
    try:
        torch.ops.load_library(_CUDA_LIBRARY)
    except OSError as error:
        return f"`_cuda` was built but could not be loaded: {error}"
    return None


_cuda_reason = _load_cuda()
_namespace: _OpNamespace = torch.ops.normface_ext


def build_info() -> dict[str, object]:
    """What was built and what is loaded: versions, CUDA and its architectures, compiler, SIMD in use.

    `cuda_reason` says why the CUDA kernels are not loaded; it is None when they are.
    """
    return {
        **native.BUILD,
        "torch_run": torch.__version__,
        "cuda_built": _CUDA_LIBRARY.exists(),
        "cuda_loaded": _cuda_reason is None,
        "cuda_reason": _cuda_reason,
    }


def require_cuda(op: str) -> None:
    """Raises RuntimeError with the reason and the remedy, unless the CUDA kernels are loaded."""
    if _cuda_reason is not None:
        raise RuntimeError(
            f"{op}: expected the CUDA kernels to be loaded, got a CUDA tensor without them: {_cuda_reason}. "
            "With a CUDA build of torch and a CUDA toolkit (nvcc) on the PATH, "
            "`NORMFACE_CUDA=1 pip install --no-build-isolation --no-deps .` in the source folder builds them."
        )


def namespace() -> _OpNamespace:
    """The operators in use: torch.ops.normface_ext."""
    return _namespace


def emulating() -> bool:
    """Whether the emulated CUDA kernels are in place of the real ones."""
    return str(_namespace.name) == "normface_emulation"


@contextmanager
def use_namespace(other: _OpNamespace) -> Iterator[None]:
    """For tests: operators come from `other`, an emulation of the CUDA kernels on CPU tensors."""
    global _namespace
    before, _namespace = _namespace, other
    try:
        yield
    finally:
        _namespace = before
