"""python -m normface_ext.evaluation: features and a list in, a table and figures out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from ..engine.files import clip
from .commands import COMMANDS
from .ijb import IJB_RATES
from .pair_list import LAYOUTS

DESCRIPTION = """\
Protocols of face verification and identification, of features and a list:

  pairs     your own list of pairs
              COMMAND pairs --features F.npy --names names.txt --pairs pairs.csv --plot roc.png
  lfw       LFW's pairs.txt, with the paper's PCA
              COMMAND lfw --features F.npy --names names.txt --pairs pairs.txt --pca 256
  bin       InsightFace's lfw.bin, cfp_fp.bin, agedb_30.bin, calfw.bin, cplfw.bin
              COMMAND bin lfw.bin --backbone my_net.py:make --weights my_net.pt --progress
  cfp       CFP-FP or CFP-FF from the folder Protocol
              COMMAND cfp cfp-dataset/Protocol --protocol FP --features F.npy
  ijb       IJB-B or IJB-C, 1:1
              COMMAND ijb --features F.npy --templates ijbc_face_tid_mid.txt
                      --pairs ijbc_template_pair_label.txt --scores ijbc_name_5pts_score.txt
  identify  rank-k and TPIR@FPIR of probes against a gallery with distractors
              COMMAND identify --gallery G.npy --gallery-labels g.txt --probes P.npy --probe-labels p.txt
                      --distractors D.npy --plot cmc.png
  blufr     all pairs at low false accept rates, and open-set identification, in random trials
              COMMAND blufr --features F.npy --labels people.txt
  ytf       YouTube Faces with HIK-SVM
              COMMAND ytf --splits splits.txt --folder videos

