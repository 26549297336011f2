"""Known faults that are being mended, and the calls that would show them."""

from __future__ import annotations

from typing import Any

from lanes import Lane

from .functions import Call
from .inputs import POISON, Rows

#: Rows that tensors may have in common, or nearly.
COMMON = ("offset", "ones", "shared", "opposite", "basis", "small integers")
#: Known faults that are being mended: calls that would show them are not judged. The name, and whether a call
#: on a lane is one. Nothing else in this folder makes exceptions for a fault.
KNOWN: dict[str, Any] = {
    # 0 / 0 in a branch that is not taken: NaN gradients once no negative is active.
    "normalize_negative without an active negative": lambda call, lane: (
        call.op == "c_contrastive_loss" and call.options["normalize_negative"] is not None
    ),
    # Two gradients rounded to 16 bits before they are added.
    "the anchor of 16-bit triplets": lambda call, lane: (
        call.op == "triplet_loss" and call.tensors["anchor"].dtype in ("f16", "bf16")
    ),
    # 1 / n overflows.
    "denormal rows with eps 0": lambda call, lane: (
        call.options.get("eps") == 0
        and any(isinstance(recipe, Rows) and recipe.has("denormal") for recipe in call.tensors.values())
    ),
    # 2 (x sum g - g w) is a difference of large sums where rows have something in common.
    "inner_distance's gradient under a common offset": lambda call, lane: (
        call.op == "inner_distance"
        and call.options["p"] == 2
        and (
            call.tensors["x"].has(*COMMON)
            or call.tensors["weight"].has(*COMMON)
            or call.tensors["x"].seed == call.tensors["weight"].seed
            or call.tensors["x"].dim < 4
        )
    ),
    # 0 * NaN in the dense backward.
    "an ignored row beside a poisoned agent": lambda call, lane: (
        call.op in ("c_contrastive_loss", "c_triplet_loss")
        and "weight" in call.tensors
        and call.tensors["weight"].has(*POISON)
    ),
    # A row whose inverse norm is 0 counts as ignored.
    "an infinity in the features of the hinge losses on CUDA": lambda call, lane: (
        call.op in ("c_contrastive_loss", "c_triplet_loss")
        and not lane.widens
        and call.tensors["x"].has("inf")
    ),
    # The scale goes onto the features in float16.
    "norm_linear's scale in float16 on CUDA": lambda call, lane: (
        call.op == "norm_linear" and not lane.widens and call.tensors["x"].dtype == "f16"
    ),
    # label - first_class.
    "an overflow for the least ignore_index on CUDA": lambda call, lane: (
        call.op == "normface_loss" and not lane.widens and call.options["ignore_index"] == -(2**63)
    ),
    # An infinite E times zero in the backward that computes scores again.
    "a zero sample weight and a tight workspace": lambda call, lane: (
        call.op == "normface_loss"
        and call.options["workspace"] is not None
        and getattr(call.tensors.get("sample_weight"), "kind", None) == "some zero"
    ),
}


def known(call: Call, lane: Lane) -> str | None:
    return next((name for name, shows in KNOWN.items() if shows(call, lane)), None)
