"""Parameters that are one: of layers that share them by a name (`param { name: "w" }`), and of layers of one
name in two phases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..engine.files import clip, quoted
from .layer import LateLayer, Layer
from .spec import Spec

Multipliers = dict[str, list[tuple[float, float]]]


class _Blob(NamedTuple):
    key: str
    layer: Layer
    spec: Spec
    place: int
    twin: bool  # of a layer whose name another phase had first: its multipliers do not count

    @property
    def name(self) -> str:
        return self.layer.BLOBS[self.place]

    def shape(self) -> list[int]:
        """0 where the size is not known yet."""
        if self.name in self.layer.shapes:
            return self.layer.shapes[self.name]
        late = isinstance(self.layer, LateLayer) and self.layer.is_late(self.name)
        return self.layer.late_shape(0) if late and isinstance(self.layer, LateLayer) else []


def share(layers: Sequence[tuple[str, Layer, Spec]], multipliers: Multipliers) -> None:
    """Joins the blobs that are one parameter. The first layer's filler makes it; a multiplier may stand in
    any of the layers, and in several where it is the same, as in Caffe. A name of one blob joins nothing."""
    groups: list[list[_Blob]] = []
    first: dict[str, Layer] = {}
    for key, layer, spec in layers:
        twin = first.setdefault(layer.name, layer)
        if twin is not layer and len(twin.BLOBS) != len(layer.BLOBS):
            spec.refuse(
                f"expected the {len(twin.BLOBS)} parameters that the layer of this name in the other phase"
                f" has, got {len(layer.BLOBS)}"
            )
            continue
        for i in range(len(layer.BLOBS)):
            blob = _Blob(key, layer, spec, i, twin is not layer)
            joined = [group for group in groups if any(_same(blob, other) for other in group)]
            groups = [group for group in groups if group not in joined]
            groups.append([other for group in joined for other in group] + [blob])
    for group in groups:
        if len(group) > 1:
            _join(group, multipliers)


def _param_name(blob: _Blob) -> str:
    params = blob.spec.message.param
    return str(params[blob.place].name) if blob.place < len(params) else ""


def _same(blob: _Blob, other: _Blob) -> bool:
    if blob.layer.name == other.layer.name and blob.place == other.place:
        return True
    return _param_name(blob) != "" and _param_name(blob) == _param_name(other)


def _join(users: list[_Blob], multipliers: Multipliers) -> None:
    told = f"the parameter {quoted(clip(_param_name(users[0]) or users[0].name, 40))}"
    shape = users[0].shape()
    for user in users:
        own = user.shape()
        if len(own) != len(shape) or any(a and b and a != b for a, b in zip(own, shape, strict=True)):
            sentence = f"expected {told} to have one shape in each layer, got {_text(shape)} and {_text(own)}"
            user.spec.refuse(sentence, "param", user.place)
            return
        shape = [a or b for a, b in zip(shape, own, strict=True)]
    merged = (_one(users, "lr_mult", told), _one(users, "decay_mult", told))
    for user in users:
        multipliers[user.key][user.place] = merged
        user.layer.lr_mults[user.place] = merged[0]
        user.layer.peers[user.name] = [(other.layer, other.name) for other in users]
        if all(shape):
            user.layer.shapes[user.name] = list(shape)


def _one(users: list[_Blob], field: str, told: str) -> float:
    values: list[float] = []
    for user in users:
        params = user.spec.message.param
        if not user.twin and user.place < len(params) and params[user.place].HasField(field):
            values.append(float(getattr(params[user.place], field)))
            if values[-1] != values[0]:
                sentence = f"expected one `{field}` for {told}, got {values[0]:g} and {values[-1]:g}"
                user.spec.refuse(sentence, "param", user.place)
    return values[0] if values else 1.0


def _text(shape: list[int]) -> str:
    return f"[{', '.join(str(size or 'D') for size in shape)}]"
