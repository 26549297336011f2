"""normface_ext.evaluation against cases worked by hand and against scikit-learn."""

from __future__ import annotations

import csv
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.metrics.pairwise import cosine_similarity

from normface_ext import evaluation as ev
from normface_ext.evaluation.__main__ import main


def clusters(seed: int = 0, people: int = 20, images: int = 6, dim: int = 16, noise: float = 0.6):
    """Features [M, D] scattered around one direction per person, and the person of each row."""
    random = np.random.default_rng(seed)
    who = np.repeat(np.arange(people), images)
    centres = random.normal(size=(people, dim)) / np.sqrt(dim)
    features = centres[who] + noise * random.normal(size=(len(who), dim)) / np.sqrt(dim)
    return (features * random.uniform(0.1, 10, size=(len(who), 1))).astype(np.float32), who


def random_pairs(who: np.ndarray, count: int, seed: int = 0, folds: int = 10) -> ev.Pairs:
    first, second = np.triu_indices(len(who), 1)
    same = who[first] == who[second]
    random = np.random.default_rng(seed)
    chosen = np.r_[
        random.choice(np.flatnonzero(same), count, replace=False),
        random.choice(np.flatnonzero(~same), count, replace=False),
    ]
    return ev.Pairs.in_folds(first[chosen], second[chosen], same[chosen], folds)


# ------------------------------------------------------------------------------------------- scores


def test_pair_scores_are_cosines_whatever_the_block():
    features, _ = clusters()
    random = np.random.default_rng(1)
    first, second = random.integers(0, len(features), (2, 501))
    truth = cosine_similarity(features.astype(np.float64))[first, second]
    for block in (1, 7, 500, 501, 10_000):
        np.testing.assert_allclose(ev.pair_scores(features, first, second, block=block), truth, atol=3e-7)
    assert ev.pair_scores(torch.tensor(features), first, second).dtype == np.float32
    double = ev.pair_scores(features.astype(np.float64), first, second)
    np.testing.assert_allclose(double, truth, atol=1e-12)
    half = torch.tensor(features).to(torch.bfloat16)
    np.testing.assert_allclose(ev.pair_scores(half, first, second), truth, atol=0.02)


def test_pair_scores_by_hand_and_zero_rows():
    features = np.array([[3.0, 4.0], [4.0, 3.0], [-6.0, -8.0], [0.0, 0.0]])
    scores = ev.pair_scores(features, [0, 0, 0, 0], [0, 1, 2, 3])
    np.testing.assert_allclose(scores, [1, 0.96, -1, 0], atol=1e-12)
    assert len(ev.pair_scores(features, np.empty(0, int), np.empty(0, int))) == 0


def test_a_million_pairs_take_seconds_and_bounded_memory():
    random = np.random.default_rng(0)
    features = random.normal(size=(5000, 128)).astype(np.float32)
    first, second = random.integers(0, 5000, (2, 1_000_000))
    same = random.random(1_000_000) < 0.5
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    curve = ev.roc(ev.pair_scores(features, first, second), same)
    seconds = time.process_time() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024  # MiB; gathered: 977
    assert abs(curve.auc - 0.5) < 0.002
    assert seconds < 20, f"{seconds:.1f} s of CPU"
    assert grown < 400, f"{grown:.0f} MiB"


def test_merge_mirror():
    front, mirrored = np.array([[1.0, -2.0]]), np.array([[3.0, -5.0]])
    np.testing.assert_array_equal(ev.merge_mirror(front, mirrored), [[4, -7]])
    np.testing.assert_array_equal(ev.merge_mirror(front, mirrored, "max"), [[3, -2]])
    with pytest.raises(ValueError, match=r"`how` to be sum or max, got 'mean'"):
        ev.merge_mirror(front, mirrored, "mean")
    with pytest.raises(ValueError, match=r"`mirrored` to have shape \[1, 2\], got \[2, 2\]"):
        ev.merge_mirror(front, np.zeros((2, 2)))


