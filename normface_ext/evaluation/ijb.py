"""IJB-B and IJB-C, 1:1: images make media, media make templates, pairs of templates are verified.

images = read_ijb_templates("ijbc_face_tid_mid.txt")
pairs = read_ijb_pairs("ijbc_template_pair_label.txt")
result = ijb_protocol(features, images, pairs)
result.tar([1e-6, 1e-5, 1e-4])
"""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np
import numpy.typing as npt

from ..engine.arguments import flag, integer
from ..engine.files import file_name, quoted
from ._checks import Array, Features, as_features, as_same, as_scores, as_whole
from ._text import LONGEST_LINE, lines, refused, whole
from .embedding import progress
from .roc import Roc, roc, tar_at_far
from .scores import unit_rows

IJB_RATES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""The false accept rates that papers print."""


@dataclass(frozen=True)
class TemplateImages:
    """Of each image, [M]: its ``template`` and its ``media``, and its name if the list has one."""

    template: npt.NDArray[np.int64]
    media: npt.NDArray[np.int64]
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        op = "TemplateImages"
        template, media = as_whole(op, "template", self.template), as_whole(op, "media", self.media)
        if len(template) == 0 or len(media) != len(template) or len(self.names) not in (0, len(template)):
            sizes = [len(template), len(media), len(self.names)]
            raise ValueError(f"{op}: expected columns of one length >= 1, got lengths {sizes}")
        object.__setattr__(self, "template", template)
        object.__setattr__(self, "media", media)

    def __len__(self) -> int:
        return len(self.template)


@dataclass(frozen=True)
class TemplatePairs:
    """P pairs of templates by number: ``first``, ``second`` [P] int64; ``same`` [P] bool."""

    first: npt.NDArray[np.int64]
    second: npt.NDArray[np.int64]
    same: npt.NDArray[np.bool_]

    def __post_init__(self) -> None:
        op = "TemplatePairs"
        held = {n: as_whole(op, n, getattr(self, n)) for n in ("first", "second")}
        same = as_same(op, self.same)
        if not len(held["first"]) == len(held["second"]) == len(same):
            sizes = [len(held["first"]), len(held["second"]), len(same)]
            raise ValueError(f"{op}: expected columns of one length, got lengths {sizes}")
        for name, value in (*held.items(), ("same", same)):
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.same)


def read_ijb_templates(path: str | os.PathLike[str]) -> TemplateImages:
    """``ijbc_face_tid_mid.txt``: lines "image template media", in the order of the features.

    Raises:
        OSError: as ``open`` has it.
        ValueError: a malformed line, naming file and line.
    """
    names: list[str] = []
    template, media = array("q"), array("q")
    for where, line in lines(path):
        words = re.split(r"[ \t,]+", line)
        if len(words) != 3:
            raise refused(where, "'image template media'", f"{len(words)} words")
        names.append(words[0])
        template.append(whole(where, words[1], "a template number"))
        media.append(whole(where, words[2], "a media number"))
    if not names:
        raise refused(file_name(path), "at least one image", "none")
    return TemplateImages(np.array(template, np.int64), np.array(media, np.int64), tuple(names))


def read_ijb_scores(path: str | os.PathLike[str]) -> npt.NDArray[np.float64]:
    """The last word of each line of ``ijbc_name_5pts_score.txt``: how sure the face detection was, [M].

    Raises:
        OSError: as ``open`` has it.
        ValueError: a last word that is no finite number >= 0, naming file and line.
    """
    scores = array("d")
    for where, line in lines(path):
        word = line.rpartition(" ")[2]
        if not re.fullmatch(r"[0-9]{1,20}(?:\.[0-9]{0,40})?(?:[eE][-+]?[0-9]{1,2})?", word):
            raise refused(where, "a detection score >= 0 as the last word", quoted(word, 40))
        scores.append(float(word))
    return np.array(scores)


#: Lines of three numbers, of which the last is 0 or 1, and nothing else.
_ROWS = re.compile(rb"(?:[ \t]*[0-9]{1,18}[ \t]+[0-9]{1,18}[ \t]+[01][ \t]*\r?\n)+")


def _blocks_of_lines(file: IO[bytes], size: int = 1 << 18) -> Iterator[bytes]:
    rest = b""
    while data := file.read(size):
        head, end, rest = (rest + data).rpartition(b"\n")
        if len(rest) > LONGEST_LINE:
            raise ValueError
        yield head + end
    yield rest + b"\n"


class _PairTable:
    """17 bytes for each pair, however many there are."""

    def __init__(self) -> None:
        self.first, self.second, self.same = array("q"), array("q"), bytearray()

    def pairs(self, where: str) -> TemplatePairs:
        if not self.same:
            raise refused(where, "at least one pair", "none")
        first, second = (np.frombuffer(column, dtype=np.int64) for column in (self.first, self.second))
        return TemplatePairs(first, second, np.frombuffer(self.same, dtype=np.bool_))


def _in_blocks(file: IO[bytes]) -> _PairTable:
    """Of plain lines alone; ValueError where another is."""
    table = _PairTable()
    for block in _blocks_of_lines(file):
        if not block.strip():
            continue
        if not _ROWS.fullmatch(block):
            raise ValueError
        rows = np.array(block.split(), dtype=np.int64).reshape(-1, 3)
        table.first.frombytes(rows[:, 0].tobytes())
        table.second.frombytes(rows[:, 1].tobytes())
        table.same += (rows[:, 2] == 1).tobytes()
    return table


def read_ijb_pairs(path: str | os.PathLike[str]) -> TemplatePairs:
    """``ijbc_template_pair_label.txt``: lines "template template same", 15.7 million of them.

    Plain files are read in blocks; of others, with commas or a byte order mark, every line by itself.
    Memory: 17 bytes per pair.

    Raises:
        OSError: as ``open`` has it.
        ValueError: a malformed line, naming file and line.
    """
    try:
        with open(path, "rb") as file:
            return _in_blocks(file).pairs(file_name(path))
    except OSError as error:
        raise OSError(error.errno, error.strerror, file_name(path)) from error
    except ValueError:  # by line, which reads it or names the line
        return _pairs_by_line(path)


def _pairs_by_line(path: str | os.PathLike[str]) -> TemplatePairs:
    table = _PairTable()
    for where, line in lines(path):
        words = re.split(r"[ \t,]+", line)
        if len(words) != 3 or words[2] not in ("0", "1"):
            raise refused(where, "'template template same', same 0 or 1", quoted(line))
        table.first.append(whole(where, words[0], "a template number"))
        table.second.append(whole(where, words[1], "a template number"))
        table.same.append(words[2] == "1")
    return table.pairs(file_name(path))


def pool_templates(
    features: Features, images: TemplateImages, *, weights: object = None, normalize_images: bool = False
) -> tuple[npt.NDArray[np.int64], Array]:
    """Templates [T], sorted, and their unit features [T, D].

    With x_i the features, w_i the weights, M the media of template t and I_m the images of medium m in t:

        f_t = sum_{m in M} (1 / |I_m|) sum_{i in I_m} w_i x_i,    returned as f_t / |f_t|

    (a sum over media: its length does not matter). This is image2template_feature of InsightFace's ijb code.

    Args:
        features: [M, D] in the order of ``images``, as the network gives them, mirrors merged.
        weights: [M] >= 0: the face detection's scores (``read_ijb_scores``), as InsightFace's N0D1F1.
        normalize_images: x_i / |x_i| instead of x_i. InsightFace's default keeps the length, a measure of
            quality: N1 there means that it is kept.

    Raises:
        ValueError: other shapes, weights that are negative or not finite, features that are not finite.
    """
    op = "pool_templates"
    matrix = as_features(op, "features", features)
    if len(matrix) != len(images):
        raise ValueError(f"{op}: expected `features` of {len(images)} images, got {len(matrix)}")
    if flag(op, "normalize_images", normalize_images):
        matrix = unit_rows(matrix)
    scale = np.ones(len(matrix))
    if weights is not None:
        scale = as_scores(op, "weights", weights).astype(np.float64)
        if scale.shape != (len(matrix),) or (scale < 0).any():
            raise ValueError(
                f"{op}: expected `weights` [{len(matrix)}], each >= 0, got {list(scale.shape)},"
                f" {scale.min(initial=0.0):g} the smallest"
            )
    order = np.lexsort((images.media, images.template))
    template, media = images.template[order], images.media[order]
    starts_medium = np.r_[True, (template[1:] != template[:-1]) | (media[1:] != media[:-1])]
    medium = np.cumsum(starts_medium) - 1
    sizes = np.bincount(medium)
    numbers, first = np.unique(template, return_index=True)
    scale = scale[order] / sizes[medium]
    pooled = np.empty((len(numbers), matrix.shape[1]))
    ends = np.r_[first[1:], len(order)]
    for at, (start, end) in enumerate(zip(first, ends, strict=True)):
        pooled[at] = scale[start:end] @ matrix[order[start:end]]
    return numbers, unit_rows(pooled)


@dataclass(frozen=True)
class IjbResult:
    """``scores`` [P], cosines of templates, with ``same`` [P]."""

    scores: Array
    same: npt.NDArray[np.bool_]

    def tar(self, far: float | Sequence[float] = IJB_RATES, *, how: str = "below") -> npt.NDArray[np.float64]:
        """TAR at each FAR (``tar_at_far``); "nearest" as InsightFace's tables have it."""
        return tar_at_far(self.scores, self.same, far, how=how)

    def roc(self) -> Roc:
        return roc(self.scores, self.same)


