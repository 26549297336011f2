"""New blobs: their sizes are checked before memory is taken, then they get Caffe's initial values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..cosine.rows import gaussian_unitball_
from ..engine.files import quoted
from .spec import Context, Spec

FILLERS = ("constant", "uniform", "gaussian", "gaussian_unitball", "xavier", "msra")
#: Caffe counts the numbers and the axes of a blob in these limits, too.
MOST_NUMBERS, MOST_AXES = 2**31 - 1, 32


class Filler(NamedTuple):
    """FillerParameter, in a form that copies and pickles."""

    type: str
    value: float
    min: float
    max: float
    mean: float
    std: float
    variance_norm: int
    sparse: int


#: The options that a type reads.
_READS = {"constant": ("value",), "uniform": ("min", "max"), "gaussian": ("mean", "std")}


def check_filler(spec: Spec, path: str, context: Context) -> Filler:
    message = spec.get(path)
    filler = Filler(*(getattr(message, name) for name in Filler._fields))
    if filler.type not in FILLERS:
        spec.refuse(
            f"expected `{path}.type` to be one of {', '.join(FILLERS)}, got {quoted(filler.type)}",
            f"{path}.type",
        )
    if message.sparse < -1:
        spec.refuse(f"expected `{path}.sparse` >= 0, or -1 for none, got {message.sparse}", f"{path}.sparse")
    largest = torch.finfo(dtype_of(context.dtype)).max
    for name in _READS.get(filler.type, ()):
        if abs(value := getattr(filler, name)) > largest:
            spec.refuse(
                f"expected `{path}.{name}` within the parameter's dtype, got {value:g}", f"{path}.{name}"
            )
    if filler.type == "gaussian" and filler.std < 0:
        spec.refuse(f"expected `{path}.std` >= 0, got {filler.std:g}", f"{path}.std")
    if filler.type == "uniform" and not 0 <= filler.max - filler.min <= largest:
        spec.refuse(
            f"expected `{path}.min` <= `max` with a finite difference, got {filler.min:g} and {filler.max:g}",
            f"{path}.min",
        )
    return filler


def dtype_of(dtype: torch.dtype | None) -> torch.dtype:
    return torch.get_default_dtype() if dtype is None else dtype


def free_memory(device: torch.device | str | None) -> float:
    """Bytes that new tensors can have on a device; infinity where nobody says."""
    kind = torch.device(torch.get_default_device() if device is None else device)
    if kind.type == "cuda":
        cached = torch.cuda.memory_reserved(kind) - torch.cuda.memory_allocated(kind)
        return torch.cuda.mem_get_info(kind)[0] + cached
    said = Path("/proc/meminfo")
    if kind.type == "cpu" and said.exists():
        for line in said.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return math.inf


def size_problem(shape: Sequence[int], dtype: torch.dtype | None, free: float) -> str:
    """What is wrong with the size of a blob beside so much free memory, or ""."""
    count = math.prod(shape)
    needed = count * dtype_of(dtype).itemsize
    if len(shape) > MOST_AXES:
        return f"of at most {MOST_AXES} axes, got {len(shape)}"
    if count > MOST_NUMBERS:
        return f"of at most 2^31 - 1 numbers, as in Caffe, got shape {list(shape)}"
    if needed > free:
        return f"of at most {max(free, 0) / 2**30:.1f} GiB, the free memory, got shape {list(shape)}"
    return ""


def new_blob(
    name: str,
    shape: Sequence[int],
    filler: Filler,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> Tensor:
    """A filled blob.

    Raises:
        ValueError: too large, or a filler whose values are infinite.
    """
    problem = size_problem(shape, dtype, free_memory(device))
    if problem:
        raise ValueError(f"expected `{name}` {problem}")
    try:
        blob = torch.empty(list(shape), dtype=dtype, device=device)
    except RuntimeError as error:  # what torch's allocators raise
        raise ValueError(
            f"expected memory for `{name}` of shape {list(shape)}, got none: {str(error).splitlines()[0]}"
        ) from error
    fill_(blob, filler)
    if filler.type == "gaussian" and not blob.is_meta and not torch.isfinite(blob).all():
        raise ValueError(f"expected a filler of `{name}` with finite values, got std: {filler.std:g}")
    return blob


@torch.no_grad()
def fill_(blob: Tensor, filler: Filler) -> None:
    """Caffe's initial values, in place."""
    if filler.type == "constant":
        blob.fill_(filler.value)
    elif filler.type == "uniform":
        blob.uniform_(filler.min, filler.max)
    elif filler.type == "gaussian":
        blob.normal_(filler.mean, filler.std)
        if filler.sparse >= 0 and blob.dim():  # so many numbers per column that are not 0, on average
            blob.mul_(torch.rand_like(blob) < filler.sparse / blob.shape[0])
    elif filler.type == "gaussian_unitball":
        blob.copy_(
            gaussian_unitball_(blob.reshape(blob.shape[0] if blob.dim() else 1, -1)).reshape(blob.shape)
        )
    else:
        fan_in = blob.numel() / blob.shape[0] if blob.dim() else 1
        fan_out = blob.numel() / blob.shape[1] if blob.dim() > 1 else 1
        n = (fan_in, fan_out, (fan_in + fan_out) / 2)[filler.variance_norm]
        if filler.type == "xavier":
            blob.uniform_(-math.sqrt(3 / n), math.sqrt(3 / n))
        else:
            blob.normal_(0, math.sqrt(2 / n))
