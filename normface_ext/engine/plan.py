"""How the fused head will run: decided here from shapes alone, obeyed by the kernels.

The engine walks the classes in chunks. ``stored`` keeps E = exp(s cos - kappa) of every chunk from
forward to backward (three matrix products per step); ``recompute`` keeps nothing of size N x C and
computes the scores again in backward (four). ``single sweep`` recomputes too, but a tile of E never
leaves the multiprocessor (CUDA, 16-bit operands, D <= 256). The choice follows the workspace budget and,
between the last two and ``stored``, a model of the time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import checks
from .arguments import integer

GIB = 1 << 30
#: Default budgets: what the head may hold beyond its inputs, gradients and per-class norms.
DEFAULT_WORKSPACE = {"cpu": 2 * GIB, "cuda": 8 * GIB}


@dataclass(frozen=True)
class Plan:
    """What ``plan`` decided.

    Attributes:
        algorithm: "stored", "recompute" or "single sweep".
        scores: what makes the scores: "blas" (CPU), "cublas", or the library's own kernels, which never write
            them: "tensor cores" for 16-bit operands on compute capability 8.0 and newer, "cuda cores" for
            wider ones where a step is so small that launches are what it costs.
        weight_gradient: what makes the product E^T X of dW: "blas", "cublas", or the library's own, from
            which dW comes in its final form.
        class_chunk: classes per chunk.
        chunks: number of chunks.
        workspace_bytes: predicted peak memory beyond inputs and gradients.
        flops: floating-point operations of the matrix products, forward + backward.
        bytes_moved: least memory traffic of forward + backward: inputs, gradients and E.
    """

    algorithm: str
    scores: str
    weight_gradient: str
    class_chunk: int
    chunks: int
    workspace_bytes: int
    flops: int
    bytes_moved: int

    @property
    def store(self) -> bool:
        return self.algorithm == "stored"

    @property
    def kernels(self) -> int:
        """The code of ``HeadKernels`` in csrc/engine/row_state.h."""
        if self.algorithm == "single sweep":
            return 3
        if self.scores == "cuda cores":
            return 4
        return sum(name == "tensor cores" for name in (self.scores, self.weight_gradient))

    def __str__(self) -> str:
        products = self.scores if self.scores == self.weight_gradient else f"{self.scores} and cublas"
        return (
            f"{self.algorithm}, {products}: {self.chunks} chunk(s) of {self.class_chunk} classes,"
            f" workspace {self.workspace_bytes / 2**20:.1f} MiB,"
            f" {self.flops / 1e9:.2f} GFLOP, at least {self.bytes_moved / 2**20:.1f} MiB moved"
        )


def _threads() -> int:
    """Dynamo cannot trace the question, and the answer holds for the life of a trace."""
    return torch.get_num_threads()


# What torch.compiler.assume_constant_result does, without its import of torch._dynamo, which takes longer
# than that of torch itself.
_threads._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _cpu_chunk(batch: int, dim: int, classes: int, threads: int) -> int:
    """Classes per tile: the tile of W and the tile of E should share a core's L2 cache, and every
    thread should get a few tiles."""
    fits = max(64, (1 << 18) // max(1, dim + batch))
    return max(1, min(fits, -(-classes // (4 * threads)) if classes > 256 else classes))


def plan(
    batch: int,
    dim: int,
    classes: int,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    *,
    workspace: int | None = None,
) -> Plan:
    """The algorithm, chunking, memory and work of ``normface_loss`` for a shape.

    Args:
        batch: N.
        dim: D.
        classes: C.
        dtype: of the operands (float64, float32, float16 or bfloat16).
        device: where it will run.
        workspace: budget in bytes for everything beyond inputs and gradients; ``None`` is 2 GiB on the
            CPU and 8 GiB (at most a quarter of the card's memory) on CUDA.

    Raises:
        TypeError: a size that is no int, another dtype.
        ValueError: a size below 1 (the batch may be 0), or a budget in which not even one class per
            chunk fits; the message names the least that does.
    """
    batch = integer("plan", "batch", batch, 0)
    dim, classes = integer("plan", "dim", dim, 1), integer("plan", "classes", classes, 1)
    dtype, workspace = checks.floating_dtype("plan", dtype), checks.workspace("plan", "workspace", workspace)
    device = checks.device("plan", device)
    kind = device.type
    budget = _default_workspace(kind, device) if workspace is None else workspace

    if kind == "cuda":
        return _cuda_plan(batch, dim, classes, dtype, budget, _Device(dim, dtype, device))
    return _cpu_plan(batch, dim, classes, dtype, budget)


def _default_workspace(kind: str, device: str | torch.device) -> int:
    budget = DEFAULT_WORKSPACE.get(kind, DEFAULT_WORKSPACE["cpu"])
    if kind == "cuda" and torch.cuda.is_available():
        budget = min(budget, torch.cuda.get_device_properties(device).total_memory // 4)
    return budget


class _Device:
    """What the kernels for tensor cores may do here. Without a GPU at hand, the shared memory is the least
    among those that have the instructions (compute capability 8.6), and the multiprocessors are many."""

    def __init__(self, dim: int, dtype: torch.dtype, device: str | torch.device) -> None:
        self.multiprocessors, limit, capable = 148, 101_376, True
        if torch.cuda.is_available():
            properties = torch.cuda.get_device_properties(device)
            self.multiprocessors, capable = properties.multi_processor_count, properties.major >= 8
            limit = getattr(properties, "shared_memory_per_block_optin", limit)  # not in torch's stubs
        #: Whether simt_products.cu takes this shape.
        self.plain = (
            dtype.itemsize >= 4
            and dim * dtype.itemsize % 16 == 0
            and dim <= 512
            and plain_shared_bytes(dim) <= limit
        )
        capable = capable and dtype.itemsize == 2 and dim % 8 == 0
        #: Whether sm80_scores.cu, sm80_weight_gradient.cu and sm80_single_sweep.cu take this shape.
        self.scores = capable and score_shared_bytes(dim) <= limit
        self.weight_gradient = self.scores and dim <= 512
        self.sweep = self.scores and dim <= 256


def score_shared_bytes(dim: int) -> int:
    """Most shared memory of a block of sm80_scores.cu: a tile of features, three stages of the weight, and
    three numbers per row."""
    return 128 * (-(-dim // 64) * 64) * 2 + 3 * 128 * 64 * 2 + 128 * 12


def plain_shared_bytes(dim: int) -> int:
    """Most shared memory of a block of simt_products.cu: two stages of 128 bytes of 256 rows for the scores;
    for dW of more than 256 columns, two of 64 bytes of 64 classes and 512 columns, and a count per class. The
    latter is more than compute capability 7.5 has."""
    return 2 * 128 * 256 if dim <= 256 else 2 * 64 * (64 + 512) + 64 * 4


@dataclass(frozen=True)
class _Costs:
    """Bytes of workspace: `fixed`, `per_class` of a chunk, and `stored` for E where it is not in a chunk."""

    fixed: int
    per_class: int
    stored: int
    item: int  # bytes of an element of inputs and gradients
    e_item: int  # bytes of an element of E


def _choose(
    batch: int,
    dim: int,
    classes: int,
    budget: int,
    scores: str,
    gradient: str,
    store: _Costs,
    shrunk: _Costs,
    chunk: int,
    stored_chunk: int,
) -> Plan:
    products = 2 * batch * dim * classes
    traffic = (3 * classes * dim + 2 * batch * dim) * store.item
    used = store.fixed + store.per_class * stored_chunk + store.stored
    if used <= budget:
        chunks = -(-classes // stored_chunk)
        moved = traffic + 2 * batch * classes * store.e_item
        return Plan("stored", scores, gradient, stored_chunk, chunks, used, 3 * products, moved)
    used = store.fixed + store.per_class * chunk
    if used > budget:
        chunk = min(chunk, (budget - shrunk.fixed) // shrunk.per_class)
        used = shrunk.fixed + shrunk.per_class * chunk
    if chunk < 1:
        raise ValueError(
            f"plan: expected `workspace` of at least {shrunk.fixed + shrunk.per_class} bytes for"
            f" N={batch}, D={dim}, C={classes}, got {budget}"
        )
    moved = traffic + classes * dim * shrunk.item
    return Plan("recompute", scores, gradient, chunk, -(-classes // chunk), used, 4 * products, moved)


#: Bytes of a row's state, its slopes (csrc/engine/row_state.h) and its gradients
#: (csrc/cuda/device/backward_kernels.cuh), its counter, and what the single sweep's backward knows of it.
ROW_STATE = (7 + 4 + 7) * 8 + 4 + 16


def _cpu_plan(batch: int, dim: int, classes: int, dtype: torch.dtype, budget: int) -> Plan:
    item = 8 if dtype == torch.float64 else 4
    threads = _threads()
    chunk = _cpu_chunk(batch, dim, classes, threads)

    def costs(slots: int) -> _Costs:
        return _Costs(
            # x_hat and its weighted copy, x_sum, an accumulator per thread; the rows' state; norms of W.
            fixed=(3 + slots) * batch * dim * item + (ROW_STATE + 16 * slots) * batch + classes * item,
            # Per class of a tile and thread: unit weights, their gradient, and a column of scores.
            per_class=slots * (2 * dim + batch) * item,
            stored=batch * classes * item,
            item=item,
            e_item=item,
        )

    # A chunk that had to shrink is walked by all threads.
    store, shrunk = costs(min(threads, -(-classes // chunk))), costs(min(threads, classes))
    return _choose(batch, dim, classes, budget, "blas", "blas", store, shrunk, chunk, chunk)


#: Predicted rates of an H200, until measured: products by cuBLAS and by the kernels of mma.sync, memory.
LIBRARY_RATE, KERNEL_RATE, BANDWIDTH = 670e12, 375e12, 4.3e12
#: E below this size stays in the L2 cache between the kernels.
CACHED = 32 << 20
#: A float32 product of so many operations takes about as long by cuBLAS as by the library's own kernel.
SMALL = 6e9


def _cuda_plan(batch: int, dim: int, classes: int, dtype: torch.dtype, budget: int, device: _Device) -> Plan:
    operand = dtype.itemsize  # of the products' operands and of E; scores and sums are at least float32
    wide = max(operand, 4)
    # What dW of one class costs after a product by cuBLAS: written, read with the weight, written again.
    afterwards = 10 * dim / BANDWIDTH
    product = 2 * batch * dim
    fused = device.weight_gradient and product / KERNEL_RATE <= product / LIBRARY_RATE + afterwards
    if device.sweep and (sweep := _sweep_plan(batch, dim, classes, budget, device)) is not None:
        e = 2 * batch if 2 * batch * classes > CACHED else 0  # bytes per class, written once and read twice
        rest = product / KERNEL_RATE if fused else product / LIBRARY_RATE + afterwards
        stored = product * (1 / KERNEL_RATE + 1 / LIBRARY_RATE) + rest + 3 * e / BANDWIDTH
        if 4 * product / KERNEL_RATE < stored:
            return sweep
    else:
        sweep = None
    plain = device.plain and product * classes <= SMALL
    kernels = ("tensor cores" if device.scores else "cublas", "tensor cores" if fused else "cublas")
    if plain:
        kernels = ("cuda cores", "cuda cores")
    scores = 0 if device.scores or operand == wide else wide  # E replaces scores of its own size
    # Partial sums: of every block that a row has (of at most 256 tiles: sm80_scores.cu), or of stretches of
    # classes.
    blocks = 0
    if device.scores:
        blocks = max(1, 8 * device.multiprocessors // max(1, -(-batch // 128)), -(-classes // (256 * 128)))
    stretch = 128 if plain else 4096
    costs = _Costs(
        # x_hat and its weighted copy, x_sum and the part added to it; the rows' state, before and after
        # it is finished, partial sums, and columns up to a multiple of 8; norms of W.
        fixed=2 * batch * dim * (operand + wide)
        + (ROW_STATE + 20 * min(blocks, -(-classes // 128)) + 7 * (operand + scores)) * batch
        + classes * wide,
        # Unit weights and, for 16-bit operands, their copy or their gradient; a column of E and of scores.
        per_class=dim * (operand + wide)
        + (batch + 8) * (operand + scores)
        + (0 if device.scores else 16 * batch // stretch + 1),
        stored=0,
        item=operand,
        e_item=operand,
    )
    chunk = max(1, min(classes, (1 << 28) // max(1, batch + dim)))
    if sweep is not None and costs.fixed + costs.per_class * classes > budget:
        return sweep
    return _choose(batch, dim, classes, budget, *kernels, costs, costs, chunk, classes)


def _sweep_plan(batch: int, dim: int, classes: int, budget: int, device: _Device) -> Plan | None:
    """The single sweep, if the budget is enough for chunks of a reasonable size."""
    row_blocks = -(-batch // 128)
    splits = max(1, 2 * device.multiprocessors // max(1, row_blocks))
    fixed = (
        # x_hat, weighted features, x_sum and its parts; the rows' state and partial sums; norms of W.
        (4 + 4) * batch * dim + 4 * splits * batch * dim + (ROW_STATE + 16 * splits) * batch + 4 * classes
    )
    per_class = 4 * dim  # unit weights in two types
    least = min(classes, 4096)
    if fixed + per_class * least > budget:
        return None
    chunk = min(classes, (budget - fixed) // per_class, (1 << 30) // dim)
    product = 2 * batch * dim * classes
    moved = (4 * classes * dim + 2 * batch * dim) * 2  # inputs and gradients, and the weight once more
    return Plan(
        "single sweep",
        "tensor cores",
        "tensor cores",
        chunk,
        -(-classes // chunk),
        fixed + per_class * chunk,
        4 * product,
        moved,
    )
