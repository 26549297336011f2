"""What the figure examples share: data, a small LeNet, training with a progress bar, figures and CSV.

Each example is one command, `python examples/NAME.py`, with the options of `parser` below; everything it
writes lies under --out. Defaults train on scikit-learn's digits and take about a minute of one CPU core.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import idx
import numpy as np
import torch
import torch.nn.functional as F
from images import read_image, scan
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

import normface_ext as nf

FASHION_VARIABLE = "FASHION_MNIST"  # the environment's word for where Fashion-MNIST lies
FASHION = Path(os.environ.get(FASHION_VARIABLE, "/usr/share/datasets/fashion-mnist"))
BATCH = 64
FOLDER_SIZE = 28  # images of --data FOLDER become grey and this large, like Fashion-MNIST's
INK, FAINT = "#23272e", "#9aa1ab"


# ------------------------------------------------------------------------------------ command line


class Size(NamedTuple):
    """How much by default: of the digits, and of data with larger images."""

    digits: int
    others: int


IMAGES = Size(10_000, 10_000)


class Parser(argparse.ArgumentParser):
    """Also takes options whose default depends on --data."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.by_data: dict[str, Size] = {}

    def add_size(self, name: str, text: str, size: Size) -> None:
        text += f"; default: {size.digits} for digits, else {size.others}"
        self.add_argument(f"--{name}", type=positive, metavar="N", help=text)
        self.by_data[name] = size

    def parse_args(self, arguments: Sequence[str] | None = None) -> argparse.Namespace:
        options = super().parse_args(arguments)
        for name, size in self.by_data.items():
            if getattr(options, name) is None:
                setattr(options, name, size.digits if options.data == "digits" else size.others)
        return options


def parser(description: str | None, out: str, epochs: Size, images: Size = IMAGES) -> Parser:
    result = Parser(description)
    text = "digits (scikit-learn's, the default), fashion-mnist (Debian's), or a folder CLASS/IMAGE.png"
    result.add_argument("--data", metavar="NAME|FOLDER", default="digits", help=text)
    result.add_size("images", "use at most N images", images)
    result.add_size("epochs", "passes over the training images", epochs)
    # Batches are so small that a second thread brings little, and on a busy machine it costs a lot.
    result.add_argument("--threads", type=positive, default=1, help="CPU threads; default: 1")
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    result.add_argument("--out", type=Path, metavar="DIR", default=Path(out), help=f"default: ./{out}")
    return result


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return int(text)


# -------------------------------------------------------------------------------------------- data


@dataclass
class Data:
    """Images [N, 1, S, S] in [0, 1] and labels [N]; 70 % train, classes in the same proportion."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    names: tuple[str, ...]

    @property
    def size(self) -> int:
        return self.train_images.shape[-1]

    @property
    def classes(self) -> int:
        return len(self.names)


FASHION_NAMES = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot",
)  # fmt: skip


def read_idx(path: Path) -> np.ndarray:
    """An array of bytes, or the end of the program with a sentence."""
    try:
        return idx.read(path)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None


def fashion(folder: Path = FASHION) -> tuple[np.ndarray, np.ndarray]:
    """All 70,000 images and labels."""
    files = [
        [folder / f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k")]
        for kind in ("images-idx3", "labels-idx1")
    ]
    missing = [str(path) for kind in files for path in kind if not path.exists()]
    if missing:
        raise SystemExit(
            f"Fashion-MNIST is not there: {missing[0]} is missing. On Debian and Ubuntu"
            " `sudo apt-get install dataset-fashion-mnist` puts it there; without root, in an empty folder,"
            " `apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb .` and"
            f" {FASHION_VARIABLE}=usr/share/datasets/fashion-mnist. --data digits needs no files."
        )
    images, labels = ([read_idx(path) for path in kind] for kind in files)
    for (image_file, label_file), pixels, numbers in zip(
        zip(*files, strict=True), images, labels, strict=True
    ):
        if numbers.ndim != 1 or pixels.ndim != 3 or pixels.shape != (len(numbers), *images[0].shape[1:]):
            raise SystemExit(
                f"{image_file}: expected an image for each label of {label_file.name}, all of one size, got"
                f" images {list(pixels.shape)} and labels {list(numbers.shape)}"
            )
    return np.concatenate(images), np.concatenate(labels)


def folder(path: Path) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Grey images [N, FOLDER_SIZE, FOLDER_SIZE], labels, names; a class is a folder of images in `path`."""
    found = scan(path, FOLDER_SIZE)
    for skipped, reason in found.skipped:
        print(f"skipped {skipped}: {reason}", file=sys.stderr)
    if len(found.people) < 2:
        raise SystemExit(
            f"{path}: expected at least 2 folders with 2 readable images each, got {len(found.people)}"
        )
    pixels, labels = [], []
    for label, images in enumerate(found.people.values()):
        try:
            pixels += [read_image(image, FOLDER_SIZE).float().mean(0).numpy() for image in images]
        except (ValueError, OSError) as error:
            raise SystemExit(f"was readable a moment ago and is not any more: {error}") from None
        labels += [label] * len(images)
    return np.stack(pixels), np.array(labels), tuple(found.people)


