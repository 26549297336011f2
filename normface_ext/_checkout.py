"""In a checkout, `import normface_ext` means the installed package.

Python puts the current folder, or that of a script, before the installed packages; in a checkout the source
folder then hides what `pip install .` made, and it has no compiled module. Importing this module, which
``__init__`` does first, hands over to the installed package as a whole: sources and compiled module belong
together. An editable install puts the compiled module here, and nothing happens.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent


def _has_compiled_module(folder: Path) -> bool:
    return any((folder / f"_C{suffix}").exists() for suffix in importlib.machinery.EXTENSION_SUFFIXES)


def _installed() -> importlib.machinery.ModuleSpec | None:
    """The first package of this name elsewhere on the path that has a compiled module."""
    for entry in sys.path:
        spec = importlib.machinery.PathFinder.find_spec("normface_ext", [entry])
        if spec and spec.origin and _has_compiled_module(Path(spec.origin).parent):
            return spec
    return None


def _hand_over() -> None:
    spec = None if _has_compiled_module(_HERE) else _installed()
    if spec is None or spec.loader is None:
        return  # _library says what is missing
    for name in ("normface_ext", __name__):
        sys.modules.pop(name, None)
    module = importlib.util.module_from_spec(spec)
    sys.modules["normface_ext"] = module  # what the import statement that led here returns
    spec.loader.exec_module(module)


_hand_over()
