"""Thresholds and rates over scores [P] and same [P]: a pair is accepted when score > threshold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..engine.arguments import choice
from ._checks import Array, false_accept_rates, judged_pairs
from ._optional import require


def best_threshold(scores: Array, same: Array) -> float:
    """The threshold with the fewest mistakes on these pairs; of equally good ones the middle one.

    Candidates lie half-way between neighbouring distinct scores, and outside all of them. Pairs of one kind
    have a best threshold too: it accepts all or none.

    Args:
        scores: [P], finite.
        same: [P], bools, or numbers that are 0 and 1.

    Raises:
        ValueError: no pair, other shapes; a score that is NaN or infinite, a label that is no answer, by the
            first.
    """
    scores, is_same = judged_pairs("best_threshold", scores, same, both=False)
    if len(scores) == 0:
        raise ValueError("best_threshold: expected at least one pair, got none")
    values, index = np.unique(scores, return_inverse=True)
    same_at = np.bincount(index, weights=is_same, minlength=len(values))
    different_at = np.bincount(index, weights=~is_same, minlength=len(values))
    # Cut k rejects the k smallest values.
    right = np.r_[0, different_at.cumsum()] + is_same.sum() - np.r_[0, same_at.cumsum()]
    # In the scores' own precision; half-way between neighbours in it may round up to the upper one.
    between = np.maximum(values[:-1] / 2 + values[1:] / 2, values[:-1])  # no sum that overflows
    between = np.where(between < values[1:], between, values[:-1])
    with np.errstate(over="ignore"):  # below the lowest number lies -infinity
        below = np.nextafter(values[:1], -np.inf)
    cuts = np.r_[below, between, values[-1:]]
    best = np.flatnonzero(right == right.max())
    return float(cuts[best[len(best) // 2]])


def false_accept_threshold(impostors_descending: Array, accepted: int) -> float:
    """The lowest threshold that accepts at most ``accepted`` impostors; -infinity when that is all."""
    if accepted >= len(impostors_descending):
        return -np.inf
    return float(impostors_descending[accepted])


def allowed(far: float, impostors: int) -> int:
    """floor(far * impostors), safe from 0.3 * 10 = 2.9999999999999996."""
    return int(np.floor(far * impostors * (1 + 1e-12)))


def tar_at_far(
    scores: Array, same: Array, far: float | Sequence[float], *, how: str = "below"
) -> npt.NDArray[np.float64]:
    """The true accept rate at each false accept rate: never above the FAR asked for, no interpolation.

    The threshold is the lowest one that accepts at most floor(far * impostors) different pairs, so a FAR
    below 1 / impostors means no false accept at all: TAR is then the share of same pairs above every
    different one. Returns one value for each ``far``.

    Args:
        scores: [P], finite.
        same: [P], bools, or numbers that are 0 and 1; some of each.
        far: in [0, 1].
        how: "below" as above, or "nearest": TAR at the corner of scikit-learn's ROC curve whose FAR is
            nearest, be it above or below, of equally near ones that with the larger TAR. InsightFace's
            tables of IJB-B and IJB-C are made so.

    Raises:
        ValueError: other shapes or rates; a score that is NaN or infinite, a label that is no answer, by the
            first; labels of one kind.
        ImportError: "nearest" without scikit-learn.
    """
    op = "tar_at_far"
    scores, is_same = judged_pairs(op, scores, same)
    rates = false_accept_rates(op, far)
    if choice(op, "how", how, ("below", "nearest")) == "nearest":
        fars, tars, _ = require("sklearn.metrics", op).roc_curve(is_same, scores)
        return np.array([tars[::-1][np.abs(fars[::-1] - rate).argmin()] for rate in rates])
    impostors, genuine = np.sort(scores[~is_same])[::-1], scores[is_same]
    counts = [allowed(rate, len(impostors)) for rate in rates]
    return np.array([(genuine > false_accept_threshold(impostors, count)).mean() for count in counts])


@dataclass(frozen=True)
class Roc:
    """The curve: ``far`` and ``tar`` rise from 0 to 1 as ``threshold`` falls (accept: score >= threshold)."""

    far: npt.NDArray[np.float64]
    tar: npt.NDArray[np.float64]
    threshold: npt.NDArray[np.float64]
    auc: float
    eer: float


def roc(scores: Array, same: Array) -> Roc:
    """The ROC curve with its area and its equal error rate (scikit-learn), every corner kept.

    The EER is where FAR = 1 - TAR on the straight line between the two corners around it.

    Args:
        scores: [P], finite.
        same: [P], bools, or numbers that are 0 and 1; some of each.

    Raises:
        ValueError: as ``tar_at_far``.
        ImportError: without scikit-learn.
    """
    scores, is_same = judged_pairs("roc", scores, same)
    metrics = require("sklearn.metrics", "roc")
    far, tar, threshold = metrics.roc_curve(is_same, scores, drop_intermediate=False)
    gap = far - (1 - tar)  # rises from -1 to 1
    after = int(np.argmax(gap >= 0))
    share = -gap[after - 1] / (gap[after] - gap[after - 1])
    eer = float(far[after - 1] + share * (far[after] - far[after - 1]))
    return Roc(far, tar, threshold, float(metrics.auc(far, tar)), eer)
