"""Labels of pairs, folds and scores that are none: every protocol says so, none guesses."""

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
VIDEOS = tuple(f"p{i}/0" for i in range(PAIRS)), tuple(f"p{i}/1" for i in range(PAIRS))

#: Everything that takes labels of pairs.
TAKES_SAME: dict[str, Callable[[object], object]] = {
    "best_threshold": lambda same: ev.best_threshold(SCORES, same),
    "tar_at_far": lambda same: ev.tar_at_far(SCORES, same, 0.1),
    "roc": lambda same: ev.roc(SCORES, same),
    "Pairs": lambda same: ev.Pairs(ROWS, ROWS, same, FOLD),
    "Pairs.in_folds": lambda same: ev.Pairs.in_folds(ROWS, ROWS, same, 4),
    "VideoPairs": lambda same: ev.VideoPairs(*VIDEOS, same, FOLD),
    "hik_svm_protocol": lambda same: ev.hik_svm_protocol(HISTOGRAMS, same, FOLD),
}
by_taker = pytest.mark.parametrize("taker", TAKES_SAME)


def with_entry(value: float, at: int = 7) -> np.ndarray:
    labels = IS_SAME.astype(float)
    labels[at] = value
    return labels


@by_taker
@pytest.mark.parametrize(
    ("same", "found"),
    [
        (np.where(IS_SAME, 1, -1), "-1 at pair 0 and 19 more"),
        (np.where(IS_SAME, 1, -1).astype(np.int8), "-1 at pair 0"),
        (torch.tensor(IS_SAME) * 2 - 1, "-1 at pair 0"),
        (np.where(IS_SAME, 1, 2), "2 at pair 0"),
        (np.where(IS_SAME, 255, 0).astype(np.uint8), "255 at pair 1"),
        (with_entry(np.nan), "nan at pair 7 and 0 more"),
        (with_entry(np.inf), "inf at pair 7"),
        (with_entry(0.9), "0.9 at pair 7"),
        (with_entry(np.nextafter(1.0, 2.0)), "1.0000000000000002 at pair 7"),
        (np.where(IS_SAME, "1", "0"), "<U1, '0' first"),
        (np.where(IS_SAME, b"True", b"False"), r"\|S5"),
        (np.where(IS_SAME, "1", "0").astype(object), "object of str"),
        ([*IS_SAME.tolist()[:-1], None], "object of NoneType, bool"),
        (IS_SAME.astype(complex), "complex128"),
        (IS_SAME[:, None], r"one shape \[P\], got \[40, 1\]"),
        (np.ma.masked_array(IS_SAME, ~IS_SAME), "without masked entries, got 20"),
        ("same", "got "),
        (None, "got "),
    ],
)
def test_labels_that_are_no_answers_are_refused(taker: str, same: object, found: str):
    with pytest.raises(ValueError, match=rf"^{taker}: expected `same` .*{found}"):
        TAKES_SAME[taker](same)


@by_taker
@pytest.mark.parametrize("kind", [list, torch.tensor, object, np.uint8, np.int64, np.float32, np.float64])
def test_labels_that_are_0_and_1_are_read(taker: str, kind: Callable[..., object]):
    given = IS_SAME.astype(kind) if isinstance(kind, type) and kind is not list else kind(IS_SAME.tolist())
    found, truth = TAKES_SAME[taker](given), TAKES_SAME[taker](IS_SAME)
    if isinstance(found, (ev.Pairs, ev.VideoPairs)):
        assert found.same.dtype == bool
        np.testing.assert_array_equal(found.same, IS_SAME)
    elif isinstance(found, ev.Roc):
        assert (found.auc, found.eer) == (truth.auc, truth.eer)
    else:
        np.testing.assert_array_equal(found, truth)


@by_taker
def test_labels_of_another_length_are_refused(taker: str):
    with pytest.raises(ValueError, match=rf"^(VideoP|P|{taker}).*(shape|length|\[P\])"):
        TAKES_SAME[taker](IS_SAME[:-1])


