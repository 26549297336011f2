"""Measures how exact the head is against float64, over the scale: loss, dX, dW and ds.

    python benchmarks/accuracy.py            about two minutes on a CPU; it runs on the GPU if there is one

Eager PyTorch and this package, with float32 and with bfloat16 inputs. The truth is float64 on the inputs as
each has them, so rounding the inputs to bfloat16 does not count, what is done with them does. Two situations:
"untrained", random features, and "trained", features around their own class weight. There p of the target
comes close to 1, and what is left of p - 1 in 24 bits, or in 8, is what eager's gradient is made of.

An error is ||value - truth|| / ||truth||, the median over the seeds. Files: accuracy.csv, accuracy.md (the
table of the documentation), accuracy.png.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import machine
import torch
import truth
from cases import Inputs, head, make_inputs
from competitors import BASE, EAGER, OURS

import normface_ext as nf

SCALES = (1.0, 16.0, 30.0, 64.0, 128.0)
SITUATIONS = ("untrained", "trained")
BATCH, DIM, CLASSES = 256, 128, 10_572
WINDOW = 168.7  # the fixed shift serves while 2 s + ln C is at most this (csrc/math/softmax.h, float32)
#: Provider and dtype of its inputs, and how it is drawn.
COMPETITORS = {
    (EAGER, "bfloat16"): ("#9aa1ab", "--"),
    (EAGER, "float32"): ("#23272e", "--"),
    (OURS, "bfloat16"): ("#e09f1f", "-"),
    (OURS, "float32"): ("#c8421c", "-"),
}


@dataclass(frozen=True)
class Measured:
    """The relative error of each quantity; `fallback`: outside the window of the fixed shift."""

    situation: str
    scale: float
    provider: str
    dtype: str
    fallback: bool
    loss: float
    dx: float
    dw: float
    ds: float


def make(situation: str, dtype: str, seed: int, device: str, classes: int) -> Inputs:
    """Random inputs; "trained" puts each row at a cosine of about 0.65 to its own class."""
    inputs = make_inputs(head(BATCH, DIM, classes, dtype), device, seed)
    if situation == "trained":
        generator = torch.Generator(device).manual_seed(seed)
        own = torch.empty(BATCH, 1, device=device).normal_(0.65, 0.1, generator=generator).clamp(0, 0.95)
        with torch.no_grad():
            noise = nf.reference.normalize(inputs.x.float())
            agents = nf.reference.normalize(inputs.weight[inputs.labels].float())
            inputs.x.copy_(DIM**0.5 * (own * agents + (1 - own.square()).sqrt() * noise))
    return inputs


def measure(seeds: int, device: str, classes: int) -> list[Measured]:
    found = []
    for situation in SITUATIONS:
        for scale in SCALES:
            errors: dict[tuple[str, str], list[dict[str, float]]] = {key: [] for key in COMPETITORS}
            for seed in range(seeds):
                for dtype in sorted({dtype for _, dtype in COMPETITORS}):
                    case = head(BATCH, DIM, classes, dtype)
                    inputs = make(situation, dtype, seed, device, classes)
                    right = truth.truth(case, inputs, scale)
                    for provider, its in COMPETITORS:
                        if its == dtype:
                            forward = BASE[provider].build(case, "fwd+bwd", device)
                            errors[provider, dtype].append(truth.errors(forward, inputs, scale, case, right))
            fallback = 2 * scale + math.log(classes) > WINDOW
            for (provider, dtype), each in errors.items():
                medians = [statistics.median(e[q] for e in each) for q in truth.QUANTITIES]
                found.append(Measured(situation, scale, provider, dtype, fallback, *medians))
        print(f"{situation}: done", file=sys.stderr, flush=True)
    return found


def write_csv(found: list[Measured], about: dict[str, object], path: Path) -> None:
    names = ["situation", "scale", "provider", "dtype", "fallback", *truth.QUANTITIES]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*names, *about])
        for m in found:
            values = [f"{v:.3g}" if isinstance(v, float) else v for v in (getattr(m, n) for n in names)]
            writer.writerow([*values, *about.values()])


def markdown(found: list[Measured], about: dict[str, object]) -> str:
    """A table for each situation: a row per scale and quantity, a column per competitor."""
    lines = [", ".join(f"{name} {value}" for name, value in about.items()) + "."]
    for situation in SITUATIONS:
        heads = [f"{provider}, {dtype}" for provider, dtype in COMPETITORS]
        lines += ["", f"**{situation.capitalize()}**", "", f"| s | error of | {' | '.join(heads)} |"]
        lines.append("|--:|---|" + "--:|" * len(heads))
        for scale in SCALES:
            rows = [m for m in found if m.situation == situation and m.scale == scale]
            text = f"{scale:g}" + (" (row maximum)" if rows[0].fallback else "")
            for quantity in truth.QUANTITIES:
                cells = [f"{getattr(m, quantity):.0e}" for m in rows]
                name = {"loss": "loss", "dx": "dX", "dw": "dW", "ds": "ds"}[quantity]
                lines.append(f"| {text} | {name} | {' | '.join(cells)} |")
                text = ""
    return "\n".join(lines) + "\n"


def draw(found: list[Measured], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(
        len(SITUATIONS), 4, figsize=(13, 6), layout="constrained", sharex=True, sharey=True
    )
    titles = {"loss": "loss", "dx": "gradient of X", "dw": "gradient of W", "ds": "gradient of s"}
    for axes, situation in zip(grid, SITUATIONS, strict=True):
        for axis, (quantity, title) in zip(axes, titles.items(), strict=True):
            for (provider, dtype), (color, line) in COMPETITORS.items():
                mine = [
                    m for m in found if (m.situation, m.provider, m.dtype) == (situation, provider, dtype)
                ]
                errors = [max(getattr(m, quantity), 1e-9) for m in mine]  # an error of 0 has no logarithm
                scales = [m.scale for m in mine]
                axis.plot(scales, errors, line, color=color, marker="o", markersize=4,
                          label=f"{provider}, {dtype}")  # fmt: skip
            if situation == SITUATIONS[0]:
                axis.set_title(title, weight="bold", fontsize=11)
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].set_ylabel(f"{situation}\nrelative error")
    for axis in grid[-1]:
        axis.set_xlabel("s")
    grid[0][0].set_xscale("log", base=2)
    grid[0][0].set_xticks(SCALES, [f"{s:g}" for s in SCALES])
    grid[0][0].set_yscale("log")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> list[Measured]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="default: 3")
    parser.add_argument("--classes", type=int, default=CLASSES, help=f"default: {CLASSES}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("bench_results"),
                        help="where the files go (default: ./bench_results)")  # fmt: skip
    options = parser.parse_args(argv)
    if options.seeds < 1 or options.classes < 2:
        parser.error(f"expected --seeds >= 1 and --classes >= 2, got {options.seeds}, {options.classes}")
    options.out.mkdir(parents=True, exist_ok=True)
    found = measure(options.seeds, options.device, options.classes)
    cuda = options.device.startswith("cuda")
    about: dict[str, object] = {
        "N": BATCH,
        "D": DIM,
        "C": options.classes,
        "seeds": options.seeds,
        "device": machine.device_name("cuda" if cuda else "cpu"),
        "torch": torch.__version__,
        "normface_ext": machine.version(),
    }
    text = markdown(found, about)
    print(text)
    about |= {
        "commit": machine.commit(),
        "timestamp": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    write_csv(found, about, options.out / "accuracy.csv")
    (options.out / "accuracy.md").write_text(text)
    draw(found, options.out / "accuracy.png")
    return found


if __name__ == "__main__":
    main()
