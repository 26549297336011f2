"""What the diagrams of the documentation are drawn with."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, FAINT, PAPER = "#23272e", "#737b87", "#ffffff"
PREPARE, SWEEP, FINISH, TARGET = "#2a9d8f", "#3f6fb5", "#c8421c", "#e09f1f"


def box(axis, x: float, y: float, width: float, height: float, color: str, title: str) -> None:
    style = "round,pad=0,rounding_size=0.12"
    axis.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=color + "14", edgecolor=color, lw=1.6)
    )
    axis.text(x + 0.15, y + height - 0.16, title, color=color, weight="bold", fontsize=13, va="top")


def lines(axis, x: float, y: float, texts: list[str], step: float = 0.34, size: float = 10.5) -> None:
    for i, text in enumerate(texts):
        axis.text(x, y - i * step, text, color=INK, fontsize=size, va="top")


def arrow(axis, start: tuple[float, float], end: tuple[float, float], color: str = INK, bend: float = 0.0):
    axis.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=14,
            color=color,
            lw=1.5,
            connectionstyle=f"arc3,rad={bend}",
        )
    )


def canvas(name: str, width: float, height: float):
    """A figure, and an axis over all of it in inches; ``name`` makes the file the same each time."""
    plt.rcParams.update({"font.family": "DejaVu Sans", "svg.hashsalt": name})
    figure = plt.figure(figsize=(width, height), facecolor=PAPER)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_xlim(0, width)
    axis.set_ylim(0, height)
    axis.axis("off")
    return figure, axis


def save(figure, path: Path) -> None:
    figure.savefig(path, facecolor=PAPER, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
