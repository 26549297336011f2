"""Parameters that layers share by a name: `param { name: "w" }`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..engine.files import clip, quoted
from .layer import LateLayer, Layer
from .spec import Spec

Multipliers = dict[str, list[tuple[float, float]]]


def share(layers: Sequence[tuple[str, Layer, Spec]], multipliers: Multipliers) -> None:
    """Joins the blobs of one name. The first layer's filler makes them; a multiplier may stand in any of the
    layers, and in several where it is the same, as in Caffe. A name that one blob has joins nothing."""
    found: dict[str, list[tuple[str, Layer, Spec, int]]] = {}
    for key, layer, spec in layers:
        for i, param in enumerate(spec.message.param[: len(layer.BLOBS)]):
            if param.name:
                found.setdefault(param.name, []).append((key, layer, spec, i))
    for name, users in found.items():
        if len(users) > 1:
            _join(name, users, multipliers)


def _join(name: str, users: list[tuple[str, Layer, Spec, int]], multipliers: Multipliers) -> None:
    peers = [(layer, layer.BLOBS[i]) for _, layer, _, i in users]
    shape, told = _shape(*peers[0]), f"the shared parameter {quoted(clip(name, 40))}"
    for (layer, blob), (_, _, spec, i) in zip(peers, users, strict=True):
        own = _shape(layer, blob)
        if len(own) != len(shape) or any(a and b and a != b for a, b in zip(own, shape, strict=True)):
            spec.refuse(
                f"expected {told} of one shape in each layer, got {_text(shape)} and {_text(own)}", "param", i
            )
            return
        shape = [a or b for a, b in zip(shape, own, strict=True)]
    given: list[float] = []
    for field in ("lr_mult", "decay_mult"):
        values = []
        for _, _, spec, i in users:
            param: Any = spec.message.param[i]
            if param.HasField(field):
                values.append(float(getattr(param, field)))
            if len(set(values)) > 1:
                spec.refuse(
                    f"expected one `{field}` for {told}, got {values[0]:g} and {values[-1]:g}", "param", i
                )
                return
        given.append(values[0] if values else 1.0)
    for key, layer, _, i in users:
        multipliers[key][i] = (given[0], given[1])
        layer.lr_mults[i] = given[0]
        layer.peers[layer.BLOBS[i]] = peers
        if all(shape):
            layer.shapes[layer.BLOBS[i]] = list(shape)


def _shape(layer: Layer, blob: str) -> list[int]:
    """0 where the size is not known yet."""
    if blob in layer.shapes:
        return layer.shapes[blob]
    return layer.late_shape(0) if isinstance(layer, LateLayer) and layer.is_late(blob) else []


def _text(shape: list[int]) -> str:
    return f"[{', '.join(str(size or 'D') for size in shape)}]"
