"""Every head of the package side by side, on classes never trained on.

    python examples/compare_heads.py

As in compare_losses.py some of the classes are left out of training, others in each run, and pairs of their
images are verified by cosine ("unseen"): accuracy in ten folds, and TAR@FAR=1%. "Seen" verifies new images of
the training classes. All heads start from the same network and see the same batches. Losses are those of the
last epoch, each head's own number: they are not to be compared with each other. A step is one of the whole
network, on a batch of 64.

compare_heads.csv has every run, summary.csv and summary.md mean and standard deviation over the runs,
compare_heads.png shows them.

What to expect: no ranking. Margins, scales and schedules are published for millions of faces and for features
of a trained network; ten classes of small images, for a few hundred steps, are another world. Softmax heads
have NormFace's own scale here, since what is to differ is the head; Circle loss, SphereFace and SphereFace2
have the scales that are part of them. It shows that each of them trains, what one writes for it, and what a
step costs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import compare_losses
import numpy as np
from common import Size, Softmax, load, parser, report, write_csv, write_markdown
from compare_losses import FEATURES, LEFT_OUT, Run, draw
from torch import nn

import normface_ext as nf


def with_margin(**options: object) -> Callable[[int], nn.Module]:
    """At NormFace's own scale. A margin is made anew for each run: it may have a state."""
    margin = options.pop("margin")

    def make(classes: int) -> nn.Module:
        scale = nf.theory.auto_scale(classes)
        return nf.NormFaceLoss(FEATURES, classes, scale=scale, margin=margin(), **options)

    return make


def preset(kind: type[nf.NormFaceLoss] | type[nf.SphereFace2Loss], name: str) -> Callable[[int], nn.Module]:
    return lambda classes: kind.preset(name, FEATURES, classes)


#: Name -> (number of classes -> head).
HEADS: dict[str, Callable[[int], nn.Module]] = {
    "softmax": lambda c: Softmax(FEATURES, c),
    "NormFace": lambda c: nf.NormFaceLoss(FEATURES, c),
    "NormFace, learned s": lambda c: nf.NormFaceLoss(FEATURES, c, learn_scale=True),
    "CosFace": with_margin(margin=lambda: nf.CosFace(0.35)),
    "ArcFace": with_margin(margin=lambda: nf.ArcFace(0.5)),
    "ArcFace, straight": with_margin(margin=lambda: nf.ArcFace(0.5), margin_gradient="straight"),
    "CombinedMargin": with_margin(margin=lambda: nf.CombinedMargin(1.0, 0.3, 0.2)),
    "AdaFace": with_margin(margin=lambda: nf.AdaFace()),
    "MagFace": with_margin(margin=lambda: nf.MagFace()),
    "ElasticFace-Arc": with_margin(margin=lambda: nf.ElasticArcFace()),
    "ElasticFace-Cos": with_margin(margin=lambda: nf.ElasticCosFace()),
    "CurricularFace": with_margin(margin=lambda: nf.CurricularFace()),
    "MV-Arc-Softmax": with_margin(margin=lambda: nf.MVSoftmax()),
    "MV-AM-Softmax": with_margin(margin=lambda: nf.MVSoftmax(kind="am")),
    "CosFace + filter": with_margin(margin=lambda: nf.CosFace(0.35), filter_threshold=0.4),
    "Circle loss": preset(nf.NormFaceLoss, "circle"),
    "SphereFace": preset(nf.NormFaceLoss, "sphereface"),
    "SphereFace, m 1.7": preset(nf.NormFaceLoss, "sphereface-opensphere"),
    "SphereFace2-C": lambda c: nf.SphereFace2Loss(FEATURES, c),
    "SphereFace2-A": preset(nf.SphereFace2Loss, "wespeaker-a"),
    "C-contrastive": lambda c: nf.CContrastiveLoss(FEATURES, c),
    "C-triplet": lambda c: nf.CTripletLoss(FEATURES, c),
}


@dataclass
class HeadRun(Run):
    loss: float
    ms: float


MEASURES = ("unseen", "unseen_tar", "seen", "seen_tar", "loss", "ms")
TITLES = (
    "head",
    "unseen: accuracy",
    "TAR@FAR=1%",
    "seen: accuracy",
    "TAR@FAR=1%",
    "last loss",
    "ms per step",
)


def summary(runs: list[HeadRun]) -> list[tuple[object, ...]]:
    """Of each head mean and standard deviation of every measure."""
    rows = []
    for name in dict.fromkeys(r.head for r in runs):
        row: list[object] = [name]
        for measure in MEASURES:
            values = np.array([getattr(r, measure) for r in runs if r.head == name])
            row += [float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0]
        rows.append(tuple(row))
    return rows


def cells(row: tuple[object, ...]) -> list[str]:
    name, *v = row
    percent = [f"{100 * v[i]:.1f} ± {100 * v[i + 1]:.1f}" for i in (0, 2, 4, 6)]
    return [str(name), *percent, f"{v[8]:.3g}", f"{v[10]:.1f}"]


def main(arguments: list[str] | None = None) -> list[HeadRun]:
    command = parser(__doc__, "compare_heads", epochs=Size(10, 5), images=Size(10_000, 5_000))
    command.add_size("runs", "seeds, each with other classes left out", Size(5, 2))
    command.add_argument("--heads", nargs="+", metavar="NAME", choices=list(HEADS), help="only these")
    options = command.parse_args(arguments)
    start, data = time.perf_counter(), load(options)
    if data.classes < LEFT_OUT + 2:
        raise SystemExit(f"--data: expected at least {LEFT_OUT + 2} classes, got {data.classes}")
    # The figure shows differences to the plain softmax.
    chosen = {
        n: make for n, make in HEADS.items() if not options.heads or n in options.heads or n == "softmax"
    }
    runs = []
    for run in range(options.runs):
        for name, make in chosen.items():
            found, history = compare_losses.trained(name, make, data, run, options.epochs, options.seed)
            ms = 1e3 * history.seconds / history.steps
            runs.append(HeadRun(**vars(found), loss=history.losses[-1], ms=ms))
    rows = summary(runs)
    options.out.mkdir(parents=True, exist_ok=True)
    print(f"{options.data}, {options.runs} runs, {options.epochs} epochs; mean ± standard deviation, in %")
    for line in (TITLES, *map(cells, rows)):
        print(f"{line[0]:20}" + "  ".join(f"{word:>16}" for word in line[1:]))
    draw(runs, options.out / "compare_heads.png")
    columns = ["head", "run", "left_out", *MEASURES]
    header = [f"{m}{part}" for m in MEASURES for part in ("", "_deviation")]
    files = [
        options.out / "compare_heads.png",
        write_csv(
            options.out / "compare_heads.csv", columns, ([getattr(r, c) for c in columns] for r in runs)
        ),
        write_csv(options.out / "summary.csv", ["head", *header], rows),
        write_markdown(options.out / "summary.md", TITLES, map(cells, rows)),
    ]
    report(files, start)
    return runs


if __name__ == "__main__":
    main()
