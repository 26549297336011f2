"""Face verification and identification: lists, features, protocols, rates and figures.

Scores are cosines of features; a pair is accepted when its score is above the threshold. NumPy is enough
for lists, scores, thresholds and rates; PCA, SVM, ROC and AUC need scikit-learn, images Pillow, bars tqdm,
figures matplotlib: the ``evaluation`` extra.
``python -m normface_ext.evaluation --help`` is the command.
"""

from .bins import VerificationSet, decode_images, read_bin
from .blufr import BlufrResult, Trial, blufr, identification_rate, random_trials, verification_rate
from .cfp import read_cfp
from .embedding import embed
from .features import read_features
from .folds import FoldResult, fold_protocol
from .identification import Identification, identify
from .ijb import (
    IJB_RATES,
    IjbResult,
    TemplateImages,
    TemplatePairs,
    ijb_protocol,
    pool_templates,
    read_ijb_pairs,
    read_ijb_scores,
    read_ijb_templates,
)
from .lfw import LfwResult, lfw_protocol
from .lists import read_index_pairs, read_lfw_pairs, read_name_pairs, read_names
from .pair_list import LAYOUTS, PairList, read_pairs
from .pairs import Pairs
from .plots import plot_cmc, plot_roc, plot_scores
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
    "IJB_RATES",
    "LAYOUTS",
    "BlufrResult",
    "FoldResult",
    "Identification",
    "IjbResult",
    "LfwResult",
    "PairList",
    "Pairs",
    "Roc",
    "TemplateImages",
    "TemplatePairs",
    "Trial",
    "VerificationSet",
    "VideoPairs",
    "YtfResult",
    "best_threshold",
    "blufr",
    "decode_images",
    "embed",
    "fold_protocol",
    "frame_scores",
    "hik_svm_protocol",
    "histogram_intersection",
    "identification_rate",
    "identify",
    "ijb_protocol",
    "lfw_protocol",
    "merge_mirror",
    "pair_scores",
    "plot_cmc",
    "plot_roc",
    "plot_scores",
    "pool_templates",
    "random_trials",
    "read_bin",
    "read_cfp",
    "read_features",
    "read_ijb_pairs",
    "read_ijb_scores",
    "read_ijb_templates",
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
