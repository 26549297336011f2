"""identify against the whole matrix of scores, and against identification_rate."""

from __future__ import annotations

import resource

import numpy as np
import pytest
from sklearn.metrics import top_k_accuracy_score
from sklearn.preprocessing import normalize

from normface_ext import evaluation as ev


def drawn(kind: str, seed: int = 0):
    """Gallery [G, D] with labels, probes [M, D] with labels, distractors [K, D]."""
    random = np.random.default_rng(seed)
    people = np.repeat(np.arange(30), random.integers(1, 4, 30)) if kind != "one each" else np.arange(30)
    people = random.permutation(people)
    who = random.integers(0, 40, 120)  # 30 to 39 are strangers
    centres = random.normal(size=(40, 8))
    gallery = centres[people] + 0.8 * random.normal(size=(len(people), 8))
    probes = centres[who] + 0.8 * random.normal(size=(120, 8))
    crowd = random.normal(size=(75, 8))
    if kind == "ties":  # whole numbers of one length: equal cosines are equal numbers
        gallery, probes, crowd = (
            np.eye(4)[np.abs(x[:, 0] * 3).astype(int) % 4] for x in (gallery, probes, crowd)
        )
    return gallery, people, probes, who, crowd


def counted(gallery, people, probes, who, crowd):
    """Ranks, mate scores and top scores from the scores of all probes and all people at once."""
    scores = normalize(probes) @ normalize(np.r_[gallery, crowd]).T
    names = np.r_[people, -1 - np.arange(len(crowd))]
    known = np.isin(who, people)
    ranks, mates = np.zeros(len(who), int), np.full(len(who), -np.inf)
    for at in range(len(who)):
        best = {name: scores[at, names == name].max() for name in np.unique(names)}
        if known[at]:
            mates[at] = best.pop(who[at])
            ranks[at] = 1 + sum(value >= mates[at] for value in best.values())
    return known, ranks, mates, scores.max(axis=1)


@pytest.mark.parametrize("kind", ["one each", "several", "ties"])
@pytest.mark.parametrize(("block", "gallery_block"), [(512, 8192), (7, 5), (1, 1), (120, 30)])
@pytest.mark.parametrize("crowded", [False, True])
def test_ranks_and_scores_are_those_of_the_whole_matrix(
    kind: str, block: int, gallery_block: int, crowded: bool
):
    gallery, people, probes, who, crowd = drawn(kind)
    crowd = crowd if crowded else crowd[:0]
    known, ranks, mates, tops = counted(gallery, people, probes, who, crowd)
    result = ev.identify(
        gallery, people, probes, who, distractors=crowd if crowded else None, block=block,
        gallery_block=gallery_block,
    )  # fmt: skip
    np.testing.assert_array_equal(result.known, known)
    np.testing.assert_array_equal(result.rank, ranks)
    np.testing.assert_allclose(result.mate_score, mates, atol=1e-12)
    np.testing.assert_allclose(result.top_score, tops, atol=1e-12)
    assert result.people == 30 + len(crowd)
    for k in (1, 2, 5, 30):
        assert result.rank_rate(k)[0] == (ranks[known] <= k).mean()
    np.testing.assert_allclose(
        result.cmc(), [(ranks[known] <= k).mean() for k in range(1, len(result.cmc()) + 1)]
    )
    assert (
        len(result.cmc()) == min(100, result.people) and result.cmc(3).tolist() == result.cmc()[:3].tolist()
    )
    for fpir in (0.0, 1e-6, 0.05, 0.3, 1.0):
        strangers = np.sort(result.top_score[~known])
        let_in = int(fpir * len(strangers) + 1e-9)
        cut = strangers[-let_in - 1] if let_in < len(strangers) else -np.inf
        assert (result.top_score[~known] > cut).mean() <= fpir
        for rank in (1, 3):
            truth = ((ranks[known] <= rank) & (result.mate_score[known] > cut)).mean()
            assert result.tpir(fpir, rank=rank)[0] == truth