def ijb_protocol(
    features: Features,
    images: TemplateImages,
    pairs: TemplatePairs,
    *,
    weights: object = None,
    normalize_images: bool = False,
    block: int = 1 << 14,
    progress_bar: bool = False,
) -> IjbResult:
    """Template features (``pool_templates``), and the cosine of each pair of templates, block by block.

    Raises:
        ValueError: as ``pool_templates``; a pair of a template that has no image, by its number.
        ImportError: a bar without tqdm.
    """
    op = "ijb_protocol"
    block = integer(op, "block", block, 1)
    numbers, pooled = pool_templates(features, images, weights=weights, normalize_images=normalize_images)
    rows = []
    for name, column in (("first", pairs.first), ("second", pairs.second)):
        at = np.searchsorted(numbers, column).clip(max=len(numbers) - 1)
        missing = numbers[at] != column
        if missing.any():
            pair = int(missing.argmax())
            got = f"none of {column[pair]}, `{name}` of pair {pair}"
            raise ValueError(f"{op}: expected images of every template, got {got}")
        rows.append(at)
    scores = np.empty(len(pairs), dtype=pooled.dtype)
    starts = range(0, len(pairs), block)
    for start in progress(starts, len(starts), op, flag(op, "progress_bar", progress_bar)):
        part = slice(start, start + block)
        scores[part] = np.einsum("pd,pd->p", pooled[rows[0][part]], pooled[rows[1][part]])
    return IjbResult(scores, pairs.same)