def test_bad_scores_are_refused():
    features = np.ones((3, 2))
    with pytest.raises(IndexError, match=r"`second` in \[0, 3\), got 3 at pair 1"):
        ev.pair_scores(features, [0, 1], [1, 3])
    with pytest.raises(IndexError, match=r"`first` in \[0, 3\), got -1 at pair 0"):
        ev.pair_scores(features, [-1], [1])
    with pytest.raises(ValueError, match="`second` to have 2 entries, got 1"):
        ev.pair_scores(features, [0, 1], [1])
    with pytest.raises(ValueError, match="row of integers"):
        ev.pair_scores(features, [0.5], [1])
    features[2, 1] = np.nan
    with pytest.raises(ValueError, match="NaN or infinity at row 2"):
        ev.pair_scores(features, [0], [1])
    with pytest.raises(ValueError, match="2-D"):
        ev.unit_rows(np.ones(3))


# ---------------------------------------------------------------------------------------------- ROC


def test_best_threshold_by_hand():
    scores, same = np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1])
    threshold = ev.best_threshold(scores, same)
    assert ((scores > threshold) == same).sum() == 3  # no cut gets all four
    # Of 0.2, 0.4, 0.6 the cuts at 0.3 and 0.5 are separable only at 0.5.
    assert ev.best_threshold(np.array([0.2, 0.4, 0.6]), np.array([0, 0, 1])) == pytest.approx(0.5)
    assert ev.best_threshold(np.array([0.2, 0.4]), np.array([1, 1])) < 0.2  # accept all
    assert ev.best_threshold(np.array([0.2, 0.4]), np.array([0, 0])) >= 0.4  # accept none


def test_best_threshold_between_neighbouring_numbers():
    low = np.float32(0.3)
    scores = np.array([low, np.nextafter(low, np.float32(1))])
    assert (scores > ev.best_threshold(scores, np.array([0, 1]))).tolist() == [False, True]


def test_best_threshold_never_cuts_between_equal_scores():
    scores, same = np.array([0.5, 0.5, 0.5, 0.9]), np.array([0, 0, 1, 1])
    assert ev.best_threshold(scores, same) == pytest.approx(0.7)


@pytest.mark.parametrize("seed", range(5))
def test_best_threshold_is_as_good_as_trying_every_score(seed: int):
    random = np.random.default_rng(seed)
    scores = random.normal(size=200).round(1)  # many ties
    same = random.random(200) < 0.5
    scores += same
    tried = max(((scores > t) == same).mean() for t in np.r_[scores, -99.0])
    assert ((scores > ev.best_threshold(scores, same)) == same).mean() == tried


def test_tar_at_far_by_hand():
    scores = np.array([0.9, 0.8, 0.5, 0.3, 0.85, 0.4, 0.2, 0.1])
    same = np.array([1, 1, 1, 1, 0, 0, 0, 0])
    # Impostors 0.85 0.4 0.2 0.1. None let in: above 0.85. One: above 0.4. All: everything.
    rates = ev.tar_at_far(scores, same, [0.0, 0.24, 0.25, 0.5, 1.0])
    np.testing.assert_array_equal(rates, [0.25, 0.25, 0.75, 1.0, 1.0])


def test_tar_at_far_counts_ties_against_us():
    # The genuine 0.5 ties with an impostor: it cannot be accepted without that impostor.
    rates = ev.tar_at_far(np.array([0.5, 0.9, 0.5, 0.1]), np.array([1, 1, 0, 0]), [0.0, 0.5])
    np.testing.assert_array_equal(rates, [0.5, 1.0])


@pytest.mark.parametrize("seed", range(5))
def test_roc_and_rates_agree_with_scikit_learn(seed: int):
    random = np.random.default_rng(seed)
    same = random.random(700) < 0.3
    scores = (random.normal(size=700) + same).round(2)
    curve = ev.roc(scores, same)
    assert curve.auc == pytest.approx(roc_auc_score(same, scores), abs=1e-12)
    far, tar, _ = roc_curve(same, scores, drop_intermediate=False)
    for wanted in (0.0, 0.001, 0.01, 0.1, 0.3, 1.0):
        assert ev.tar_at_far(scores, same, wanted)[0] == tar[far <= wanted].max()
    assert curve.eer == pytest.approx(np.interp(0, far - (1 - tar), far), abs=1e-12)


