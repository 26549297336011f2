"""The ops of the engine by name (csrc/engine/head_arguments.h), past the Python functions.

An argument that a test does not name is what a plain softmax over all classes has."""

from __future__ import annotations

import torch
from torch import Tensor

from normface_ext.engine import library
from normface_ext.engine.sweep import Swept


def arguments(x: Tensor, weight: Tensor, labels: Tensor, **given: object) -> dict[str, object]:
    classes = weight.shape[0]
    return {
        "x": x, "weight": weight, "labels": labels, "scale": None, "threshold": None, "numbers": None,
        "sample_weight": None, "class_weight": None, "shift": None, "store": False, "need_x": True,
        "need_class_sum": False, "sink": 0, "capacity": 0, "ignore_index": -100, "scale_value": 8.0,
        "eps": 1e-12, "total_classes": max(1, classes), "term": 0, "lowest": -1.0, "highest": 1.0,
        "class_chunk": max(1, classes), "kernels": 0, "product_precision": x.dtype, "is_shard": False,
        "need_weight": True, "need_scale": False, **given,
    }  # fmt: skip


def call(name: str, given: dict[str, object]) -> object:
    """The op, with those of the arguments that it takes."""
    op = getattr(library.namespace(), name)
    return op(*[given[argument.name] for argument in op.default._schema.arguments])


def sweep(given: dict[str, object]) -> tuple[Swept, Tensor, Tensor]:
    """(what backward is given, listed, found)"""
    *swept, listed, found = call("head_sweep", given)  # type: ignore[misc]
    return Swept(*swept), listed, found


def backward(given: dict[str, object], swept: Swept, slopes: Tensor, grad_loss: Tensor) -> tuple[Tensor, ...]:
    upstream = {"grad_loss": grad_loss, "slopes": slopes, "need_x": True}
    return call("head_backward", {**given, **swept._asdict(), **upstream})  # type: ignore[return-value]


def wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