def load(options: argparse.Namespace) -> Data:
    """The data of --data, at most --images of it; sets the number of threads."""
    torch.set_num_threads(options.threads)
    brightest = 255
    if options.data == "digits":
        digits = load_digits()
        pixels, labels, names, brightest = digits.images, digits.target, tuple("0123456789"), 16
    elif options.data == "fashion-mnist":
        pixels, labels, names = (*fashion(), FASHION_NAMES)
        if labels.max() >= len(names):
            raise SystemExit(f"{FASHION}: expected labels from 0 to {len(names) - 1}, got {labels.max()}")
    elif os.path.isdir(options.data):
        pixels, labels, names = folder(Path(options.data))
    else:
        raise SystemExit(f"--data: expected digits, fashion-mnist or a folder, got {options.data!r}")
    rows = np.arange(len(labels))
    if options.images < len(rows):
        rows, _ = train_test_split(
            rows, train_size=options.images, random_state=options.seed, stratify=labels
        )
    pixels, labels = pixels[rows], labels[rows]
    images = torch.tensor(pixels, dtype=torch.float32)[:, None] / brightest
    targets = torch.tensor(labels, dtype=torch.int64)
    split = train_test_split(range(len(labels)), test_size=0.3, random_state=options.seed, stratify=labels)
    parts = [values[part].to(options.device) for part in split for values in (images, targets)]
    return Data(*parts, names)


# ---------------------------------------------------------------------------------- network, heads


def lenet(features: int, size: int) -> nn.Module:
    """[N, 1, size, size] -> [N, features]. It ends without a ReLU: features can point anywhere."""
    layers: list[nn.Module] = []
    channels, width = 1, 16
    if size > 16:  # strides where the image is large: a third of the time
        layers += [nn.Conv2d(1, width, 5, stride=2, padding=2), nn.BatchNorm2d(width), nn.ReLU()]
        channels, width, size = width, 2 * width, (size + 1) // 2
    while size > 4:
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.MaxPool2d(2)]
        channels, width, size = width, min(2 * width, 64), size // 2
    layers += [nn.Conv2d(channels, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten()]
    layers += [nn.Linear(64 * size * size, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, features)]
    return nn.Sequential(*layers)


class Softmax(nn.Module):
    """The usual head, with or without bias, behind the interface of NormFaceLoss."""

    def __init__(self, in_features: int, num_classes: int, *, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, num_classes, bias=bias)

    @property
    def weight(self) -> Tensor:
        return self.linear.weight

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.linear(features), labels)


@dataclass
class History:
    """Mean training loss of each epoch, the scale after it, how many steps there were, and the time training
    took: CPU time on a CPU, which other programs disturb least."""

    losses: list[float] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    seconds: float = 0.0
    steps: int = 0


