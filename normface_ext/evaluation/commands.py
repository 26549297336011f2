"""What each command of ``python -m normface_ext.evaluation`` does: options in, a table out."""

from __future__ import annotations

import argparse
import csv
import importlib.util
from collections.abc import Callable, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..engine.files import file_name, reading
from ._checks import Array, folds_of_both_kinds
from .bins import VerificationSet, read_bin
from .blufr import blufr, random_trials
from .cfp import read_cfp
from .embedding import embed
from .features import read_features
from .folds import fold_protocol
from .identification import identify
from .ijb import ijb_protocol, read_ijb_pairs, read_ijb_scores, read_ijb_templates
from .lfw import lfw_protocol
from .lists import read_names
from .pair_list import PairList, read_pairs
from .pairs import Pairs
from .plots import plot_cmc, plot_roc, plot_scores
from .roc import roc, tar_at_far
from .scores import merge_mirror
from .ytf import ytf_protocol
from .ytf_splits import read_ytf_splits

Rows = list[tuple[str, int | float]]


@dataclass
class Report:
    """``found``: a line on what was read; ``rows``: the table; ``more``: what the CSV has besides."""

    found: str
    rows: Rows
    more: Rows = field(default_factory=list)

    def write(self, path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["measure", "value"])
            writer.writerows((name, f"{value:.8g}") for name, value in self.rows + self.more)


def _features(options: argparse.Namespace) -> Array:
    """Of --features, with --mirror added."""
    features = read_features(options.features, options.array, transpose=options.transpose)
    if not options.mirror:
        return features
    mirrored = read_features(options.mirror, options.array, transpose=options.transpose)
    if mirrored.shape != features.shape:
        raise ValueError(
            f"{file_name(options.mirror)}: expected features of shape {list(features.shape)} as in"
            f" {file_name(options.features)}, got {list(mirrored.shape)}"
        )
    return merge_mirror(features, mirrored)


def _as_many(path: Path, values: Sized, rows: int, what: str) -> None:
    if len(values) != rows:
        raise ValueError(f"{file_name(path)}: expected {rows} {what}, got {len(values)}")


def _names(options: argparse.Namespace, rows: int) -> list[str] | None:
    if not options.names:
        return None
    names = read_names(options.names, encoding=options.encoding)
    _as_many(options.names, names, rows, "names")
    return names


def _verified(options: argparse.Namespace, name: str, features: Array, pairs: Pairs, found: str) -> Report:
    """Accuracy in folds, and the rates of all pairs together."""
    folds_of_both_kinds(name, pairs.same, pairs.fold)
    if options.thresholds == "grid":
        if options.pca is not None:
            raise ValueError(
                "--pca: expected --thresholds all, got grid, which InsightFace has without a PCA"
            )
        result = fold_protocol(features, pairs, far=min(options.far))
        accuracies, scores = result.accuracies, result.scores
        threshold = ("threshold on the squared distance", float(result.thresholds.mean()))
        spread: Rows = [("standard deviation", result.standard_deviation)]
        spread.append((f"TAR by folds, FAR={min(options.far):g}", float(result.tar.mean())))
        cut = -threshold[1]
    else:
        exact = lfw_protocol(features, pairs, pca=None if options.pca is None else (options.pca or True))
        accuracies, scores = exact.accuracies, exact.scores
        cut = float(exact.thresholds.mean())
        threshold, spread = ("threshold", cut), [("standard error", exact.standard_error)]
    curve = roc(scores, pairs.same)
    rates = tar_at_far(scores, pairs.same, options.far)
    if options.plot:
        plot_roc({options.features.stem if options.features else name: curve}, options.plot)
    if options.histogram:
        plot_scores(scores, pairs.same, options.histogram, thresholds={"mean threshold": cut})
    return Report(
        found,
        [
            ("pairs", len(pairs)),
            ("accuracy", float(accuracies.mean())),
            *spread,
            threshold,
            ("AUC", curve.auc),
            ("EER", curve.eer),
            *((f"TAR@FAR={far:g}", float(rate)) for far, rate in zip(options.far, rates, strict=True)),
        ],
        [(f"accuracy of fold {i + 1}", float(value)) for i, value in enumerate(accuracies)],
    )


def _columns(text: str | None) -> dict[str, int | str] | None:
    """ "first=left,second=right,same=label", or numbers instead of names."""
    if text is None:
        return None
    parts = [part.partition("=") for part in text.split(",")]
    if not all(sign for _, sign, _ in parts):
        raise ValueError(f"--columns: expected first=...,second=...,same=..., got {text[:100]!r}")
    numbers = all(value.isdecimal() for _, _, value in parts)
    return {key: int(value) if numbers else value for key, _, value in parts}


def pairs(options: argparse.Namespace) -> Report:
    features = _features(options)
    images: dict[str, Any] = {"rows": len(features)}
    if _names(options, len(features)) is not None:
        images = {"names": options.names}
    listed: PairList = read_pairs(
        options.pairs,
        **images,
        labels=options.labels,
        columns=_columns(options.columns),
        layout=options.layout,
        separator=options.separator,
        encoding=options.encoding,
        folds=options.folds,
    )
    return _verified(options, file_name(options.pairs), features, listed.pairs, listed.found)


