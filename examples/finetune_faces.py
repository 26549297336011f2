"""Fine-tunes a face network on a folder of images with the normalised head, as the paper does.

    python examples/finetune_faces.py FACES --backbone my_net.py:make --weights my_net.pt --out run

FACES holds a folder per person with aligned face crops (FACES/Ada/1.jpg). --backbone names a function in a
file or module that returns any nn.Module from images [N, 3, S, S], about -1 to 1, to embeddings [N, D];
without it a small network is trained from nothing. Settings are the paper's: SGD with a small learning
rate, a head that learns faster and has no weight decay, mirrored images, and a scale from the number of
people.

A share of the people (--holdout) is left out of training and verified before and after it, in the folds of
the LFW protocol, each image's feature summed with its mirror image's.

Under --out:
    checkpoint.pt   written every --save-every steps and at the end; --resume goes on from it. On the CPU, or
                    with --deterministic, an interrupted and resumed run ends with the same bits as one
                    that was never interrupted.
    metrics.csv     losses and verification
    training.png    the loss against its bound, and the ROC of the held-out people
    skipped.csv     files and people that were left out, and why
    embedder.pt2    what to deploy: pixels in, unit-length embeddings out (torch.export; needs only torch)
    embedder.json   its input, output and threshold

The tensor to deploy is the embedding, not the head: the head's weight knows only the people of the training
set. Two faces are compared by the dot product of their embeddings.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from checkpoint import Training, resume, save
from common import FAINT, pyplot, write_csv
from images import read_image, readable, scan, sentence
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch_files import load_weights
from tqdm import tqdm

import normface_ext as nf
from normface_ext import evaluation as ev

# --------------------------------------------------------------------------------------------- data


def split(people: dict[str, list[Path]], holdout: float, seed: int) -> tuple[list[str], list[str]]:
    """(training people, held-out people), at least two of each."""
    names = list(people)
    if len(names) < 4:
        raise SystemExit(
            "expected at least 4 people with 2 readable images each (2 to train on, 2 to verify),"
            f" got {len(names)}; the folder should look like FACES/person/image.jpg"
        )
    count = min(max(2, round(holdout * len(names))), len(names) - 2)
    chosen = set(np.random.default_rng(seed).choice(len(names), count, replace=False).tolist())
    return [n for i, n in enumerate(names) if i not in chosen], [
        n for i, n in enumerate(names) if i in chosen
    ]


class Faces(Dataset):
    """(index, mirrored) -> (image [3, S, S] uint8, label)."""

    def __init__(self, people: dict[str, list[Path]], names: list[str], size: int) -> None:
        self.items = [(path, label) for label, name in enumerate(names) for path in people[name]]
        self.labels = np.array([label for _, label in self.items])
        self.size = size

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: tuple[int, bool]) -> tuple[Tensor, int]:
        index, mirrored = key
        path, label = self.items[index]
        try:
            image = read_image(path, self.size)
        except (ValueError, OSError) as error:
            raise RuntimeError(f"{path}: was readable at the start and is not any more: {error}") from error
        return (image.flip(2) if mirrored else image), label


def batches(faces: Faces, batch: int, seed: int, epoch: int) -> list[list[tuple[int, bool]]]:
    """The order and the mirrorings of an epoch, from (seed, epoch) alone: what makes resuming exact."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(faces), generator=generator).tolist()
    mirrored = (torch.rand(len(faces), generator=generator) < 0.5).tolist()
    keys = list(zip(order, mirrored, strict=True))
    parts = [keys[i : i + batch] for i in range(0, len(keys), batch)]
    return [part for part in parts if len(part) > 1]  # one image alone would break BatchNorm


def loader(faces: Faces, plan: list[list[tuple[int, bool]]], workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    # A generator of its own: otherwise every loader that is opened draws from the global random state, and a
    # resumed run, which opens one more, would see other dropout.
    own = torch.Generator().manual_seed(0)
    return iter(DataLoader(faces, batch_sampler=plan, num_workers=workers, generator=own))


def to_network(pixels: Tensor) -> Tensor:
    """0 .. 255 to about -1 .. 1: the paper's (x - 127.5) / 128."""
    return (pixels.float() - 127.5) / 128


# ----------------------------------------------------------------------------------------- networks


def small_backbone(features: int = 128) -> nn.Module:
    """For a first try: images of any size -> [N, features]. Ends without a ReLU."""
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.PReLU(after)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * 128, features))


