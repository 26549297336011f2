"""python -m normface_ext.evaluation: features and a list of pairs in, a table and a ROC figure out."""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

from ..engine.files import clip, file_name
from ._checks import folds_of_both_kinds
from .features import read_features
from .lfw import lfw_protocol
from .lists import read_names
from .pair_list import read_pairs
from .plots import plot_roc
from .roc import roc, tar_at_far
from .scores import merge_mirror

DESCRIPTION = """\
Verification accuracy in folds, AUC, EER and TAR@FAR of features under a list of pairs.

  LFW    python -m normface_ext.evaluation --features F.npy --names names.txt --pairs pairs.txt --pca 256
  yours  python -m normface_ext.evaluation --features F.npy --pairs pairs.txt      (lines "i j same")

F.npy holds one row per image. names.txt holds one image name per row (Al_Gore_0003.jpg); with it the pairs
file is read in LFW's format, which has a header "folds pairs", or without one as lines "image image same"
of these names; without names.txt as row numbers. same is 1 for one person and 0 for two."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m normface_ext.evaluation",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--features", type=Path, required=True, metavar="F.npy", help="[M, D]")
    parser.add_argument("--mirror", type=Path, metavar="M.npy", help="features of the mirrored images, added")
    parser.add_argument("--pairs", type=Path, required=True, metavar="pairs.txt")
    parser.add_argument(
        "--names", type=Path, metavar="names.txt", help="the image of each row: pairs by name"
    )
    parser.add_argument("--folds", type=int, default=10, help="for pairs without folds (default: 10)")
    parser.add_argument(
        "--pca", type=int, metavar="AXES", help="PCA fitted on the other folds; 0 keeps all axes"
    )
    parser.add_argument("--far", type=float, nargs="+", default=[0.1, 0.01, 0.001], help="for TAR@FAR")
    parser.add_argument("--plot", type=Path, metavar="roc.png", help="write the ROC figure")
    parser.add_argument("--csv", type=Path, metavar="table.csv", help="write the table, and every fold")
    return parser


def evaluate(options: argparse.Namespace) -> list[tuple[str, float]]:
    """The rows of the table; writes the files asked for."""
    features = read_features(options.features)
    if options.mirror:
        mirrored = read_features(options.mirror)
        if mirrored.shape != features.shape:
            raise ValueError(
                f"{file_name(options.mirror)}: expected features of shape {list(features.shape)} as in"
                f" {file_name(options.features)}, got {list(mirrored.shape)}"
            )
        features = merge_mirror(features, mirrored)
    if options.names:
        names = read_names(options.names)
        if len(names) != len(features):
            raise ValueError(f"{file_name(options.names)}: expected {len(features)} names, got {len(names)}")
        pairs = read_pairs(options.pairs, options.names, folds=options.folds).pairs
    else:
        pairs = read_pairs(options.pairs, rows=len(features), folds=options.folds).pairs
    folds_of_both_kinds(file_name(options.pairs), pairs.same, pairs.fold)
    pca = None if options.pca is None else (options.pca or True)
    result = lfw_protocol(features, pairs, pca=pca)
    curve = roc(result.scores, pairs.same)
    rates = tar_at_far(result.scores, pairs.same, options.far)
    rows = [
        ("pairs", float(len(pairs))),
        ("accuracy", result.accuracy),
        ("standard error", result.standard_error),
        ("threshold", float(result.thresholds.mean())),
        ("AUC", curve.auc),
        ("EER", curve.eer),
        *((f"TAR@FAR={far:g}", float(rate)) for far, rate in zip(options.far, rates, strict=True)),
    ]
    if options.csv:
        folds = [(f"accuracy of fold {i + 1}", float(v)) for i, v in enumerate(result.accuracies)]
        with options.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["measure", "value"])
            writer.writerows((name, f"{value:.8g}") for name, value in rows + folds)
    if options.plot:
        plot_roc({options.features.stem: curve}, options.plot)
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        rows = evaluate(options)
    except (ValueError, TypeError, IndexError, OSError, ImportError, MemoryError) as error:
        print(f"{parser.prog}: {clip(str(error)) or type(error).__name__}", file=sys.stderr)
        return 1
    for name, value in rows:
        print(f"{name:16}  {value:.0f}" if name == "pairs" else f"{name:16}  {value:.4f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
