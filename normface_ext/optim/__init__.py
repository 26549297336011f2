"""What the heads ask of an optimizer: groups of parameters, hard normalisation, steps without a gradient in
memory, gradients that add up in place."""

from .accumulation import Accumulating, accumulate_in_place
from .fused import FusedAdam, FusedAdamW, FusedSGD
from .groups import is_scale, parameter_groups, renormalize_after_step

__all__ = [
    "Accumulating",
    "FusedAdam",
    "FusedAdamW",
    "FusedSGD",
    "accumulate_in_place",
    "is_scale",
    "parameter_groups",
    "renormalize_after_step",
]
