"""A small case of every op and every kernel, in tables: what ``scripts/every_kernel.py`` runs.

A table is a generator of cases for one dtype. A new op, or a new kernel, needs a row in one of them;
tests/test_every_kernel.py says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from . import agents, distances, norms, shards, softmax, terms, updates
from .case import Case

Table = Callable[[torch.dtype], Iterator[Case]]
TABLES: dict[str, Table] = {
    "norms": norms.cases,
    "softmax": softmax.cases,
    "agents": agents.cases,
    "distances": distances.cases,
    "shards": shards.cases,
    "terms": terms.cases,
    "updates": updates.cases,
}
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]

__all__ = ["DTYPES", "TABLES", "Case"]
