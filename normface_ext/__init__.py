"""NormFace for PyTorch: the normalised classification head, fused.

``NormalizeLayer``, ``NormLinear`` and ``NormFaceLoss`` are the layers, ``InnerDistance`` and the metric
losses stand beside them, ``functional`` what they call,
``reference`` the same in plain PyTorch, ``theory`` the paper's bounds, ``plan`` what a fused head will
cost, ``build_info`` what was built.
"""

from . import functional, reference, theory
from ._library import build_info
from .margins import ArcFace, CombinedMargin, CosFace
from .metric import CContrastiveLoss, CTripletLoss, InnerDistance, PairContrastiveLoss, TripletLoss
from .modules import NormalizeLayer, NormFaceLoss, NormLinear, gaussian_unitball_
from .plan import Plan, plan

__all__ = [
    "ArcFace",
    "CContrastiveLoss",
    "CTripletLoss",
    "CombinedMargin",
    "CosFace",
    "InnerDistance",
    "NormFaceLoss",
    "NormLinear",
    "NormalizeLayer",
    "PairContrastiveLoss",
    "Plan",
    "TripletLoss",
    "build_info",
    "functional",
    "gaussian_unitball_",
    "plan",
    "reference",
    "theory",
]
