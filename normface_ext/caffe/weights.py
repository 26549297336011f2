"""The weights of a .caffemodel, held against the layers of a head."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import proto
from .layers import Layer


def layer_key(name: str) -> str:
    """A layer's name as a module's: no dots, and no attribute of ModuleDict."""
    key = name.replace(".", "_")
    return f"{key}_" if hasattr(nn.ModuleDict, key) else key


def stored_weights(
    path: str | os.PathLike[str] | bytes, layers: nn.ModuleDict, labels: Mapping[str, str], strict: bool
) -> list[tuple[str, str, Tensor]]:
    """(layer, blob, value) of every blob that the file has for the layers; ValueError as
    ``Head.load_caffemodel`` says. ``labels`` are the layers' names in messages."""
    where, data = ("<bytes>", path) if isinstance(path, bytes) else (os.fspath(path), Path(path).read_bytes())
    net = proto.parse_binary(data, where)
    stored = {
        layer_key(str(layer.name)): layer.blobs for layer in [*net.layers, *net.layer] if len(layer.blobs)
    }
    copies: list[tuple[str, str, Tensor]] = []
    problems = []
    for key, layer in layers.items():
        assert isinstance(layer, Layer)
        names = layer.BLOBS
        if not names:
            continue
        if key not in stored:
            problems += [f"{labels[key]}: expected its weights in the file, got none"] * strict
            continue
        spare = stored[key][len(names) : len(names) + layer.SPARE_BLOBS]
        if len(stored[key]) != len(names) + len(spare) or any(bool(_values(b).any()) for b in spare):
            problems.append(
                f"{labels[key]}: expected {len(names)} blobs ({', '.join(names)}), got {len(stored[key])}"
            )
            continue
        for name, blob in zip(names, stored[key], strict=False):
            value, problem = _tensor(blob, getattr(layer, name), layer)
            if problem:
                problems.append(f"{labels[key]}: expected `{name}` {problem}")
            else:
                copies.append((key, name, value))
    if problems:
        raise ValueError(f"load_caffemodel: {where} does not fit:\n" + "\n".join(problems))
    return copies


def _values(blob: Any) -> Tensor:
    # NumPy takes protobuf's buffer as a whole; torch.tensor would take it number by number.
    numbers, dtype = (blob.double_data, np.float64) if len(blob.double_data) else (blob.data, np.float32)
    return torch.from_numpy(np.array(numbers, dtype=dtype))


def _tensor(blob: Any, parameter: Tensor | None, layer: Layer) -> tuple[Tensor, str]:
    """(a stored blob in the shape of the parameter, what is wrong with it or "")."""
    data = _values(blob)
    legacy = not blob.HasField("shape")
    shape = [blob.num, blob.channels, blob.height, blob.width] if legacy else [int(n) for n in blob.shape.dim]
    open_shape = [getattr(layer, "num_output", 1), shape[-1] if shape else 1]
    wanted = open_shape if parameter is None else list(parameter.shape)
    fits = shape == ([1] * (4 - len(wanted)) + wanted if legacy else wanted)
    if not fits or data.numel() != math.prod(wanted):
        meant = wanted if parameter is not None else f"[{layer.num_output}, D]"
        return data, f"of shape {meant}, got {shape} with {data.numel()} values"
    if not torch.isfinite(data).all():
        return data, f"to be finite, got {float(data[~torch.isfinite(data)][0])}"
    return data.reshape(wanted), ""
