"""The LFW protocol: each fold is judged by a threshold, and a PCA, that come from the other folds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..engine.arguments import BETWEEN_0_AND_1, integer, number
from ._checks import Array, Features, as_features, as_rows, folds_of_both_kinds
from ._optional import require
from .pairs import Pairs
from .roc import best_threshold
from .scores import pair_scores, unit_rows


@dataclass(frozen=True)
class LfwResult:
    """What the protocol measured: a value per fold, and the score of every pair in its own fold."""

    accuracies: npt.NDArray[np.float64]
    thresholds: npt.NDArray[np.float64]
    scores: Array

    @property
    def accuracy(self) -> float:
        """Mean over the folds: the number that papers print."""
        return float(self.accuracies.mean())

    @property
    def standard_error(self) -> float:
        """Standard deviation over the folds / sqrt(folds), as LFW asks to report."""
        folds = len(self.accuracies)
        return float(self.accuracies.std(ddof=1) / np.sqrt(folds)) if folds > 1 else 0.0


def _pca(features: Array, rows: npt.NDArray[np.int64], components: int | float | None) -> Array:
    """All features, as coordinates on the main axes of the rows given; the axes see no other row."""
    decomposition = require("sklearn.decomposition", "lfw_protocol with `pca`")
    limit = min(len(rows), features.shape[1])
    if isinstance(components, int) and components > limit:
        raise ValueError(f"lfw_protocol: expected `pca` <= {limit} (images or dimensions), got {components}")
    fitted = decomposition.PCA(n_components=components, svd_solver="full").fit(features[rows])
    projected: Array = fitted.transform(features)
    return projected


def _axes(op: str, pca: object) -> int | float | bool:
    """A count, a share of the variance, True for all axes, False for no PCA."""
    if pca is None or isinstance(pca, (bool, np.bool_)):
        return bool(pca)
    if isinstance(pca, (float, np.floating)):
        return number(op, "pca", pca, BETWEEN_0_AND_1)
    return integer(op, "pca", pca, 1)


def lfw_protocol(
    features: Features, pairs: Pairs, *, pca: int | float | bool | None = None, block: int = 1 << 14
) -> LfwResult:
    """Verification accuracy in folds: threshold from the other folds, scored on the one left out.

    The paper (section 4) adds a PCA fitted on the images of the other folds. It centres the features,
    which alone moves the cosines; features are normalised before it, and cosines are taken after it.

    Args:
        features: [M, D], as the network gives them; mirror images merged before (``merge_mirror``).
        pairs: with at least two folds, each of same and different pairs.
        pca: axes to keep: a count, a share of the variance in (0, 1), ``True`` for all, ``None`` for no PCA.
        block: pairs scored at a time.

    Raises:
        ValueError: one fold; a fold of one kind of pairs, by its number; values that are not finite.
        IndexError: a row number, naming the pair.
        ImportError: PCA without scikit-learn.
    """
    op = "lfw_protocol"
    folds = folds_of_both_kinds(op, pairs.same, pairs.fold)
    axes = _axes(op, pca)
    matrix = as_features(op, "features", features)
    first = as_rows(op, "first", pairs.first, len(matrix))
    second = as_rows(op, "second", pairs.second, len(matrix))
    unit = unit_rows(matrix)
    scores = pair_scores(unit, first, second, block=block)
    own = scores.copy()  # of each pair, in the space of its own fold
    accuracies, thresholds = [], []
    for fold in folds:
        judged = pairs.fold == fold
        if axes is not False:
            rows = np.unique(np.r_[first[~judged], second[~judged]])
            space = _pca(unit, rows, None if axes is True else axes)
            scores = pair_scores(space, first, second, block=block)
        threshold = best_threshold(scores[~judged], pairs.same[~judged])
        accuracies.append(((scores[judged] > threshold) == pairs.same[judged]).mean())
        thresholds.append(threshold)
        own[judged] = scores[judged]
    return LfwResult(np.array(accuracies), np.array(thresholds), own)