def test_eer_by_hand():
    scores, same = np.array([4.0, 3.0, 2.0, 1.0]), np.array([1, 0, 1, 0])
    assert ev.roc(scores, same).eer == pytest.approx(0.5)
    assert ev.roc(np.array([4.0, 3.0, 2.0, 1.0]), np.array([1, 1, 0, 0])).eer == 0.0
    # FAR 0, miss 1/2 at {4}; FAR 1/3, miss 1/2 at {4, 3}; FAR 1/3, miss 0 at {4, 3, 2}: they meet at 1/3.
    scores = np.array([4.0, 3.0, 2.0, 1.0, 0.0])
    assert ev.roc(scores, np.array([1, 0, 1, 0, 0])).eer == pytest.approx(1 / 3)


def test_rates_refuse_one_kind_and_nan():
    with pytest.raises(ValueError, match="same and different pairs, got 2 same of 2"):
        ev.roc(np.array([0.1, 0.2]), np.array([1, 1]))
    with pytest.raises(ValueError, match="got one at pair 1"):
        ev.tar_at_far(np.array([0.1, np.nan]), np.array([1, 0]), 0.1)
    with pytest.raises(ValueError, match=r"in \[0, 1\], got 2"):
        ev.tar_at_far(np.array([0.1, 0.2]), np.array([1, 0]), 2)


# ---------------------------------------------------------------------------------------------- LFW


