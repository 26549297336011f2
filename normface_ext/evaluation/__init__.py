"""Face verification protocols: LFW, ROC and TAR@FAR, BLUFR-style rates, YTF with HIK-SVM.

Scores are cosines of features; a pair is accepted when its score is above the threshold. NumPy is enough
for scores, thresholds and rates; PCA, SVM, ROC and AUC need scikit-learn, the ``evaluation`` extra.
``python -m normface_ext.evaluation --help`` is the command.
"""

from .blufr import BlufrResult, Trial, blufr, identification_rate, random_trials, verification_rate
from .features import read_features
from .lfw import LfwResult, lfw_protocol
from .lists import read_index_pairs, read_lfw_pairs, read_name_pairs, read_names
from .pair_list import PairList, read_pairs
from .pairs import Pairs
from .plots import plot_roc
from .roc import Roc, best_threshold, roc, tar_at_far
from .scores import merge_mirror, pair_scores, unit_rows
from .ytf import (
    YtfResult,
    frame_scores,
    hik_svm_protocol,
    histogram_intersection,
    score_histogram,
    ytf_protocol,
)
from .ytf_splits import VideoPairs, read_ytf_splits

__all__ = [
    "BlufrResult",
    "LfwResult",
    "PairList",
    "Pairs",
    "Roc",
    "Trial",
    "VideoPairs",
    "YtfResult",
    "best_threshold",
    "blufr",
    "frame_scores",
    "hik_svm_protocol",
    "histogram_intersection",
    "identification_rate",
    "lfw_protocol",
    "merge_mirror",
    "pair_scores",
    "plot_roc",
    "random_trials",
    "read_features",
    "read_index_pairs",
    "read_lfw_pairs",
    "read_name_pairs",
    "read_names",
    "read_pairs",
    "read_ytf_splits",
    "roc",
    "score_histogram",
    "tar_at_far",
    "unit_rows",
    "verification_rate",
    "ytf_protocol",
]
