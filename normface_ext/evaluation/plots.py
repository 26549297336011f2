"""The ROC figure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ._optional import require
from .roc import Roc


def plot_roc(curves: Mapping[str, Roc], path: str | Path, *, title: str = "") -> None:
    """TAR against FAR on a logarithmic axis, where face verification is decided; a file per its suffix."""
    require("matplotlib", "plot_roc")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axis = figure.subplots()
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
    axis.set_xlabel("false accept rate (log); the dot is the equal error rate")
    axis.set_ylabel("true accept rate")
    axis.set_title(title, fontsize=11)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=130)
