"""Loads `_C` and asks it, by ctypes, what the ops do not say: tables, plans, rates.

Loading registers the schemas and the CPU kernels. The library knows nothing of Python, so one build serves
every Python; csrc/exports.h and the files that include it are the other side.
"""

from __future__ import annotations

import ctypes
import json
import struct
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import transforms

FOLDER = Path(__file__).parent.parent
LIBRARY = FOLDER / "_C.so"

#: cuda, threads, multiprocessors, bytes of shared memory of a block, 80 for compute capability 8.0, name.
Facts = tuple[bool, int, int, int, int, str]
#: cell N C + klass C + row N + rest.
Polynomials = tuple[tuple[int, int, int, int], ...]

if not LIBRARY.exists():
    raise ImportError(
        f"normface_ext: the compiled library `_C` is missing from {FOLDER}, and no other folder on sys.path "
        "has an installed normface_ext. Build it with `pip install .` or `pip install -e .` in the checkout."
    )


def _load() -> ctypes.PyDLL:
    try:
        torch.ops.load_library(LIBRARY)
        return ctypes.PyDLL(str(LIBRARY))  # keeps Python's lock: the answers take microseconds
    except OSError as error:
        raise ImportError(
            f"normface_ext: the compiled library {LIBRARY} does not load beside torch {torch.__version__}: "
            f"{error}. It needs torch 2.11 or newer, on the kind of machine that it was built for."
        ) from error


_library = _load()
_STEP = struct.Struct("=12q")  # csrc/plan_exports.cpp: Step
_WAY = struct.Struct("=4qdQ")  # csrc/plan_exports.cpp: WayRecord


def _function(name: str, result: Any, *arguments: Any) -> Any:
    function = getattr(_library, name)
    function.restype, function.argtypes = result, arguments
    return function


_text, _flag, _number, _int = ctypes.c_char_p, ctypes.c_bool, ctypes.c_double, ctypes.c_int64
_tables = _function("nf_tables", _text)
_has_fixed_shift = _function("nf_has_fixed_shift", _flag, _number, _number, _flag, _number, _number)
_rates = _function("nf_rates", _text, _flag, _text)
_ways = _function("nf_ways", _int, _text, _text, ctypes.c_void_p, _int)
_store_rule = _function("nf_store_rule", _text, _text, _text)
_labels_within = _function("nf_labels_within", _flag, ctypes.c_void_p, _int, _int)
_workspace_bytes = _function("nf_workspace_bytes", _int, _text, _text, _text, _int)

_answer = json.loads(_tables())
#: How `_C` was built, and the SIMD path in use.
BUILD: dict[str, object] = _answer["build"]
#: A row's fields by name, each with how shards combine: csrc/engine/row_state.h.
ROW_FIELDS: dict[str, str] = dict(_answer["row_fields"])
#: The slopes of a row's loss by name, those along the margin's numbers last.
SLOPES: list[str] = _answer["slopes"]
#: By their numbers: csrc/engine/terms.h.
TERMS: list[str] = _answer["terms"]
SINKS: list[str] = _answer["sinks"]


class Product(NamedTuple):
    """A way to make the products of a step: csrc/engine/products.h.

    Attributes:
        name: by which it is asked for.
        device: "cuda" or "cpu".
        scores: what makes the scores.
        weight_gradient: what makes E^T X of dW.
        keeps_e: whether it can keep E from forward to backward.
        results: the file its rates were measured in; None where they are predictions.
    """

    name: str
    device: str
    scores: str
    weight_gradient: str
    keeps_e: bool
    results: str | None


PRODUCTS: list[Product] = [Product(**row) for row in _answer["products"]]
_ROOM = 1 + 2 * len(PRODUCTS)  # for every way there is: E kept or not


class Way(NamedTuple):
    """A product for one shape on one device: csrc/engine/plan.h.

    Attributes:
        product: what makes the products.
        store: whether E is kept.
        chunk: rows of the weight at once; 0 where not even one class fits.
        bytes: held; where nothing fits, the least that would do.
        seconds: predicted for a step.
        refusal: why it is out of the question; empty where it is not.
    """

    product: Product
    store: bool
    chunk: int
    bytes: int
    seconds: float
    refusal: str


