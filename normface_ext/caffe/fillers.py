"""Caffe's initial values of a blob."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..modules import gaussian_unitball_
from .spec import Spec

FILLERS = ("constant", "uniform", "gaussian", "gaussian_unitball", "xavier", "msra")


class Filler(NamedTuple):
    """FillerParameter, in a form that copies and pickles."""

    type: str
    value: float
    min: float
    max: float
    mean: float
    std: float
    variance_norm: int


def check_filler(spec: Spec, path: str) -> Filler:
    filler = spec.get(path)
    if filler.type not in FILLERS:
        spec.refuse(
            f"expected `{path}.type` to be one of {', '.join(FILLERS)}, got {filler.type!r}", f"{path}.type"
        )
    if filler.sparse != -1:
        spec.refuse(f"`{path}.sparse` is not supported", f"{path}.sparse")
    return Filler(*(getattr(filler, name) for name in Filler._fields))


@torch.no_grad()
def fill_(blob: Tensor, filler: Filler) -> None:
    """Caffe's initial values, in place."""
    if filler.type == "constant":
        blob.fill_(filler.value)
    elif filler.type == "uniform":
        blob.uniform_(filler.min, filler.max)
    elif filler.type == "gaussian":
        blob.normal_(filler.mean, filler.std)
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
