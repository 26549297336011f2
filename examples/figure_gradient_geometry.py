"""The geometry of a step through x / ||x|| (NormFace, section 3.1 and its appendix), measured.

    python examples/figure_gradient_geometry.py

Left: two points on the circle, pulled together by the Euclidean loss 1/2 ||x/||x|| - y/||y|| ||^2 and
gradient descent. Every step is a tangent: it turns the points towards each other, and carries them outwards.
Middle: the length of x over the steps. By Pythagoras ||x||^2 grows by ||step||^2 each time; lines are
measured, dots predicted from the steps alone. Longer vectors get smaller gradients (by 1 / ||x||), which is
why features want a little weight decay.
Right: |cosine| between a feature and its gradient, for features of a network under a plain softmax and under
NormFaceLoss. The latter are orthogonal but for rounding, in float32.

geometry.csv has the lengths, orthogonality.csv the cosines.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from common import FAINT, INK, Size, Softmax, embed, lenet, load, parser, pyplot, report, train, write_csv
from torch import Tensor

import normface_ext as nf

FIRST, SECOND = "#3f6fb5", "#c8421c"
RATES = {0.3: "#2a9d8f", 1.0: "#3f6fb5", 3.0: "#c8421c"}


@dataclass
class Path2:
    """Both points before every step, [steps + 1, 2 points, 2], the steps, and the losses."""

    points: np.ndarray
    steps: np.ndarray
    losses: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return np.linalg.norm(self.points, axis=2)

    @property
    def predicted(self) -> np.ndarray:
        """sqrt(||x_0||^2 + sum of ||step||^2): what orthogonality says the lengths must be."""
        squares = (self.steps**2).sum(2).cumsum(0)
        return np.sqrt(self.lengths[:1] ** 2 + np.concatenate([np.zeros((1, 2)), squares]))

    @property
    def tangency(self) -> float:
        """The largest |cosine| between a point and its step."""
        dots = np.abs((self.points[:-1] * self.steps).sum(2))
        size = self.lengths[:-1] * np.linalg.norm(self.steps, axis=2)
        return float((dots / np.maximum(size, 1e-300)).max())


def descend(rate: float, steps: int, degrees: tuple[float, float] = (200.0, 40.0)) -> Path2:
    """Gradient descent on 1/2 ||x/||x|| - y/||y|| ||^2 from two points of the unit circle, in float64."""
    angles = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    points = torch.stack([angles.cos(), angles.sin()], 1).requires_grad_()
    seen, moved, losses = [points.detach().clone()], [], []
    for _ in range(steps):
        unit = nf.functional.normalize(points)
        loss = 0.5 * (unit[0] - unit[1]).square().sum()
        (gradient,) = torch.autograd.grad(loss, points)
        with torch.no_grad():
            points -= rate * gradient
        seen.append(points.detach().clone())
        moved.append(-rate * gradient)
        losses.append(float(loss.detach()))
    return Path2(torch.stack(seen).numpy(), torch.stack(moved).numpy(), np.array(losses))


def cosine_with_gradient(features: Tensor, head: torch.nn.Module, labels: Tensor) -> np.ndarray:
    """|<x, dL/dx>| / (||x|| ||dL/dx||) of each feature; those with no gradient at all are left out."""
    x = features.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(head(x, labels), x)
    x, gradient = x.detach().double(), gradient.double()
    size = x.norm(dim=1) * gradient.norm(dim=1)
    return ((x * gradient).sum(1).abs() / size)[size > 0].cpu().numpy()


def draw(paths: dict[float, Path2], cosines: dict[str, np.ndarray], path: Path) -> None:
    plt = pyplot()
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(14, 4.9), layout="constrained", width_ratios=[1.2, 1, 1]
    )
    turn = np.linspace(0, 2 * np.pi, 400)
    left.plot(np.cos(turn), np.sin(turn), color="#d5d9df", linewidth=2.5)
    shown = paths[1.0]
    for k, color in ((0, FIRST), (1, SECOND)):
        points = shown.points[:, k]
        unit = points / np.linalg.norm(points, axis=1, keepdims=True)
        left.plot(*points[0], "o", color=color, markersize=10, zorder=4)
        for i in range(min(9, len(points) - 1)):
            arrow = {"arrowstyle": "-|>", "color": color, "lw": 1.8, "shrinkA": 0, "shrinkB": 0}
            left.annotate("", points[i + 1], points[i], zorder=3, arrowprops=arrow)
            left.plot([0, points[i + 1][0]], [0, points[i + 1][1]], color=color, linewidth=0.5, alpha=0.35)
        left.plot(*unit[1:].T, "o", color=color, markersize=4.5, alpha=0.75, zorder=2)
    left.plot(0, 0, "+", color=INK, markersize=8)
    left.set_aspect("equal")
    left.axis("off")
    left.set_title("each step is a tangent: it turns x, and lengthens it", weight="bold")
    left.text(0.5, -0.03, "large dots: start; arrows: x; small dots: x / ||x||", transform=left.transAxes,
              ha="center", fontsize=9.5)  # fmt: skip

    for rate, p in paths.items():
        steps = np.arange(len(p.points))
        middle.plot(steps, p.lengths[:, 0], color=RATES[rate], linewidth=2, label=f"rate {rate:g}")
        middle.plot(steps, p.predicted[:, 0], "o", color=RATES[rate], markersize=5, markerfacecolor="white")
    middle.axhline(1, color=FAINT, linewidth=1, linestyle=":")
    middle.set_xlabel("step")
    middle.set_ylabel("||x||")
    middle.set_title("||x|| only grows (dots: Pythagoras)", weight="bold")
    middle.legend(loc="center right")

    bins = np.logspace(-10, 0, 61)
    for (name, values), color in zip(cosines.items(), ("#8a8f98", "#c8421c"), strict=True):
        right.hist(values.clip(1e-10, 1), bins=bins, color=color, alpha=0.85)
        height = np.histogram(values.clip(1e-10, 1), bins=bins)[0].max()
        right.text(np.median(values), height * 1.04, name, color=color, ha="center", weight="bold")
    right.set_xscale("log")
    right.margins(y=0.12)
    right.set_xlim(bins[0], 30)  # room for the name above the last bins
    right.set_yticks([])
    right.spines["left"].set_visible(False)
    right.set_xlabel("|cosine| of feature and gradient (log)")
    right.set_title("the gradient is orthogonal to the feature", weight="bold")
    figure.savefig(path)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> tuple[dict[float, Path2], dict[str, np.ndarray]]:
    options = parser(__doc__, "figure_gradient_geometry", epochs=Size(3, 1)).parse_args(arguments)
    start, data = time.perf_counter(), load(options)
    paths = {rate: descend(rate, 12) for rate in RATES}
    cosines = {}
    for name, make in (
        ("softmax", Softmax),
        ("NormFaceLoss", nf.NormFaceLoss),
    ):
        torch.manual_seed(options.seed)
        backbone = lenet(32, data.size).to(options.device)
        head = make(32, data.classes).to(options.device)
        images, labels = data.train_images, data.train_labels
        train(backbone, head, images, labels, epochs=options.epochs, seed=options.seed, name=name)
        cosines[name] = cosine_with_gradient(embed(backbone, data.test_images), head, data.test_labels)
    options.out.mkdir(parents=True, exist_ok=True)
    draw(paths, cosines, options.out / "geometry.png")
    for rate, p in paths.items():
        print(
            f"rate {rate:3g}: ||x|| 1 -> {p.lengths[-1, 0]:.4f}, Pythagoras says {p.predicted[-1, 0]:.4f};"
            f" loss {p.losses[0]:.3f} -> {p.losses[-1]:.2e}; largest |cos(x, step)| {p.tangency:.1e}"
        )
    for name, values in cosines.items():
        print(f"{name:12}: |cos(x, gradient)| median {np.median(values):.1e}, largest {values.max():.1e}")
    files = [
        options.out / "geometry.png",
        write_csv(options.out / "geometry.csv", ["rate", "step", "length", "predicted"], (
            (rate, i, float(a), float(b)) for rate, p in paths.items()
            for i, (a, b) in enumerate(zip(p.lengths[:, 0], p.predicted[:, 0], strict=True))
        )),
        write_csv(options.out / "orthogonality.csv", ["head", "cosine"],
                  ((name, float(v)) for name, values in cosines.items() for v in values)),
    ]  # fmt: skip
    report(files, start)
    return paths, cosines


if __name__ == "__main__":
    main()
