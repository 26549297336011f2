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

from .roc import allowed, false_accept_threshold
from .scores import Array, Features, unit_rows


def _labels(op: str, labels: object, rows: int) -> npt.NDArray[np.int64]:
    checked = np.asarray(labels)
    if checked.shape != (rows,):
        raise ValueError(f"{op}: expected `labels` to have shape [{rows}], got {list(checked.shape)}")
    return checked.astype(np.int64)


def verification_rate(
    features: Features, labels: object, far: float | Sequence[float] = 0.001, *, block: int = 512
) -> npt.NDArray[np.float64]:
    """TAR at each FAR over all M (M - 1) / 2 pairs, as ``tar_at_far`` would say.

    Memory: block * M scores, the genuine scores, and the largest max(far) * impostors impostor scores.

    Args:
        features: [M, D].
        labels: [M], who is on each image.
    """
    op = "verification_rate"
    unit = unit_rows(features)
    who = _labels(op, labels, len(unit))
    counts = np.unique(who, return_counts=True)[1].astype(np.int64)
    genuine_pairs = int((counts * (counts - 1) // 2).sum())
    impostor_pairs = len(who) * (len(who) - 1) // 2 - genuine_pairs
    if genuine_pairs == 0 or impostor_pairs == 0:
        raise ValueError(f"{op}: expected same and different pairs, got {genuine_pairs} and {impostor_pairs}")
    accepted = [allowed(value, impostor_pairs) for value in np.atleast_1d(far)]
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
        gallery_labels: [G].
        probe_labels: [M].
    """
    op = "identification_rate"
    known, asked = unit_rows(gallery), unit_rows(probes)
    if len(known) == 0:
        raise ValueError(f"{op}: expected at least one gallery image, got none")
    names, who = _labels(op, gallery_labels, len(known)), _labels(op, probe_labels, len(asked))
    best, said = np.empty(len(asked), dtype=asked.dtype), np.empty(len(asked), dtype=np.int64)
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
    thresholds = [false_accept_threshold(strangers, allowed(f, len(strangers))) for f in np.atleast_1d(far)]
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
    if not 0 < known < 1:
        raise ValueError(f"random_trials: expected `known` in (0, 1), got {known}")
    who = np.asarray(labels)
    people, counts = np.unique(who, return_counts=True)
    candidates = people[counts >= 2]
    count = max(1, round(known * len(people)))
    if count > len(candidates) or count >= len(people):
        raise ValueError(
            f"random_trials: expected at least {count} people with two images and strangers beside them,"
            f" got {len(candidates)} of {len(people)}"
        )
    random = np.random.default_rng(seed)
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
    """
    unit = unit_rows(features)
    who = _labels("blufr", labels, len(unit))
    verification, identification = [], []
    for trial in trials:
        rows = np.r_[trial.gallery, trial.probes]
        verification.append(verification_rate(unit[rows], who[rows], verification_far)[0])
        parts = (unit[trial.gallery], who[trial.gallery], unit[trial.probes], who[trial.probes])
        identification.append(identification_rate(*parts, identification_far)[0])
    return BlufrResult(np.array(verification), np.array(identification))
