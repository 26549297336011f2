"""From Caffe: the heads of NormFace's prototxt files, their weights, and what Caffe did on the way.

``load_head`` reads a prototxt, ``Head.load_caffemodel`` its weights (both need protobuf: the extra
``caffe``), ``renormalize_after_step`` is the hard normalisation of ``normalize: true``, ``accuracy`` has
Caffe's ties, ``general_contrastive_loss`` and ``general_triplet_loss`` have the released
layers' gradients. docs/caffe-compatibility.md compares layer by layer.
"""

from ..optim import renormalize_after_step
from .accuracy import accuracy
from .general_losses import general_contrastive_loss, general_triplet_loss
from .graph import Head, HeadOutput
from .load import load_head

__all__ = [
    "Head",
    "HeadOutput",
    "accuracy",
    "general_contrastive_loss",
    "general_triplet_loss",
    "load_head",
    "renormalize_after_step",
]
