"""Why a normalised head needs a scale, on scikit-learn's 8x8 digits, in well under a minute.

    python examples/train_digits.py

The same small network is trained three times, with the same seed, batches and optimizer. Only the head
differs:

    plain      nn.Linear and cross-entropy: what everybody uses
    s = 1      features and class weights normalised, so the logits are cosines in [-1, 1]
    s = auto   the same, times the scale NormFaceLoss picks from the number of classes

Cosines alone cannot make the softmax sure of anything: with 10 classes and s = 1 the loss can never fall
below 1.377 (NormFace, Proposition 2), however good the features are. So the gradient never fades for
samples that are already right, and training stalls at the bound. The scale lifts it. Each head's loss is
printed beside its bound; the figure shows both. Ten classes forgive the stall, and the endless pull even
packs each class tightly (see "verification"); with the 10,575 of CASIA-WebFace the bound is 8.27, which
is next to nothing below the 9.27 of blind guessing, and nothing is learned.

"Verification" asks what a face recogniser asks: do these two images show the same class? Balanced pairs
of test images are compared by cosine similarity; the threshold is chosen on one half of the pairs and
scored on the other, then the halves change places.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import normface_ext as nf

CLASSES, FEATURES, BATCH = 10, 32, 64
COLORS = {"plain": "#8a8f98", "s = 1": "#3f6fb5", "s = auto": "#c8421c"}


class PlainHead(nn.Module):
    """The usual classification head behind the interface of NormFaceLoss."""

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, num_classes)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.linear(features), labels)


def make_head(name: str) -> nn.Module:
    if name == "plain":
        return PlainHead(FEATURES, CLASSES)
    return nf.NormFaceLoss(FEATURES, CLASSES, scale=1.0 if name == "s = 1" else "auto")


def scores(head: nn.Module, features: Tensor) -> Tensor:
    """[N, CLASSES]; the largest is the prediction. Scaling by s > 0 would not change which."""
    if isinstance(head, nf.NormFaceLoss):
        return nf.functional.norm_linear(features, head.weight)
    return head.linear(features)


def make_backbone() -> nn.Module:
    """[N, 1, 8, 8] -> [N, FEATURES]. It ends without a ReLU, so that features can point anywhere."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 16, FEATURES)),
    )


@dataclass
class Data:
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load(seed: int, device: str) -> Data:
    """1,797 images, 70 % for training, every class in the same proportion on both sides."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target, dtype=torch.int64)
    train, test = train_test_split(range(len(labels)), test_size=0.3, random_state=seed, stratify=labels)
    return Data(*(t[part].to(device) for part in (train, test) for t in (images, labels)))


def make_pairs(labels: Tensor, seed: int, count: int = 2000) -> tuple[Tensor, Tensor, Tensor]:
    """(first, second, same): `count` pairs of one class and `count` pairs of two, shuffled."""
    generator = torch.Generator().manual_seed(seed)
    labels = labels.cpu()
    first, second = torch.combinations(torch.arange(len(labels))).unbind(1)
    same = labels[first] == labels[second]
    chosen = []
    for wanted in (same, ~same):
        candidates = wanted.nonzero()[:, 0]
        chosen.append(candidates[torch.randperm(len(candidates), generator=generator)[:count]])
    pairs = torch.cat(chosen)
    pairs = pairs[torch.randperm(len(pairs), generator=generator)]
    return first[pairs], second[pairs], same[pairs]


def best_threshold(similarity: Tensor, same: Tensor) -> float:
    """The cut between "different" (below) and "same" that makes the fewest mistakes."""
    ordered, order = similarity.sort()
    is_same = same[order].int()
    below = torch.arange(len(ordered) + 1)
    same_below = torch.cat([torch.zeros(1, dtype=torch.int64), is_same.cumsum(0)])
    right = (below - same_below) + (is_same.sum() - same_below)
    cut = int(right.argmax())
    edges = torch.cat([ordered[:1] - 1, (ordered[:-1] + ordered[1:]) / 2, ordered[-1:] + 1])
    return float(edges[cut])


def verification_accuracy(features: Tensor, pairs: tuple[Tensor, Tensor, Tensor]) -> float:
    first, second, same = pairs
    unit = nf.functional.normalize(features).cpu()
    similarity = (unit[first] * unit[second]).sum(1)
    half = len(same) // 2
    accuracies = []
    for choose, judge in ((slice(half), slice(half, None)), (slice(half, None), slice(half))):
        threshold = best_threshold(similarity[choose], same[choose])
        accuracies.append(((similarity[judge] > threshold) == same[judge]).float().mean())
    return float(sum(accuracies) / 2)


@dataclass
class Run:
    """What one head did: its mean training loss in each epoch, and how good it is on test images."""

    head: str
    scale: float | None  # None: the plain head, whose loss has no bound but 0
    bound: float
    losses: list[float] = field(default_factory=list)
    classification: float = 0.0
    verification: float = 0.0
    seconds: float = 0.0


def train(name: str, data: Data, epochs: int, seed: int, device: str) -> Run:
    torch.manual_seed(seed)  # the backbone is drawn first, so all three start from the same one
    backbone, head = make_backbone().to(device), make_head(name).to(device)
    scale = float(head.scale) if isinstance(head, nf.NormFaceLoss) else None
    run = Run(name, scale, 0.0 if scale is None else nf.theory.loss_lower_bound(CLASSES, scale))
    optimizer = torch.optim.Adam([*backbone.parameters(), *head.parameters()], lr=3e-3)
    order = torch.Generator().manual_seed(seed)
    samples = len(data.train_labels)
    start = time.perf_counter()
    bar = progress(range(epochs), name)
    for _ in bar:
        backbone.train()
        total = torch.zeros((), device=device)
        for batch in torch.randperm(samples, generator=order).split(BATCH):
            batch = batch.to(device)
            loss = head(backbone(data.train_images[batch]), data.train_labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(batch)
        run.losses.append(float(total) / samples)
        if hasattr(bar, "set_postfix_str"):
            bar.set_postfix_str(f"loss {run.losses[-1]:.4f}, bound {run.bound:.4g}")
    run.seconds = time.perf_counter() - start

    backbone.eval()
    with torch.no_grad():
        features = backbone(data.test_images)
        run.classification = float((scores(head, features).argmax(1) == data.test_labels).float().mean())
        run.verification = verification_accuracy(features, make_pairs(data.test_labels, seed))
    print(
        f"{name:8}  loss {run.losses[0]:.4f} -> {run.losses[-1]:.4f}, lower bound {run.bound:.4g}", flush=True
    )
    return run


def progress(epochs: range, name: str) -> Iterable[int]:
    """A bar on stderr where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return epochs
    return tqdm(epochs, desc=f"{name:8}", unit="epoch", file=sys.stderr)


