"""The weights of a .caffemodel, held against the layers of a head."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..engine.files import clip, file_name, listing, read_bytes, reading
from .build import Layers
from .fillers import dtype_of
from .layer import LateLayer, Layer
from .proto import messages

#: protobuf writes and reads no larger message.
MOST_BYTES = 2**31 - 1
#: Layers of a file; the deepest released nets have some thousands.
MOST_LAYERS = 100_000
EXPECTED = "a binary NetParameter (.caffemodel)"


def stored_weights(
    path: str | os.PathLike[str] | bytes, layers: Layers, labels: Mapping[str, str], strict: bool
) -> list[tuple[str, str, Tensor]]:
    """(layer, blob, value) of every blob that the file has for the layers, each as its parameter will hold
    it; ValueError as ``Head.load_caffemodel`` says. ``labels`` are the layers' names in messages."""
    where = "<bytes>" if isinstance(path, bytes) else file_name(path)
    data = path if isinstance(path, bytes) else read_bytes(path, MOST_BYTES, EXPECTED)
    stored = _stored_layers(data, {layer.name.encode() for _, layer in layers.items()}, where)
    copies: list[tuple[str, str, Tensor]] = []
    problems = []
    for layer_name, layer in layers.items():
        names, found = layer.BLOBS, stored.get(layer.name.encode(), [])
        if not names:
            continue
        try:
            if len(found) > 1:
                raise _Unfit(f"once in the file, got it {len(found)} times")
            if found:
                copies += [
                    (layer_name, name, value) for name, value in _fitting(found[0], names, layer, where)
                ]
            elif strict:
                raise _Unfit("its weights in the file, got none")
        except _Unfit as problem:
            problems.append(f"{labels[layer_name]}: expected {problem}")
    if problems:
        raise ValueError(listing(f"load_caffemodel: {where} does not fit:", problems, 0))
    return copies


class _Unfit(Exception):
    """What was expected of a layer's weights, and what the file has."""


def _parse(kind: str, data: bytes, where: str) -> Any:
    message = messages()[kind]()
    with reading(where, EXPECTED):
        message.ParseFromString(data)
    return message


def _stored_layers(data: bytes, wanted: set[bytes], where: str) -> dict[bytes, list[list[bytes]]]:
    """name -> the blobs, still as bytes, of each wanted layer of that name that has any."""
    net = _parse("StoredNet", data, where)
    count = len(net.layers) + len(net.layer)
    if not 1 <= count <= MOST_LAYERS:
        raise ValueError(f"{where}: expected {EXPECTED} of 1 to {MOST_LAYERS} layers, got {count}")
    stored: dict[bytes, list[list[bytes]]] = {}
    for kind, shells in (("StoredV1Layer", net.layers), ("StoredLayer", net.layer)):
        for shell in shells:
            layer = _parse(kind, shell, where)
            if layer.name in wanted and len(layer.blobs):
                stored.setdefault(layer.name, []).append(layer.blobs)
    return stored


def _fitting(
    blobs: list[bytes], names: tuple[str, ...], layer: Layer, where: str
) -> list[tuple[str, Tensor]]:
    """The value of each parameter."""
    unfit = _Unfit(f"{len(names)} blobs ({', '.join(names)}), got {len(blobs)}")
    if not len(names) <= len(blobs) <= len(names) + layer.SPARE_BLOBS:
        raise unfit
    messages = [_parse("StoredBlob", blob, where) for blob in blobs]
    if any(bool(_values(spare).any()) for spare in messages[len(names) :]):
        raise unfit
    return [(name, _value(name, blob, layer)) for name, blob in zip(names, messages, strict=False)]


def _values(blob: Any) -> Tensor:
    # NumPy takes protobuf's buffer as a whole; torch.tensor would take it number by number.
    numbers, dtype = (blob.double_data, np.float64) if len(blob.double_data) else (blob.data, np.float32)
    return torch.from_numpy(np.array(numbers, dtype=dtype))


def _value(name: str, blob: Any, layer: Layer) -> Tensor:
    """A stored blob as the parameter, its shape and dtype, will hold it."""
    parameter = getattr(layer, name)
    # Caffe takes the four old sizes where the file has one of them. A blob of one number has no sizes.
    legacy = any(blob.HasField(size) for size in ("num", "channels", "height", "width"))
    shape = [blob.num, blob.channels, blob.height, blob.width] if legacy else [int(n) for n in blob.shape.dim]
    if parameter is not None:
        wanted = list(parameter.shape)
    elif name in layer.shapes:
        wanted = layer.shapes[name]
    else:
        assert isinstance(layer, LateLayer)
        wanted = layer.late_shape(max(1, shape[-1]) if shape else 1)
    data = _values(blob)
    if (
        name in layer.ONE_NUMBER
        and len(data) > 1
        and len(data) == math.prod(shape)
        and bool((data == data[0]).all())
    ):
        data, shape = data[:1], [1] * len(shape) if legacy else []
    if shape != ([1] * (4 - len(wanted)) + wanted if legacy else wanted) or len(data) != math.prod(wanted):
        known = parameter is not None or name in layer.shapes
        meant = wanted if known else f"[{', '.join([*map(str, wanted[:-1]), 'D'])}]"
        raise _Unfit(clip(f"`{name}` of shape {meant}, got {shape} with {len(data)} values", 200))
    dtype = dtype_of(layer.dtype) if parameter is None else parameter.dtype
    value = data.to(dtype)
    finite = torch.isfinite(value)
    if not finite.all():
        bad = float(data[~finite][0])
        raise _Unfit(f"`{name}` to be finite, got {bad:g}" + f", too large for {dtype}" * math.isfinite(bad))
    return value.reshape(wanted).to(layer.device if parameter is None else parameter.device)
