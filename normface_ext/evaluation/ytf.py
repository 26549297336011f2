"""YouTube Faces: two videos give many frame scores; their histogram tells more than their mean.

The paper (section 4.3) describes a pair of videos by a 100-bin histogram of its frame scores and lets an
SVM with the histogram-intersection kernel (HIK) decide, in the ten folds of the data set.

    pairs = read_ytf_splits("splits.txt")
    result = ytf_protocol({"Al_Gore/1": features_of_its_frames, ...}, pairs)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..engine.arguments import POSITIVE, integer, number
from ._checks import (
    Array,
    Features,
    as_array,
    as_reals,
    as_same,
    as_scores,
    as_whole,
    folds_of_both_kinds,
)
from ._optional import require
from .roc import best_threshold
from .scores import unit_rows
from .ytf_splits import VideoPairs


def frame_scores(first: Features, second: Features) -> Array:
    """Cosines of all frame pairs of two videos: [F1, D] and [F2, D] -> [F1 * F2].

    Their mean is the plain score of the pair; their histogram is what HIK-SVM takes.
    """
    one, other = unit_rows(first), unit_rows(second)
    if one.shape[1] != other.shape[1]:
        raise ValueError(f"frame_scores: expected `second` [F2, {one.shape[1]}], got {list(other.shape)}")
    scores: Array = (one @ other.T).ravel()
    return scores


def score_histogram(scores: Array, bins: int = 100) -> npt.NDArray[np.float64]:
    """The share of scores in each of ``bins`` equal intervals of [-1, 1]: [bins], sum 1.

    Cosines that rounding carried past +-1 count in the outer bins.

    Raises:
        ValueError: no score, a score that is NaN or infinite, no bin.
    """
    op = "score_histogram"
    bins = integer(op, "bins", bins, 1)
    values = as_scores(op, "scores", as_array(op, "scores", scores).ravel()).astype(np.float64)
    if len(values) == 0:
        raise ValueError(f"{op}: expected at least one score, got none")
    counts = np.histogram(values.clip(-1, 1), bins=bins, range=(-1.0, 1.0))[0]
    return counts / len(values)


def _shares(op: str, name: str, histograms: Array) -> npt.NDArray[np.float64]:
    rows = as_reals(op, name, histograms).astype(np.float64)
    if not (np.isfinite(rows) & (rows >= 0)).all():
        raise ValueError(f"{op}: expected `{name}` to be finite and >= 0, got other values")
    return rows


def histogram_intersection(a: Array, b: Array) -> npt.NDArray[np.float64]:
    """k(a, b) = sum_i min(a_i, b_i): [n, bins] and [m, bins] -> [n, m]; 1 for equal histograms.

    Raises:
        ValueError: other shapes, shares that are negative, NaN or infinite.
    """
    a, b = _shares("histogram_intersection", "a", a), _shares("histogram_intersection", "b", b)
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
        histograms: [P, bins], one row per pair of videos.
        same: [P], bools, or numbers that are 0 and 1.
        fold: [P] whole numbers; at least two folds, each of same and different pairs.
        c: the SVM's penalty, above 0.

    Raises:
        ValueError: other shapes or values; one fold; a fold of one kind of pairs, by its number.
        ImportError: without scikit-learn.
    """
    op = "hik_svm_protocol"
    penalty = number(op, "c", c, POSITIVE)
    svm = require("sklearn.svm", op)
    rows, is_same, folds = (
        _shares(op, "histograms", histograms),
        as_same(op, same),
        as_whole(op, "fold", fold),
    )
    if rows.ndim != 2 or is_same.shape != (len(rows),) or folds.shape != (len(rows),):
        raise ValueError(
            f"{op}: expected histograms [P, bins], same [P] and fold [P],"
            f" got {list(rows.shape)}, {list(is_same.shape)} and {list(folds.shape)}"
        )
    numbers = folds_of_both_kinds(op, is_same, folds)
    kernel = histogram_intersection(rows, rows)
    accuracies = []
    for value in numbers:
        judged = folds == value
        model = svm.SVC(C=penalty, kernel="precomputed").fit(
            kernel[np.ix_(~judged, ~judged)], is_same[~judged]
        )
        accuracies.append((model.predict(kernel[np.ix_(judged, ~judged)]) == is_same[judged]).mean())
    return np.array(accuracies)


@dataclass(frozen=True)
class YtfResult:
    """A value per fold: ``accuracies`` by HIK-SVM, ``mean_accuracies`` by a threshold on the mean score.

    ``mean_scores`` [P] and ``histograms`` [P, bins] are what both were decided on.
    """

    accuracies: npt.NDArray[np.float64]
    mean_accuracies: npt.NDArray[np.float64]
    mean_scores: npt.NDArray[np.float64]
    histograms: npt.NDArray[np.float64]

    @property
    def accuracy(self) -> float:
        """Mean over the folds by HIK-SVM: the number that the paper prints."""
        return float(self.accuracies.mean())

    @property
    def standard_error(self) -> float:
        """Standard deviation over the folds / sqrt(folds)."""
        return float(self.accuracies.std(ddof=1) / np.sqrt(len(self.accuracies)))


def ytf_protocol(
    features: Mapping[str, Features], pairs: VideoPairs, *, bins: int = 100, c: float = 1.0
) -> YtfResult:
    """Accuracy in folds over pairs of videos: the histogram of frame scores, judged by an HIK-SVM.

    Each fold is judged by an SVM, and for comparison by a threshold on the mean frame score, that come from
    the other folds. Besides the features it holds the scores of one pair of videos, and P histograms.

    Args:
        features: name of a video -> [frames, D], as the network gives them.
        pairs: with at least two folds, each of same and different pairs (``read_ytf_splits``).
        bins: of the histograms, over [-1, 1].
        c: the SVM's penalty.

    Raises:
        ValueError: one fold; a fold of one kind of pairs, by its number; a video without features or without
            a frame, by its name.
        ImportError: without scikit-learn.
    """
    op = "ytf_protocol"
    folds, bins = folds_of_both_kinds(op, pairs.same, pairs.fold), integer(op, "bins", bins, 1)
    penalty = number(op, "c", c, POSITIVE)
    missing = [name for name in pairs.videos if name not in features]
    if missing:
        raise ValueError(
            f"{op}: expected `features` of {len(pairs.videos)} videos, got none of {len(missing)} of them,"
            f" {missing[0]!r} first"
        )
    empty = [name for name in pairs.videos if len(features[name]) == 0]
    if empty:
        raise ValueError(f"{op}: expected at least one frame per video, got none of {empty[0]!r}")
    mean_scores = np.empty(len(pairs))
    histograms = np.empty((len(pairs), bins))
    for i, (one, other) in enumerate(zip(pairs.first, pairs.second, strict=True)):
        try:
            scores = frame_scores(features[one], features[other])
        except ValueError as error:
            raise ValueError(f"{op}: {one!r} and {other!r}: {error}") from error
        mean_scores[i] = scores.mean(dtype=np.float64)
        histograms[i] = score_histogram(scores, bins)
    by_mean = []
    for fold in folds:
        judged = pairs.fold == fold
        threshold = best_threshold(mean_scores[~judged], pairs.same[~judged])
        by_mean.append(((mean_scores[judged] > threshold) == pairs.same[judged]).mean())
    accuracies = hik_svm_protocol(histograms, pairs.same, pairs.fold, c=penalty)
    return YtfResult(accuracies, np.array(by_mean), mean_scores, histograms)
