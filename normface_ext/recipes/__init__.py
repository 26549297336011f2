"""Published heads as a few lines of torch over the functions of the package: ``nf.recipes``.

They serve to compare with what others published, and as examples of how a head is built from
``functional.head_parts``, ``functional.norm_linear`` and ``NormFaceLoss``. ``NormSoftmax``, ``LDAM``,
``KappaFace``, ``AdaCos`` and ``ProxyNCA`` run on the kernels of the fused head, without an N x C matrix;
``P2SGrad`` needs D x D numbers instead. ``ProxyAnchor`` and ``UniFace`` build N x C numbers and
``SoftTriple`` N x C K: they are for class counts where that fits.
"""

from .adacos import AdaCos
from .kappaface import KappaFace
from .ldam import LDAM, drw_weights
from .norm_softmax import NormSoftmax
from .p2sgrad import P2SGrad
from .proxy_anchor import ProxyAnchor
from .proxy_nca import ProxyNCA
from .soft_triple import SoftTriple
from .uniface import UniFace

__all__ = [
    "LDAM",
    "AdaCos",
    "KappaFace",
    "NormSoftmax",
    "P2SGrad",
    "ProxyAnchor",
    "ProxyNCA",
    "SoftTriple",
    "UniFace",
    "drw_weights",
]
