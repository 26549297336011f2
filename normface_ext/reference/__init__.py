"""The specification: every op in plain PyTorch, slow, complete and differentiable to any order.

Tests hold the kernels against these functions in float64, and second derivatives of the fused ops
come from here. Nothing here is optimised. Arguments are those of ``normface_ext.functional``;
bad input is that module's business. What only says how a loss is computed (workspace, active_limit,
check_finite) is taken where the options are declared, and changes nothing here.
"""

from .agents import (
    c_contrastive_loss,
    c_contrastive_stats,
    c_triplet_loss,
    c_triplet_stats,
    contrastive_of_distances,
    triplet_of_distances,
)
from .losses import reduce_rows, statistics
from .margins import FORMULAS, MARGINS, SIN_FLOOR, hard_negatives, margin, phi, turned
from .pairs import inner_distance, pair_contrastive_loss, triplet_loss
from .ranking import nearest_class, target_rank
from .rows import (
    cosine,
    norm_linear,
    norm_linear_backward,
    normalize,
    normalize_backward,
)
from .sigmoid import sigmoid_logits, sphereface2_loss
from .softmax import HeadParts, head_parts, loss_of_parts, normface_loss

__all__ = [
    "FORMULAS",
    "MARGINS",
    "SIN_FLOOR",
    "HeadParts",
    "c_contrastive_loss",
    "c_contrastive_stats",
    "c_triplet_loss",
    "c_triplet_stats",
    "contrastive_of_distances",
    "cosine",
    "hard_negatives",
    "head_parts",
    "inner_distance",
    "loss_of_parts",
    "margin",
    "nearest_class",
    "norm_linear",
    "norm_linear_backward",
    "normalize",
    "normalize_backward",
    "normface_loss",
    "pair_contrastive_loss",
    "phi",
    "reduce_rows",
    "sigmoid_logits",
    "sphereface2_loss",
    "statistics",
    "target_rank",
    "triplet_loss",
    "triplet_of_distances",
    "turned",
]
