"""How the engine will run: whether E is kept is decided here, from shapes alone; everything else inside the
ops, by the same descriptors (csrc/engine/products.h, csrc/engine/plan.h).

The engine walks the classes in chunks. ``stored`` keeps E = exp(s cos - kappa) of every chunk from
forward to backward (three matrix products per step); ``recompute`` keeps nothing of size N x C and
computes the scores again in backward (four). ``single sweep`` recomputes too, but a tile of E never
leaves the multiprocessor (CUDA, 16-bit operands, D <= 256). The choice follows the workspace budget and,
between the last two and ``stored``, a model of the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from . import checks, graphs, library, native
from .arguments import flag, integer
from .lists import list_bytes, list_limits
from .native import Facts, Step, Way

GIB = 1 << 30
#: Default budgets: what the head may hold beyond its inputs, gradients and per-class norms.
DEFAULT_WORKSPACE = {"cpu": 2 * GIB, "cuda": 8 * GIB}

#: Without a GPU at hand: the shared memory is the least among those that have tensor cores (compute
#: capability 8.6), and the multiprocessors are many.
ASSUMED: Facts = (True, 1, 148, 101_376, 80, "")
#: Of the kernels' emulation on a CPU (tests/emulation/device/launch.cuh).
EMULATED: Facts = (True, 1, 3, 227 << 10, 90, "emulated")


class Loser(NamedTuple):
    """A way that was not taken.

    Attributes:
        product: its name in csrc/engine/products.h.
        algorithm: as in ``Plan``.
        seconds: predicted for a step; None where the product does not take the shape.
        why: what speaks against it.
    """

    product: str
    algorithm: str
    seconds: float | None
    why: str


@dataclass(frozen=True)
class Plan:
    """What ``plan`` decided.

    Attributes:
        algorithm: "stored", "recompute" or "single sweep".
        scores: what makes the scores: "blas" (CPU), "cublas", or the library's own kernels, which never write
            them: "tensor cores" for 16-bit operands on compute capability 8.0 and newer, "cuda cores" for
            wider ones where a step is so small that launches are what it costs. By name only (``asking``),
            since no GPU has run them: "wgmma" for 16-bit operands on compute capability 9.0, and "tensor
            cores" for float32.
        weight_gradient: what makes the product E^T X of dW: "blas", "cublas", or the library's own, from
            which dW comes in its final form.
        class_chunk: classes per chunk.
        chunks: number of chunks.
        workspace_bytes: predicted peak memory beyond inputs and gradients.
        flops: floating-point operations of the matrix products, forward + backward.
        bytes_moved: least memory traffic of forward + backward: inputs, gradients and E.
        product: the name of the product that makes both, and that leaves the rest to the library.
        seconds: predicted for a step, forward + backward, of a weight in at least float32.
        losers: the other ways, each with its predicted seconds and why it lost.
        listed: active classes that a loss over agents lists per row, 0 where it follows no lists.
        list_bytes: of these lists, a part of workspace_bytes.
    """

    algorithm: str
    scores: str
    weight_gradient: str
    class_chunk: int
    chunks: int
    workspace_bytes: int
    flops: int
    bytes_moved: int
    product: str
    seconds: float
    losers: tuple[Loser, ...] = field(compare=False, repr=False)
    listed: int = 0
    list_bytes: int = 0

    @property
    def store(self) -> bool:
        return self.algorithm == "stored"

    def __str__(self) -> str:
        products = self.scores if self.scores == self.weight_gradient else f"{self.scores} and cublas"
        chosen = (
            f"{self.algorithm}, {products}: {self.chunks} chunk(s) of {self.class_chunk} classes,"
            f" workspace {_size(self.workspace_bytes)},"
            f" {self.flops / 1e9:.2f} GFLOP, at least {_size(self.bytes_moved)} moved,"
            f" predicted {_time(self.seconds)}"
        )
        if self.listed > 0:
            chosen += (
                f", lists of {self.listed} active classes a row {_size(self.list_bytes)} of the workspace"
            )
        lines = [
            f"  not {loser.product if loser.seconds is None else f'{loser.algorithm} by {loser.product}'}:"
            f" {loser.why}"
            for loser in self.losers
        ]
        return "\n".join([chosen, *lines])


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.1f} MiB"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _threads() -> int:
    """Dynamo cannot trace the question, and the answer holds for the life of a trace."""
    return torch.get_num_threads()


# What torch.compiler.assume_constant_result does, without its import of torch._dynamo, which takes longer
# than that of torch itself.
_threads._dynamo_marked_constant = True  # type: ignore[attr-defined]


def facts(device: torch.device) -> Facts:
    """What the products ask of a device."""
    if device.type != "cuda":
        return False, _threads(), 0, 0, 0, ""
    if library.emulating():
        return EMULATED
    if not torch.cuda.is_available():
        return ASSUMED
    card = torch.cuda.get_device_properties(device)
    shared = getattr(card, "shared_memory_per_block_optin", ASSUMED[3])  # not in torch's stubs
    return True, 1, card.multi_processor_count, shared, 10 * card.major + card.minor, card.name


def operand_bytes(device: torch.device, dtype: torch.dtype) -> int:
    """Of the products' operands and of E; a CPU widens 16-bit ones."""
    return dtype.itemsize if device.type == "cuda" else max(4, dtype.itemsize)