def make_backbone(name: str | None, weights: Path | None) -> nn.Module:
    """From "file.py:function" or "package.module:function", or the small one."""
    if name is None:
        backbone = small_backbone()
    else:
        where, _, function = name.rpartition(":")
        if not where:
            raise SystemExit(f"--backbone: expected file.py:function or module:function, got {name!r}")
        if where.endswith(".py"):
            if not Path(where).exists():
                raise SystemExit(f"--backbone: there is no file {where}")
            spec = importlib.util.spec_from_file_location(Path(where).stem, where)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
        if not hasattr(module, function):
            raise SystemExit(f"--backbone: {where} has no function {function!r}")
        backbone = getattr(module, function)()
    if weights:
        try:
            load_weights(backbone, weights)
        except (ValueError, OSError) as error:
            raise SystemExit(sentence(f"--weights: {error}")) from None
    return backbone


def embedding_size(backbone: nn.Module, size: int) -> int:
    was_training = backbone.training
    with torch.no_grad():
        out = backbone.eval()(torch.zeros(2, 3, size, size))
    backbone.train(was_training)
    if not isinstance(out, Tensor) or out.dim() != 2 or len(out) != 2:
        got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise SystemExit(f"--backbone: expected embeddings [2, D] for two images, got {got}")
    return out.shape[1]


class Embedder(nn.Module):
    """What is deployed: pixels [N, 3, S, S], 0 .. 255 RGB -> unit-length embeddings [N, D].

    Plain torch, so that loading it needs nothing else. With ``mirror`` the features of the image and its
    mirror image are summed before normalisation, as in the paper's evaluation.
    """

    def __init__(self, backbone: nn.Module, mirror: bool) -> None:
        super().__init__()
        self.backbone, self.mirror = backbone, mirror

    def forward(self, pixels: Tensor) -> Tensor:
        images = to_network(pixels)
        features = self.backbone(images)
        if self.mirror:
            features = features + self.backbone(images.flip(3))
        features = features.float()
        return features / (features.square().sum(1, keepdim=True) + 1e-12).sqrt()


# --------------------------------------------------------------------------------------- evaluation


def sample_pairs(labels: np.ndarray, count: int, seed: int) -> ev.Pairs:
    """Up to `count` same and as many different pairs, no pair twice, in ten folds (fewer if few)."""
    random = np.random.default_rng(seed)
    order = np.argsort(labels, kind="stable")
    groups = np.split(order, np.unique(labels[order], return_index=True)[1][1:])
    same, different = set(), set()
    for _ in range(20 * count):
        if len(same) < count:
            group = groups[random.integers(len(groups))]
            same.add(tuple(sorted(random.choice(group, 2, replace=False).tolist())))
        if len(different) < count:
            i, j = random.integers(len(labels), size=2).tolist()
            if labels[i] != labels[j]:
                different.add((min(i, j), max(i, j)))
    fewest = min(len(same), len(different))
    pairs = np.array([*sorted(same)[:fewest], *sorted(different)[:fewest]])
    is_same = np.arange(2 * fewest) < fewest
    mixed = random.permutation(2 * fewest)
    pairs, is_same = pairs[mixed], is_same[mixed]
    return ev.Pairs.in_folds(pairs[:, 0], pairs[:, 1], is_same, folds=min(10, fewest))


@torch.no_grad()
def embeddings(embedder: Embedder, faces: Faces, batch: int, workers: int, device: str) -> np.ndarray:
    embedder.eval()
    keys = [(i, False) for i in range(len(faces))]
    plan = [keys[i : i + batch] for i in range(0, len(keys), batch)]
    return torch.cat(
        [embedder(pixels.to(device)).cpu() for pixels, _ in loader(faces, plan, workers)]
    ).numpy()


@dataclass
class Verification:
    """Accuracy in folds, its threshold and TAR@FAR=1%; and the score of each pair, same or not, [P]."""

    measures: dict[str, float]
    scores: np.ndarray
    same: np.ndarray


def evaluate(embedder: Embedder, faces: Faces, options: argparse.Namespace) -> Verification:
    """Of the held-out people."""
    features = embeddings(embedder, faces, options.batch, options.workers, options.device)
    pairs = sample_pairs(faces.labels, options.pairs, options.seed)
    if len(np.unique(pairs.fold)) < 2:
        raise SystemExit("expected at least 2 same pairs among the held-out people: raise --holdout")
    result = ev.lfw_protocol(features, pairs)
    tar = float(ev.tar_at_far(result.scores, pairs.same, 0.01)[0])
    measures = {"accuracy": result.accuracy, "threshold": float(result.thresholds.mean())}
    return Verification({**measures, "tar_at_far_1": tar}, result.scores, pairs.same)


# ----------------------------------------------------------------------------------------- training


