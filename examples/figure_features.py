"""What features look like under a plain softmax and on the sphere (NormFace, figures 2 and 3).

    python examples/figure_features.py

features_2d.png: a small LeNet with 2-D features is trained with a softmax with bias, without bias, and
normalised. The first two are radial: a class is a ray from the origin, and a sample near the origin is one
the network is unsure of. Angle alone, which is what a verification score looks at, then says less than the
head, whose logits also know lengths and biases. Normalised features have nothing but an angle.

features_3d.png: 3-D features on the unit sphere for the scales 1, 2, 4, 7 and 11. A small scale never stops
pulling at samples that are right already, so its clusters are the tightest; a large one lets go of them.

features.csv has the numbers: test accuracy by angle, the spread around the class mean, and lengths.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from common import (
    FAINT,
    INK,
    Data,
    Size,
    Softmax,
    embed,
    lenet,
    load,
    nearest_by_angle,
    parser,
    pyplot,
    report,
    train,
    write_csv,
)
from torch import Tensor, nn

import normface_ext as nf

SCALES = (1.0, 2.0, 4.0, 7.0, 11.0)


@dataclass
class Cloud:
    """Test features [N, D], labels [N], class weights [C, D], and what was measured on them."""

    name: str
    features: np.ndarray
    labels: np.ndarray
    weight: np.ndarray
    by_angle: float  # test accuracy of the nearest class weight by angle
    by_logit: float  # test accuracy of the head itself
    spread: float  # mean angle to the class's mean direction, degrees
    lengths: float  # standard deviation / mean of the feature lengths


def spread_in_degrees(features: Tensor, labels: Tensor) -> float:
    unit = nf.functional.normalize(features)
    means = torch.stack([unit[labels == c].mean(0) for c in labels.unique()])
    means = nf.functional.normalize(means)
    own = means[torch.unique(labels, return_inverse=True)[1]]
    return float(torch.rad2deg(torch.acos((unit * own).sum(1).clamp(-1, 1))).mean())


def cloud(name: str, data: Data, make: Callable[[], nn.Module], dim: int, epochs: int, seed: int) -> Cloud:
    torch.manual_seed(seed)
    backbone = lenet(dim, data.size).to(data.train_images.device)
    head = make().to(data.train_images.device)
    train(backbone, head, data.train_images, data.train_labels, epochs=epochs, seed=seed, name=name)
    features = embed(backbone, data.test_images)
    with torch.no_grad():
        by_angle = nearest_by_angle(features, head.weight, data.test_labels)
        by_logit = by_angle
        if isinstance(head, Softmax):
            by_logit = float((head.linear(features).argmax(1) == data.test_labels).float().mean())
        lengths = features.norm(dim=1)
        arrays = [t.detach().cpu().numpy() for t in (features, data.test_labels, head.weight)]
        spread = spread_in_degrees(features, data.test_labels)
        return Cloud(name, *arrays, by_angle, by_logit, spread, float(lengths.std() / lengths.mean()))


def draw_2d(clouds: list[Cloud], names: tuple[str, ...], path: Path) -> None:
    plt = pyplot()
    figure, axes = plt.subplots(1, len(clouds), figsize=(13, 5.4), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0, 1, 0.95))  # it takes no heed of titles of axes that are off
    colors = plt.get_cmap("tab10").colors
    for axis, c in zip(axes, clouds, strict=True):
        normalised = c.name.startswith("normalised")
        points = c.features / np.linalg.norm(c.features, axis=1, keepdims=True) if normalised else c.features
        reach = 1.0 if normalised else float(np.quantile(np.linalg.norm(points, axis=1), 0.995))
        if normalised:  # a little noise outwards, or thousands of points would lie on one line
            noise = np.random.default_rng(0).normal(1, 0.02, (len(points), 1))
            points = points * noise
            turn = np.linspace(0, 2 * np.pi, 400)
            axis.plot(np.cos(turn), np.sin(turn), color="#d5d9df", linewidth=8, zorder=0)
        for k, name in enumerate(names):
            mine = points[c.labels == k]
            axis.scatter(*mine.T, s=9, color=colors[k % 10], alpha=0.6, linewidths=0)
            direction = c.weight[k] / np.linalg.norm(c.weight[k])
            end = direction * reach * (0.86 if normalised else 1.05)
            axis.plot([0, end[0]], [0, end[1]], color=colors[k % 10], linewidth=1.2, zorder=1)
            at = direction * reach * 1.17
            axis.text(*at, name, color=colors[k % 10], ha="center", va="center", weight="bold", fontsize=12)
        axis.plot(0, 0, "+", color=INK, markersize=8)
        axis.set_xlim(-1.3 * reach, 1.3 * reach)
        axis.set_ylim(-1.3 * reach, 1.3 * reach)
        axis.set_aspect("equal")
        axis.axis("off")
        axis.set_title(c.name, fontsize=13, weight="bold", pad=22)
        point = "only the angle is left" if normalised else "a class is a ray, and length counts"
        axis.text(0.5, 1.015, point, transform=axis.transAxes, ha="center", fontsize=11)
        text = f"right by angle alone {c.by_angle:.1%}"
        if not normalised:
            text = f"right {c.by_logit:.1%}, {text}"
        axis.text(0.5, -0.02, text, transform=axis.transAxes, ha="center", va="top", fontsize=11)
    figure.supxlabel(
        "2-D features of test images; lines: class weights, +: the origin", fontsize=10, color=FAINT
    )
    figure.savefig(path)
    plt.close(figure)


def draw_3d(clouds: list[Cloud], path: Path) -> None:
    plt = pyplot()
    figure = plt.figure(figsize=(3.1 * len(clouds), 4.1), layout="constrained")
    colors = np.array(plt.get_cmap("tab10").colors)
    eye = np.array([1.0, -1.0, 0.6]) / np.linalg.norm([1.0, -1.0, 0.6])
    u, v = np.mgrid[0 : 2 * np.pi : 25j, 0 : np.pi : 13j]
    for i, c in enumerate(clouds):
        axis = figure.add_subplot(1, len(clouds), i + 1, projection="3d", computed_zorder=False)
        axis.plot_wireframe(
            np.cos(u) * np.sin(v), np.sin(u) * np.sin(v), np.cos(v), color="#dfe2e7", linewidth=0.5, zorder=0
        )
        points = c.features / np.linalg.norm(c.features, axis=1, keepdims=True)
        front = points @ eye
        for near in (False, True):  # the far side first, and faint
            side = (front > 0) == near
            axis.scatter(
                *points[side].T, c=colors[c.labels[side] % 10], s=8 if near else 5,
                alpha=0.9 if near else 0.15, linewidths=0, depthshade=False, zorder=2 if near else 1,
            )  # fmt: skip
        axis.view_init(elev=np.degrees(np.arcsin(eye[2])), azim=-45)
        axis.set_box_aspect((1, 1, 1), zoom=1.45)
        axis.set_axis_off()
        axis.set_title(c.name, fontsize=13, weight="bold", y=0.98)
        axis.text2D(0.5, -0.03, f"spread {c.spread:.1f}°", transform=axis.transAxes, ha="center",
                    fontsize=13, weight="bold")  # fmt: skip
        axis.text2D(0.5, -0.13, f"right {c.by_angle:.1%}", transform=axis.transAxes, ha="center", fontsize=11)
    tightest, widest = (f(clouds, key=lambda c: c.spread) for f in (min, max))
    figure.suptitle(
        f"3-D features on the unit sphere: classes are tightest at {tightest.name}, widest at {widest.name}",
        fontsize=13, weight="bold",
    )  # fmt: skip
    figure.savefig(path)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> list[Cloud]:
    options = parser(__doc__, "figure_features", epochs=Size(40, 8)).parse_args(arguments)
    start, data = time.perf_counter(), load(options)
    heads = {
        "softmax with bias": lambda: Softmax(2, data.classes),
        "softmax without bias": lambda: Softmax(2, data.classes, bias=False),
        "normalised (s = auto)": lambda: nf.NormFaceLoss(2, data.classes),
    }
    flat = [cloud(name, data, make, 2, options.epochs, options.seed) for name, make in heads.items()]
    round_ = [
        cloud(
            f"s = {s:g}", data, lambda s=s: nf.NormFaceLoss(3, data.classes, scale=s), 3, options.epochs,
            options.seed,
        )
        for s in SCALES
    ]  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    draw_2d(flat, data.names, options.out / "features_2d.png")
    draw_3d(round_, options.out / "features_3d.png")
    rows = []
    print("head                    dims  right  right by angle  spread  lengths: deviation / mean")
    for c in flat + round_:
        dims = c.features.shape[1]
        print(
            f"{c.name:22}  {dims:4}  {c.by_logit:5.1%}  {c.by_angle:14.1%}  {c.spread:5.1f}°  {c.lengths:.2f}"
        )
        rows.append((c.name, dims, c.by_logit, c.by_angle, c.spread, c.lengths))
    header = ["head", "dimensions", "accuracy", "accuracy_by_angle", "spread_degrees", "length_variation"]
    table = write_csv(options.out / "features.csv", header, rows)
    report([options.out / "features_2d.png", options.out / "features_3d.png", table], start)
    return flat + round_


if __name__ == "__main__":
    main()
