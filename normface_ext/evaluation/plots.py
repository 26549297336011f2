"""Figures: the ROC curve, the histogram of scores, the CMC curve."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.arguments import integer
from ._checks import Array, judged_pairs
from ._optional import require
from .identification import Identification
from .roc import Roc


def _axis(op: str, title: str, x: str, y: str) -> tuple[Any, Any]:
    require("matplotlib", op)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axis = figure.subplots()
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.set_title(title, fontsize=11)
    axis.grid(alpha=0.3)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def plot_roc(curves: Mapping[str, Roc], path: str | Path, *, title: str = "") -> None:
    """TAR against FAR on a logarithmic axis, where face verification is decided; a file per its suffix."""
    x = "false accept rate (log); the dot is the equal error rate"
    figure, axis = _axis("plot_roc", title, x, "true accept rate")
    lowest = 1.0
    for name, curve in curves.items():
        above = curve.far > 0
        # From the first false accept on; left of it the data say nothing.
        far, tar = curve.far[above], curve.tar[above]
        lowest = min(lowest, float(far[0]))
        axis.step(far, tar, where="post", label=f"{name}  AUC {curve.auc:.4f}, EER {curve.eer:.2%}")
        axis.plot(curve.eer, 1 - curve.eer, "o", color=axis.lines[-1].get_color(), markersize=5)
    axis.set_xscale("log")
    axis.set_xlim(lowest, 1)
    axis.set_ylim(top=1.005)
    axis.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=130)


def plot_scores(
    scores: Array,
    same: Array,
    path: str | Path,
    *,
    thresholds: Mapping[str, float] | None = None,
    bins: int = 100,
    title: str = "",
) -> None:
    """Densities of the scores of same and of different pairs, with thresholds as lines.

    Each density has area 1, however many pairs of its kind there are, so that their overlap is seen.

    Args:
        scores: [P], finite.
        same: [P], bools, or numbers that are 0 and 1; some of each.
        thresholds: name -> score.

    Raises:
        ValueError: as ``tar_at_far``.
        ImportError: without matplotlib.
    """
    op = "plot_scores"
    scores, is_same = judged_pairs(op, scores, same)
    figure, axis = _axis(op, title, "score", "density")
    low, high = float(scores.min()), float(scores.max())
    edges = np.linspace(low, high if high > low else low + 1, integer(op, "bins", bins, 1) + 1)
    for kind, name in ((~is_same, "different people"), (is_same, "same person")):
        label = f"{name}, {int(kind.sum()):,} pairs"
        axis.hist(scores[kind].astype(np.float64), edges, density=True, alpha=0.55, label=label)
    for i, (name, value) in enumerate((thresholds or {}).items()):
        axis.axvline(value, color="black", linestyle=("-", "--", ":")[i % 3], linewidth=1, label=name)
    axis.set_xlim(edges[0], edges[-1])
    axis.legend(frameon=False)
    figure.savefig(path, dpi=130)


def plot_cmc(
    results: Mapping[str, Identification], path: str | Path, *, most: int = 100, title: str = ""
) -> None:
    """The share of known probes whose person is among the k best, against k on a logarithmic axis.

    Raises:
        ValueError: no known probe.
        ImportError: without matplotlib.
    """
    x = "rank k (log)"
    figure, axis = _axis("plot_cmc", title, x, "share of probes identified within k")
    longest = 1
    for name, result in results.items():
        curve = result.cmc(most)
        longest = max(longest, len(curve))
        label = f"{name}  rank 1 {curve[0]:.2%}, {result.people:,} people"
        axis.plot(np.arange(1, len(curve) + 1), curve, marker=".", markersize=4, label=label)
    axis.set_xscale("log")
    axis.set_xlim(0.95, max(longest, 2) * 1.05)
    ticks = [k for k in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if k <= longest]
    axis.set_xticks(ticks, [str(k) for k in ticks])
    axis.minorticks_off()
    axis.set_ylim(top=1.005)
    axis.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=130)
