"""The sentences of bad input: "op: expected `argument` to ..., got ...". Used by ``functional``.

The C++ checks (csrc/checks.h) are the second line; the stable ABI can raise only RuntimeError there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from .margins import NO_MARGIN, CombinedMargin

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def tensor(op: str, name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: expected `{name}` to be a Tensor, got {type(value).__name__}")
    if type(value).__name__ == "DTensor":
        raise TypeError(f"{op}: expected `{name}` to be a plain Tensor, got a DTensor")
    return value


def floating(op: str, name: str, value: object) -> Tensor:
    checked = tensor(op, name, value)
    if checked.dtype not in FLOATING:
        raise TypeError(
            f"{op}: expected `{name}` to be float64, float32, float16 or bfloat16, got {checked.dtype}"
        )
    return checked


def matrix(op: str, name: str, value: object, meaning: str) -> Tensor:
    checked = floating(op, name, value)
    if checked.dim() != 2:
        raise ValueError(f"{op}: expected `{name}` to be 2-D {meaning}, got shape {list(checked.shape)}")
    return checked


def same_device(op: str, name: str, value: Tensor, other: str, reference: Tensor) -> None:
    if value.device != reference.device:
        raise ValueError(
            f"{op}: expected `{name}` on the device of `{other}` ({reference.device}), got {value.device}"
        )


def eps(op: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: expected `eps` to be a number, got {type(value).__name__}")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{op}: expected `eps` to be finite and >= 0, got {value}")
    return float(value)


def features_and_weight(op: str, x: object, weight: object) -> tuple[Tensor, Tensor]:
    """x [N, D] and weight [C, D], floating, on one device; float64 only together with float64."""
    features, agents = _head(op, x, weight, "C")
    if agents.shape[0] == 0:
        raise ValueError(f"{op}: expected `weight` to have at least one class, got shape [0, D]")
    return features, agents


def features_and_shard(op: str, x: object, weight: object, classes: int) -> tuple[Tensor, Tensor]:
    """The same of one shard of the classes, which has `classes` of them, perhaps none."""
    features, agents = _head(op, x, weight, str(classes))
    if agents.shape[0] != classes:
        raise ValueError(
            f"{op}: expected `weight` to have this rank's {classes} classes, got shape {list(agents.shape)}"
        )
    return features, agents


def _head(op: str, x: object, weight: object, classes: str) -> tuple[Tensor, Tensor]:
    features = matrix(op, "x", x, "[N, D]")
    agents = matrix(op, "weight", weight, f"[{classes}, D]")
    if features.shape[1] != agents.shape[1]:
        raise ValueError(
            f"{op}: expected `weight` to be [{classes}, {features.shape[1]}] to match `x`,"
            f" got shape {list(agents.shape)}"
        )
    if (features.dtype == torch.float64) != (agents.dtype == torch.float64):
        raise TypeError(
            f"{op}: expected `weight` and `x` to be both float64 or both not,"
            f" got {agents.dtype} and {features.dtype}"
        )
    same_device(op, "weight", agents, "x", features)
    return features, agents


def scale(op: str, value: object, x: Tensor) -> tuple[Tensor | None, float]:
    """(0-d tensor, 0.0) or (None, float)."""
    if isinstance(value, Tensor):
        if value.dim() != 0 or value.dtype not in FLOATING:
            raise ValueError(
                f"{op}: expected `scale` to be a float or a 0-d floating tensor,"
                f" got {value.dtype} of shape {list(value.shape)}"
            )
        same_device(op, "scale", value, "x", x)
        return value, 0.0
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: expected `scale` to be a float or a 0-d tensor, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{op}: expected `scale` to be finite, got {value}")
    return None, float(value)


def label_rows(op: str, value: object, x: Tensor) -> Tensor:
    """labels [N] int64, of any value."""
    checked = tensor(op, "labels", value)
    if checked.dtype != torch.int64:
        raise TypeError(f"{op}: expected `labels` to be int64, got {checked.dtype}")
    if checked.dim() != 1 or checked.shape[0] != x.shape[0]:
        raise ValueError(f"{op}: expected `labels` to have shape [{x.shape[0]}], got {list(checked.shape)}")
    same_device(op, "labels", checked, "x", x)
    return checked


def has_values(value: Tensor) -> bool:
    """Whether a tensor's values can be read at all: not of a fake or meta tensor, nor while compiling."""
    return not (torch.compiler.is_compiling() or value.is_meta or is_fake(value))


def readable(value: Tensor) -> bool:
    """Whether values can be read without waiting for a device."""
    return value.device.type == "cpu" and has_values(value)


def labels(op: str, value: object, x: Tensor, classes: int, ignore_index: int) -> Tensor:
    """labels [N] int64 in [0, C) or ignore_index. On CUDA the range is checked by the kernel."""
    checked = label_rows(op, value, x)
    if readable(checked):
        label_range(op, checked, classes, ignore_index)
    return checked


def label_range(op: str, value: Tensor, classes: int, ignore_index: int) -> None:
    bad = ((value < 0) | (value >= classes)) & (value != ignore_index)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise IndexError(
            f"{op}: expected `labels` in [0, {classes}) or ignore_index ({ignore_index}),"
            f" got {int(value[row])} at row {row}"
        )


def reduction(op: str, value: object) -> int:
    if not isinstance(value, str) or value not in REDUCTIONS:
        raise ValueError(f"{op}: expected `reduction` to be one of none, mean, sum, got {value!r}")
    return REDUCTIONS[value]


def margin(op: str, value: object) -> CombinedMargin:
    if value is not None and not isinstance(value, CombinedMargin):
        raise TypeError(
            f"{op}: expected `margin` to be CosFace, ArcFace, CombinedMargin or None,"
            f" got {type(value).__name__}"
        )
    return value or NO_MARGIN


def smoothing(op: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: expected `label_smoothing` to be a number, got {type(value).__name__}")
    if not 0 <= value < 1:
        raise ValueError(f"{op}: expected `label_smoothing` in [0, 1), got {value}")
    return float(value)


def weights(op: str, name: str, value: object, x: Tensor, count: int) -> Tensor | None:
    """Constant factors [count], in the accumulator dtype of x."""
    if value is None:
        return None
    checked = floating(op, name, value)
    if checked.dim() != 1 or checked.shape[0] != count:
        raise ValueError(f"{op}: expected `{name}` to have shape [{count}], got {list(checked.shape)}")
    if checked.requires_grad:
        raise ValueError(f"{op}: expected `{name}` not to require a gradient, got one that does")
    same_device(op, name, checked, "x", x)
    return checked.to(torch.float64 if x.dtype == torch.float64 else torch.float32).contiguous()