def make_training(backbone: nn.Module, people: int, options: argparse.Namespace) -> Training:
    dim = embedding_size(backbone, options.size)
    head = nf.NormFaceLoss(dim, people, scale=options.scale)
    backbone.to(options.device)
    head.to(options.device)
    groups = [
        {"params": list(backbone.parameters()), "factor": 1.0, "weight_decay": options.weight_decay},
        {"params": list(head.parameters()), "factor": options.head_lr, "weight_decay": 0.0},
    ]
    return Training(backbone, head, torch.optim.SGD(groups, lr=options.lr, momentum=0.9))


def set_learning_rate(training: Training, options: argparse.Namespace, total: int) -> None:
    """A tenth after 60 % and again after 85 % of the steps; a function of the step alone."""
    done = training.step / total
    rate = options.lr * (1.0 if done < 0.6 else 0.1 if done < 0.85 else 0.01)
    for group in training.optimizer.param_groups:
        group["lr"] = rate * group["factor"]


def fingerprint(options: argparse.Namespace, faces: Faces) -> dict[str, object]:
    """What must not change between a run and its continuation."""
    names = (
        "batch",
        "epochs",
        "seed",
        "lr",
        "head_lr",
        "weight_decay",
        "scale",
        "size",
        "backbone",
        "holdout",
    )
    files = [readable(f"{path.parent.name}/{path.name}") for path, _ in faces.items]
    return {**{name: getattr(options, name) for name in names}, "images": files}


def fit(
    training: Training, faces: Faces, options: argparse.Namespace, checkpoint: Callable[[], None]
) -> bool:
    """True when training is complete, False when --stop-after ended it."""
    per_epoch = len(batches(faces, options.batch, options.seed, 0))
    total, taken = per_epoch * options.epochs, 0
    bound = training.head.loss_lower_bound()
    with tqdm(total=total, initial=training.step, desc="training", unit="step", file=sys.stderr) as bar:
        while training.step < total:
            epoch, inside = divmod(training.step, per_epoch)
            training.backbone.train()
            plan = batches(faces, options.batch, options.seed, epoch)[inside:]
            for pixels, labels in loader(faces, plan, options.workers):
                set_learning_rate(training, options, total)
                features = training.backbone(to_network(pixels.to(options.device)))
                loss = training.head(features, labels.to(options.device))
                training.optimizer.zero_grad()
                loss.backward()
                training.optimizer.step()
                training.step += 1
                taken += 1
                training.losses.append(float(loss.detach()))
                bar.update()
                bar.set_postfix_str(f"loss {training.losses[-1]:.4f}, bound {bound:.1e}")
                if not np.isfinite(training.losses[-1]):
                    raise SystemExit(f"the loss is {training.losses[-1]} at step {training.step}: lower --lr")
                if training.step % options.save_every == 0:
                    checkpoint()
                if taken == options.stop_after:
                    checkpoint()
                    return training.step == total
    return True


def export(embedder: Embedder, size: int, after: dict[str, float], out: Path) -> None:
    """embedder.pt2 and embedder.json; what was written is loaded again and compared."""
    embedder = embedder.cpu().eval()
    pixels = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        program = torch.export.export(embedder, (pixels,), dynamic_shapes=({0: batch},))
        torch.export.save(program, out / "embedder.pt2")
        loaded = torch.export.load(out / "embedder.pt2").module()
        three = torch.cat([pixels, pixels[:1]])
        deployed = loaded(three)
        error = float((deployed - embedder(three)).abs().max())
    if error > 1e-4:
        raise SystemExit(f"{out / 'embedder.pt2'}: the exported network differs by {error:.2g}")
    about = {
        "input": f"[N, 3, {size}, {size}] uint8, RGB, 0 .. 255, aligned face crops",
        "output": f"[N, {deployed.shape[1]}] float32, unit length",
        "score": "dot product of two outputs; same person when above the threshold",
        "threshold": after["threshold"],
        "mirror_summed": embedder.mirror,
    }
    (out / "embedder.json").write_text(json.dumps(about, indent=2) + "\n")


