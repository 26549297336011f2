"""The paper's combined objective, softmax + 0.01 C-contrastive, on a small data set, in seconds.

    python examples/combined_objective.py

NormFace's best result on LFW (99.22 %) trains one network with two heads (section 4): the scaled softmax,
which tells classes apart, and a little of the contrastive loss over class agents, which asks for what
verification needs, namely small distances within a class and large ones between classes. Each head has
agents of its own, as in the released nets.

The same network is trained with the softmax alone, with the C-triplet loss alone and with the combination,
from the same seed. For each: the accuracy of the nearest agent on test images, and the squared distance of
each test feature to its own agent and to the nearest other one. With ten easy classes every row is right
nearly always; the distances are where the losses differ. combined.png shows them, combined.csv has the means.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from common import FAINT, Data, Size, embed, lenet, load, parser, pyplot, report, train, write_csv
from compare_losses import Combined
from torch import nn

import normface_ext as nf

FEATURES = 16
OWN, OTHER = "#3f6fb5", "#c8421c"

HEADS = {
    "softmax": nf.NormFaceLoss,
    "C-triplet": nf.CTripletLoss,
    "softmax + 0.01 C-contrastive": Combined,
}


@dataclass
class Distances:
    """Of each test feature: squared distance to its own agent and to the nearest other one, [M]."""

    name: str
    own: np.ndarray
    other: np.ndarray
    final_loss: float

    @property
    def accuracy(self) -> float:
        return float((self.own < self.other).mean())

    @property
    def ratio(self) -> float:
        return float(self.other.mean() / self.own.mean())


def measure(name: str, data: Data, epochs: int, seed: int) -> Distances:
    torch.manual_seed(seed)  # the backbone is drawn first, so all start from the same one
    backbone: nn.Module = lenet(FEATURES, data.size).to(data.train_images.device)
    head = HEADS[name](FEATURES, data.classes).to(data.train_images.device)
    images, labels = data.train_images, data.train_labels
    history = train(backbone, head, images, labels, epochs=epochs, seed=seed, name=name)
    # The combination's classes are told apart by the agents of its softmax.
    agents = head.softmax.weight if isinstance(head, Combined) else head.weight
    features = nf.functional.normalize(embed(backbone, data.test_images))
    distances = nf.functional.inner_distance(features, agents.detach(), normalize=True)
    own = data.test_labels[:, None]
    near = distances.gather(1, own)[:, 0]
    far = distances.scatter(1, own, torch.inf).min(1).values
    return Distances(name, near.cpu().numpy(), far.cpu().numpy(), history.losses[-1])


def draw(found: list[Distances], path: Path) -> None:
    plt = pyplot()
    figure, axes = plt.subplots(len(found), 1, figsize=(8, 1.7 * len(found) + 1), sharex=True,
                                layout="constrained")  # fmt: skip
    bins = np.linspace(0, max(float(d.other.max()) for d in found), 60)
    for axis, d in zip(axes, found, strict=True):
        axis.hist(d.own, bins, color=OWN, alpha=0.8, label="to its own agent")
        axis.hist(d.other, bins, color=OTHER, alpha=0.8, label="to the nearest other agent")
        for values, color in ((d.own, OWN), (d.other, OTHER)):
            axis.axvline(values.mean(), color=color, linestyle="--", linewidth=1.2)
        axis.set_title(f"{d.name}: {d.ratio:.1f} times as far to the others", loc="left", weight="bold")
        axis.set_yticks([])
        axis.spines["left"].set_visible(False)
    axes[0].legend(fontsize=9)
    axes[-1].set_xlabel("squared distance of a test feature; dashed: mean", color=FAINT)
    figure.savefig(path)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> list[Distances]:
    options = parser(__doc__, "combined_objective", epochs=Size(20, 5)).parse_args(arguments)
    start, data = time.perf_counter(), load(options)
    found = [measure(name, data, options.epochs, options.seed) for name in HEADS]
    options.out.mkdir(parents=True, exist_ok=True)
    draw(found, options.out / "combined.png")
    print("objective                     final loss  accuracy  to own agent  to nearest other  ratio")
    for d in found:
        print(
            f"{d.name:28}  {d.final_loss:10.4f}  {d.accuracy:8.2%}  {d.own.mean():12.4f}"
            f"  {d.other.mean():16.4f}  {d.ratio:5.1f}"
        )
    header = ["objective", "final_loss", "accuracy", "own_distance", "other_distance", "ratio"]
    rows = ((d.name, d.final_loss, d.accuracy, float(d.own.mean()), float(d.other.mean()), d.ratio)
            for d in found)  # fmt: skip
    report([options.out / "combined.png", write_csv(options.out / "combined.csv", header, rows)], start)
    return found


if __name__ == "__main__":
    main()
