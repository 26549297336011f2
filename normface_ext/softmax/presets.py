"""Published recipes of a head, by name: what ``NormFaceLoss.preset`` gives the constructor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .margins import ArcFace, CosFace

#: Functions, since a margin may have a state, of which every head needs its own.
PRESETS: Mapping[str, Callable[[], dict[str, Any]]] = {
    # Deng et al. 2019, section 3.1: s = 64, m = 0.5 for ResNet-100 on MS1MV2.
    "arcface": lambda: {"scale": 64.0, "margin": ArcFace(0.5)},
    # Wang et al. 2018, section 4: s = 64, m = 0.35.
    "cosface": lambda: {"scale": 64.0, "margin": CosFace(0.35)},
    # Wang et al. 2017, section 3.2 and the released nets: no margin, and s is learned; it begins where the
    # paper's bound is low.
    "normface": lambda: {"scale": "auto", "learn_scale": True},
}
