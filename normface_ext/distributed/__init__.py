"""Heads whose classes are spread over the ranks of ``torch.distributed``.

:func:`shard_head` makes the class-parallel twin of a ``NormFaceLoss``, a ``CContrastiveLoss``, a
``CTripletLoss`` or a ``SphereFace2Loss``: every rank keeps some of the classes, its weight is a DTensor, and
a step gives the loss and the gradients of one process with all of them. The ranks exchange the features, a
few sums per row, and the features' gradient, through the process groups that ``torchrun`` and
``torch.distributed`` set up; gloo and NCCL both serve.
"""

from .agent_modules import ShardedCContrastiveLoss, ShardedCTripletLoss
from .agents import c_contrastive_loss, c_triplet_loss
from .checkpoint import checkpoints, load_checkpoint, save_checkpoint
from .conversion import full_state_dict, load_optimizer_state
from .modules import ShardedNormFaceLoss, shard_head
from .optim import RowAdamW, RowSGD, clip_grad_norm_
from .sampling import ClassSampler
from .shard import ClassShard
from .sigmoid import sphereface2_loss
from .sigmoid_modules import ShardedSphereFace2Loss
from .softmax import normface_loss
from .wrapping import class_parallel_weights, exclude_from_ddp

__all__ = [
    "ClassSampler",
    "ClassShard",
    "RowAdamW",
    "RowSGD",
    "ShardedCContrastiveLoss",
    "ShardedCTripletLoss",
    "ShardedNormFaceLoss",
    "ShardedSphereFace2Loss",
    "c_contrastive_loss",
    "c_triplet_loss",
    "checkpoints",
    "class_parallel_weights",
    "clip_grad_norm_",
    "exclude_from_ddp",
    "full_state_dict",
    "load_checkpoint",
    "load_optimizer_state",
    "normface_loss",
    "save_checkpoint",
    "shard_head",
    "sphereface2_loss",
]