def default_workspace(device: torch.device) -> int:
    budget = DEFAULT_WORKSPACE.get(device.type, DEFAULT_WORKSPACE["cpu"])
    if device.type == "cuda" and torch.cuda.is_available():
        budget = min(budget, torch.cuda.get_device_properties(device).total_memory // 4)
    return budget


def plan(
    batch: int,
    dim: int,
    classes: int,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    *,
    workspace: int | None = None,
    sub_centers: int = 1,
    agents: bool = False,
) -> Plan:
    """The algorithm, chunking, memory and work of ``normface_loss`` for a shape. ``print`` it: it says what
    was chosen, what was not, and why.

    Args:
        batch: N.
        dim: D.
        classes: C.
        dtype: of the operands (float64, float32, float16 or bfloat16).
        device: where it will run.
        workspace: budget in bytes for everything beyond inputs and gradients; ``None`` is 2 GiB on the
            CPU and 8 GiB (at most a quarter of the card's memory) on CUDA.
        sub_centers: K, see ``normface_loss``: K rows of the weight for each of C classes.
        agents: of ``c_contrastive_loss`` and ``c_triplet_loss`` instead, whose lists of active classes are a
            part of the workspace.

    Raises:
        TypeError: a size that is no int, another dtype.
        ValueError: a size below 1 (the batch may be 0), or a budget in which not even one class per
            chunk fits; the message names the least that does.
    """
    batch = integer("plan", "batch", batch, 0)
    dim, classes = integer("plan", "dim", dim, 1), integer("plan", "classes", classes, 1)
    dtype, workspace = checks.floating_dtype("plan", dtype), checks.workspace("plan", "workspace", workspace)
    device, centers = checks.device("plan", device), integer("plan", "sub_centers", sub_centers, 1)
    if flag("plan", "agents", agents):
        return _plan_of_agents(batch, dim, classes * centers, dtype, device, centers, workspace)
    return plan_of_step(batch, dim, classes * centers, dtype, device, True, centers, workspace)


def _plan_of_agents(
    batch: int,
    dim: int,
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
    centers: int,
    workspace: int | None,
) -> Plan:
    """With the lists, or without where nothing fits beside them."""
    budget = default_workspace(device) if workspace is None else workspace
    step = batch, dim, rows, dtype, device, False, centers
    capacity, _ = list_limits(batch, dim, rows, device.type, dtype, budget, None)
    lists = list_bytes(batch, capacity)
    try:
        found = plan_of_step(*step, budget - lists)
    except ValueError:
        return plan_of_step(*step, budget)
    return replace(found, workspace_bytes=found.workspace_bytes + lists, listed=capacity, list_bytes=lists)


def plan_of_step(
    batch: int,
    dim: int,
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
    softmax: bool,
    centers: int,
    workspace: int | None,
) -> Plan:
    """``plan`` of what was checked, for a sweep of the softmax's term or of another, over a weight of `rows`
    rows, `centers` of them for a class."""
    budget = default_workspace(device) if workspace is None else workspace
    item = operand_bytes(device, dtype)
    way, *all_ways = native.ways(Step(batch, dim, rows, item, softmax, centers), facts(device), budget)
    if way.chunk == 0:
        raise ValueError(
            f"plan: expected `workspace` of at least {way.bytes} bytes for"
            f" N={batch}, D={dim}, C={rows // centers}, got {budget}"
        )
    algorithm, product = _algorithm(way), 2 * batch * dim * rows
    weights, kept = (3, 2 * batch * rows) if way.store else (4, 0)  # W is read once more without E
    moved = (weights * rows * dim + 2 * batch * dim + kept) * item
    others = [other for other in all_ways if (other.product, other.store) != (way.product, way.store)]
    return Plan(
        algorithm,
        way.product.scores,
        way.product.weight_gradient,
        way.chunk // centers,
        -(-rows // way.chunk),
        way.bytes,
        (3 if way.store else 4) * product,
        moved,
        way.product.name,
        way.seconds,
        tuple(_loser(other, way, budget) for other in others),
    )


def _algorithm(way: Way) -> str:
    return "stored" if way.store else "recompute" if way.product.keeps_e else "single sweep"


def _loser(way: Way, chosen: Way, budget: int) -> Loser:
    seconds = way.seconds or None
    if way.refusal:
        why = way.refusal
    elif way.bytes > budget:
        why = f"needs {_size(way.bytes)} of {_size(budget)}"
    else:
        why = f"predicted {_time(way.seconds)}"
        if way.seconds <= chosen.seconds:  # the rule is about kinds of shapes, and this one is at its edge
            why += ", as long" if not chosen.store else ", while E stays in the cache"
    return Loser(way.product.name, _algorithm(way), seconds, why)


# What the ops are told ----------------------------------------------------------------------------------


class Products(NamedTuple):
    """Whether E is kept, and what the ops choose the rest by."""

    keep: bool
    workspace: int  # bytes
    product: str  # "auto", or a name in csrc/engine/products.h


#: csrc/engine/plan.h: StoreRule (parts of a byte, memory, later, cells in the cache), and the default budget.
#: A plain tuple: torch 2.11 does not unpack another in a trace.
_Rule = tuple[int, native.Polynomials, native.Polynomials, int, int]


class _Asked(NamedTuple):
    product: str
    store: bool | None
    chunk: int | None


_rules: dict[tuple[Any, ...], _Rule] = {}
_asked: _Asked | None = None


def _rule(device: torch.device, dim: int, dtype: torch.dtype, softmax: bool, centers: int) -> _Rule:
    key = device, dim, dtype, softmax, centers, library.emulating(), torch.get_num_threads()
    rule = _rules.get(key)
    if rule is None:
        integer("plan", "dim", dim, 1)
        kind = Step(0, dim, 0, operand_bytes(device, dtype), softmax, centers)
        coefficients = native.store_rule(kind, facts(device))
        rule = _rules[key] = (*coefficients, default_workspace(device))
    return rule


_rule._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _least(bounds: native.Polynomials, batch: int, classes: int) -> int:
    values = [(cell * batch + klass) * classes + row * batch + rest for cell, klass, row, rest in bounds]
    least = values[0]
    for value in values[1:]:  # of two a trace makes an expression, of more it would ask
        least = min(least, value)
    return least


def products(
    batch: int,
    dim: int,
    classes: int,
    dtype: torch.dtype,
    device: torch.device,
    workspace: int | None,
    *,
    softmax: bool = True,
    centers: int = 1,
) -> Products:
    """Of a sweep: one inequality in N and C, so that a trace has one guard however its sizes may change. With
    several `centers` of a class, rows of the weight take the place of its classes.

    Raises:
        ValueError: as ``plan``, outside of traces.
    """
    # D has to be a number for the rule: a trace takes it as one by the length of a range.
    parts, memory, later, cache_cells, budget = _rule(device, len(range(dim)), dtype, softmax, centers)
    if workspace is not None:
        budget = workspace
    rows = classes * centers
    if _asked is not None and (given := _as_asked(_asked, batch, dim, rows, dtype, device, budget, centers)):
        return given
    if graphs.exporting():
        return Products(False, budget, "auto")  # one program for all batches, that keeps nothing for later
    excess = _least(memory, batch, rows) - parts * budget
    if later:  # E in the cache, or not the slower way
        beyond = batch * rows - cache_cells
        excess = max(excess, min(beyond, _least(later, batch, rows)))
    keep = bool(excess <= 0)
    if not keep and not torch.compiler.is_compiling():  # raises where not even one class fits
        plan_of_step(batch, dim, rows, dtype, device, softmax, centers, budget)
    return Products(keep, budget, "auto")


@contextmanager
def asking(product: str, *, store: bool | None = None, chunk: int | None = None) -> Iterator[None]:
    """A product by its name instead of the fastest, within the block: E kept or not, `chunk` classes at a
    time. For measuring and testing; one that does not take a shape raises there. What is for another kind of
    device is not asked for on this one."""
    global _asked
    before, _asked = _asked, _Asked(product, store, chunk)
    try:
        yield
    finally:
        _asked = before


def asked_for() -> bool:
    """Whether a plan may be another than its shape's: a product is asked for, or one program is made for all
    batches."""
    return _asked is not None or graphs.exporting()


def _as_asked(
    asked: _Asked,
    batch: int,
    dim: int,
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
    budget: int,
    centers: int,
) -> Products | None:
    known = {product.name: product for product in native.PRODUCTS}
    if asked.product not in known:
        raise ValueError(f"asking: expected `product` among {', '.join(known)}, got {asked.product!r}")
    product = known[asked.product]
    if product.device != device.type:
        return None
    store = product.keeps_e if asked.store is None else asked.store
    if asked.chunk is not None and not store:
        step = Step(batch, dim, rows, operand_bytes(device, dtype), True, centers)
        budget = native.workspace_bytes(product.name, step, facts(device), min(asked.chunk * centers, rows))
    return Products(store, budget, asked.product)
