"""What the evaluation borrows, and the sentence when it is not installed."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, what: str) -> Any:
    """The module, or an ImportError that says what needs it and how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = {"sklearn": "scikit-learn", "PIL": "pillow"}.get(
            module.partition(".")[0], module.partition(".")[0]
        )
        raise ImportError(
            f"{what}: needs {package}, which is not installed or does not load ({error}); "
            '`pip install "normface_ext[evaluation]"` brings it'
        ) from error
