"""Rates against scikit-learn and against counting, with ties, constant scores and extreme values."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, roc_auc_score, roc_curve

from normface_ext import evaluation as ev

MOST, LEAST = np.finfo(np.float64).max, 5e-324
KINDS = {
    "plain": lambda random, same: random.normal(size=len(same)) + same,
    "ties": lambda random, same: (random.normal(size=len(same)) + same).round(),
    "constant": lambda random, same: np.full(len(same), random.normal()),
    "two values": lambda random, same: random.integers(0, 2, len(same)) / 3,
    "float32": lambda random, same: (random.normal(size=len(same)) + same).astype(np.float32),
    "float16": lambda random, same: (random.normal(size=len(same)) + same).astype(np.float16),
    "integers": lambda random, same: random.integers(-3, 4, len(same)) + 2 * same,
    "extreme": lambda random, same: random.choice([-MOST, -1.0, 0.0, 1.0, MOST / 2, MOST], len(same)),
    "denormal": lambda random, same: random.integers(-4, 5, len(same)) * LEAST,
    "neighbours": lambda random, same: 1 + random.integers(0, 4, len(same)) * 2.0**-52,
    "magnitudes": lambda random, same: random.choice([-1, 1], len(same)) * 10.0 ** random.integers(-300, 300),
    "separable": lambda random, same: same + random.random(len(same)) / 2,
    "inverted": lambda random, same: ~same + random.random(len(same)) / 2,
}


def draw(kind: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    same = random.random(random.integers(2, 120)) < random.choice([0.05, 0.5, 0.9])
    same[:2] = [True, False]
    return KINDS[kind](random, same), same


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # of scikit-learn
def test_rates_are_those_of_scikit_learn_and_of_counting(kind: str):
    for seed in range(12):
        scores, same = draw(kind, seed)
        genuine, impostors = scores[same], scores[~same]
        curve = ev.roc(scores, same)
        assert curve.auc == pytest.approx(roc_auc_score(same, scores), abs=1e-12)
        ahead = (genuine[:, None] > impostors).mean() + (genuine[:, None] == impostors).mean() / 2
        assert curve.auc == pytest.approx(ahead, abs=1e-12)  # no curve at all

        far, tar, thresholds = roc_curve(same, scores, drop_intermediate=False)
        np.testing.assert_array_equal(curve.far, far)
        np.testing.assert_array_equal(curve.tar, tar)
        assert far.tolist() == [(impostors >= threshold).mean() for threshold in thresholds]
        assert tar.tolist() == [(genuine >= threshold).mean() for threshold in thresholds]

        before = np.flatnonzero(1 - tar >= far)[-1]  # the last corner where FAR has not passed 1 - TAR
        behind = min(before + 1, len(far) - 1)
        assert far[before] - 1e-12 <= curve.eer <= far[behind] + 1e-12
        assert 1 - tar[behind] - 1e-12 <= curve.eer <= 1 - tar[before] + 1e-12
        assert curve.eer == pytest.approx(np.interp(0, far - (1 - tar), far), abs=1e-12)

        steps = np.arange(len(impostors) + 1) / len(impostors)
        wanted = [*steps, *np.random.default_rng(seed).random(5), 0.0, 1.0]
        allowed = np.array([int((steps <= rate + 1e-12).sum()) - 1 for rate in wanted])
        best = [max((t for f, t in zip(far, tar, strict=True) if f <= steps[count])) for count in allowed]
        np.testing.assert_array_equal(ev.tar_at_far(scores, same, wanted), best)


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_threshold_makes_the_fewest_mistakes(kind: str):
    for seed in range(12):
        scores, same = draw(kind, seed)
        threshold = ev.best_threshold(scores, same)
        cuts = [scores > value for value in np.unique(scores)]
        most = max(same.mean(), *(accuracy_score(same, accepted) for accepted in cuts))
        assert accuracy_score(same, scores > threshold) == most


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_thresholds_are_half_way_wherever_that_is(dtype: type):
    limits = np.finfo(dtype)
    for low, high, middle in (
        (-limits.max, limits.max, 0.0),
        (limits.max / 2, limits.max, limits.max / 4 * 3),
        (0.0, limits.smallest_subnormal, 0.0),
        (limits.smallest_subnormal * 3, limits.smallest_subnormal * 4, limits.smallest_subnormal * 3),
        (-limits.smallest_subnormal, 0.0, -limits.smallest_subnormal),
    ):
        scores = np.array([low, high], dtype=dtype)
        assert ev.best_threshold(scores, [False, True]) == middle


def test_nothing_but_the_order_of_scores_counts():
    """AUC, EER and TAR@FAR stay what they are under a rising map of the scores."""
    random = np.random.default_rng(0)
    same = random.random(300) < 0.4
    scores = random.integers(-20, 20, 300) + 5 * same
    truth, rates = ev.roc(scores, same), ev.tar_at_far(scores, same, [0.0, 0.01, 0.1])
    for moved in (np.exp(scores.astype(float)), scores.astype(np.float32) * 1e-30, np.cbrt(scores) * 1e300):
        curve = ev.roc(moved, same)
        assert (curve.auc, curve.eer) == (truth.auc, truth.eer)
        np.testing.assert_array_equal(ev.tar_at_far(moved, same, [0.0, 0.01, 0.1]), rates)
