"""Layers of before 2014 (`layers { type: INNER_PRODUCT }`) as the layers of today, as Caffe upgrades them."""

from __future__ import annotations

from typing import Any

from ..engine.files import clip
from .proto import messages
from .prototxt import Lines
from .spec import Report

#: The old names whose new ones are not their words in capitals and small letters.
TYPES = {
    "ABSVAL": "AbsVal", "ARGMAX": "ArgMax", "BNLL": "BNLL", "HDF5_DATA": "HDF5Data",
    "HDF5_OUTPUT": "HDF5Output", "IM2COL": "Im2col", "LRN": "LRN", "MVN": "MVN", "PRELU": "PReLU",
    "RELU": "ReLU",    "SOFTMAX_LOSS": "SoftmaxWithLoss", "TANH": "TanH",
}  # fmt: skip
#: Fields that mean the same in both.
_KEPT = ("name", "bottom", "top", "loss_weight", "blobs", "include", "exclude")


def new_type(old: str) -> str:
    """INNER_PRODUCT -> InnerProduct; also for the names that forks added."""
    return TYPES.get(old) or "".join(word[:1] + word[1:].lower() for word in old.split("_"))


def upgraded(old: Any, lines: Lines, report: Report) -> tuple[Any, Lines]:
    """(LayerParameter, its lines) of a V1LayerParameter."""
    new, fields = messages()["LayerParameter"](), dict(lines.fields)
    for descriptor, value in old.ListFields():
        name = descriptor.name
        if name in _KEPT and hasattr(value, "__len__") and not isinstance(value, str):
            getattr(new, name).MergeFrom(value)
        elif name in _KEPT:
            setattr(new, name, value)
        elif name.endswith("_param"):
            getattr(new, name).CopyFrom(value)
    for name, line in lines.unknown:
        if name == "layer":
            report.refuse(line, "`layers { layer { ... } }` is a format of before 2013: upgrade the file")
    if old.HasField("type"):
        new.type = new_type(old.type)
    # What `param` holds today stood in four lists.
    lists = {name: getattr(old, name) for name in ("param", "blob_share_mode", "blobs_lr", "weight_decay")}
    count = max(map(len, lists.values()))
    if len(old.weight_decay) not in (0, count) or len(old.blobs_lr) not in (0, count):
        report.refuse(
            lines.of("blobs_lr"),
            f'layer "{clip(old.name, 60)}": expected as many `blobs_lr` as `weight_decay`, got'
            f" {len(old.blobs_lr)} and {len(old.weight_decay)}",
        )
    for i in range(count):
        param = new.param.add()
        for name, kept in zip(lists, ("name", "share_mode", "lr_mult", "decay_mult"), strict=True):
            if i < len(lists[name]):
                setattr(param, kept, lists[name][i])
    places = [p for name in lists for p in fields.pop(name, [])[:count]]
    if count:
        fields["param"] = (places + [Lines(lines.line)] * count)[:count]
    return new, Lines(lines.line, fields, lines.unknown)
