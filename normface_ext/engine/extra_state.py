"""What a layer keeps in its ``state_dict`` besides tensors: a few plain values, as the bytes of their JSON.

A tensor, so that whatever takes a state_dict takes it: safetensors, averages of models, checkpoints of
several ranks. It is padded to whole blocks: its size does not depend on the digits of a number.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from . import checks

_BLOCK = 256


def pack(values: dict[str, Any]) -> Tensor:
    text = json.dumps(values).encode()
    return torch.frombuffer(bytearray(text.ljust(-(-len(text) // _BLOCK) * _BLOCK)), dtype=torch.uint8)


def unpack(op: str, state: object) -> dict[str, Any]:
    """What ``pack`` was given; nothing, where there are no values to see (a fake or meta tensor)."""
    if not isinstance(state, Tensor) or state.dtype != torch.uint8 or state.dim() != 1:
        kind = f"{state.dtype} tensor" if isinstance(state, Tensor) else type(state).__name__
        raise ValueError(f"{op}: expected the extra state of a {op} in the state_dict, got a {kind}")
    if not checks.has_values(state):
        return {}
    try:
        values = json.loads(bytes(state.tolist()))
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise ValueError(f"{op}: expected the extra state of a {op} in the state_dict, got other bytes")
    return values