def lfw_by_the_book(features: np.ndarray, pairs: ev.Pairs, pca: bool) -> list[float]:
    """The protocol once more, slowly: every midpoint tried, scikit-learn's PCA and cosine."""
    unit = features.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    accuracies = []
    for fold in range(pairs.fold.max() + 1):
        rest = pairs.fold != fold
        space = unit
        if pca:
            used = sorted({*pairs.first[rest].tolist(), *pairs.second[rest].tolist()})
            space = PCA(5, svd_solver="full").fit(unit[used]).transform(unit)
        scores = cosine_similarity(space)[pairs.first, pairs.second]
        cuts = np.sort(scores[rest])
        cuts = np.r_[-2, (cuts[1:] + cuts[:-1]) / 2, 2]
        right = [((scores[rest] > cut) == pairs.same[rest]).sum() for cut in cuts]
        best = np.flatnonzero(np.array(right) == max(right))
        threshold = cuts[best[len(best) // 2]]
        accuracies.append(((scores[~rest] > threshold) == pairs.same[~rest]).mean())
    return accuracies


@pytest.mark.parametrize("pca", [None, 5])
def test_lfw_protocol_by_the_book(pca: int | None):
    features, who = clusters(noise=1.0)
    pairs = random_pairs(who, 150)
    result = ev.lfw_protocol(features.astype(np.float64), pairs, pca=pca)
    truth = lfw_by_the_book(features, pairs, pca is not None)
    np.testing.assert_allclose(result.accuracies, truth, atol=1e-12)
    assert result.accuracy == pytest.approx(np.mean(truth))
    assert result.standard_error == pytest.approx(np.std(truth, ddof=1) / np.sqrt(10))
    assert 0.6 < result.accuracy < 1.0


def test_lfw_threshold_comes_from_the_other_folds():
    # Fold 0 separates at 0.8, fold 1 at 0.2: each judged by the other's threshold is wrong on half.
    angles = np.array([0.9, 0.7, 0.3, 0.1])
    features = np.array([[1.0, 0.0], *([c, np.sqrt(1 - c * c)] for c in angles)])
    pairs = ev.Pairs(
        np.zeros(4, dtype=int), np.array([1, 2, 3, 4]), np.array([1, 0, 1, 0], bool), np.array([0, 0, 1, 1])
    )
    result = ev.lfw_protocol(features, pairs)
    np.testing.assert_allclose(result.thresholds, [0.2, 0.8])
    np.testing.assert_array_equal(result.accuracies, [0.5, 0.5])
    with pytest.raises(ValueError, match="at least 2 folds, got 1"):
        ev.lfw_protocol(features, ev.Pairs(pairs.first, pairs.second, pairs.same, np.zeros(4, int)))


def test_pca_does_not_see_the_fold_it_judges():
    features, who = clusters()
    pairs = random_pairs(who, 60, folds=2)
    only_in_0 = np.setdiff1d(
        np.r_[pairs.first[pairs.fold == 0], pairs.second[pairs.fold == 0]],
        np.r_[pairs.first[pairs.fold == 1], pairs.second[pairs.fold == 1]],
    )
    before = ev.lfw_protocol(features, pairs, pca=4)
    changed = features.copy()
    changed[only_in_0[:1]] *= -1
    after = ev.lfw_protocol(changed, pairs, pca=4)
    # Fold 0 is judged in fold 1's space, so only the pairs of the changed image move.
    untouched = (
        (pairs.fold == 0) & ~np.isin(pairs.first, only_in_0[:1]) & ~np.isin(pairs.second, only_in_0[:1])
    )
    np.testing.assert_array_equal(after.scores[untouched], before.scores[untouched])
    assert (after.scores[pairs.fold == 1] != before.scores[pairs.fold == 1]).any()
    with pytest.raises(ValueError, match="`pca` <= 16 "):
        ev.lfw_protocol(features, pairs, pca=17)


PAIRS_TXT = """2\t1
Al_Gore\t1\t3
Al_Gore\t2\tBo_Li\t1
Bo_Li\t1\t2
Bo_Li\t2\tAl_Gore\t1
"""
NAMES = ["Al_Gore/Al_Gore_0001.jpg", "x\\Al_Gore_0002.PNG", "Al_Gore_0003", "Bo_Li_0001", "Bo_Li_0002.jpeg"]


def test_lfw_pairs_file(tmp_path: Path):
    path = tmp_path / "pairs.txt"
    path.write_text(PAIRS_TXT)
    pairs = ev.read_lfw_pairs(path, NAMES)
    assert pairs.first.tolist() == [0, 1, 3, 4]
    assert pairs.second.tolist() == [2, 3, 4, 0]
    assert pairs.same.tolist() == [True, False, True, False]
    assert pairs.fold.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("", "expected a header line"),
        ("2 1\nAl_Gore 1 3\n", "expected 2 x 2 x 1 = 4 pairs after the header, got 1"),
        (PAIRS_TXT.replace("Bo_Li\t1\t2", "Bo_Li\t1\t7"), r":4: .* Bo_Li_0007, got none"),
        (PAIRS_TXT.replace("Bo_Li\t1\t2", "Bo_Li\tone\t2"), r":4: expected an image number, got 'one'"),
        (PAIRS_TXT.replace("Bo_Li\t1\t2", "Bo_Li 1"), r":4: expected 'name i j'.*got 2 words"),
    ],
)
def test_lfw_pairs_file_says_what_is_wrong(tmp_path: Path, text: str, sentence: str):
    path = tmp_path / "pairs.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=sentence):
        ev.read_lfw_pairs(path, NAMES)
    with pytest.raises(ValueError, match="each image once, got 'A_0001' at rows 0 and 1"):
        ev.read_lfw_pairs(path, ["A_0001.jpg", "B/A_0001.jpg"])