ONE_KIND = {
    "tar_at_far": lambda same, fold: ev.tar_at_far(SCORES, same, 0.1),
    "roc": lambda same, fold: ev.roc(SCORES, same),
}
IN_FOLDS = {
    "hik_svm_protocol": lambda same, fold: ev.hik_svm_protocol(HISTOGRAMS, same, fold),
    "lfw_protocol": lambda same, fold: ev.lfw_protocol(
        HISTOGRAMS, ev.Pairs(ROWS, (ROWS + 1) % PAIRS, same, fold)
    ),
    "ytf_protocol": lambda same, fold: ev.ytf_protocol(
        dict.fromkeys(VIDEOS[0] + VIDEOS[1], HISTOGRAMS[:2]), ev.VideoPairs(*VIDEOS, same, fold)
    ),
}


@pytest.mark.parametrize("value", [0, 1])
@pytest.mark.parametrize("taker", [*ONE_KIND, *IN_FOLDS])
def test_labels_of_one_kind_are_refused(taker: str, value: int):
    call = {**ONE_KIND, **IN_FOLDS}[taker]
    with pytest.raises(ValueError, match=rf"^{taker}: expected same and different pairs"):
        call(np.full(PAIRS, value), FOLD)


@pytest.mark.parametrize("taker", IN_FOLDS)
def test_folds_of_one_kind_are_named(taker: str):
    fold = FOLD.copy()
    fold[:10] = np.where(IS_SAME[:10], 70, 80)
    expected = rf"^{taker}: .*every fold, got 5 same of 5 in fold 70, 0 same of 5 in fold 80$"
    with pytest.raises(ValueError, match=expected):
        IN_FOLDS[taker](IS_SAME, fold)
    with pytest.raises(ValueError, match="and 37 more folds of one kind"):
        IN_FOLDS[taker](IS_SAME, np.arange(PAIRS))
    with pytest.raises(ValueError, match=rf"^{taker}: expected pairs in at least 2 folds, got 1"):
        IN_FOLDS[taker](IS_SAME, np.zeros(PAIRS))
    for bad in (FOLD + 0.5, np.where(IS_SAME, np.nan, FOLD), FOLD.astype(str), FOLD + 1e300):
        with pytest.raises(ValueError, match="`fold` to be a row of whole numbers"):
            IN_FOLDS[taker](IS_SAME, bad)


# ------------------------------------------------------------------------------------------- scores

TAKES_SCORES = {
    "best_threshold": lambda scores: ev.best_threshold(scores, IS_SAME),
    "tar_at_far": lambda scores: ev.tar_at_far(scores, IS_SAME, 0.1),
    "roc": lambda scores: ev.roc(scores, IS_SAME),
    "score_histogram": lambda scores: ev.score_histogram(scores),
}


@pytest.mark.parametrize("taker", TAKES_SCORES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_refused(taker: str, value: float):
    scores = SCORES.copy()
    scores[[3, 9]] = value
    with pytest.raises(ValueError, match=rf"^{taker}: expected `scores` without NaN or inf.*pair 3 of 40"):
        TAKES_SCORES[taker](scores)


@pytest.mark.parametrize("taker", TAKES_SCORES)
@pytest.mark.parametrize(
    "scores",
    [
        SCORES + 1j,
        SCORES.astype(str),
        SCORES.astype(object),
        IS_SAME,
        np.arange(PAIRS).astype("M8[s]"),
        np.arange(PAIRS) + (1 << 60),
        np.ma.masked_array(SCORES, IS_SAME),
        torch.tensor(SCORES).to_sparse(),
    ],
    ids=lambda scores: str(scores.dtype),
)
def test_scores_that_are_no_real_numbers_are_refused(taker: str, scores: object):
    with pytest.raises(ValueError, match=rf"^{taker}: expected `scores` (to be|without masked)"):
        TAKES_SCORES[taker](scores)


@pytest.mark.parametrize("names", ["video", None, 3, np.array("a"), [1] * PAIRS, [*VIDEOS[0][1:], None]])
def test_videos_that_are_no_names_are_refused(names: object):
    for columns in ((names, VIDEOS[1]), (VIDEOS[0], names)):
        with pytest.raises(TypeError, match=r"^VideoPairs: expected `(first|second)` to be names of videos"):
            ev.VideoPairs(*columns, IS_SAME, FOLD)
