"""Identification against a gallery, with distractors: rank-k (CMC) and TPIR at an FPIR, in blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..engine.arguments import flag, integer
from ._checks import Array, Features, as_array, as_whole, false_accept_rates, numbered
from .embedding import progress
from .roc import allowed, false_accept_threshold
from .scores import unit_rows


@dataclass(frozen=True)
class Identification:
    """Of each probe its answer from the gallery, in the order of the probes.

    ``known`` [M]: whether its person is in the gallery. ``rank`` [M]: of its person, 1 the best; 0 if not
    known. ``mate_score`` [M]: of its person; -infinity if not known. ``top_score`` [M]: of the best person.
    ``people``: how many the gallery has, distractors included.
    """

    known: npt.NDArray[np.bool_]
    rank: npt.NDArray[np.int64]
    mate_score: Array
    top_score: Array
    people: int

    def rank_rate(self, k: int | Sequence[int] = (1, 5, 10)) -> npt.NDArray[np.float64]:
        """The share of known probes whose person is among the k best, for each k.

        Raises:
            ValueError: k below 1; no known probe.
        """
        op = "rank_rate"
        ranks = as_whole(op, "k", np.atleast_1d(as_array(op, "k", k)))
        if (ranks < 1).any():
            raise ValueError(f"{op}: expected `k` >= 1, got {ranks.min()}")
        return np.array([(self._known_ranks(op) <= k).mean() for k in ranks])

    def cmc(self, most: int = 100) -> npt.NDArray[np.float64]:
        """The cumulative match characteristic: ``rank_rate`` of 1, 2, ..., min(most, people)."""
        count = min(integer("cmc", "most", most, 1), self.people)
        found = np.bincount(self._known_ranks("cmc").clip(max=count + 1), minlength=count + 2)
        shares: npt.NDArray[np.float64] = np.cumsum(found[1 : count + 1]) / found.sum()
        return shares

    def _known_ranks(self, op: str) -> npt.NDArray[np.int64]:
        if not self.known.any():
            raise ValueError(f"{op}: expected a probe whose person is in the gallery, got none")
        return self.rank[self.known]

    def threshold(self, fpir: float | Sequence[float]) -> npt.NDArray[np.float64]:
        """The lowest threshold at which at most floor(fpir * strangers) probes of strangers get an answer.

        Raises:
            ValueError: a rate outside [0, 1]; no probe of a stranger.
        """
        op = "threshold"
        strangers = np.sort(self.top_score[~self.known])[::-1]
        rates = false_accept_rates(op, fpir, "fpir")
        if len(strangers) == 0:
            raise ValueError(f"{op}: expected probes of people who are not in the gallery, got none")
        return np.array([false_accept_threshold(strangers, allowed(rate, len(strangers))) for rate in rates])

    def tpir(self, fpir: float | Sequence[float] = (0.01, 0.1), *, rank: int = 1) -> npt.NDArray[np.float64]:
        """TPIR at each FPIR: the share of known probes whose person is above the threshold, within ``rank``.

        FPIR = share of strangers' probes with any person above the threshold (NIST FRVT 1:N; 1 - TPIR is
        FNIR). An FPIR below 1 / strangers lets no stranger get an answer.

        Raises:
            ValueError: as ``threshold`` and ``rank_rate``.
        """
        most = integer("tpir", "rank", rank, 1)
        found = self._known_ranks("tpir") <= most
        scores = self.mate_score[self.known]
        return np.array([(found & (scores > cut)).mean() for cut in self.threshold(fpir)])


def _best_per_person(scores: Array, starts: npt.NDArray[np.int64]) -> Array:
    best: Array = np.maximum.reduceat(scores, starts, axis=1)
    return best


def identify(
    gallery: Features,
    gallery_labels: object,
    probes: Features,
    probe_labels: object,
    *,
    distractors: Features | None = None,
    block: int = 512,
    gallery_block: int = 1 << 13,
    progress_bar: bool = False,
) -> Identification:
    """Every probe against a gallery, block by block: the rank and score of its person, and the best score.

    A person's score is the largest cosine with their gallery images. The rank of a probe's person is 1 + the
    number of other people whose score is at least as large: a tie counts against the probe, so that features
    that are all alike identify nobody. ``identification_rate`` is TPIR at rank 1, where ties go to the first.

    Args:
        gallery: [G, D], at least one image; pool a template's images before (``pool_templates``).
        gallery_labels: [G], numbers or words.
        probes: [M, D]; a probe whose label is not in the gallery is a stranger.
        probe_labels: [M].
        distractors: [K, D]: each image one more person of the gallery, whom no probe shows (MegaFace).
        block: probes at a time; ``gallery_block``: gallery images at a time. Memory: block * gallery_block
            scores, whatever G, M and K are.
        progress_bar: through tqdm, on stderr.

    Raises:
        ValueError: shapes, a feature that is not finite, a label that is missing.
        ImportError: a bar without tqdm.
    """
    op = "identify"
    block, width = integer(op, "block", block, 1), integer(op, "gallery_block", gallery_block, 1)
    enrolled, asked = unit_rows(gallery), unit_rows(probes)
    crowd = unit_rows(distractors) if distractors is not None else enrolled[:0]
    for name, part in (("probes", asked), ("distractors", crowd)):
        if part.shape[1] != enrolled.shape[1]:
            raise ValueError(f"{op}: expected `{name}` [., {enrolled.shape[1]}], got {list(part.shape)}")
    if len(enrolled) == 0 or len(asked) == 0:
        raise ValueError(f"{op}: expected images in gallery and probes, got {len(enrolled)} and {len(asked)}")
    names, who = numbered(
        op, gallery_labels=(gallery_labels, len(enrolled)), probe_labels=(probe_labels, len(asked))
    )
    order = np.argsort(names, kind="stable")
    enrolled, names = enrolled[order], names[order]
    people, first = np.unique(names, return_index=True)
    person = np.searchsorted(people, who).clip(max=len(people) - 1)
    known = people[person] == who
    mate = np.full(len(asked), -np.inf, dtype=asked.dtype)
    top, rank = mate.copy(), np.where(known, 1, 0)
    parts = list(_whole_people(first, len(enrolled), width))
    starts = range(0, len(asked), block)
    for start in progress(starts, len(starts), op, flag(op, "progress_bar", progress_bar)):
        rows = np.arange(start, min(start + block, len(asked)))
        # Twice over the gallery: who is better than the mate is known once the mate's score is.
        for again in (False, True):
            for low, high in parts:
                own = first[low:high]
                end = first[high] if high < len(first) else len(enrolled)
                scores = _best_per_person(asked[rows] @ enrolled[own[0] : end].T, own - own[0])
                here = np.flatnonzero(known[rows] & (person[rows] >= low) & (person[rows] < high))
                at = person[rows[here]] - low
                if not again:
                    mate[rows[here]] = scores[here, at]
                    top[rows] = np.maximum(top[rows], scores.max(axis=1))
                    continue
                scores[here, at] = -np.inf
                rank[rows] += ((scores >= mate[rows, None]) & known[rows, None]).sum(axis=1)
        for low in range(0, len(crowd), width):
            scores = asked[rows] @ crowd[low : low + width].T
            top[rows] = np.maximum(top[rows], scores.max(axis=1))
            rank[rows] += ((scores >= mate[rows, None]) & known[rows, None]).sum(axis=1)
    return Identification(known, rank, mate, top, len(people) + len(crowd))


def _whole_people(first: npt.NDArray[np.int64], images: int, most: int) -> list[tuple[int, int]]:
    """Ranges of people whose images are about ``most``; a person is never cut in two."""
    ends = np.r_[first[1:], images]
    ranges, low = [], 0
    while low < len(first):
        high = max(int(np.searchsorted(ends, first[low] + most, side="right")), low + 1)
        ranges.append((low, high))
        low = high
    return ranges