def test_index_pairs(tmp_path: Path):
    path = tmp_path / "pairs.txt"
    path.write_text("# first second same\n0 1 1\n2 3 0\n\n4 5 1\n6 7 0\n")
    pairs = ev.read_index_pairs(path, folds=2)
    assert pairs.first.tolist() == [0, 2, 4, 6]
    assert pairs.same.tolist() == [True, False, True, False]
    assert pairs.fold.tolist() == [0, 0, 1, 1]  # each fold has one pair of each kind
    path.write_text("0, 1, 1, 5\n2, 3, 0, 6\n")
    assert ev.read_index_pairs(path).fold.tolist() == [5, 6]
    for text, sentence in (
        ("0 1 2\n", ":1: expected same to be 0 or 1, got 2"),
        ("0 1 1\n0 1\n", ":2: expected 'i j same'"),
        ("0 1 1\n0 1 1 3\n", ":2: expected 3 words"),
        ("0 b 1\n", ":1: expected a whole number, got 'b'"),
        ("\n", "at least one pair"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=sentence):
            ev.read_index_pairs(path)


# -------------------------------------------------------------------------------------------- BLUFR


@pytest.mark.parametrize("block", [1, 13, 512])
def test_verification_rate_is_tar_at_far_over_all_pairs(block: int):
    features, who = clusters(noise=1.0)
    features = features.astype(np.float64)
    first, second = np.triu_indices(len(who), 1)
    scores, same = cosine_similarity(features)[first, second], who[first] == who[second]
    fars = [0.0, 0.0005, 0.01, 0.1, 1.0]
    truth = ev.tar_at_far(scores, same, fars)
    np.testing.assert_allclose(ev.verification_rate(features, who, fars, block=block), truth, atol=1e-12)
    assert truth[0] < truth[2] < truth[3] < truth[4] == 1


def unit_vectors(*degrees: float) -> np.ndarray:
    angle = np.radians(degrees)
    return np.stack([np.cos(angle), np.sin(angle)], 1)


def test_identification_rate_by_hand():
    gallery, names = unit_vectors(0, 90), [7, 8]
    #                        right  right  wrong  right | strangers 45, 60 (to 90: 30), 180 (to 90: 90), 91
    probes = unit_vectors(5, 95, 60, 20, 45, 60, 180, 91)
    who = [7, 8, 7, 7, 1, 2, 3, 4]
    rates = [
        ev.identification_rate(gallery, names, probes, who, far)[0] for far in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    # Strangers' best angles: 1, 30, 45, 90. Let in none: nearer than 1. One: nearer than 30. Two: 45.
    assert rates == [0.0, 0.75, 0.75, 0.75, 0.75]
    rates = ev.identification_rate(
        gallery, names, unit_vectors(5, 95, 60, 20, 12, 60), [7, 8, 7, 7, 1, 2], [0, 1]
    )
    assert rates.tolist() == [0.5, 0.75]  # 12 degrees lets in 5 and 95, not 20
    with pytest.raises(ValueError, match="known and unknown probes, got 1 known of 1"):
        ev.identification_rate(gallery, names, probes[:1], [7])


def test_blufr_trials_are_open_set_and_reported_as_mean_minus_deviation():
    features, who = clusters(people=24, noise=0.9)
    trials = ev.random_trials(who, known=0.25, trials=4, seed=3)
    for trial in trials:
        assert len(trial.gallery) == 6 == len(set(who[trial.gallery]))
        assert set(trial.gallery) | set(trial.probes) == set(range(len(who)))
        assert not set(trial.gallery) & set(trial.probes)
    again = ev.random_trials(who, known=0.25, trials=4, seed=3)
    assert all((a.gallery == b.gallery).all() for a, b in zip(trials, again, strict=True))
    assert (trials[0].gallery != trials[1].gallery).any()
    result = ev.blufr(features, who, trials, verification_far=0.01, identification_far=0.1)
    for trial, rate in zip(trials, result.identification, strict=True):
        parts = (features[trial.gallery], who[trial.gallery], features[trial.probes], who[trial.probes])
        assert rate == ev.identification_rate(*parts, 0.1, block=5)[0]
    np.testing.assert_allclose(result.verification, ev.verification_rate(features, who, 0.01)[0])
    verification, identification = result.report()
    assert verification == pytest.approx(result.verification.mean())
    assert identification == pytest.approx(result.identification.mean() - result.identification.std(ddof=1))
    assert result.identification.std() > 0
    with pytest.raises(ValueError, match="at least 6 people with two images"):
        ev.random_trials(np.arange(24))


# ---------------------------------------------------------------------------------------------- YTF


def test_frame_scores_and_histogram_by_hand():
    scores = ev.frame_scores(unit_vectors(0, 90), unit_vectors(0, 60, 180))
    np.testing.assert_allclose(scores, [1, 0.5, -1, 0, np.sqrt(3) / 2, 0], atol=1e-12)
    # Quarters of [-1, 1]: -1 | none | 0 0 | 0.5 0.87 1; the last interval is closed.
    histogram = ev.score_histogram(np.array([1, 0.5, -1, 1e-9, 0.87, 1e-9]), bins=4)
    np.testing.assert_allclose(histogram, np.array([1, 0, 2, 3]) / 6)
    assert ev.score_histogram(np.array([1 + 1e-6, -1 - 1e-6])).sum() == 1
    assert ev.score_histogram(np.array([0.3])).shape == (100,)


def test_histogram_intersection_by_hand_and_by_broadcast():
    a, b = np.array([[0.5, 0.5, 0.0], [0.0, 0.2, 0.8]]), np.array([[0.1, 0.6, 0.3]])
    np.testing.assert_allclose(ev.histogram_intersection(a, b), [[0.6], [0.5]])
    random = np.random.default_rng(0).random((9, 100))
    truth = np.minimum(random[:, None], random[None]).sum(2)
    np.testing.assert_allclose(ev.histogram_intersection(random, random), truth, atol=1e-12)


def test_hik_svm_finds_what_the_mean_score_hides():
    # Same pairs: half of the frames match well, half not at all. Different pairs: all so-so. Equal means.
    random = np.random.default_rng(0)
    histograms, same = [], np.arange(200) % 2 == 0
    means = []
    for is_same in same:
        spread = random.choice([-0.4, 0.4], 60) if is_same else np.zeros(60)
        scores = spread - spread.mean() + random.normal(0.3, 0.1, 60)
        means.append(scores.mean())
        histograms.append(ev.score_histogram(scores))
    fold = np.arange(200) // 20
    accuracies = ev.hik_svm_protocol(np.array(histograms), same, fold)
    threshold = ev.best_threshold(np.array(means), same)
    assert ((np.array(means) > threshold) == same).mean() < 0.65
    assert len(accuracies) == 10
    assert accuracies.mean() > 0.97
    shuffled = ev.hik_svm_protocol(np.array(histograms), random.permutation(same), fold)
    assert shuffled.mean() < 0.65
    with pytest.raises(ValueError, match="at least 2 folds"):
        ev.hik_svm_protocol(np.array(histograms), same, np.zeros(200))


YTF_HEADER = "split number, pair number, first name, second name, is same, is same\n"


def write_splits(path: Path, rows: list[str], header: str = YTF_HEADER) -> Path:
    path.write_text(header + "".join(f"{row}\n" for row in rows))
    return path


def test_ytf_splits_are_read_by_the_names_of_their_columns(tmp_path: Path):
    rows = ["1, 1, Al_Gore/0, Al_Gore/3, 1, 1", "2, 1, Al_Gore/0, Tony_Blair/2, 0, 0"]
    pairs = ev.read_ytf_splits(write_splits(tmp_path / "a", rows), splits=2, pairs_per_split=1)
    assert (pairs.first, pairs.second) == (("Al_Gore/0", "Al_Gore/0"), ("Al_Gore/3", "Tony_Blair/2"))
    assert pairs.same.tolist() == [True, False]
    assert pairs.fold.tolist() == [1, 2]
    assert pairs.videos == ["Al_Gore/0", "Al_Gore/3", "Tony_Blair/2"]
    short = write_splits(
        tmp_path / "b", ["7,Al_Gore/0,Al_Gore/3,1"], "Split Number,first name,second name,is same\n"
    )
    other = ev.read_ytf_splits(short, splits=None, pairs_per_split=None)
    assert (other.first, other.second, other.fold.tolist()) == (("Al_Gore/0",), ("Al_Gore/3",), [7])
    whole = [f"{s}, {i}, a/{i}, b/{i}, {i % 2}, {i % 2}" for s in range(1, 11) for i in range(500)]
    assert len(ev.read_ytf_splits(write_splits(tmp_path / "c", whole))) == 5000


@pytest.mark.parametrize(
    ("header", "rows", "sentence"),
    [
        (YTF_HEADER, ["1, 1, a/0, b/0, 2, 2"], r"splits:2: expected 'is same' to be 0 or 1, got '2'"),
        (YTF_HEADER, ["x, 1, a/0, b/0, 1, 1"], r"splits:2: expected a split number, got 'x'"),
        (YTF_HEADER, ["", "1, 1, a/0, b/0, 1"], r"splits:3: expected 6 columns as in the header, got 5"),
        (YTF_HEADER, ["1, 1, a/0, a/0, 1, 1"], r"splits:2: expected the names of two videos"),
        (YTF_HEADER, ["1, 1, , a/0, 1, 1"], r"splits:2: expected the names of two videos"),
        ("1, a/0, b/0, 1\n", [], r"splits:1: expected a header with the columns .*'is same'"),
        (
            "number, a, first name, second name, is same\n",
            [],
            r"splits:1: expected a header with the columns",
        ),
        ("1, 1, a/0, b/0, 1, 1\n", ["2, 1, a/0, b/0, 1"], r"splits:2: expected 6 columns"),
        ("", [], r"expected a header and a row per pair, got an empty file"),
        (YTF_HEADER, [], r"expected 2 splits, got 0"),
        (YTF_HEADER, ["1, 1, a/0, b/0, 1, 1"], r"expected 2 splits, got 1: \[1\]"),
        (
            YTF_HEADER,
            ["1, 1, a/0, b/0, 1, 1", "1, 2, a/0, c/0, 0, 0", "2, 1, a/0, c/0, 0, 0"],
            r"expected 2 pairs in each split, got 1 in split 2",
        ),
    ],
)
def test_ytf_splits_that_are_wrong_are_named(tmp_path: Path, header: str, rows: list[str], sentence: str):
    path = write_splits(tmp_path / "splits", rows, header)
    with pytest.raises(ValueError, match=sentence):
        ev.read_ytf_splits(path, splits=2, pairs_per_split=2)


def videos(people: int, each: int, frames: int, noise: float) -> dict[str, np.ndarray]:
    """Frames scattered around a direction per person."""
    random = np.random.default_rng(3)
    centres = random.normal(size=(people, 16))
    return {
        f"p{p}/{v}": (centres[p] + noise * random.normal(size=(frames + v, 16))).astype(np.float32)
        for p in range(people)
        for v in range(each)
    }


def test_ytf_protocol_over_a_splits_file(tmp_path: Path):
    features = videos(people=40, each=2, frames=12, noise=0.5)
    rows = []
    for p in range(40):
        fold = p // 4 + 1
        rows.append(f"{fold}, {2 * p}, p{p}/0, p{p}/1, 1, 1")
        rows.append(f"{fold}, {2 * p + 1}, p{p}/0, p{(p + 7) % 40}/1, 0, 0")
    pairs = ev.read_ytf_splits(write_splits(tmp_path / "splits", rows), pairs_per_split=8)
    result = ev.ytf_protocol(features, pairs)
    assert result.accuracies.shape == result.mean_accuracies.shape == (10,)
    assert result.histograms.shape == (80, 100)
    scores = ev.frame_scores(features["p0/0"], features["p0/1"])
    assert len(scores) == 12 * 13
    assert result.mean_scores[0] == pytest.approx(scores.mean(), rel=1e-6)
    np.testing.assert_array_equal(result.histograms[0], ev.score_histogram(scores))
    assert result.accuracy == result.accuracies.mean() > 0.95
    assert result.standard_error == pytest.approx(result.accuracies.std(ddof=1) / np.sqrt(10))
    # The folds decide: with the answers shuffled nothing is left to learn.
    random = np.random.default_rng(0)
    blind = ev.VideoPairs(pairs.first, pairs.second, random.permutation(pairs.same), pairs.fold)
    assert ev.ytf_protocol(features, blind).accuracy < 0.7

    with pytest.raises(ValueError, match=r"got none of 1 of them, 'p3/1' first"):
        ev.ytf_protocol({k: v for k, v in features.items() if k != "p3/1"}, pairs)
    with pytest.raises(ValueError, match=r"at least one frame per video, got none of 'p3/1'"):
        ev.ytf_protocol({**features, "p3/1": np.empty((0, 16), np.float32)}, pairs)
    one_fold = ev.VideoPairs(pairs.first, pairs.second, pairs.same, np.ones(80, dtype=np.int64))
    with pytest.raises(ValueError, match="at least 2 folds, got 1"):
        ev.ytf_protocol(features, one_fold)
    with pytest.raises(ValueError, match="four columns of one length"):
        ev.VideoPairs(pairs.first[1:], pairs.second, pairs.same, pairs.fold)


# ------------------------------------------------------------------------------------------ command


def write_index_pairs(path: Path, pairs: ev.Pairs) -> None:
    lines = zip(pairs.first, pairs.second, pairs.same.astype(int), strict=True)
    path.write_text("".join(f"{i} {j} {s}\n" for i, j, s in lines))


def test_command_prints_the_table_and_writes_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    features, who = clusters(noise=1.0)
    pairs = random_pairs(who, 150)
    np.save(tmp_path / "F.npy", features)
    write_index_pairs(tmp_path / "pairs.txt", pairs)
    arguments = ["--features", str(tmp_path / "F.npy"), "--pairs", str(tmp_path / "pairs.txt")]
    assert main([*arguments, "--plot", str(tmp_path / "roc.png"), "--csv", str(tmp_path / "t.csv")]) == 0
    result = ev.lfw_protocol(features, pairs)
    printed = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert printed["pairs"] == "300"
    assert printed["accuracy"] == f"{result.accuracy:.4f}"
    rate = ev.tar_at_far(result.scores, pairs.same, 0.01)[0]
    assert printed["TAR@FAR=0.01"] == f"{rate:.4f}"
    with (tmp_path / "t.csv").open() as file:
        table = {row["measure"]: float(row["value"]) for row in csv.DictReader(file)}
    assert table["AUC"] == pytest.approx(roc_auc_score(pairs.same, result.scores), abs=1e-7)
    assert [table[f"accuracy of fold {i + 1}"] for i in range(10)] == pytest.approx(
        result.accuracies.tolist()
    )
    assert (tmp_path / "roc.png").read_bytes()[:4] == b"\x89PNG"

    mirrored = clusters(noise=1.0, seed=1)[0]
    np.save(tmp_path / "M.npy", mirrored)
    assert main([*arguments, "--mirror", str(tmp_path / "M.npy"), "--pca", "0"]) == 0
    merged = ev.lfw_protocol(features + mirrored, pairs, pca=True)
    assert f"accuracy          {merged.accuracy:.4f}" in capsys.readouterr().out


def test_command_with_lfw_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    np.save(tmp_path / "F.npy", unit_vectors(0, 80, 10, 90, 100))
    (tmp_path / "pairs.txt").write_text(PAIRS_TXT)
    (tmp_path / "names.txt").write_text("\n".join(NAMES) + "\n")
    names = ["--names", str(tmp_path / "names.txt")]
    arguments = ["--features", str(tmp_path / "F.npy"), "--pairs", str(tmp_path / "pairs.txt")]
    assert main(arguments + names) == 0
    # Al_Gore 1-3: 10 degrees, same. 2-Bo_Li 1: 10, different. Bo_Li 1-2: 10. 2-Al_Gore 1: 100.
    assert "pairs             4" in capsys.readouterr().out
    (tmp_path / "names.txt").write_text("Al_Gore_0001\n")
    assert main(arguments + names) == 1
    assert "expected 5 names, got 1" in capsys.readouterr().err
    assert main(arguments) == 1
    assert "pairs.txt:1: expected 'i j same'" in capsys.readouterr().err


def test_command_runs_as_a_module(tmp_path: Path):
    command = [sys.executable, "-m", "normface_ext.evaluation"]
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0
    assert "--features" in done.stdout
    missing = ["--features", "no.npy", "--pairs", "no.txt"]
    done = subprocess.run([*command, *missing], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert "no.npy" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_scikit_learn_the_sentence_names_the_extra(tmp_path: Path):
    program = """
import sys
sys.modules["sklearn"] = None
import numpy as np
from normface_ext import evaluation as ev
scores, same = np.array([0.1, 0.9, 0.2]), np.array([0, 1, 0])
assert ev.tar_at_far(scores, same, 0.0)[0] == 1 and ev.best_threshold(scores, same) == 0.55
try:
    ev.roc(scores, same)
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("roc: needs scikit-learn")
    assert 'pip install "normface_ext[evaluation]"' in done.stdout
