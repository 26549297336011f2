"""When the gradient of a loss over agents follows a list of what is active, and how long the list may be."""

from __future__ import annotations

import torch

#: What a list may hold for a gradient that follows it to be the quicker one, as a share of all N C cells. A
#: listed cell is two gathers of D numbers, a dense one its part of three products. On the CPU measured: the
#: crossover lay between 0.075 (N = 64, C = 85,742) and 0.2 (N = 256, C = 10,572). On CUDA a prediction: 16 D
#: bytes at 3 TB/s against 6 D operations at the rates below.
LISTED_SHARE = {"cpu": 1 / 16, "cuda": 1 / 64}
LISTED_SHARE_16_BITS = 1 / 256  # on CUDA, where tensor cores make the products
#: What a list costs whatever is in it; on CUDA the host waits to read how long it is.
LIST_SECONDS = 1e-4


def dense_rate(device: str, precision: torch.dtype) -> float:
    """Operations per second of a dense backward, roughly."""
    if device != "cuda":
        return 1e11
    return 375e12 if precision.itemsize == 2 else 5e13


#: Bytes of a listed class, at most: its number and its coefficient.
LISTED_BYTES = 16


def list_bytes(batch: int, capacity: int) -> int:
    """Of the lists of a sweep, which forward leaves for backward: a part of the workspace."""
    return LISTED_BYTES * batch * capacity


def list_limits(
    batch: int,
    dim: int,
    classes: int,
    device: str,
    precision: torch.dtype,
    workspace: int,
    limit: int | None,
) -> tuple[int, int]:
    """(active classes listed per row, active classes of all rows up to which the gradient follows the lists).
    An explicit limit is obeyed; else a list is for work that takes longer than it does, and no larger than an
    eighth of the workspace."""
    if limit is not None:
        capacity = min(limit, classes - 1)
        return capacity, batch * capacity
    if 4 * batch * dim * classes < LIST_SECONDS * dense_rate(device, precision):
        return 0, 0
    narrow = device == "cuda" and precision.itemsize == 2
    share = LISTED_SHARE_16_BITS if narrow else LISTED_SHARE[device]
    # A row may have more than its share, as long as all together have not.
    room = workspace // (8 * LISTED_BYTES * max(1, batch))
    return min(int(2 * classes * share), room), int(batch * classes * share)
