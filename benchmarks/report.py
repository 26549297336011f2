"""What a reader gets: a table on the screen, a CSV file and, with matplotlib, a figure."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass
class Row:
    """One line of the CSV; its fields are the columns. Empty: not measured, or does not exist."""

    case: str
    N: int
    D: int
    C: int
    dtype: str
    provider: str
    mode: str
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    ratio_to_eager: float | None = None  # median over rounds of time / eager's time; below 1 is faster
    peak_extra_mib: float | None = None
    err_loss: float | None = None
    err_dx: float | None = None
    err_dw: float | None = None
    err_ds: float | None = None
    floor_ms: float | None = None
    percent_of_floor: float | None = None  # floor / median: 100 would be perfect
    device: str = ""
    torch: str = ""
    version: str = ""
    threads: int = 0
    commit: str = ""
    timestamp: str = ""
    note: str = ""


def _number(value: float | None, digits: int = 3) -> str:
    """Three digits, never in the form 1e+03."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.0e}"


COLUMNS = (
    *("provider", "median ms", "p20", "p80", "time/eager", "extra MiB"),
    *("err loss", "err dx", "err dw", "err ds", "% of floor"),
)


def _line(cells: Sequence[str]) -> str:
    widths = [14, *(max(9, len(name)) for name in COLUMNS[1:])]
    padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
    return "  ".join([cells[0].ljust(widths[0]), *padded[1:]])


def table(rows: list[Row]) -> str:
    """Rows grouped by case; a provider that could not take part shows its reason."""
    lines, case = [], None
    for row in rows:
        if row.case != case:
            case = row.case
            lines += ["", f"{case}  ({row.mode}; floor {_number(row.floor_ms)} ms)", _line(COLUMNS)]
        if row.median_ms is None:
            lines.append(f"{row.provider:14}  {row.note}")
            continue
        times = map(_number, (row.median_ms, row.p20_ms, row.p80_ms, row.ratio_to_eager, row.peak_extra_mib))
        errors = map(_error, (row.err_loss, row.err_dx, row.err_dw, row.err_ds))
        lines.append(_line([row.provider, *times, *errors, _number(row.percent_of_floor, 2)]))
    return "\n".join(lines)


def headline(rows: list[Row], ours: str, eager: str) -> list[str]:
    """One sentence per case: what the kernels change for a user."""
    found = {(row.case, row.provider): row for row in rows}
    lines = []
    for name in dict.fromkeys(row.case for row in rows):
        a, b = found[name, ours], found[name, eager]
        if not (a.median_ms and b.median_ms and a.ratio_to_eager):
            continue
        factor = 1 / a.ratio_to_eager
        change = f"{_number(factor)} times faster" if factor >= 1 else f"{_number(1 / factor)} times SLOWER"
        memory = ""
        if a.peak_extra_mib is not None and b.peak_extra_mib is not None:
            memory = f"; extra memory {_number(a.peak_extra_mib)} against {_number(b.peak_extra_mib)} MiB"
        times = f"{_number(a.median_ms)} ms, eager PyTorch {_number(b.median_ms)} ms"
        lines.append(f"{name}, {a.mode}: {times}: {change}{memory}")
    return lines


def write_csv(rows: list[Row], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        for row in rows:
            values = asdict(row).items()
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values})


COLORS = {"normface_ext": "#c8421c", "eager": "#8a8f98", "compile": "#3f6fb5", "torch.lin_ce": "#58a4a0"}
SPARE_COLORS = ("#b58a2c", "#7a5aa6", "#5c8a3a", "#a6527a")


def plot(rows: list[Row], path: Path, title: str) -> None:
    """Time relative to eager (left) and extra memory (right), one group of bars per case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    cases = list(dict.fromkeys(row.case for row in rows))
    providers = list(dict.fromkeys(row.provider for row in rows if row.median_ms))
    spare = iter(SPARE_COLORS * 2)
    colors = {name: COLORS.get(name) or next(spare) for name in providers}
    height = 1.6 + len(cases) * (0.35 + 0.17 * len(providers))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, height), sharey=True, layout="constrained")
    for group, case in enumerate(cases):
        mine = [row for row in rows if row.case == case and row.median_ms]
        thick = 0.8 / max(1, len(mine))
        for index, row in enumerate(mine):
            y, color = group - 0.4 + (index + 0.5) * thick, colors[row.provider]
            shown = min(row.ratio_to_eager, 2.5)
            left.barh(y, shown, thick * 0.9, color=color)
            _label(left, shown, y, f"{_number(row.ratio_to_eager)}  ({_number(row.median_ms)} ms)")
            if row.peak_extra_mib is not None:
                shown = max(row.peak_extra_mib, 1.0)  # the resolution; a log axis has no zero
                right.barh(y, shown, thick * 0.9, color=color)
                _label(right, shown, y, "< 1" if row.peak_extra_mib < 1 else _number(row.peak_extra_mib))
        eager = next((row for row in mine if row.ratio_to_eager == 1.0), None)
        if eager and eager.floor_ms:
            floor = eager.floor_ms / eager.median_ms
            left.plot([floor, floor], [group - 0.42, group + 0.42], color="black", linewidth=1.4)
    left.axvline(1, color="#8a8f98", linewidth=0.8, linestyle=":")
    left.set_yticks(range(len(cases)), [case.replace(" ", "\n", 1) for case in cases])
    left.set_ylim(len(cases) - 0.45, -0.55)
    left.set_xlim(0, max(1.5, *(1.35 * min(row.ratio_to_eager, 2.5) for row in rows if row.median_ms)))
    left.set_xlabel("time / eager PyTorch's time (shorter is faster)")
    right.set_xscale("log")
    right.set_xlim(0.8, 6 * max([row.peak_extra_mib or 1 for row in rows] + [1]))
    right.set_xlabel("peak memory beyond inputs and gradients, MiB (log)")
    for axis in (left, right):
        axis.tick_params(axis="y", length=0)
        axis.spines[["top", "right", "left"]].set_visible(False)
    legend = [Patch(color=colors[name], label=name) for name in providers]
    legend.append(Line2D([], [], color="black", linewidth=1.4, label="floor"))
    figure.legend(handles=legend, title=title, loc="outside upper center", ncols=len(legend), frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _label(axis: Axes, x: float, y: float, text: str) -> None:
    axis.annotate(text, (x, y), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7)