def test_rank_k_is_top_k_accuracy_where_nothing_ties():
    gallery, people, probes, who, _ = drawn("one each")
    known = np.isin(who, people)
    scores = (normalize(probes) @ normalize(gallery).T)[:, np.argsort(people)]
    result = ev.identify(gallery, people, probes, who)
    for k in (1, 5, 10):
        truth = top_k_accuracy_score(who[known], scores[known], k=k, labels=np.arange(30))
        assert result.rank_rate(k)[0] == pytest.approx(truth)
    # Rank 1 at a FAR among strangers is BLUFR's rate.
    for far in (0.0, 0.01, 0.1, 0.5):
        assert result.tpir(far)[0] == ev.identification_rate(gallery, people, probes, who, far)[0]


def test_features_that_are_all_alike_identify_nobody():
    ones = np.ones((6, 4))
    result = ev.identify(ones, list("abcdef"), ones, list("abcdez"), distractors=np.ones((4, 4)))
    assert result.rank.tolist() == [10] * 5 + [0] and result.rank_rate([1, 9, 10]).tolist() == [0, 0, 1]
    assert result.tpir([0.0, 0.5]).tolist() == [0, 0] and result.tpir(1.0, rank=10).tolist() == [1]


def test_labels_are_words_or_numbers_and_found_by_value():
    gallery, people, probes, who, _ = drawn("several")
    truth = ev.identify(gallery, people, probes, who).rank
    words = ev.identify(gallery, [f"p{p}" for p in people], probes, [f"p{p}" for p in who])
    assert words.rank.tolist() == truth.tolist()
    assert ev.identify(gallery, people * 1.0, probes, who).rank.tolist() == truth.tolist()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"probes": np.ones((2, 3))}, r"`probes` \[., 2\], got \[2, 3\]"),
        ({"distractors": np.ones((2, 3))}, r"`distractors` \[., 2\]"),
        (
            {"gallery": np.ones((0, 2)), "gallery_labels": []},
            "images in gallery and probes, got 0 and 2",
        ),
        (
            {"probes": np.ones((0, 2)), "probe_labels": []},
            "images in gallery and probes, got 2 and 0",
        ),
        ({"gallery_labels": [1]}, r"`gallery_labels` to have shape \[2\]"),
        ({"probe_labels": [1, np.nan]}, "`probe_labels`"),
        ({"probes": np.full((2, 2), np.nan)}, "to be finite"),
        ({"block": 0}, "`block`"),
        ({"gallery_block": 0}, "`gallery_block`"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, object], sentence: str):
    given = {
        "gallery": np.ones((2, 2)), "gallery_labels": [1, 2],
        "probes": np.ones((2, 2)), "probe_labels": [1, 3],
        **change,
    }  # fmt: skip
    with pytest.raises(ValueError, match=sentence):
        ev.identify(**given)


def test_rates_without_known_or_unknown_probes_are_refused():
    ones = np.ones((2, 2))
    known = ev.identify(ones, [1, 2], ones, [1, 2])
    with pytest.raises(ValueError, match="probes of people who are not in the gallery, got none"):
        known.tpir(0.1)
    strangers = ev.identify(ones, [1, 2], ones, [3, 4])
    for call in (strangers.cmc, strangers.rank_rate, lambda: strangers.tpir(0.1)):
        with pytest.raises(ValueError, match="a probe whose person is in the gallery, got none"):
            call()
    for call in (lambda: known.rank_rate(0), lambda: known.cmc(0), lambda: known.rank_rate(1.5)):
        with pytest.raises(ValueError, match=r"`k`|`most`"):
            call()


def test_a_large_gallery_takes_bounded_memory():
    random = np.random.default_rng(0)
    crowd = random.normal(size=(60_000, 32)).astype(np.float32)
    probes = random.normal(size=(600, 32)).astype(np.float32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = ev.identify(probes[:300], np.arange(300), probes, np.arange(600), distractors=crowd)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024  # all scores at once: 137
    assert (result.rank[:300] == 1).all() and result.people == 60_300
    assert grown < 100, f"{grown:.0f} MiB"
