"""fold_protocol against a plain implementation of InsightFace's verification.py; tar_at_far's two ways."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_curve
from sklearn.model_selection import KFold
from sklearn.preprocessing import normalize

from normface_ext import evaluation as ev
from normface_ext.evaluation.bins import VerificationSet


def features_of(kind: str, seed: int, pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """[2 P, D] and same [P]; rows 2 p and 2 p + 1 are a pair."""
    random = np.random.default_rng(seed)
    same = np.arange(pairs) % 2 == 0 if kind != "blocks" else np.arange(pairs) // 7 % 2 == 0
    first = random.normal(size=(pairs, 12))
    second = np.where(same[:, None], first, random.normal(size=(pairs, 12)))
    second = second + 0.7 * random.normal(size=second.shape)
    if kind == "ties":  # few different distances, and some that are thresholds themselves
        return np.sign(np.stack([first, second], 1).reshape(2 * pairs, -1)[:, :4]), same
    if kind == "equal":
        first = second = np.ones((pairs, 3))
    rows = np.stack([first, second], 1).reshape(2 * pairs, -1)
    return rows * random.uniform(0.1, 9, (len(rows), 1)), same


def published(features: np.ndarray, same: np.ndarray, folds: int) -> tuple[list[float], list[float]]:
    """calculate_roc, step by step: KFold, 400 distances, the first best on the other folds."""
    unit = normalize(features)
    distance = np.sum(np.square(unit[0::2] - unit[1::2]), 1)
    grid = np.arange(0, 4, 0.01)
    accuracies, thresholds = [], []
    for train, test in KFold(n_splits=folds, shuffle=False).split(np.arange(len(same))):
        on_others = [np.mean((distance[train] < t) == same[train]) for t in grid]
        best = grid[np.argmax(on_others)]
        accuracies.append(np.mean((distance[test] < best) == same[test]))
        thresholds.append(best)
    return accuracies, thresholds


@pytest.mark.parametrize("kind", ["apart", "blocks", "ties", "equal"])
@pytest.mark.parametrize(("pairs", "folds"), [(140, 10), (143, 10), (60, 3), (28, 2)])
def test_accuracy_is_that_of_the_published_protocol(kind: str, pairs: int, folds: int):
    features, same = features_of(kind, pairs, pairs)
    listed = VerificationSet((b"",) * (2 * pairs), same).pairs(folds)
    for fold, (_, test) in enumerate(KFold(folds).split(same)):
        np.testing.assert_array_equal(np.flatnonzero(listed.fold == fold), test)
    result = ev.fold_protocol(features, listed)
    accuracies, thresholds = published(features, same, folds)
    np.testing.assert_allclose(result.accuracies, accuracies, atol=1e-15)
    np.testing.assert_array_equal(result.thresholds, thresholds)
    assert result.accuracy == pytest.approx(np.mean(accuracies))
    assert result.standard_deviation == pytest.approx(np.std(accuracies))
    single = ev.fold_protocol(features.astype(np.float32), listed)  # judged in float64 as well
    np.testing.assert_allclose(single.accuracies, published(features.astype(np.float32), same, folds)[0])


@pytest.mark.parametrize("kind", ["apart", "ties", "equal"])
@pytest.mark.parametrize("far", [0.0, 1e-9, 0.01, 0.1, 1.0])
def test_tar_at_far_comes_from_the_other_folds(kind: str, far: float):
    features, same = features_of(kind, 3, 200)
    pairs = VerificationSet((b"",) * 400, same).pairs()
    result = ev.fold_protocol(features, pairs, far=far)
    distance = -result.scores
    for fold in range(10):
        train, test = pairs.fold != fold, pairs.fold == fold
        candidates = np.r_[-1.0, np.unique(distance)]  # accept: distance <= cut
        rates = np.array([(distance[train & ~same] <= cut).mean() for cut in candidates])
        # The most that may be accepted: below the next impostor of the other folds.
        allowed = candidates[rates <= far + 1e-12].max()
        assert result.tar[fold] == (distance[test & same] <= allowed).mean()
        assert result.far[fold] == (distance[test & ~same] <= allowed).mean()


def test_a_far_below_one_impostor_accepts_none():
    scores, same = np.array([0.9, 0.8, 0.7, 0.6, 0.5]), np.array([1, 1, 0, 1, 0])
    for far in (0.0, 1e-9, 0.49):
        assert ev.tar_at_far(scores, same, far)[0] == 2 / 3
    tied = np.array([0.9, 0.7, 0.7, 0.6, 0.5])
    assert ev.tar_at_far(tied, same, 0.0)[0] == 1 / 3  # a genuine score that ties with an impostor is refused
    # The nearest corner of the curve: FAR 0 up to 0.25, then FAR 0.5.
    assert ev.tar_at_far(scores, same, [0.2, 0.3], how="nearest").tolist() == [2 / 3, 1.0]


@pytest.mark.parametrize("kind", ["continuous", "ties", "equal"])
def test_nearest_is_the_published_choice_of_insightface(kind: str):
    random = np.random.default_rng(5)
    same = random.random(400) < 0.3
    scores = random.normal(size=400) + same
    scores = {"continuous": scores, "ties": scores.round(), "equal": np.zeros(400)}[kind]
    fpr, tpr, _ = roc_curve(same, scores)
    fpr, tpr = np.flipud(fpr), np.flipud(tpr)  # from ijb's eval: "select largest tpr at same fpr"
    for far in (1e-6, 1e-4, 1e-2, 0.03, 0.1, 0.5, 1.0):
        _, at = min(list(zip(abs(fpr - far), range(len(fpr)), strict=True)))
        assert ev.tar_at_far(scores, same, far, how="nearest")[0] == tpr[at]
        below = ev.tar_at_far(scores, same, far)[0]
        assert below == max(t for f, t in zip(*roc_curve(same, scores)[:2], strict=True) if f <= far + 1e-12)
    with pytest.raises(ValueError, match="tar_at_far: expected `how` to be one of below, nearest"):
        ev.tar_at_far(scores, same, 0.1, how="interpolate")


def test_folds_of_one_kind_are_named():
    features, same = features_of("apart", 0, 40)
    pairs = VerificationSet((b"",) * 80, np.sort(same)).pairs(4)
    with pytest.raises(ValueError, match=r"fold_protocol: expected same and diff.*0 same of 10 in fold 0"):
        ev.fold_protocol(features, pairs)
    # Each kind cut for itself.
    again = ev.Pairs.in_folds(pairs.first, pairs.second, pairs.same, 4)
    assert len(ev.fold_protocol(features, again).accuracies) == 4
    with pytest.raises(ValueError, match="at least 2 folds"):
        ev.fold_protocol(features, VerificationSet((b"",) * 80, same).pairs(1))
    with pytest.raises(IndexError, match=r"`second` in \[0, 79\), got 79 at pair 39"):
        ev.fold_protocol(features[:-1], VerificationSet((b"",) * 80, same).pairs(4))
    with pytest.raises(ValueError, match="`far`"):
        ev.fold_protocol(features, again, far=2)
