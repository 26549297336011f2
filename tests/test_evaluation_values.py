"""Identities, features, row numbers and options that are none are refused by name; what is read is exact."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from normface_ext import evaluation as ev

PAIRS = 40
IS_SAME = np.arange(PAIRS) % 2 == 1
FOLD = np.arange(PAIRS) // 10
SCORES = np.random.default_rng(0).normal(size=PAIRS) + IS_SAME
HISTOGRAMS = np.random.default_rng(1).random((PAIRS, 8))
ROWS = np.arange(PAIRS)


def people() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    who = np.arange(60) % 12
    return random.normal(size=(60, 16)) + 2 * random.normal(size=(12, 16))[who], who


SAME_PEOPLE: dict[str, Callable[[np.ndarray], object]] = {
    "fractions": lambda who: who / 4 + 0.2,
    "beyond float64": lambda who: who + (1 << 62),
    "unsigned": lambda who: who.astype(np.uint64) + (1 << 63),
    "words": lambda who: [f"person {i}" for i in who],
    "objects": lambda who: np.array([f"person {i}" for i in who], dtype=object),
    "bytes": lambda who: np.array([b"p%d" % i for i in who]),
    "tensor": lambda who: torch.tensor(who),
    "negative": lambda who: who - 100,
}


@pytest.mark.parametrize("kind", SAME_PEOPLE)
def test_identities_are_told_apart_whatever_they_are(kind: str):
    features, who = people()
    given = SAME_PEOPLE[kind](who)
    truth = ev.verification_rate(features, who, [0.01, 0.1])
    np.testing.assert_array_equal(ev.verification_rate(features, given, [0.01, 0.1]), truth)
    trials = ev.random_trials(who, trials=2)
    for a, b in zip(trials, ev.random_trials(given, trials=2), strict=True):
        assert kind in ("words", "objects", "bytes") or a.gallery.tolist() == b.gallery.tolist()
    found, expected = ev.blufr(features, given, trials), ev.blufr(features, who, trials)
    np.testing.assert_array_equal(found.identification, expected.identification)
    trial = trials[0]
    parts = [np.asarray(given)[rows] for rows in (trial.gallery, trial.probes)]
    rate = ev.identification_rate(features[trial.gallery], parts[0], features[trial.probes], parts[1])
    assert rate == expected.identification[0]


def test_identities_of_gallery_and_probes_meet_by_value():
    features, who = people()
    gallery, probes = np.arange(6), np.arange(6, 60)
    truth = ev.identification_rate(features[gallery], who[gallery], features[probes], who[probes], 0.1)
    big = 1 << 53  # neighbours above it are one number in float64, as is what uint64 and int64 have in common
    mixed = ev.identification_rate(
        features[gallery],
        (who[gallery] + big).astype(np.uint64),
        features[probes],
        (who[probes] + big).astype(np.int64),
        0.1,
    )
    np.testing.assert_array_equal(mixed, truth)
    with pytest.raises(ValueError, match="known and unknown probes, got 0 known of 54"):
        ev.identification_rate(features[gallery], who[gallery], features[probes], who[probes].astype(str))


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (np.where(np.arange(60) == 5, np.nan, 1.0), "without missing entries, got .*nan.* at 5"),
        (["" if i == 5 else "a" for i in range(60)], "without missing entries, got .* at 5"),
        ([None if i == 5 else "a" for i in range(60)], "got object of NoneType, str"),
        (np.zeros(60, dtype=complex), "got complex128"),
        (np.zeros(60, dtype="M8[s]"), "got datetime64"),
        (np.zeros((60, 1)), r"shape \[60\], got \[60, 1\]"),
        (np.zeros(59), r"shape \[60\], got \[59\]"),
    ],
)
def test_identities_that_are_none_are_refused(labels: object, found: str):
    features, who = people()
    with pytest.raises(ValueError, match=f"^verification_rate: expected `labels` .*{found}"):
        ev.verification_rate(features, labels)
    with pytest.raises(ValueError, match=f"^identification_rate: expected `probe_labels` .*{found}"):
        ev.identification_rate(features, who, features, labels)
    with pytest.raises(ValueError, match=f"^blufr: expected `labels` .*{found}"):
        ev.blufr(features, labels, ev.random_trials(who))


def test_trials_name_what_is_wrong_with_their_rows():
    features, who = people()
    gallery, probes = np.arange(6), np.arange(6, 60)
    for trial, error, found in (
        (ev.Trial(gallery, probes - 7), IndexError, r"`probes` in \[0, 60\), got -1 at position 0"),
        (ev.Trial(gallery + 0.5, probes), ValueError, "`gallery` to be a row of integers"),
        (ev.Trial(gallery, np.r_[probes, 3]), ValueError, "each image once"),
    ):
        with pytest.raises(error, match=found):
            ev.blufr(features, who, [trial])
    with pytest.raises(ValueError, match="at least one trial"):
        ev.blufr(features, who, [])


# --------------------------------------------------------------------------------- features and rows

TAKES_FEATURES = {
    "unit_rows": ev.unit_rows,
    "merge_mirror": lambda f: ev.merge_mirror(f, f),
    "pair_scores": lambda f: ev.pair_scores(f, [0], [1]),
    "lfw_protocol": lambda f: ev.lfw_protocol(f, ev.Pairs(ROWS, (ROWS + 1) % PAIRS, IS_SAME, FOLD)),
    "verification_rate": lambda f: ev.verification_rate(f, ROWS // 2),
    "frame_scores": lambda f: ev.frame_scores(f, f),
}


@pytest.mark.parametrize("taker", TAKES_FEATURES)
@pytest.mark.parametrize(
    ("features", "found"),
    [
        (HISTOGRAMS + 0j, "got complex128"),
        (torch.tensor(HISTOGRAMS) + 0j, "got complex128"),
        (HISTOGRAMS.astype(str), "got <U"),
        (HISTOGRAMS.astype(object), "got object"),
        (HISTOGRAMS > 0.5, "got bool"),
        (np.where(HISTOGRAMS > 0.9, np.nan, HISTOGRAMS), "NaN or infinity at row"),
        (np.full((PAIRS, 3), -np.inf), "NaN or infinity at row 0"),
        (HISTOGRAMS[0], r"2-D \[rows, D\], got shape \[8\]"),
        (HISTOGRAMS[:, :0], "to have columns"),
        ([[1.0, 2.0], [3.0]], "to be an array, got list"),
        (np.ma.masked_array(HISTOGRAMS, HISTOGRAMS > 0.5), "without masked entries"),
    ],
)
def test_features_that_are_no_real_numbers_are_refused(taker: str, features: object, found: str):
    with pytest.raises(ValueError, match=f"^({taker}|unit_rows): expected `(features|front)` .*{found}"):
        TAKES_FEATURES[taker](features)


@pytest.mark.parametrize(
    ("dtype", "unit"),
    [
        ("f2", "f4"), ("f4", "f4"), ("f8", "f8"), (">f8", "f8"), (">f4", "f4"), (">f2", "f4"), ("i1", "f4"),
        ("u2", "f4"), ("i4", "f8"), ("i8", "f8"),
    ],
)  # fmt: skip
def test_features_are_read_as_the_float_that_holds_them(dtype: str, unit: str):
    given = (HISTOGRAMS * 100).astype(dtype)
    truth = given.astype(np.float64)
    truth /= np.linalg.norm(truth, axis=1, keepdims=True)
    found = ev.unit_rows(given)
    assert found.dtype == unit
    np.testing.assert_allclose(found, truth, rtol=2e-7 if unit == "f4" else 1e-14)


def test_mirror_sums_that_overflow_are_named():
    most = np.full((2, 3), np.finfo(np.float32).max, dtype=np.float32)
    with pytest.raises(ValueError, match=r"^merge_mirror: .*infinity at row 0"):
        ev.merge_mirror(most, most)
    np.testing.assert_array_equal(ev.merge_mirror(most, most, "max"), most)


@pytest.mark.parametrize("rows", [[0.7, 1.9], [0.0, 1.0], ["0", "1"], [True, False], [None, 1]])
def test_rows_that_are_no_integers_are_refused(rows: list[object]):
    for name, call in (
        ("Pairs.in_folds: expected `first`", lambda: ev.Pairs.in_folds(rows, [0, 1], [0, 1], 2)),
        ("Pairs.in_folds: expected `second`", lambda: ev.Pairs.in_folds([0, 1], rows, [0, 1], 2)),
        ("Pairs: expected `first`", lambda: ev.Pairs(rows, [0, 1], [0, 1], [0, 1])),
        ("pair_scores: expected `second`", lambda: ev.pair_scores(np.ones((2, 2)), [0, 1], rows)),
    ):
        with pytest.raises(ValueError, match=f"^{name} to be a row of integers"):
            call()


@pytest.mark.parametrize(
    ("call", "found"),
    [
        (lambda: ev.Pairs.in_folds([0], [1], [1], 0), "`folds` in .*got 0"),
        (lambda: ev.Pairs.in_folds([0], [1], [1], 2.5), "`folds` to be an int"),
        (lambda: ev.tar_at_far(SCORES, IS_SAME, np.nan), "tar_at_far: expected `far` in .*nan"),
        (lambda: ev.tar_at_far(SCORES, IS_SAME, []), "`far` to be a rate or a row"),
        (lambda: ev.tar_at_far(SCORES, IS_SAME, [[0.1]]), "`far` to be a rate or a row"),
        (lambda: ev.tar_at_far(SCORES, IS_SAME, "0.1"), "`far`"),
        (lambda: ev.tar_at_far(SCORES, IS_SAME, True), "`far`"),
        (lambda: ev.verification_rate(HISTOGRAMS, ROWS // 2, block=0), "`block` >= 1, got 0"),
        (lambda: ev.verification_rate(HISTOGRAMS, ROWS // 2, -0.1), "`far` in"),
        (lambda: ev.identification_rate(HISTOGRAMS, ROWS, HISTOGRAMS, ROWS, block=-1), "`block` >= 1"),
        (lambda: ev.identification_rate(HISTOGRAMS, ROWS, HISTOGRAMS[:, :3], ROWS), r"`probes` \[M, 8\]"),
        (lambda: ev.frame_scores(HISTOGRAMS, HISTOGRAMS[:, :3]), r"`second` \[F2, 8\]"),
        (lambda: ev.score_histogram(SCORES, 0), "`bins` >= 1"),
        (lambda: ev.score_histogram([]), "at least one score"),
        (lambda: ev.histogram_intersection(HISTOGRAMS, -HISTOGRAMS), "`b` to be finite and >= 0"),
        (lambda: ev.hik_svm_protocol(HISTOGRAMS, IS_SAME, FOLD, c=0), "`c` to be finite and > 0"),
        (lambda: ev.random_trials(ROWS // 2, trials=0), "`trials` >= 1"),
        (lambda: ev.random_trials(ROWS // 2, known=1), r"`known` in \(0, 1\)"),
    ],
)
def test_options_outside_their_range_are_named(call: Callable[[], object], found: str):
    with pytest.raises((ValueError, TypeError), match=found):
        call()


@pytest.mark.parametrize("pca", [0, -1, 0.0, 1.5, np.nan, "all"])
def test_pca_that_keeps_no_share_is_refused(pca: object):
    pairs = ev.Pairs(ROWS, (ROWS + 1) % PAIRS, IS_SAME, FOLD)
    with pytest.raises((ValueError, TypeError), match=r"^lfw_protocol: expected `pca`"):
        ev.lfw_protocol(HISTOGRAMS, pairs, pca=pca)


def test_what_was_checked_is_what_is_used():
    """Bools out of numbers: ~ and comparisons with bools mean what they say."""
    pairs = ev.Pairs([0, 2, 4, 6], [1, 3, 5, 7], [1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 1.0, 1.0])
    assert [column.dtype for column in (pairs.first, pairs.same, pairs.fold)] == [np.int64, bool, np.int64]
    features = np.eye(8)
    features[[1, 5]] = features[[0, 4]]
    assert ev.lfw_protocol(features, pairs).accuracy == 1
    unsigned = ev.Pairs(np.arange(4, dtype=np.uint8), np.arange(4), torch.ones(4), [0, 0, 1, 1])
    assert unsigned.first.dtype == np.int64 and unsigned.same.all()
