"""YouTube Faces: two videos give many frame scores; their histogram tells more than their mean.

The paper (section 4.3) describes a pair of videos by a 100-bin histogram of its frame scores and lets an
SVM with the histogram-intersection kernel (HIK) decide, in the ten folds of the data set.

    pairs = read_ytf_splits("splits.txt")
    result = ytf_protocol({"Al_Gore/1": features_of_its_frames, ...}, pairs)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ._optional import require
from .roc import best_threshold
from .scores import Array, Features, unit_rows


@dataclass(frozen=True)
class VideoPairs:
    """P pairs of videos by name: ``first``, ``second``; ``same`` [P] bool; ``fold`` [P] int64."""

    first: tuple[str, ...]
    second: tuple[str, ...]
    same: npt.NDArray[np.bool_]
    fold: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        sizes = [len(part) for part in (self.first, self.second, self.same, self.fold)]
        if len(set(sizes)) != 1:
            raise ValueError(f"VideoPairs: expected four columns of one length, got lengths {sizes}")

    def __len__(self) -> int:
        return len(self.same)

    @property
    def videos(self) -> list[str]:
        """The name of every video in some pair, once, sorted."""
        return sorted({*self.first, *self.second})


def _columns(where: str, header: str) -> dict[str, int]:
    """Where the columns are, by their names in the header; of several "is same" the first."""
    names = [" ".join(cell.lower().split()) for cell in header.split(",")]
    meanings = {
        "split": lambda name: name.startswith("split"),
        "first": lambda name: name == "first name",
        "second": lambda name: name == "second name",
        "same": lambda name: name in ("is same", "same"),
    }
    found = {}
    for meaning, fits in meanings.items():
        places = [i for i, name in enumerate(names) if fits(name)]
        if not places:
            raise ValueError(
                f"{where}: expected a header with the columns 'split number', 'first name', 'second name'"
                f" and 'is same', got {header.strip()!r}"
            )
        found[meaning] = places[0]
    return found


def read_ytf_splits(
    path: str | Path, *, splits: int | None = 10, pairs_per_split: int | None = 500
) -> VideoPairs:
    """The splits file of YouTube Faces: a header line, then a comma-separated row per pair of videos.

    The released ``splits.txt`` has the columns "split number, pair number, first name, second name, is
    same, is same". They are found by name, so that other orders are read too; the first "is same" counts.
    Videos are named "person/number".

    Args:
        path: the file.
        splits: how many there must be, 10 in the data set; ``None`` accepts any number.
        pairs_per_split: likewise, 500 in the data set.

    Raises:
        ValueError: a malformed header or row, a pair of a video with itself, or a file with other numbers of
            splits or pairs, naming file and line.
    """
    path = Path(path)
    lines = [
        (f"{path}:{number}", line)
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1)
        if line.strip()
    ]
    if not lines:
        raise ValueError(f"{path}: expected a header and a row per pair, got an empty file")
    column = _columns(*lines[0])
    width = len(lines[0][1].split(","))
    first: list[str] = []
    second: list[str] = []
    same: list[bool] = []
    fold: list[int] = []
    for where, line in lines[1:]:
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != width:
            raise ValueError(f"{where}: expected {width} columns as in the header, got {len(cells)}")
        split, flag = cells[column["split"]], cells[column["same"]]
        one, other = cells[column["first"]], cells[column["second"]]
        if not split.isdecimal():
            raise ValueError(f"{where}: expected a split number, got {split!r}")
        if flag not in ("0", "1"):
            raise ValueError(f"{where}: expected 'is same' to be 0 or 1, got {flag!r}")
        if not one or not other or one == other:
            raise ValueError(f"{where}: expected the names of two videos, got {one!r} and {other!r}")
        first.append(one)
        second.append(other)
        same.append(flag == "1")
        fold.append(int(split))
    numbers, counts = np.unique(np.array(fold, dtype=np.int64), return_counts=True)
    if splits is not None and len(numbers) != splits:
        raise ValueError(f"{path}: expected {splits} splits, got {len(numbers)}: {numbers.tolist()}")
    wrong = counts != pairs_per_split
    if pairs_per_split is not None and wrong.any():
        at = int(wrong.argmax())
        raise ValueError(
            f"{path}: expected {pairs_per_split} pairs in each split, got {counts[at]} in split {numbers[at]}"
        )
    return VideoPairs(tuple(first), tuple(second), np.array(same, dtype=bool), np.array(fold, dtype=np.int64))


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
        histograms: [P, bins], one row per pair of videos.
        same: [P].
        fold: [P].
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
        pairs: with at least two folds (``read_ytf_splits``).
        bins: of the histograms, over [-1, 1].
        c: the SVM's penalty.

    Raises:
        ValueError: one fold; a video without features or without a frame, by its name.
        ImportError: without scikit-learn.
    """
    op = "ytf_protocol"
    folds = np.unique(pairs.fold)
    if len(folds) < 2:
        raise ValueError(f"{op}: expected pairs in at least 2 folds, got {len(folds)}")
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
        scores = frame_scores(features[one], features[other])
        mean_scores[i] = scores.mean(dtype=np.float64)
        histograms[i] = score_histogram(scores, bins)
    by_mean = []
    for fold in folds:
        judged = pairs.fold == fold
        threshold = best_threshold(mean_scores[~judged], pairs.same[~judged])
        by_mean.append(((mean_scores[judged] > threshold) == pairs.same[judged]).mean())
    accuracies = hik_svm_protocol(histograms, pairs.same, pairs.fold, c=c)
    return YtfResult(accuracies, np.array(by_mean), mean_scores, histograms)
