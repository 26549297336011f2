"""BLUFR-style rates: every pair of the test images, at low false accept rates.

Verification rate at a FAR over all pairs, and the open-set detection-and-identification rate (DIR) of
probes against a gallery at a FAR over probes of strangers (Liao, Lei, Yi, Li, IJCB 2014). Impostor scores
are never all kept: what decides a threshold is the few largest of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..engine.arguments import BETWEEN_0_AND_1, integer, number
from ._checks import RATE, Array, Features, as_array, as_rows, false_accept_rates, numbered
from .roc import allowed, false_accept_threshold
from .scores import unit_rows


def verification_rate(
    features: Features, labels: object, far: float | Sequence[float] = 0.001, *, block: int = 512
) -> npt.NDArray[np.float64]:
    """TAR at each FAR over all M (M - 1) / 2 pairs, as ``tar_at_far`` would say.

    Memory: block * M scores, the genuine scores, and the largest max(far) * impostors impostor scores.

    Args:
        features: [M, D].
        labels: [M], who is on each image: numbers or words; images of equal labels are of one person.
        far: in [0, 1].
        block: rows at a time.

    Raises:
        ValueError: shapes, rates, a feature that is not finite, a label that is missing; one person, or no
            person twice.
    """
    op = "verification_rate"
    unit, rates, block = unit_rows(features), false_accept_rates(op, far), integer(op, "block", block, 1)
    (who,) = numbered(op, labels=(labels, len(unit)))
    counts = np.unique(who, return_counts=True)[1].astype(np.int64)
    genuine_pairs = int((counts * (counts - 1) // 2).sum())
    impostor_pairs = len(who) * (len(who) - 1) // 2 - genuine_pairs
    if genuine_pairs == 0 or impostor_pairs == 0:
        raise ValueError(f"{op}: expected same and different pairs, got {genuine_pairs} and {impostor_pairs}")
    accepted = [allowed(rate, impostor_pairs) for rate in rates]
    keep = min(max(accepted) + 1, impostor_pairs)
    largest = np.empty(0, dtype=unit.dtype)
    genuine: list[Array] = []
    for start in range(0, len(unit), block):
        rows = np.arange(start, min(start + block, len(unit)))
        scores = unit[rows] @ unit[start:].T
        later = np.arange(start, len(unit))[None, :] > rows[:, None]  # each pair once
        same = who[rows, None] == who[None, start:]
        genuine.append(scores[later & same])
        impostors = scores[later & ~same]
        if len(largest) == keep:  # most blocks bring little that is new
            impostors = impostors[impostors > largest.min()]
        largest = np.concatenate([largest, impostors])
        if len(largest) > keep:
            largest = np.partition(largest, len(largest) - keep)[len(largest) - keep :]
    ordered = np.sort(largest)[::-1]
    matched = np.concatenate(genuine)
    # `ordered` holds every impostor there is when keep reached impostor_pairs.
    return np.array([(matched > false_accept_threshold(ordered, count)).mean() for count in accepted])


def identification_rate(
    gallery: Features,
    gallery_labels: object,
    probes: Features,
    probe_labels: object,
    far: float | Sequence[float] = 0.01,
    *,
    block: int = 512,
) -> npt.NDArray[np.float64]:
    """Open-set DIR at rank 1: known probes whose best gallery image is theirs and above the threshold.

    A probe whose label is not in the gallery is a stranger. The threshold is the lowest that lets at most
    floor(far * strangers) of them in; DIR is the share of known probes that are accepted and named right.

    Args:
        gallery: [G, D].
        probes: [M, D].
        gallery_labels: [G], numbers or words.
        probe_labels: [M].
        far: in [0, 1].
        block: probes at a time.

    Raises:
        ValueError: shapes, rates, a feature that is not finite, a label that is missing; no known or no
            unknown probe.
    """
    op = "identification_rate"
    known, asked = unit_rows(gallery), unit_rows(probes)
    rates, block = false_accept_rates(op, far), integer(op, "block", block, 1)
    if len(known) == 0:
        raise ValueError(f"{op}: expected at least one gallery image, got none")
    if known.shape[1] != asked.shape[1]:
        raise ValueError(f"{op}: expected `probes` [M, {known.shape[1]}], got {list(asked.shape)}")
    names, who = numbered(
        op, gallery_labels=(gallery_labels, len(known)), probe_labels=(probe_labels, len(asked))
    )
    best = np.empty(len(asked), dtype=np.result_type(asked, known))
    said = np.empty(len(asked), dtype=np.int64)
    for start in range(0, len(asked), block):
        part = slice(start, start + block)
        scores = asked[part] @ known.T
        winner = scores.argmax(axis=1)
        best[part], said[part] = scores[np.arange(len(winner)), winner], names[winner]
    enrolled = np.isin(who, names)
    if not enrolled.any() or enrolled.all():
        raise ValueError(f"{op}: expected known and unknown probes, got {enrolled.sum()} known of {len(who)}")
    strangers = np.sort(best[~enrolled])[::-1]
    right, confidence = (said == who)[enrolled], best[enrolled]
    thresholds = [false_accept_threshold(strangers, allowed(rate, len(strangers))) for rate in rates]
    return np.array([(right & (confidence > threshold)).mean() for threshold in thresholds])


@dataclass(frozen=True)
class Trial:
    """Row numbers: ``gallery`` has one image of each known person, ``probes`` known people and strangers."""

    gallery: npt.NDArray[np.int64]
    probes: npt.NDArray[np.int64]


def random_trials(labels: object, *, known: float = 0.25, trials: int = 10, seed: int = 0) -> list[Trial]:
    """Random trials: a share of the people with two images or more is known, one image of each enrolled.

    BLUFR publishes its own ten (about a quarter of the people known); numbers that are to be compared with
    a paper need those.
    """
    op = "random_trials"
    known, trials = number(op, "known", known, BETWEEN_0_AND_1), integer(op, "trials", trials, 1)
    (who,) = numbered(op, labels=(labels, as_array(op, "labels", labels).size))
    people, counts = np.unique(who, return_counts=True)
    candidates = people[counts >= 2]
    count = max(1, round(known * len(people)))
    if count > len(candidates) or count >= len(people):
        raise ValueError(
            f"{op}: expected at least {count} people with two images and strangers beside them,"
            f" got {len(candidates)} of {len(people)}"
        )
    random = np.random.default_rng(integer(op, "seed", seed, 0))
    result = []
    for _ in range(trials):
        chosen = random.choice(candidates, count, replace=False)
        gallery = np.array([random.choice(np.flatnonzero(who == person)) for person in chosen])
        result.append(Trial(gallery, np.setdiff1d(np.arange(len(who)), gallery)))
    return result


@dataclass(frozen=True)
class BlufrResult:
    """A value per trial; BLUFR reports mean - standard deviation, which is what ``report`` gives."""

    verification: npt.NDArray[np.float64]
    identification: npt.NDArray[np.float64]

    def report(self) -> tuple[float, float]:
        """(verification rate, DIR), each mean - standard deviation over the trials."""
        spread = 1 if len(self.verification) > 1 else 0
        values = (self.verification, self.identification)
        verification, identification = (float(v.mean() - v.std(ddof=spread)) for v in values)
        return verification, identification


def blufr(
    features: Features,
    labels: object,
    trials: Sequence[Trial],
    *,
    verification_far: float = 0.001,
    identification_far: float = 0.01,
) -> BlufrResult:
    """Verification rate at FAR 0.1 % and open-set DIR at FAR 1 % (rank 1) in each trial.

    Verification is over all pairs of a trial's images, gallery and probes together.

    Args:
        features: [M, D].
        labels: [M], numbers or words.
        trials: at least one, of rows of ``features``, each image once in a trial.

    Raises:
        ValueError: as ``verification_rate`` and ``identification_rate``; an image twice.
        IndexError: a row number outside the features, by its place.
    """
    op = "blufr"
    unit = unit_rows(features)
    (who,) = numbered(op, labels=(labels, len(unit)))
    far = number(op, "verification_far", verification_far, RATE)
    stranger_far = number(op, "identification_far", identification_far, RATE)
    if len(trials) == 0:
        raise ValueError(f"{op}: expected at least one trial, got none")
    verification, identification = [], []
    for trial in trials:
        gallery = as_rows(op, "gallery", trial.gallery, len(unit), what="position")
        probes = as_rows(op, "probes", trial.probes, len(unit), what="position")
        rows = np.r_[gallery, probes]
        if len(np.unique(rows)) != len(rows):
            raise ValueError(f"{op}: expected each image once in gallery and probes, got one twice")
        verification.append(verification_rate(unit[rows], who[rows], far)[0])
        parts = (unit[gallery], who[gallery], unit[probes], who[probes])
        identification.append(identification_rate(*parts, stranger_far)[0])
    return BlufrResult(np.array(verification), np.array(identification))
