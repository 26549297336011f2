"""In a checkout, `import normface_ext` means the installed package.

Python puts the current folder, or that of a script, before the installed packages; in a checkout the source
folder then hides what `pip install .` made, and it has no compiled library. Importing this module, which
``__init__`` does first, hands over to the installed package as a whole: sources and compiled library belong
together. An editable install puts the compiled library here, and nothing happens.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent


def _has_compiled_library(folder: Path) -> bool:
    return (folder / "_C.so").exists()


def _installed() -> importlib.machinery.ModuleSpec | None:
    """The first package of this name elsewhere on the path that has a compiled library."""
    for entry in sys.path:
        spec = importlib.machinery.PathFinder.find_spec("normface_ext", [entry])
        if spec and spec.origin and _has_compiled_library(Path(spec.origin).parent):
            return spec
    return None


def _hand_over() -> None:
    spec = None if _has_compiled_library(_HERE) else _installed()
    if spec is None or spec.loader is None:
        return  # engine/native.py says what is missing
    for name in ("normface_ext", __name__):
        sys.modules.pop(name, None)
    module = importlib.util.module_from_spec(spec)
    sys.modules["normface_ext"] = module  # what the import statement that led here returns
    spec.loader.exec_module(module)


_hand_over()