def write_metrics(training: Training, after: dict[str, float], per_epoch: int, path: Path) -> None:
    rows: list[tuple[object, ...]] = []
    for when, values in (("before", training.before), ("after", after)):
        rows += [(f"{name} {when}", "", value) for name, value in values.items()]
    for epoch in range(0, len(training.losses), per_epoch):
        part = training.losses[epoch : epoch + per_epoch]
        rows.append(("loss", epoch // per_epoch + 1, float(np.mean(part))))
    write_csv(path, ["measure", "epoch", "value"], rows)


def draw(training: Training, verified: Verification, path: Path) -> None:
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    bound, before, after = training.head.loss_lower_bound(), training.before, verified.measures
    left.plot(range(1, len(training.losses) + 1), training.losses, color="#3f6fb5", linewidth=1)
    left.axhline(bound, color=FAINT, linestyle="--")
    left.text(1, bound, f"lower bound {bound:.1e}", color=FAINT, va="bottom")
    left.set_yscale("log")
    left.set_xlabel("step")
    left.set_title("training loss (log)", weight="bold")
    curve = ev.roc(verified.scores, verified.same)
    right.step(curve.far, curve.tar, where="post", color="#c8421c", linewidth=2, label="after training")
    right.plot(0.01, after["tar_at_far_1"], "o", color="#c8421c")
    right.plot(0.01, before["tar_at_far_1"], "o", color="#23272e", label="before, at FAR 1 %")
    right.set_xscale("symlog", linthresh=1e-3)
    right.set_xlim(0, 1)
    right.set_ylim(0, 1.02)
    right.set_xlabel("false accept rate")
    right.set_ylabel("true accept rate")
    right.legend(loc="lower right")
    right.set_title(
        f"people not trained on: accuracy {before['accuracy']:.1%} to {after['accuracy']:.1%}", weight="bold"
    )
    figure.savefig(path)
    plt.close(figure)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("faces", type=Path, metavar="FACES", help="FACES/person/image.jpg")
    parser.add_argument("--out", type=Path, default=Path("finetune_faces"), metavar="DIR")
    parser.add_argument("--backbone", metavar="FILE.py:FUNCTION", help="default: a small network")
    parser.add_argument("--weights", type=Path, metavar="FILE.pt", help="the backbone's state_dict")
    parser.add_argument("--size", type=int, default=112, help="images are resized to this (default: 112)")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=256, help="default: 256, the paper's")
    parser.add_argument("--lr", type=float, default=1e-3, help="default: 1e-3, the paper's for fine-tuning")
    parser.add_argument(
        "--head-lr", type=float, default=100.0, help="the head's multiple of it (default: 100)"
    )
    parser.add_argument("--weight-decay", type=float, default=5e-4, help="of the backbone (default: 5e-4)")
    parser.add_argument("--scale", default="auto", type=lambda s: s if s == "auto" else float(s),
                        help="default: auto, from the number of people")  # fmt: skip
    parser.add_argument("--holdout", type=float, default=0.2, help="share of people verified (default: 0.2)")
    parser.add_argument("--pairs", type=int, default=3000, help="same and as many different (default: 3000)")
    parser.add_argument("--no-mirror", action="store_true", help="evaluate and deploy the front image alone")
    parser.add_argument("--save-every", type=int, default=100, metavar="STEPS")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--stop-after", type=int, metavar="STEPS", help="save and leave, as if interrupted")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images")
    parser.add_argument("--deterministic", action="store_true", help="the same bits each time on a GPU, too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, float] | None:
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    found = scan(options.faces, options.size)
    with (options.out / "skipped.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "reason"), *found.skipped])
    for path, reason in found.skipped[:10]:
        print(f"skipped {path}: {reason}")
    if len(found.skipped) > 10:
        print(f"... and {len(found.skipped) - 10} more in {options.out / 'skipped.csv'}")
    trained, held = split(found.people, options.holdout, options.seed)
    faces, strangers = (Faces(found.people, names, options.size) for names in (trained, held))
    print(f"training: {len(trained)} people, {len(faces)} images; held out: {len(held)}, {len(strangers)}")

    torch.manual_seed(options.seed)
    training = make_training(make_backbone(options.backbone, options.weights), len(trained), options)
    embedder = Embedder(training.backbone, not options.no_mirror)
    mark = fingerprint(options, faces)
    if options.resume:
        resume(training, mark, options.out / "checkpoint.pt")
        print(f"resumed at step {training.step}")
    else:
        training.before = evaluate(embedder, strangers, options).measures

    def checkpoint() -> None:
        save(training, mark, options.out / "checkpoint.pt")

    try:
        complete = fit(training, faces, options, checkpoint)
    except KeyboardInterrupt:
        raise SystemExit(
            f"interrupted at step {training.step}; --resume goes on from the last checkpoint"
        ) from None
    if not complete:
        print(f"stopped at step {training.step}; --resume goes on")
        return None
    checkpoint()
    verified = evaluate(embedder, strangers, options)
    after = verified.measures
    per_epoch = len(batches(faces, options.batch, options.seed, 0))
    write_metrics(training, after, per_epoch, options.out / "metrics.csv")
    draw(training, verified, options.out / "training.png")
    export(embedder, options.size, after, options.out)
    for when, values in (("before", training.before), ("after", after)):
        print(f"{when:6}  accuracy {values['accuracy']:.2%}, TAR@FAR=1% {values['tar_at_far_1']:.2%}")
    print(
        f"deploy {options.out / 'embedder.pt2'}: its output is the unit-length embedding; same person when"
        f" the dot product of two is above {after['threshold']:.3f}. The head is not deployed."
    )
    return after


if __name__ == "__main__":
    main()
