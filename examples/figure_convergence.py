"""Why cosines need a scale: training stalls at s = 1 (NormFace, section 3.2 and figure 5).

    python examples/figure_convergence.py

Left: training loss for s = 1, 4, 10, 30 and a learned s, each with its lower bound dashed (Proposition 2).
Middle: what a sample's place does to its gradient. The same features, seen at four scales: the strength of
a sample's pull, ||p - onehot||, against how far its own cosine leads the best other one. At s = 1 the band
is flat: samples that are right pull almost as hard as samples that are wrong.
Right: so the many right ones outvote the few wrong ones. Share of the whole pull that belongs to the
hardest tenth of the samples; a tenth would be no attention at all.

convergence.csv has losses and bounds, gradients.csv the pulls.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from common import FAINT, Data, History, Size, embed, lenet, load, parser, pyplot, report, train, write_csv
from torch import Tensor

import normface_ext as nf

FEATURES = 32
SCALES = (1.0, 4.0, 10.0, 30.0)
COLORS = {
    "s = 1": "#3f6fb5",
    "s = 4": "#2a9d8f",
    "s = 10": "#e09f1f",
    "s = 30": "#c8421c",
    "learned s": "#7b3fa0",
}


@dataclass
class Pull:
    """Of each sample: its lead c_y - max c_j, and ||p - onehot|| at one scale."""

    lead: np.ndarray
    strength: np.ndarray

    @property
    def share_of_hardest_tenth(self) -> float:
        count = max(1, len(self.lead) // 10)
        hardest = np.argsort(self.lead)[:count]
        return float(self.strength[hardest].sum() / self.strength.sum())

    @property
    def hard_over_easy(self) -> float:
        """Mean pull of the hardest tenth over that of the easiest half."""
        order = np.argsort(self.lead)
        hard, easy = order[: max(1, len(order) // 10)], order[len(order) // 2 :]
        return float(self.strength[hard].mean() / self.strength[easy].mean())


def pull(cosines: Tensor, labels: Tensor, scale: float) -> Pull:
    """The gradient of the loss with respect to the logits s * cos, in float64: no 1 - p cancellation."""
    logits = (scale * cosines.double()).requires_grad_()
    torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    own = cosines.gather(1, labels[:, None])[:, 0]
    others = cosines.scatter(1, labels[:, None], -2.0).max(1).values
    return Pull((own - others).cpu().numpy(), logits.grad.norm(dim=1).cpu().numpy())


def run(
    name: str, data: Data, epochs: int, seed: int, snapshot: int | None = None, **options: float
) -> tuple[History, Tensor | None]:
    """The history of a head with these options, and the test cosines after `snapshot` epochs."""
    torch.manual_seed(seed)
    backbone = lenet(FEATURES, data.size).to(data.train_images.device)
    head = nf.NormFaceLoss(FEATURES, data.classes, **options).to(data.train_images.device)
    seen: list[Tensor] = []

    def look(epoch: int) -> None:
        if epoch + 1 == snapshot:
            features = embed(backbone, data.test_images)
            seen.append(nf.functional.norm_linear(features, head.weight.detach()))

    history = train(
        backbone, head, data.train_images, data.train_labels, epochs=epochs, seed=seed, name=name,
        scale_lr=0.1, after_epoch=look,
    )  # fmt: skip
    return history, (seen[0] if seen else None)


def apart(values: dict[str, float], factor: float = 1.25) -> dict[str, float]:
    """The values, moved up where they would be nearer to the next lower one than `factor`: places of labels
    on a logarithmic axis."""
    placed: dict[str, float] = {}
    lowest = 0.0
    for name, value in sorted(values.items(), key=lambda item: item[1]):
        lowest = placed[name] = max(value, factor * lowest)
    return placed


def draw(histories: dict[str, History], pulls: dict[str, Pull], classes: int, path: Path) -> None:
    plt = pyplot()
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(14, 4.6), layout="constrained", width_ratios=[1.25, 1.25, 0.8]
    )
    heights = apart({name: history.losses[-1] for name, history in histories.items()})
    for name, history in histories.items():
        epochs = np.arange(1, len(history.losses) + 1)
        bounds = [nf.theory.loss_lower_bound(classes, s) for s in history.scales]
        label = name if name != "learned s" else f"learned s: {history.scales[-1]:.1f}"
        left.plot(epochs, history.losses, color=COLORS[name], linewidth=2)
        left.plot(epochs, bounds, color=COLORS[name], linestyle="--", linewidth=1.2)
        left.annotate(
            *(label, (epochs[-1], heights[name])), xytext=(5, 0), textcoords="offset points",
            color=COLORS[name], weight="bold", va="center", fontsize=9.5, annotation_clip=False,
        )  # fmt: skip
    left.set_yscale("log")
    lowest = min(min(history.losses) for history in histories.values())
    left.set_ylim(lowest / 4, 4)
    left.set_xlabel("epoch")
    left.set_ylabel("training loss (log); dashed: its lower bound")
    left.set_title("s = 1 stalls at its bound", weight="bold")

    for name, p in pulls.items():
        middle.scatter(p.lead, p.strength, s=9, color=COLORS[name], alpha=0.6, linewidths=0, label=name)
    middle.axvline(0, color=FAINT, linewidth=1)
    middle.text(-0.02, -0.03, "wrong", ha="right", va="top", color=FAINT)
    middle.text(0.02, -0.03, "right", ha="left", va="top", color=FAINT)
    middle.set_ylim(-0.12, 1.5)
    middle.set_xlabel("lead of the own cosine over the best other one")
    middle.set_ylabel("pull of the sample, ||p - onehot||")
    middle.set_title("at s = 1 right samples pull like wrong ones", weight="bold")
    middle.legend(fontsize=9, loc="upper right", markerscale=2)

    shares = [p.share_of_hardest_tenth for p in pulls.values()]
    bars = right.bar(list(pulls), shares, color=[COLORS[name] for name in pulls], width=0.65)
    right.bar_label(bars, [f"{share:.0%}" for share in shares], padding=2)
    right.axhline(0.1, color=FAINT, linestyle=":", linewidth=1.5)
    right.set_xlabel("dotted: if all pull alike")
    right.set_ylim(0, 1.08)
    right.set_yticks([])
    right.spines["left"].set_visible(False)
    right.set_title("the hardest tenth's\nshare of the pull", weight="bold")
    figure.savefig(path)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> tuple[dict[str, History], dict[str, Pull]]:
    options = parser(__doc__, "figure_convergence", epochs=Size(40, 10)).parse_args(arguments)
    start, data = time.perf_counter(), load(options)
    histories: dict[str, History] = {}
    cosines = None
    for scale in SCALES:
        # Seen early in the run at s = 10, when some samples are still wrong.
        snapshot = max(1, options.epochs // 10) if scale == 10.0 else None
        name = f"s = {scale:g}"
        histories[name], seen = run(name, data, options.epochs, options.seed, snapshot, scale=scale)
        cosines = seen if seen is not None else cosines
    histories["learned s"], _ = run(
        "learned s", data, options.epochs, options.seed, scale=1.0, learn_scale=True
    )
    assert cosines is not None
    pulls = {f"s = {scale:g}": pull(cosines, data.test_labels, scale) for scale in SCALES}

    options.out.mkdir(parents=True, exist_ok=True)
    draw(histories, pulls, data.classes, options.out / "convergence.png")
    print("head       scale  loss at the end  lower bound  hard / easy pull  share of the hardest tenth")
    for name, h in histories.items():
        bound = nf.theory.loss_lower_bound(data.classes, h.scales[-1])
        more = ""
        if name in pulls:
            more = f"{pulls[name].hard_over_easy:16.3g}  {pulls[name].share_of_hardest_tenth:26.1%}"
        print(f"{name:9}  {h.scales[-1]:5.2f}  {h.losses[-1]:15.5f}  {bound:11.3g}  {more}")
    files = [
        options.out / "convergence.png",
        write_csv(options.out / "convergence.csv", ["head", "epoch", "scale", "loss", "bound"], (
            (name, i + 1, s, loss, nf.theory.loss_lower_bound(data.classes, s))
            for name, h in histories.items()
            for i, (s, loss) in enumerate(zip(h.scales, h.losses, strict=True))
        )),
        write_csv(options.out / "gradients.csv", ["head", "lead", "pull"], (
            (name, float(lead), float(strength))
            for name, p in pulls.items() for lead, strength in zip(p.lead, p.strength, strict=True)
        )),
    ]  # fmt: skip
    report(files, start)
    return histories, pulls


if __name__ == "__main__":
    main()
