"""Accuracy in ten folds as InsightFace's verification.py has it: LFW, CFP, AgeDB-30, CALFW, CPLFW."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..engine.arguments import number
from ._checks import RATE, Array, Features, as_features, as_rows, folds_of_both_kinds
from .pairs import Pairs
from .roc import allowed, false_accept_threshold

#: Squared distances of unit features that are tried as thresholds: 0, 0.01, ..., 3.99.
THRESHOLDS = np.arange(0, 4, 0.01)


@dataclass(frozen=True)
class FoldResult:
    """A value per fold; ``thresholds`` are squared distances d = |x - y|^2 = 2 - 2 cos, ``scores`` [P] -d.

    ``tar`` and ``far``: the rates of each fold at the threshold that has the FAR asked for on the others.
    """

    accuracies: npt.NDArray[np.float64]
    thresholds: npt.NDArray[np.float64]
    tar: npt.NDArray[np.float64]
    far: npt.NDArray[np.float64]
    scores: Array

    @property
    def accuracy(self) -> float:
        """Mean over the folds: the number that papers print."""
        return float(self.accuracies.mean())

    @property
    def standard_deviation(self) -> float:
        """Over the folds, as InsightFace prints it after the +-: numpy.std, not divided by sqrt(folds)."""
        return float(self.accuracies.std())


def squared_distances(features: Features, pairs: Pairs, block: int = 1 << 14) -> Array:
    """|x / |x| - y / |y||^2 of each pair, [P] float64, in blocks.

    To the last bit as scikit-learn's normalize and numpy.sum have it: a distance may lie on a threshold, and
    ``unit_rows`` has the paper's epsilon in the norm.
    """
    op = "fold_protocol"
    unit = as_features(op, "features", features).astype(np.float64)
    first = as_rows(op, "first", pairs.first, len(unit))
    second = as_rows(op, "second", pairs.second, len(unit))
    norms = np.sqrt(np.einsum("md,md->m", unit, unit))
    norms[norms == 0] = 1
    unit /= norms[:, None]
    distances = np.empty(len(first))
    for start in range(0, len(first), block):
        part = slice(start, start + block)
        difference = unit[first[part]] - unit[second[part]]
        distances[part] = np.square(difference, out=difference).sum(axis=1)
    return distances


def _right(distances: Array, same: Array) -> npt.NDArray[np.int64]:
    """Of each threshold t how many pairs are decided right by "same if d < t", [400]."""
    kinds = []
    for kind in (same, ~same):
        # d < t for as many as stand left of t in order.
        kinds.append(np.searchsorted(np.sort(distances[kind]), THRESHOLDS, side="left"))
    return kinds[0] + (int((~same).sum()) - kinds[1])


def fold_protocol(features: Features, pairs: Pairs, *, far: float = 1e-3) -> FoldResult:
    """Accuracy of each fold under the best of 400 distances on the other folds, and TAR at a FAR likewise.

    d_p = |x_p / |x_p| - y_p / |y_p||^2; a pair is accepted when d < t. Of the thresholds t = 0, 0.01, ...,
    3.99 the first with the highest accuracy on the other folds decides the fold (InsightFace,
    recognition/arcface_torch/eval/verification.py, calculate_roc). ``lfw_protocol`` chooses among all
    thresholds and adds the paper's PCA; the two differ in the second decimal of the percentage.

    TAR and FAR of a fold are at the largest distance that lets at most floor(far * impostors) impostors of
    the other folds in. InsightFace interpolates between thresholds there, which SciPy refuses where two of
    them have one FAR. A ``far`` below 1 / impostors lets none in.

    Args:
        features: [M, D], as the network gives them, mirrors merged (``embed``).
        pairs: with at least two folds, each of same and different pairs. ``VerificationSet.pairs`` cuts
            folds as InsightFace does, ``Pairs.in_folds`` each kind for itself.
        far: in [0, 1].

    Raises:
        ValueError: one fold; a fold of one kind of pairs, by its number (its TAR or FAR would be 0 / 0);
            values that are not finite.
        IndexError: a row number, naming the pair.
    """
    op = "fold_protocol"
    rate = number(op, "far", far, RATE)
    folds = folds_of_both_kinds(op, pairs.same, pairs.fold)
    distances, same = squared_distances(features, pairs), pairs.same
    counts = [_right(distances[pairs.fold == fold], same[pairs.fold == fold]) for fold in folds]
    total = np.sum(counts, axis=0)
    accuracies, thresholds, tars, fars = [], [], [], []
    for fold, right in zip(folds, counts, strict=True):
        judged = pairs.fold == fold
        best = int((total - right).argmax())  # the first of equally good ones
        accuracies.append(right[best] / judged.sum())
        thresholds.append(THRESHOLDS[best])
        impostors = np.sort(-distances[~judged & ~same])[::-1]
        cut = false_accept_threshold(impostors, allowed(rate, len(impostors)))
        tars.append((-distances[judged & same] > cut).mean())
        fars.append((-distances[judged & ~same] > cut).mean())
    accuracy, threshold, tar, false = map(np.array, (accuracies, thresholds, tars, fars))
    return FoldResult(accuracy, threshold, tar, false, -distances)
