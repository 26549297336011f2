"""What users call: the public functions of all families.

Every function takes float64, float32, float16 or bfloat16 and accumulates in at least float32
(float64 for float64). Bad input raises ValueError (shapes, values), TypeError (types, dtypes) or
IndexError (labels) with a sentence "op: expected `argument` to ..., got ...".
"""

from .agents.functions import c_contrastive_loss, c_contrastive_stats, c_triplet_loss, c_triplet_stats
from .cosine.functions import norm_linear, normalize
from .distances.functions import inner_distance, pair_contrastive_loss, triplet_loss
from .sigmoid.functions import sphereface2_loss
from .softmax.functions import head_parts, normface_loss
from .softmax.ranking import nearest_class, target_rank

__all__ = [
    "c_contrastive_loss",
    "c_contrastive_stats",
    "c_triplet_loss",
    "c_triplet_stats",
    "head_parts",
    "inner_distance",
    "nearest_class",
    "norm_linear",
    "normalize",
    "normface_loss",
    "pair_contrastive_loss",
    "sphereface2_loss",
    "target_rank",
    "triplet_loss",
]