def _backbone(options: argparse.Namespace) -> torch.nn.Module:
    """--backbone FILE.py:FUNCTION, with --weights; the file is the user's own and is run."""
    file, _, function = options.backbone.rpartition(":")
    spec = importlib.util.spec_from_file_location("backbone", file) if file else None
    if spec is None or spec.loader is None:
        raise ValueError(f"--backbone: expected FILE.py:FUNCTION, got {options.backbone[:100]!r}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        raise ValueError(f"--backbone: expected a function {function} in {file_name(file)}, got none")
    model = getattr(module, function)()
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"--backbone: expected {function}() to return a module, got {type(model).__name__}")
    if options.weights:
        with reading(file_name(options.weights), "the state dict of the backbone"):
            model.load_state_dict(torch.load(options.weights, map_location="cpu", weights_only=True))
    return model.to(options.device)


def bin_(options: argparse.Namespace) -> Report:
    images: VerificationSet = read_bin(options.bin)
    if options.backbone:
        features = embed(
            images,
            _backbone(options),
            flip=options.flip,
            batch_size=options.batch_size,
            size=options.size,
            channels=options.channels,
            progress_bar=options.progress,
        )
    else:
        features = _features(options)
        _as_many(options.features, features, len(images.images), "rows, one for each image")
    found = f"{file_name(options.bin)}: InsightFace set, {len(images)} pairs, {int(images.same.sum())} same"
    return _verified(options, file_name(options.bin), features, images.pairs(options.folds), found)


def cfp(options: argparse.Namespace) -> Report:
    features = _features(options)
    listed = read_cfp(options.folder, options.protocol, _names(options, len(features)))
    _as_many(options.features, features, len(listed.names), "rows, one for each image of the lists")
    return _verified(options, file_name(options.folder), features, listed.pairs, listed.found)


def ijb(options: argparse.Namespace) -> Report:
    features = _features(options)
    images, pairs = read_ijb_templates(options.templates), read_ijb_pairs(options.pairs)
    _as_many(options.templates, images.names, len(features), "images, one for each feature row")
    weights = read_ijb_scores(options.scores) if options.scores else None
    if weights is not None:
        _as_many(options.scores, weights, len(features), "scores, one for each feature row")
    result = ijb_protocol(features, images, pairs, weights=weights, progress_bar=options.progress)
    rates = result.tar(options.far, how=options.how)
    if options.plot:
        plot_roc({options.features.stem: result.roc()}, options.plot)
    if options.histogram:
        plot_scores(result.scores, result.same, options.histogram)
    found = (
        f"{file_name(options.pairs)}: {len(pairs)} pairs of templates, {int(pairs.same.sum())} same;"
        f" {len(images)} images of {len(np.unique(images.template))} templates"
    )
    rows = [(f"TAR@FAR={far:g}", float(rate)) for far, rate in zip(options.far, rates, strict=True)]
    return Report(found, [("pairs", len(pairs)), *rows])


def _labelled(
    features: Path, labels: Path, options: argparse.Namespace
) -> tuple[Array, npt.NDArray[np.str_]]:
    matrix = read_features(features, options.array, transpose=options.transpose)
    names = read_names(labels, encoding=options.encoding)
    _as_many(labels, names, len(matrix), "labels, one for each feature row")
    return matrix, np.array(names)


def identify_(options: argparse.Namespace) -> Report:
    gallery, enrolled = _labelled(options.gallery, options.gallery_labels, options)
    probes, asked = _labelled(options.probes, options.probe_labels, options)
    crowd = read_features(options.distractors, options.array) if options.distractors else None
    bar = options.progress
    result = identify(gallery, enrolled, probes, asked, distractors=crowd, progress_bar=bar)
    known, strangers = int(result.known.sum()), int((~result.known).sum())
    rows: Rows = [("people", result.people), ("known probes", known)]
    rows += [("probes of strangers", strangers)]
    rates = result.rank_rate(options.ranks)
    rows += [(f"rank {k}", float(rate)) for k, rate in zip(options.ranks, rates, strict=True)]
    if strangers:
        shares = result.tpir(options.fpir)
        rows += [(f"TPIR@FPIR={f:g}", float(rate)) for f, rate in zip(options.fpir, shares, strict=True)]
    if options.plot:
        plot_cmc({options.probes.stem: result}, options.plot)
    return Report(f"{file_name(options.gallery)}: a gallery of {result.people} people", rows)


def blufr_(options: argparse.Namespace) -> Report:
    features, labels = _labelled(options.features, options.labels, options)
    trials = random_trials(labels, trials=options.trials, seed=options.seed)
    result = blufr(features, labels, trials)
    verification, identification = result.report()
    found = f"{file_name(options.labels)}: {len(np.unique(labels))} people, {len(trials)} random trials"
    rows = [
        ("verification rate at FAR 0.1 %, mean - deviation", verification),
        ("DIR at FAR 1 %, rank 1, mean - deviation", identification),
    ]
    return Report(found, rows)


def ytf(options: argparse.Namespace) -> Report:
    listed = read_ytf_splits(options.splits, splits=None, pairs_per_split=None)
    features = {video: read_features(options.folder / f"{video}.npy") for video in listed.videos}
    result = ytf_protocol(features, listed)
    found = f"{file_name(options.splits)}: {len(listed)} pairs of {len(features)} videos"
    return Report(
        found,
        [
            ("pairs", len(listed)),
            ("accuracy (HIK-SVM)", result.accuracy),
            ("standard error", result.standard_error),
            ("accuracy (mean score)", float(result.mean_accuracies.mean())),
        ],
        [(f"accuracy of fold {i + 1}", float(value)) for i, value in enumerate(result.accuracies)],
    )


COMMANDS: dict[str, Callable[[argparse.Namespace], Report]] = {
    "pairs": pairs,
    "lfw": pairs,
    "bin": bin_,
    "cfp": cfp,
    "ijb": ijb,
    "identify": identify_,
    "blufr": blufr_,
    "ytf": ytf,
}
