"""What a reader gets: a line per row as soon as it is known, on the screen and in a JSON lines file, and
at the end a summary in Markdown and, with matplotlib, a figure.

    python benchmarks/report.py FILE.jsonl        writes the summary of a file again, as FILE.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass
class Row:
    """One line of the file; its fields are the keys. null: not measured, or does not exist.

    `outcome`: "measured", or why not: "unavailable" (here, or for this case), "over budget", "failed",
    "interrupted", "wrong" (ours, or whoever was ready beside it). `how`: "benchmark", in the rounds of
    `bench_kernels.py`, or "by hand", with other means.
    """

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
    threads: int | None = None
    commit: str = ""
    timestamp: str = ""
    package: str = ""  # the competitor's, with the version installed
    how: str = "benchmark"
    outcome: str = "measured"
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


def _cells(row: Row) -> list[str]:
    times = map(_number, (row.median_ms, row.p20_ms, row.p80_ms, row.ratio_to_eager, row.peak_extra_mib))
    errors = map(_error, (row.err_loss, row.err_dx, row.err_dw, row.err_ds))
    return [row.provider, *times, *errors, _number(row.percent_of_floor, 2)]


def _padded(cells: Sequence[str]) -> str:
    widths = [26, *(max(9, len(name)) for name in COLUMNS[1:])]
    padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
    return "  ".join([cells[0].ljust(widths[0]), *padded[1:]])


def heading() -> str:
    return _padded(COLUMNS)


def line(row: Row) -> str:
    """Of the table on the screen."""
    return _padded(_cells(row)) + (f"  {row.note}" if row.note else "")


def reasons(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Why providers were not measured, and which."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.median_ms is None:
            found.setdefault(f"{row.outcome} ({row.note})", []).append(row.provider)
    return found


def summary(rows: list[Row]) -> str:
    """A Markdown table per case, then who was not measured and why."""
    lines = []
    for name in dict.fromkeys((row.case, row.mode) for row in rows):
        group = [row for row in rows if (row.case, row.mode) == name]
        measured = [row for row in group if row.median_ms is not None]
        floor = next((row.floor_ms for row in measured if row.floor_ms), None)
        hand = ", measured by hand" if any(row.how == "by hand" for row in measured) else ""
        lines += ["", f"**{group[0].case}** ({group[0].mode}{hand}; floor {_number(floor)} ms)", ""]
        if measured:
            lines += [f"| {' | '.join((*COLUMNS, 'note'))} |", f"|--|{'--:|' * (len(COLUMNS) - 1)}--|"]
            lines += [f"| {' | '.join((*_cells(row), row.note))} |" for row in measured]
        if missing := reasons(group):
            lines += ["", *(f"- {reason}: {', '.join(names)}" for reason, names in missing.items())]
    about = dict.fromkeys((r.device, r.torch, r.version, r.commit, r.threads) for r in rows)
    found = (
        f"{device}; torch {torch}, normface_ext {version} at {commit}" + (f", {n} threads" if n else "")
        for device, torch, version, commit, n in about
    )
    packages = ", ".join(sorted({row.package for row in rows if row.package}))
    text = "\n".join(["\n".join(found) + (f"; {packages}" if packages else ""), *lines])
    return text.rstrip() + "\n"


def headline(rows: list[Row], ours: str, eager: str) -> list[str]:
    """One sentence per case: what the kernels change for a user."""
    found = {(row.case, row.provider): row for row in rows}
    lines = []
    for name in dict.fromkeys(row.case for row in rows):
        a, b = found.get((name, ours)), found.get((name, eager))
        if not (a and b and a.median_ms and b.median_ms and a.ratio_to_eager):
            continue
        factor = 1 / a.ratio_to_eager
        change = f"{_number(factor)} times faster" if factor >= 1 else f"{_number(1 / factor)} times SLOWER"
        memory = ""
        if a.peak_extra_mib is not None and b.peak_extra_mib is not None:
            memory = f"; extra memory {_number(a.peak_extra_mib)} against {_number(b.peak_extra_mib)} MiB"
        times = f"{_number(a.median_ms)} ms, eager PyTorch {_number(b.median_ms)} ms"
        lines.append(f"{name}, {a.mode}: {times}: {change}{memory}")
    return lines


def as_json(row: Row) -> str:
    values = asdict(row).items()
    return json.dumps({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values})


def read(path: Path) -> list[Row]:
    return [Row(**json.loads(text)) for text in path.read_text().splitlines()]


class Record:
    """Writes each row where it belongs at once, so that a run that is killed keeps what it knew."""

    def __init__(self, path: Path, common: dict[str, object]) -> None:
        self.path, self.common = path, common
        self.rows: list[Row] = []
        path.write_text("")

    def write(self, *rows: Row) -> None:
        for row in rows:
            vars(row).update(self.common)
            self.rows.append(row)
        with self.path.open("a") as file:
            file.writelines(as_json(row) + "\n" for row in rows)
        for row in rows:
            if row.median_ms is not None:
                print(line(row), flush=True)
        for reason, names in reasons(rows).items():
            print(f"{reason}: {', '.join(names)}", flush=True)


COLORS = {"normface_ext": "#c8421c", "eager": "#8a8f98", "compile": "#3f6fb5", "torch.lin_ce": "#58a4a0"}
SPARE_COLORS = ("#b58a2c", "#7a5aa6", "#5c8a3a", "#a6527a")


def plot(rows: list[Row], path: Path, title: str) -> None:
    """Time relative to eager (left) and extra memory (right), one group of bars per case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    rows = [row for row in rows if row.ratio_to_eager]  # without eager's time there is nothing to show
    cases = list(dict.fromkeys(row.case for row in rows))
    providers = list(dict.fromkeys(row.provider for row in rows))
    spare = iter(SPARE_COLORS * 2)
    colors = {name: COLORS.get(name) or next(spare) for name in providers}
    height = 1.6 + len(cases) * (0.35 + 0.17 * len(providers))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, height), sharey=True, layout="constrained")
    for group, case in enumerate(cases):
        mine = [row for row in rows if row.case == case]
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
    left.set_xlim(0, max([1.5, *(1.35 * min(row.ratio_to_eager, 2.5) for row in rows)]))
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


if __name__ == "__main__":
    for name in map(Path, sys.argv[1:]):
        name.with_suffix(".md").write_text(summary(read(name)))
