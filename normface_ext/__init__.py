"""NormFace for PyTorch: the normalised classification head, fused.

``NormalizeLayer``, ``NormLinear`` and ``NormFaceLoss`` are the layers, ``InnerDistance`` and the metric
losses stand beside them, ``functional`` what they call,
``reference`` the same in plain PyTorch, ``theory`` the paper's bounds, ``plan`` what a fused head will
cost, ``build_info`` what was built, ``caffe`` what was NormFace's in Caffe, ``distributed`` heads over
several processes (loaded at first use).
"""

import importlib
from typing import Any

from . import caffe, functional, reference, theory
from ._library import build_info
from .margins import ArcFace, CombinedMargin, CosFace
from .metric import CContrastiveLoss, CTripletLoss, InnerDistance, PairContrastiveLoss, TripletLoss
from .mirror import MirrorFace
from .modules import NormalizeLayer, NormFaceLoss, NormLinear, gaussian_unitball_
from .optim import parameter_groups
from .plan import Plan, plan
from .sharded_plan import ShardedPlan

__all__ = [
    "ArcFace",
    "CContrastiveLoss",
    "CTripletLoss",
    "CombinedMargin",
    "CosFace",
    "InnerDistance",
    "MirrorFace",
    "NormFaceLoss",
    "NormLinear",
    "NormalizeLayer",
    "PairContrastiveLoss",
    "Plan",
    "ShardedPlan",
    "TripletLoss",
    "build_info",
    "caffe",
    "distributed",
    "functional",
    "gaussian_unitball_",
    "parameter_groups",
    "plan",
    "reference",
    "theory",
]


def __getattr__(name: str) -> Any:
    if name == "distributed":  # brings DTensor and its imports, which a single process can do without
        return importlib.import_module(".distributed", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
