"""Draws tile.svg, the diagram of "The way of a tile".

python docs/figures/tile.py [FILE]
"""

from __future__ import annotations

import sys
from pathlib import Path

from drawing import FAINT, FINISH, INK, PREPARE, SWEEP, TARGET, arrow, box, canvas, lines, save
from matplotlib.patches import Rectangle

WIDTH, HEIGHT = 13.2, 7.6


def grid(axis, x: float, y: float, color: str, target: bool = True) -> None:
    """A tile [N rows, some classes]; the targets' cells are empty."""
    rows, columns, side = 5, 6, 0.2
    empty = {(0, 4), (2, 1), (3, 5)} if target else set()
    for row in range(rows):
        for column in range(columns):
            own = (row, column) in empty
            axis.add_patch(
                Rectangle(
                    (x + column * side, y + row * side),
                    side,
                    side,
                    facecolor="white" if own else color + "50",
                    edgecolor=color,
                    lw=0.7,
                )
            )
            if own:
                axis.plot(
                    x + (column + 0.5) * side, y + (row + 0.5) * side, "s", color=TARGET, markersize=3.5
                )


def room(axis, x: float, y: float, text: str) -> None:
    axis.text(x, y, text, color=FAINT, fontsize=9, va="top", family="DejaVu Sans Mono")


def draw(path: Path) -> None:
    figure, axis = canvas("tile", WIDTH, HEIGHT)

    box(axis, 0.2, 4.35, 2.9, 2.95, PREPARE, "prepare")
    lines(axis, 0.35, 6.8, [
        r"$\hat x_i$,  norm,  weight of the row",
        r"$c_{iy}$ in float64, kept apart",
        r"row of the term: $s,\ \kappa$, threshold",
        r"a row that does not count is 0",
    ], step=0.42)  # fmt: skip
    room(axis, 0.35, 4.95, "csrc/engine/row_state.h")
    room(axis, 0.35, 4.67, "cpu/, cuda/host/head_sweep")

    box(axis, 3.55, 4.35, 2.7, 2.95, SWEEP, "product")
    grid(axis, 4.3, 5.42, SWEEP, target=False)
    axis.text(4.9, 6.62, r"$c = \hat X\,\hat W_{\mathrm{tile}}^{\top}$", color=INK, fontsize=11, ha="center")
    room(axis, 3.7, 5.22, "cpu: BLAS")
    room(axis, 3.7, 4.94, "cuda/products:")
    room(axis, 3.7, 4.66, "cublas simt_ sm80_")

    box(axis, 6.7, 4.35, 3.05, 2.95, FINISH, "term, cell by cell")
    grid(axis, 8.35, 5.8, FINISH)
    lines(axis, 6.85, 6.78, ["softmax", "hard negatives", "hinge", "exponential hinge"], step=0.33)
    axis.text(6.85, 5.4, "(value, second, coefficient)", color=INK, fontsize=10, va="top")
    room(axis, 6.85, 4.95, "csrc/math/terms/")
    room(axis, 6.85, 4.67, "never names a kernel")

    box(axis, 10.2, 4.35, 2.8, 2.95, SWEEP, "what is kept")
    lines(axis, 10.35, 6.8, [
        r"sums of the rows, float64",
        r"$X_E \leftarrow X_E + e\,\hat W_{\mathrm{tile}}$",
        r"$e$, under the budget",
        r"a sink: active list, hardest",
    ], step=0.42)  # fmt: skip
    room(axis, 10.35, 4.95, "add up over tiles,")
    room(axis, 10.35, 4.67, "threads, machines")

    for x in (3.12, 6.27, 9.77):
        arrow(axis, (x, 5.8), (x + 0.41, 5.8))
    axis.text(0.2, 7.52, "forward: head_sweep, tile after tile", color=FAINT, fontsize=11, va="top")

    box(axis, 3.55, 2.6, 6.2, 1.05, FINISH, "the loss of the rows")
    rows = "softmax_finish: margin, weights, smoothing; or the losses over agents, in torch"
    axis.text(3.7, 3.06, rows, color=INK, fontsize=9.8, va="top")
    room(axis, 7.6, 3.52, "csrc/math/margins")
    arrow(axis, (11.6, 4.33), (9.8, 3.15), bend=-0.25)
    axis.text(11.35, 3.55, "rows [fields, N]", color=FAINT, fontsize=9.5)
    axis.text(1.55, 3.05, "slopes [4, N]", color=FAINT, fontsize=9.5)
    arrow(axis, (3.5, 3.1), (2.6, 2.02), bend=0.2)

    box(axis, 0.2, 0.3, 2.9, 1.7, PREPARE, "factors of the rows")
    lines(axis, 0.35, 1.5, [r"$f_i$ others,  $t_i$ target", r"$f\hat X$: what meets $e$"], step=0.4)
    room(axis, 0.35, 0.72, "linear in the slopes")
    box(axis, 3.55, 0.3, 2.7, 1.7, SWEEP, "coefficients")
    lines(axis, 3.7, 1.5, [r"$e$ as stored, or made again", "by the same product"], step=0.4)
    box(axis, 6.7, 0.3, 3.05, 1.7, SWEEP, "second product")
    lines(
        axis,
        6.85,
        1.5,
        [r"$G_{\mathrm{tile}} = e^{\top}(f\hat X)$", r"$+\; t\,\hat x$ of the targets"],
        step=0.4,
    )
    box(axis, 10.2, 0.3, 2.8, 1.7, FINISH, "written once")
    lines(axis, 10.35, 1.5, [r"$dW = (G - \hat w\langle\hat w, G\rangle)/\|w\|$",
                             r"$dX$ of $f X_E + t\hat w_y$, likewise"], step=0.4)  # fmt: skip
    for x in (3.12, 6.27, 9.77):
        arrow(axis, (x, 1.1), (x + 0.41, 1.1))
    axis.text(0.2, 2.28, "backward: head_backward", color=FAINT, fontsize=11, va="top")
    save(figure, path)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".svg"))