def train(
    backbone: nn.Module,
    head: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    seed: int,
    name: str,
    lr: float = 3e-3,
    scale_lr: float | None = None,
    after_epoch: Callable[[int], None] | None = None,
) -> History:
    """Adam with a cosine schedule; batches are drawn from `seed` alone, so all heads see the same ones."""
    scale = getattr(head, "scale", None)
    groups: list[dict[str, object]] = [
        {"params": [p for p in (*backbone.parameters(), *head.parameters()) if p is not scale]}
    ]
    if isinstance(scale, nn.Parameter):
        groups.append({"params": [scale], "lr": scale_lr or lr})
    optimizer = torch.optim.Adam(groups, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, eta_min=lr / 50)
    order = torch.Generator().manual_seed(seed)
    clock = time.process_time if images.device.type == "cpu" else time.perf_counter
    history, start = History(), clock()
    bar = tqdm(range(epochs), desc=f"{name:20}", unit="epoch", file=sys.stderr, leave=False)
    for epoch in bar:
        backbone.train()
        total = torch.zeros((), device=images.device)
        # A last batch of one image would break BatchNorm.
        batches = [b for b in torch.randperm(len(labels), generator=order).split(BATCH) if len(b) > 1]
        for batch in batches:
            chosen = batch.to(images.device)
            loss = head(backbone(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(batch)
            history.steps += 1
        schedule.step()
        history.losses.append(float(total) / sum(len(batch) for batch in batches))
        history.scales.append(float("nan") if scale is None else float(torch.as_tensor(scale).detach()))
        bar.set_postfix_str(f"loss {history.losses[-1]:.4f}")
        if after_epoch:
            after_epoch(epoch)
    history.seconds = clock() - start  # the loop has just read a loss, so a GPU has nothing left to do
    return history


@torch.no_grad()
def embed(backbone: nn.Module, images: Tensor, block: int = 1024) -> Tensor:
    """Features of all images, in evaluation mode: [N, D]."""
    backbone.eval()
    return torch.cat([backbone(part) for part in images.split(block)])


def nearest_by_angle(features: Tensor, weight: Tensor, labels: Tensor) -> float:
    """The share of features whose nearest class weight, by angle, is their own."""
    cosines = nf.functional.norm_linear(features.detach(), weight.detach())
    return float((cosines.argmax(1) == labels).float().mean())


def pairs_of(labels: Tensor, count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(first, second, same): at most `count` pairs of one class and as many of two, shuffled."""
    who = labels.cpu().numpy()
    first, second = np.triu_indices(len(who), 1)
    same = who[first] == who[second]
    random = np.random.default_rng(seed)
    count = min(count, int(same.sum()), int((~same).sum()))
    chosen = np.concatenate(
        [random.choice(np.flatnonzero(kind), count, replace=False) for kind in (same, ~same)]
    )
    random.shuffle(chosen)
    return first[chosen], second[chosen], same[chosen]


# ---------------------------------------------------------------------------------------- results


def pyplot():
    """matplotlib.pyplot, drawing to files, in the examples' style."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({
        "figure.dpi": 130, "savefig.dpi": 130, "font.size": 10, "axes.titlesize": 11,
        "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
        "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": FAINT,
        "xtick.color": INK, "ytick.color": INK,
    })  # fmt: skip
    return plt


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> Path:
    """Numbers with six significant digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for row in rows:
            writer.writerow([f"{v:.6g}" if isinstance(v, float) else v for v in row])
    return path


def write_markdown(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> Path:
    """A table as the documentation includes it: the first column is text, the others are numbers."""
    lines = [header, ["---"] + ["--:"] * (len(header) - 1), *rows]
    path.write_text("".join(f"| {' | '.join(line)} |\n" for line in lines), encoding="utf-8")
    return path


def report(files: Sequence[Path], start: float) -> None:
    print(f"written in {time.perf_counter() - start:.0f} s: " + ", ".join(map(str, files)))
