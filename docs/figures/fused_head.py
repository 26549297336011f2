"""Draws fused_head.svg, the diagram of "How the fused head works".

python docs/figures/fused_head.py [FILE]
"""

from __future__ import annotations

import sys
from pathlib import Path

from drawing import FAINT, FINISH, INK, PAPER, PREPARE, SWEEP, TARGET, arrow, box, canvas, lines, save
from matplotlib.patches import Rectangle


def sheet(axis, x: float, y: float, tiles: int, current: int) -> None:
    """The N x C scores as strips of classes: done, in work, to come; the targets as dots."""
    width, height = 0.30, 1.15
    for i in range(tiles):
        fill = SWEEP if i == current else SWEEP + "40" if i < current else PAPER
        left = x + i * width
        axis.add_patch(Rectangle((left, y), width, height, facecolor=fill, edgecolor=SWEEP, lw=0.8))
    for row, column in enumerate((2.5, 7.4, 0.6, 5.3, 9.2, 3.7)):
        axis.plot(x + column * width, y + height - (row + 0.5) * height / 6, "s", color=TARGET, markersize=4)
    axis.text(
        x - 0.08, y + height / 2, "N rows", rotation=90, ha="right", va="center", fontsize=9, color=FAINT
    )
    axis.text(x + tiles * width / 2, y - 0.08, "C classes, a tile at a time", ha="center", va="top",
              fontsize=9, color=FAINT)  # fmt: skip


def draw(path: Path) -> None:
    figure, axis = canvas("fused_head", 12.6, 6.3)
    axis.text(0.2, 6.08, "forward", color=FAINT, fontsize=12, weight="bold", va="top")
    box(axis, 0.2, 2.95, 3.1, 2.75, PREPARE, "1  prepare")
    lines(axis, 0.35, 5.15, [
        r"$\hat x_i = x_i\,/\,\|x_i\|$,  norms of the rows",
        r"$c_{iy} = \langle \hat x_i, \hat w_{y_i}\rangle$  in float64",
        r"$\psi(c_{iy})$ and its slope: the margin",
        r"one shift  $\kappa$  for all rows",
    ], step=0.42)  # fmt: skip
    axis.plot(0.47, 3.22, "s", color=TARGET, markersize=7)
    axis.text(0.65, 3.22, "the target column is kept apart", fontsize=9.5, va="center", color=INK)

    box(axis, 3.75, 2.95, 5.3, 2.75, SWEEP, "2  sweep")
    sheet(axis, 4.15, 3.72, 10, 4)
    lines(axis, 7.35, 5.2, [
        r"$c = \hat X\hat W^{\top}$",
        r"$E = e^{\,s c - \kappa}$  in place",
        r"$S \leftarrow S + \Sigma E$",
        r"$A \leftarrow A + \Sigma E\,c$",
        r"$X_E \leftarrow X_E + E\hat W$",
    ], step=0.40)  # fmt: skip
    axis.text(3.95, 3.08, r"$S$, $A$, $X_E$ add up over tiles, threads and machines; nothing is rescaled",
              fontsize=9.5, va="bottom", color=INK)  # fmt: skip

    box(axis, 9.5, 2.95, 2.9, 2.75, FINISH, "3  finish")
    lines(axis, 9.65, 5.15, [
        r"$t = \ln S + \kappa - s\,\psi(c_{iy})$",
        r"$\mathrm{loss}_i = \mathrm{softplus}(t)$",
        r"$q = 1 - p_y = \mathrm{sigmoid}(t)$",
        "no 1 $-$ p is ever formed",
    ], step=0.42)  # fmt: skip
    arrow(axis, (3.32, 4.3), (3.73, 4.3))
    arrow(axis, (9.07, 4.3), (9.48, 4.3))

    axis.text(0.2, 2.5, "backward", color=FAINT, fontsize=12, weight="bold", va="top")
    box(axis, 0.2, 0.25, 3.1, 1.9, FINISH, "dX, ds")
    lines(axis, 0.35, 1.62, [
        r"$(q/S)\,X_E - q\,\psi'\,\hat w_y$,  times $s$",
        r"radial part projected away, $/\,\|x\|$",
        r"$ds = \Sigma\; q\,(A/S - \psi)$",
    ], step=0.42)  # fmt: skip
    box(axis, 3.75, 0.25, 5.3, 1.9, FINISH, "dW, a tile at a time")
    lines(axis, 3.9, 1.62, [
        r"$E^{\top}\,(\,s\,(q/S)\,\hat X\,)$,  plus the target rows, projected",
        r"E is the stored one, or is made again:",
    ], step=0.42)  # fmt: skip
    axis.text(3.9, 0.72, "stored: 3 products, N x C kept", fontsize=10, color=SWEEP, va="top", weight="bold")
    axis.text(6.7, 0.72, "recompute: 4, nothing kept", fontsize=10, color=SWEEP, va="top", weight="bold")
    box(axis, 9.5, 0.25, 2.9, 1.9, SWEEP, "workspace budget")
    lines(
        axis,
        9.65,
        1.62,
        ["decides which of the two,", "and how many classes a tile", "has;  nf.plan(...)  tells"],
        step=0.38,
    )
    arrow(axis, (9.48, 1.0), (9.07, 1.0), SWEEP)
    arrow(axis, (10.9, 2.93), (10.9, 2.35), FAINT, 0.0)
    axis.plot([1.75, 10.9], [2.35, 2.35], color=FAINT, lw=1.2)
    arrow(axis, (1.75, 2.35), (1.75, 2.17), FAINT)
    arrow(axis, (6.4, 2.35), (6.4, 2.17), FAINT)
    save(figure, path)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".svg"))