where COMMAND is python -m normface_ext.evaluation; COMMAND bin --help has the options of bin. Without a name
it is pairs. Features are a .npy, .npz or .mat file with a row per image. names.txt holds the image of each
row (Al_Gore/Al_Gore_0003.jpg); without it images are row numbers, in lines "i j same"."""


def _path(parser: argparse.ArgumentParser, flag: str, metavar: str, help: str = "", **more: object) -> None:
    parser.add_argument(flag, type=Path, metavar=metavar, help=help or None, **more)  # type: ignore[arg-type]


def _features(parser: argparse.ArgumentParser, required: bool = True) -> None:
    _path(parser, "--features", "F.npy", "[M, D]; .npy, .npz or .mat", required=required)
    _path(parser, "--mirror", "M.npy", "features of the mirrored images, added")
    _arrays(parser)


def _arrays(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--array", metavar="NAME", help="of the array in a .npz or .mat file")
    parser.add_argument("--transpose", action="store_true", help="the file has [D, M]")


def _lists(parser: argparse.ArgumentParser) -> None:
    _path(parser, "--names", "names.txt", "the image of each row")
    _encoding(parser)


def _encoding(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--encoding", help="of the lists, such as latin-1 (UTF-8 and UTF-16 are known)")


def _rates(parser: argparse.ArgumentParser, far: tuple[float, ...]) -> None:
    parser.add_argument("--far", type=float, nargs="+", default=list(far), help="for TAR@FAR")


def _figures(parser: argparse.ArgumentParser) -> None:
    _path(parser, "--plot", "roc.png", "write the ROC figure")
    _path(parser, "--histogram", "scores.png", "write the figure of the scores of same and different pairs")


def _verified(parser: argparse.ArgumentParser, thresholds: str) -> None:
    """Options of accuracy in folds."""
    parser.add_argument("--folds", type=int, default=10, help="for pairs without folds (default: 10)")
    ways = "all: the paper's exact ones; grid: InsightFace's 400 distances"
    parser.add_argument("--thresholds", choices=("all", "grid"), default=thresholds, help=ways)
    pca = "PCA fitted on the other folds; 0 keeps all axes"
    parser.add_argument("--pca", type=int, metavar="AXES", help=pca)
    _rates(parser, (0.1, 0.01, 0.001))
    _figures(parser)


def _pairs(parser: argparse.ArgumentParser) -> None:
    _features(parser)
    _path(parser, "--pairs", "pairs.txt", "the list", required=True)
    _lists(parser)
    _path(parser, "--labels", "labels.txt", "same of each pair, for a list of two columns")
    columns = "first=left,second=right,same=label by names in the header, or first=1,second=2,same=0"
    parser.add_argument("--columns", help=columns)
    parser.add_argument("--layout", choices=LAYOUTS, help="where the list would bear more than one")
    parser.add_argument("--separator", choices=("tab", "comma", "semicolon", "blank"), help="likewise")
    _verified(parser, "all")


def _bin(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bin", type=Path, metavar="lfw.bin")
    _features(parser, required=False)
    parser.add_argument("--backbone", metavar="FILE.py:FUNCTION", help="a function that returns the module")
    _path(parser, "--weights", "net.pt", "its state dict")
    parser.add_argument("--flip", choices=("sum", "max", "concat", "none"), default="sum", help="mirrors")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--size", type=int, default=112, help="of the images")
    parser.add_argument("--channels", choices=("rgb", "bgr"), default="rgb")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--progress", action="store_true", help="a bar (tqdm)")
    _verified(parser, "grid")


def _cfp(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="Protocol")
    parser.add_argument("--protocol", choices=("FF", "FP"), default="FP")
    _features(parser)
    _lists(parser)
    _verified(parser, "grid")


def _ijb(parser: argparse.ArgumentParser) -> None:
    _features(parser)
    _path(parser, "--templates", "tid_mid.txt", "lines 'image template media'", required=True)
    _path(parser, "--pairs", "pair_label.txt", "lines 'template template same'", required=True)
    _path(parser, "--scores", "5pts_score.txt", "weigh images by the face detection's score")
    _rates(parser, IJB_RATES)
    how = "below: never above the FAR; nearest: InsightFace's tables"
    parser.add_argument("--how", choices=("below", "nearest"), default="below", help=how)
    parser.add_argument("--progress", action="store_true", help="a bar (tqdm)")
    _figures(parser)


def _identify(parser: argparse.ArgumentParser) -> None:
    for part in ("gallery", "probes"):
        _path(parser, f"--{part}", f"{part[0].upper()}.npy", "[M, D]", required=True)
        flag = f"--{part.removesuffix('s')}-labels"
        _path(parser, flag, f"{part[0]}.txt", "who is on each image, a line each", required=True)
    _path(parser, "--distractors", "D.npy", "people of the gallery whom no probe shows")
    _arrays(parser)
    _encoding(parser)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 5, 10])
    parser.add_argument("--fpir", type=float, nargs="+", default=[0.01, 0.1])
    _path(parser, "--plot", "cmc.png", "write the CMC figure")
    parser.add_argument("--progress", action="store_true", help="a bar (tqdm)")


def _blufr(parser: argparse.ArgumentParser) -> None:
    _path(parser, "--features", "F.npy", "[M, D]", required=True)
    _path(parser, "--labels", "people.txt", "who is on each image, a line each", required=True)
    _arrays(parser)
    _encoding(parser)
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)


def _ytf(parser: argparse.ArgumentParser) -> None:
    _path(parser, "--splits", "splits.txt", required=True)
    _path(parser, "--folder", "videos", "with a file person/number.npy [frames, D] per video", required=True)


_OPTIONS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "pairs": _pairs,
    "lfw": _pairs,
    "bin": _bin,
    "cfp": _cfp,
    "ijb": _ijb,
    "identify": _identify,
    "blufr": _blufr,
    "ytf": _ytf,
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m normface_ext.evaluation",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="NAME")
    for name, options in _OPTIONS.items():
        one = commands.add_parser(name)
        options(one)
        if name == "lfw":
            one.set_defaults(layout="lfw")
        _path(one, "--csv", "table.csv", "write the table, and every fold")
    return parser


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    parser = build_parser()
    plain = bool(given) and given[0].startswith("--") and given[0] != "--help"
    options = parser.parse_args(["pairs", *given] if plain else given)
    if options.command == "bin" and bool(options.features) == bool(options.backbone):
        parser.error("bin: expected --features or --backbone")
    try:
        report = COMMANDS[options.command](options)
        if options.csv:
            report.write(options.csv)
    except (ValueError, TypeError, IndexError, OSError, ImportError, MemoryError) as error:
        print(f"{parser.prog}: {clip(str(error)) or type(error).__name__}", file=sys.stderr)
        return 1
    print(report.found)
    for name, value in report.rows:
        print(f"{name:16}  {value}" if isinstance(value, int) else f"{name:16}  {value:.4f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
