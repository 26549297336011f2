"""NormFace for PyTorch: the normalised classification head, fused.

``NormalizeLayer``, ``NormLinear`` and ``NormFaceLoss`` are the layers, ``InnerDistance`` and the metric
losses stand beside them, ``functional`` what they call,
``reference`` the same in plain PyTorch, ``theory`` the paper's bounds, ``plan`` what a fused head will
cost, ``build_info`` what was built. ``load_head`` and ``save_head`` read and write other libraries' heads.
``export_ready`` makes a trained model ready to leave, ``graphed`` a head's step two CUDA graphs.
``recipes`` are published heads as a few lines of torch.
``caffe`` (what was NormFace's in Caffe), ``distributed`` (heads over several processes), ``evaluation`` (face
verification) and ``formats`` (``load_head`` and ``save_head``) are loaded at first use.
"""

from . import _checkout  # noqa: F401  # isort: skip  (first: it may hand over to the installed package)

import importlib
from typing import TYPE_CHECKING, Any

from . import functional, recipes, reference, theory
from .agents.layers import CContrastiveLoss, CTripletLoss
from .cosine.layers import NormalizeLayer, NormLinear
from .cosine.rows import gaussian_unitball_
from .deploy import export_ready
from .distances.layers import InnerDistance, PairContrastiveLoss, TripletLoss
from .engine.library import build_info
from .engine.plan import Plan, plan
from .engine.statistics import Statistics
from .graphed import graphed
from .mirror import MirrorFace
from .optim import parameter_groups
from .sigmoid.layers import SphereFace2Loss
from .softmax.adaface import AdaFace
from .softmax.batch_margins import BatchMargin, Rows
from .softmax.circle import CircleSoftmax
from .softmax.class_margins import class_margins, ldam_margins
from .softmax.curricularface import CurricularFace
from .softmax.elasticface import ElasticArcFace, ElasticCosFace
from .softmax.hard_negatives import HardNegatives
from .softmax.layers import NormFaceLoss
from .softmax.magface import MagFace
from .softmax.margins import ArcFace, CombinedMargin, CosFace, RowMargin
from .softmax.mv_softmax import MVSoftmax
from .softmax.sphereface import SphereFace

if TYPE_CHECKING:
    from . import caffe, distributed, evaluation, formats
    from .formats import load_head, save_head

__all__ = [
    "AdaFace",
    "ArcFace",
    "BatchMargin",
    "CContrastiveLoss",
    "CTripletLoss",
    "CircleSoftmax",
    "CombinedMargin",
    "CosFace",
    "CurricularFace",
    "ElasticArcFace",
    "ElasticCosFace",
    "HardNegatives",
    "InnerDistance",
    "MVSoftmax",
    "MagFace",
    "MirrorFace",
    "NormFaceLoss",
    "NormLinear",
    "NormalizeLayer",
    "PairContrastiveLoss",
    "Plan",
    "RowMargin",
    "Rows",
    "SphereFace",
    "SphereFace2Loss",
    "Statistics",
    "TripletLoss",
    "build_info",
    "caffe",
    "class_margins",
    "distributed",
    "evaluation",
    "export_ready",
    "formats",
    "functional",
    "gaussian_unitball_",
    "graphed",
    "ldam_margins",
    "load_head",
    "parameter_groups",
    "plan",
    "recipes",
    "reference",
    "save_head",
    "theory",
]


#: Loaded at first use: they bring what most programs do without (DTensor, protobuf, scikit-learn).
_LAZY = frozenset({"caffe", "distributed", "evaluation", "formats"})
#: Functions of those.
_LAZY_FUNCTIONS = {"load_head": "formats", "save_head": "formats"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f".{name}", __name__)
    if name in _LAZY_FUNCTIONS:
        return getattr(importlib.import_module(f".{_LAZY_FUNCTIONS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_LAZY_FUNCTIONS})