def table(runs: list[Run]) -> str:
    lines = ["head       scale  lower bound  final loss  loss - bound  classification  verification  seconds"]
    for run in runs:
        scale = "-" if run.scale is None else f"{run.scale:.2f}"
        gap = run.losses[-1] - run.bound
        lines.append(
            f"{run.head:8}  {scale:>6}  {run.bound:11.2g}  {run.losses[-1]:10.4f}  {gap:12.4f}"
            f"  {run.classification:14.2%}  {run.verification:12.2%}  {run.seconds:7.1f}"
        )
    return "\n".join(lines)


def write_csv(runs: list[Run], folder: Path) -> list[Path]:
    """losses.csv has a line per head and epoch, summary.csv a line per head."""
    losses, summary = folder / "losses.csv", folder / "summary.csv"
    with losses.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["head", "epoch", "loss", "bound"])
        for run in runs:
            writer.writerows(
                [run.head, i + 1, f"{loss:.6g}", f"{run.bound:.6g}"] for i, loss in enumerate(run.losses)
            )
    with summary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["head", "scale", "bound", "final_loss", "classification", "verification"])
        for run in runs:
            scale = "" if run.scale is None else f"{run.scale:.6g}"
            numbers = (run.bound, run.losses[-1], run.classification, run.verification)
            writer.writerow([run.head, scale, *(f"{number:.6g}" for number in numbers)])
    return [losses, summary]


def plot(runs: list[Run], path: Path) -> None:
    """Loss against epoch, with each head's lower bound dashed in the same colour."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7.5, 4.5), layout="constrained")
    for run in runs:
        color, epochs = COLORS[run.head], range(1, len(run.losses) + 1)
        label = run.head if run.head != "s = auto" else f"s = auto ({run.scale:.1f})"
        axis.plot(epochs, run.losses, color=color, label=label, marker="." if len(epochs) < 3 else None)
        if run.bound > 0:
            axis.axhline(run.bound, color=color, linestyle="--", linewidth=1)
            axis.annotate(
                *(f"lower bound {run.bound:.4g}", (1, run.bound)),
                xycoords=axis.get_yaxis_transform(), xytext=(-4, -4), textcoords="offset points",
                ha="right", va="top", color=color, fontsize=9,
            )  # fmt: skip
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.set_ylim(low / 2, high)
    axis.set_xlabel("epoch")
    axis.set_ylabel("training loss (log)")
    axis.set_title("Cosines without a scale stall at their bound", fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=30, help="default: 30")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    # A second thread brings nothing to a network this small, and on a busy machine it costs a lot.
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("digits_results"),
                        help="where the files go (default: ./digits_results)")  # fmt: skip
    options = parser.parse_args()
    if options.epochs < 1:
        parser.error(f"expected --epochs >= 1, got {options.epochs}")
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)

    data = load(options.seed, options.device)
    print(
        f"{len(data.train_labels)} training images, {len(data.test_labels)} test images, on {options.device}"
    )
    runs = [train(name, data, options.epochs, options.seed, options.device) for name in COLORS]
    print("\n" + table(runs))
    files = write_csv(runs, options.out)
    try:
        plot(runs, options.out / "losses.png")
        files.append(options.out / "losses.png")
    except ImportError:
        print("no figure: matplotlib is not installed")
    print("written: " + ", ".join(map(str, files)))


if __name__ == "__main__":
    main()
