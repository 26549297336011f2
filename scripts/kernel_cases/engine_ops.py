"""The ops of the engine by name (csrc/engine/head_arguments.h), past the Python functions.

An argument that a test does not name is what a plain softmax over all classes has. `class_chunk` stands for
the workspace in which the `product`, a library's unless named, takes so many classes at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normface_ext.engine import library, native
from normface_ext.engine.calls import plan_device
from normface_ext.engine.plan import facts, operand_bytes
from normface_ext.engine.row_state import INVERSE_NORM, Swept


def arguments(x: Tensor, weight: Tensor, labels: Tensor, **given: object) -> dict[str, object]:
    classes = weight.shape[0]
    return {
        "x": x, "weight": weight, "labels": labels, "scale": None, "threshold": None, "numbers": None,
        "sample_weight": None, "class_weight": None, "shift": None, "store": False, "need_x": True,
        "need_class_sum": False, "need_largest": False, "sink": 0, "capacity": 0, "ignore_index": -100,
        "scale_value": 8.0, "eps": 1e-12, "total_classes": max(1, classes), "term": 0, "lowest": -1.0,
        "highest": 1.0, "centers": 1, "class_chunk": max(1, classes), "product_precision": x.dtype,
        "is_shard": False,
        "need_weight": True, "need_scale": False, **given,
    }  # fmt: skip


def call(name: str, given: dict[str, object]) -> object:
    """The op, with those of the arguments that it takes."""
    op = getattr(library.namespace(), name)
    names = [argument.name for argument in op.default._schema.arguments]
    given = {**budget(given), **given} if "workspace" in names else given
    return op(*[given[name] for name in names])


def budget(given: dict[str, Any]) -> dict[str, object]:
    x, classes, device = given["x"], given["weight"].shape[0], plan_device(given["x"])
    product = given.get("product", "cublas" if device.type == "cuda" else "blas")
    item = operand_bytes(device, given["product_precision"])
    step = native.Step(x.shape[0], max(1, x.shape[1]), max(1, classes), item, True, given["centers"])
    chunk = min(given["class_chunk"], max(1, classes))
    return {"workspace": native.workspace_bytes(product, step, facts(device), chunk), "product": product}


def sweep(given: dict[str, object]) -> tuple[Swept, Tensor, Tensor]:
    """(what backward is given, listed, found)"""
    *swept, listed, found = call("head_sweep", given)  # type: ignore[misc]
    return Swept(*swept), listed, found


def backward(given: dict[str, object], swept: Swept, slopes: Tensor, grad_loss: Tensor) -> tuple[Tensor, ...]:
    upstream = {"grad_loss": grad_loss, "slopes": slopes, "need_x": True}
    return call("head_backward", {**given, **swept._asdict(), **upstream})  # type: ignore[return-value]


def pairs_backward(
    x: Tensor, weight: Tensor, factors: Tensor, classes: Tensor, swept: Swept, *, is_shard: bool = False
) -> tuple[Tensor, ...]:
    """Gradients of the sum of factors times listed cosines, [N, listed] each."""
    inverse = swept.rows[INVERSE_NORM].to(wide(x))
    given = arguments(x, weight, classes[:, 0], is_shard=is_shard, factors=factors, classes=classes)
    norms = {"x_inverse": inverse, "weight_inverse": swept.inverse_norm}
    return call("cosine_pairs_backward", {**given, **norms})  # type: ignore[return-value]


def wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