class Step(NamedTuple):
    """A step over the classes, as the products see it.

    Attributes:
        batch: N.
        dim: D.
        classes: rows of the weight.
        item: bytes of an operand.
        softmax: whether its term is the softmax's.
        centers: rows of a class.
    """

    batch: int
    dim: int
    classes: int
    item: int
    softmax: bool = True
    centers: int = 1


def _packed(step: Sequence[int], facts: Facts, budget: int = 0) -> bytes:
    try:
        return _STEP.pack(*step, *facts[:5], budget)
    except struct.error as error:  # an int beyond 64 bits
        raise OverflowError(f"plan: expected sizes of at most 64 bits, got {(*step, budget)}") from error


def rates(cuda: bool, device: str) -> dict[str, Any]:
    """How fast a kind of device is: "kind", and (value, file it was measured in) of each rate."""
    table: dict[str, Any] = json.loads(_rates(cuda, device.encode()))
    return {name: tuple(rate) if isinstance(rate, list) else rate for name, rate in table.items()}


def ways(step: Step, facts: Facts, budget: int) -> list[Way]:
    """The way of a step that the ops take, and behind it every way there is on such a device."""
    records = ctypes.create_string_buffer(_WAY.size * _ROOM)
    count = _ways(_packed(step, facts, budget), facts[5].encode(), records, _ROOM)
    return [_way(*record) for record in _WAY.iter_unpack(records.raw[: count * _WAY.size])]


def _way(product: int, store: int, chunk: int, held: int, seconds: float, refusal: int) -> Way:
    why = ctypes.string_at(refusal).decode() if refusal else ""
    return Way(PRODUCTS[product], bool(store), chunk, held, seconds, why)


def store_rule(step: Step, facts: Facts) -> tuple[int, Polynomials, Polynomials, int]:
    """Whether E is kept, for any batch, class count and budget: (parts of a byte, memory, later, cells in the
    cache), as in StoreRule of csrc/engine/plan.h."""
    parts, memory, later, cells = json.loads(_store_rule(_packed(step, facts), facts[5].encode()))
    return parts, tuple(map(tuple, memory)), tuple(map(tuple, later)), cells


def workspace_bytes(product: str, step: Step, facts: Facts, chunk: int) -> int:
    """What a product holds with so many classes at once and no E kept."""
    held: int = _workspace_bytes(product.encode(), _packed(step, facts), facts[5].encode(), chunk)
    if held < 0:
        raise ValueError(f"workspace_bytes: expected `product` to be one of this device, got {product!r}")
    return held


def has_fixed_shift(
    scale: float, classes: float, float64: bool, lowest: float = -1.0, highest: float = 1.0
) -> bool:
    """Whether one shift serves every row, or the largest logits have to be found: csrc/math/softmax.h."""
    served: bool = _has_fixed_shift(scale, classes, float64, lowest, highest)
    return served


def labels_within(labels: torch.Tensor, classes: int) -> bool:
    """Whether all of int64 `labels` [N] on the CPU are in [0, classes). Without an op: it is asked before
    every small step."""
    plain = type(labels) is torch.Tensor and labels.is_contiguous() and not transforms.watched()
    address = labels.data_ptr() if plain else 0
    if not address:
        return bool(((labels >= 0) & (labels < classes)).all())
    within: bool = _labels_within(address, labels.shape[0], classes)
    return within


# Ctrl-C during a long kernel: `_C` runs Python's handlers between tiles, by these functions of Python's
# stable ABI (csrc/python_signals.cpp: PythonCalls).
_PYTHON_CALLS = ["Py_IsInitialized", "PyThread_get_thread_ident", "PyGILState_Ensure", "PyGILState_Release"]
_PYTHON_CALLS += ["PyErr_CheckSignals", "PyErr_Fetch", "PyErr_Restore", "Py_DecRef"]


def _watch_signals() -> None:
    calls = (ctypes.c_void_p * len(_PYTHON_CALLS))(
        *(ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p) for name in _PYTHON_CALLS)
    )
    watch = _function("nf_watch_signals", None, ctypes.c_void_p, ctypes.c_ulong)
    watch(calls, threading.main_thread().ident)


_watch_signals()
