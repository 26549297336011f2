"""Published settings of SphereFace2, by name: what ``SphereFace2Loss.preset`` gives the constructor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # The authors' library: form C, b at its balance, 50 / r.
    "opensphere": {"margin_gradient": "straight"},
    # Its margin_type "C" and "A".
    "wespeaker-c": {"r": 32.0, "m": 0.2, "loss_weight": 1.0, "first_bias": 0.0},
    "wespeaker-a": {"form": "A", "r": 32.0, "m": 0.15, "loss_weight": 1.0, "first_bias": 0.0},
}
