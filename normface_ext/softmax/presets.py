"""Published recipes of a head, by name: what ``NormFaceLoss.preset`` gives the constructor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .circle import CircleSoftmax
from .margins import ArcFace, CosFace
from .sphereface import SphereFace

#: Functions, since a margin may have a state, of which every head needs its own.
PRESETS: Mapping[str, Callable[[], dict[str, Any]]] = {
    # Deng et al. 2019, section 3.1: s = 64, m = 0.5 for ResNet-100 on MS1MV2.
    "arcface": lambda: {"scale": 64.0, "margin": ArcFace(0.5)},
    # Wang et al. 2018, section 4: s = 64, m = 0.35.
    "cosface": lambda: {"scale": 64.0, "margin": CosFace(0.35)},
    # Wang et al. 2017, section 3.2 and the released nets: no margin, and s is learned; it begins where the
    # paper's bound is low.
    "normface": lambda: {"scale": "auto", "learn_scale": True},
    # Sun et al. 2020, section 4.1, and FaceX-Zoo: gamma = 256, m = 0.25.
    "circle": lambda: {"scale": 256.0, "margin": CircleSoftmax(0.25)},
    # Liu et al. 2017 and their net sphereface_model.prototxt.
    "sphereface": lambda: {"scale": 1.0, "margin": SphereFace(), "normalize_input": False},
    # OpenSphere's SphereFace: normalised features, nothing blended in.
    "sphereface-opensphere": lambda: {
        "scale": 30.0,
        "margin": SphereFace(1.7, base=0.0, lambda_min=0.0),
        "margin_gradient": "straight",
    },
}
