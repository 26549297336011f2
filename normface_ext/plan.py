"""How the fused head will run: decided here from shapes alone, obeyed by the kernels.

The engine walks the classes in chunks. ``stored`` keeps E = exp(s cos - kappa) of every chunk from
forward to backward (three matrix products per step); ``recompute`` keeps nothing of size N x C and
computes the scores again in backward (four). The choice follows the workspace budget.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

GIB = 1 << 30
#: Default budgets: what the head may hold beyond its inputs, gradients and per-class norms.
DEFAULT_WORKSPACE = {"cpu": 2 * GIB, "cuda": 8 * GIB}


@dataclass(frozen=True)
class Plan:
    """What :func:`plan` decided.

    Attributes:
        algorithm: "stored" or "recompute".
        class_chunk: classes per chunk.
        chunks: number of chunks.
        workspace_bytes: predicted peak memory beyond inputs and gradients.
        flops: floating-point operations of the matrix products, forward + backward.
        bytes_moved: least memory traffic of forward + backward: inputs, gradients and E.
    """

    algorithm: str
    class_chunk: int
    chunks: int
    workspace_bytes: int
    flops: int
    bytes_moved: int

    @property
    def store(self) -> bool:
        return self.algorithm == "stored"

    def __str__(self) -> str:
        return (
            f"{self.algorithm}: {self.chunks} chunk(s) of {self.class_chunk} classes,"
            f" workspace {self.workspace_bytes / 2**20:.1f} MiB,"
            f" {self.flops / 1e9:.2f} GFLOP, at least {self.bytes_moved / 2**20:.1f} MiB moved"
        )


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
        batch, dim, classes: N, D and C.
        dtype: of the operands (float64, float32, float16 or bfloat16).
        device: where it will run.
        workspace: budget in bytes for everything beyond inputs and gradients; ``None`` is 2 GiB on the
            CPU and 8 GiB (at most a quarter of the card's memory) on CUDA.

    Raises:
        ValueError: a size below 1 (the batch may be 0), or a budget in which not even one class per
            chunk fits; the message names the least that does.
    """
    for name, size, least in (("batch", batch, 0), ("dim", dim, 1), ("classes", classes, 1)):
        if size < least:
            raise ValueError(f"plan: expected `{name}` >= {least}, got {size}")
    kind = torch.device(device).type
    budget = _default_workspace(kind, device) if workspace is None else workspace
    layout = _cuda_layout if kind == "cuda" else _cpu_layout
    return layout(batch, dim, classes, dtype, budget)


def _default_workspace(kind: str, device: str | torch.device) -> int:
    budget = DEFAULT_WORKSPACE.get(kind, DEFAULT_WORKSPACE["cpu"])
    if kind == "cuda" and torch.cuda.is_available():
        budget = min(budget, torch.cuda.get_device_properties(device).total_memory // 4)
    return budget


def _choose(
    batch: int,
    dim: int,
    classes: int,
    item: int,
    operand: int,
    budget: int,
    chunk: int,
    fixed: int,
    per_class: int,
    stored_all: int,
    stored_chunk: int,
) -> Plan:
    """`fixed` bytes plus `per_class` bytes for each class of a chunk; `stored_all` more for E."""
    products = 2 * batch * dim * classes
    traffic = (3 * classes * dim + 2 * batch * dim) * item
    stored = fixed + per_class * stored_chunk + stored_all
    if stored <= budget:
        return Plan(
            "stored",
            stored_chunk,
            -(-classes // stored_chunk),
            stored,
            3 * products,
            traffic + 2 * batch * classes * operand,
        )
    chunk = min(chunk, (budget - fixed) // per_class) if budget > fixed else 0
    if chunk < 1:
        raise ValueError(
            f"plan: expected `workspace` of at least {fixed + per_class} bytes for N={batch}, D={dim},"
            f" C={classes}, got {budget}"
        )
    return Plan(
        "recompute",
        chunk,
        -(-classes // chunk),
        fixed + per_class * chunk,
        4 * products,
        traffic + classes * dim * item,
    )


def _cpu_layout(batch: int, dim: int, classes: int, dtype: torch.dtype, budget: int) -> Plan:
    item = 8 if dtype == torch.float64 else 4
    threads = torch.get_num_threads()
    chunk = _cpu_chunk(batch, dim, classes, threads)
    slots = min(threads, -(-classes // chunk))
    # x_hat and V, x_sum, one accumulator per thread; the rows' state and the label order; norms of W.
    fixed = (3 + slots) * batch * dim * item + 80 * batch + classes * item
    # Per class of a tile and thread: unit weights, their gradient, and a column of scores.
    per_class = slots * (2 * dim + batch) * item
    return _choose(
        batch, dim, classes, item, item, budget, chunk, fixed, per_class, batch * classes * item, chunk
    )


def _cuda_layout(batch: int, dim: int, classes: int, dtype: torch.dtype, budget: int) -> Plan:
    operand = dtype.itemsize  # of the matrix products' inputs; sums and scores are never below float32
    wide = max(operand, 4)
    stored_bytes = 0 if operand == wide else operand  # 16-bit E stands beside the scores, else replaces
    # x_hat and V, x_sum and its partner; the rows' state and partial sums; norms of W.
    fixed = 2 * batch * dim * operand + 2 * batch * dim * wide + 1280 * batch + classes * wide
    per_class = dim * (operand + wide) + batch * (wide + stored_bytes)
    chunk = max(1, min(classes, (1 << 28) // max(1, batch + dim)))
    return _choose(batch, dim, classes, operand, operand, budget, chunk, fixed, per_class, 0, classes)
