"""NormFace for PyTorch: the normalised classification head, fused.

``NormalizeLayer``, ``NormLinear`` and ``NormFaceLoss`` are the layers, ``functional`` what they call,
``reference`` the same in plain PyTorch, ``theory`` the paper's bounds, ``plan`` what a fused head will
cost, ``build_info`` what was built.
"""

from . import functional, reference, theory
from ._library import build_info
from .margins import ArcFace, CombinedMargin, CosFace
from .modules import NormalizeLayer, NormFaceLoss, NormLinear, gaussian_unitball_
from .plan import Plan, plan

__all__ = [
    "ArcFace",
    "CombinedMargin",
    "CosFace",
    "NormFaceLoss",
    "NormLinear",
    "NormalizeLayer",
    "Plan",
    "build_info",
    "functional",
    "gaussian_unitball_",
    "plan",
    "reference",
    "theory",
]
