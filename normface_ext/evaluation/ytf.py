"""YouTube Faces: two videos give many frame scores; their histogram tells more than their mean.

The paper (section 4.3) describes a pair of videos by a 100-bin histogram of its frame scores and lets an
SVM with the histogram-intersection kernel (HIK) decide, in the ten folds of the data set.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ._optional import require
from .scores import Array, Features, unit_rows


def frame_scores(first: Features, second: Features) -> Array:
    """Cosines of all frame pairs of two videos: [F1, D] and [F2, D] -> [F1 * F2].

    Their mean is the plain score of the pair; their histogram is what HIK-SVM takes.
    """
    scores: Array = (unit_rows(first) @ unit_rows(second).T).ravel()
    return scores


def score_histogram(scores: Array, bins: int = 100) -> npt.NDArray[np.float64]:
    """The share of scores in each of ``bins`` equal intervals of [-1, 1]: [bins], sum 1.

    Cosines that rounding carried past +-1 count in the outer bins.
    """
    scores = np.asarray(scores, dtype=np.float64).ravel()
    if len(scores) == 0 or np.isnan(scores).any():
        raise ValueError(f"score_histogram: expected scores without NaN, got {len(scores)} scores")
    counts = np.histogram(scores.clip(-1, 1), bins=bins, range=(-1.0, 1.0))[0]
    return counts / len(scores)


def histogram_intersection(a: Array, b: Array) -> npt.NDArray[np.float64]:
    """k(a, b) = sum_i min(a_i, b_i): [n, bins] and [m, bins] -> [n, m]; 1 for equal histograms."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"histogram_intersection: expected [n, bins] and [m, bins],"
            f" got {list(a.shape)} and {list(b.shape)}"
        )
    kernel = np.zeros((len(a), len(b)))
    for i in range(a.shape[1]):  # one bin at a time: n * m numbers, not n * m * bins
        kernel += np.minimum(a[:, i, None], b[None, :, i])
    return kernel


def hik_svm_protocol(
    histograms: Array, same: object, fold: object, *, c: float = 1.0
) -> npt.NDArray[np.float64]:
    """The accuracy of each fold under an SVM with the intersection kernel, trained on the other folds.

    Args:
        histograms: [P, bins], one row per pair of videos. same, fold: [P].
        c: the SVM's penalty.
    """
    op = "hik_svm_protocol"
    svm = require("sklearn.svm", op)
    rows, is_same, folds = np.asarray(histograms), np.asarray(same, dtype=bool), np.asarray(fold)
    if rows.ndim != 2 or is_same.shape != (len(rows),) or folds.shape != (len(rows),):
        raise ValueError(
            f"{op}: expected histograms [P, bins], same [P] and fold [P],"
            f" got {list(rows.shape)}, {list(is_same.shape)} and {list(folds.shape)}"
        )
    if len(np.unique(folds)) < 2:
        raise ValueError(f"{op}: expected at least 2 folds, got {len(np.unique(folds))}")
    kernel = histogram_intersection(rows, rows)
    accuracies = []
    for value in np.unique(folds):
        judged = folds == value
        model = svm.SVC(C=c, kernel="precomputed").fit(kernel[np.ix_(~judged, ~judged)], is_same[~judged])
        accuracies.append((model.predict(kernel[np.ix_(judged, ~judged)]) == is_same[judged]).mean())
    return np.array(accuracies)
