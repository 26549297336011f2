"""InsightFace's verification sets (lfw.bin, cfp_fp.bin, agedb_30.bin): encoded images, two for each pair."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ..engine.arguments import integer
from ..engine.files import file_name, read_bytes, reading
from ._checks import as_same
from ._optional import require
from ._text import refused
from ._unpickle import _Array, unpickle
from .pairs import Pairs

#: Bytes of a file, and pixels of an image, beyond which it is no set of face crops.
LARGEST, PIXELS = 8 << 30, 1 << 24
_EXPECTED = "a pickle of (list of encoded images, list of answers)"


@dataclass(frozen=True)
class VerificationSet:
    """``images``: 2 P encoded images (JPEG or PNG); ``same`` [P]: images 2 p and 2 p + 1 show one person."""

    images: tuple[bytes, ...]
    same: npt.NDArray[np.bool_]

    def __post_init__(self) -> None:
        op = "VerificationSet"
        same = as_same(op, self.same)
        if len(self.images) != 2 * len(same):
            got = f"{len(self.images)} images and {len(same)} answers"
            raise ValueError(f"{op}: expected two images for each answer, got {got}")
        object.__setattr__(self, "same", same)  # what was checked is what is used

    def __len__(self) -> int:
        return len(self.same)

    def pairs(self, folds: int = 10) -> Pairs:
        """Rows 2 p and 2 p + 1, in ``folds`` runs of the list as it stands, as InsightFace cuts it.

        The first P mod folds runs have one pair more (scikit-learn's KFold without shuffling).
        """
        count = integer("VerificationSet.pairs", "folds", folds, 1, 1 << 31)
        rows = np.arange(len(self), dtype=np.int64)
        return Pairs(2 * rows, 2 * rows + 1, self.same, runs(len(self), count))


def runs(pairs: int, folds: int) -> npt.NDArray[np.int64]:
    """The fold of each pair when the list is cut as it stands: KFold(folds, shuffle=False)."""
    size, longer = divmod(pairs, folds)
    sizes = np.full(min(folds, pairs), size, dtype=np.int64)
    sizes[:longer] += 1
    return np.repeat(np.arange(len(sizes)), sizes)


def _image(where: str, at: int, value: object) -> bytes:
    if isinstance(value, _Array) and value.value is not None and value.value.dtype == np.uint8:
        value = value.value.tobytes()
    if not isinstance(value, (bytes, bytearray)):
        raise refused(where, _EXPECTED, f"{type(value).__name__.strip('_')} as image {at}")
    return bytes(value)


def read_bin(path: str | os.PathLike[str]) -> VerificationSet:
    """A verification set as InsightFace packs it, without running what a pickle may ask to be run.

    The pickle may be of Python 2 (protocols 1 and 2) or 3, and have arrays of bytes for images and NumPy's
    bools for answers; any other opcode or name in it is refused by name. Images stay encoded:
    ``decode_images`` decodes some.
    Memory: about twice the file.

    Raises:
        OSError: as ``open`` has it.
        ValueError: another file; a number of images that is not twice that of the answers; naming the file.
    """
    where = file_name(path)
    value = unpickle(where, read_bytes(path, LARGEST, _EXPECTED), _EXPECTED)
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise refused(where, _EXPECTED, f"a pickle of {type(value).__name__.strip('_')}")
    images, answers = value
    if isinstance(answers, _Array):
        answers = [] if answers.value is None else answers.value.tolist()
    if not isinstance(images, (list, tuple)) or not isinstance(answers, (list, tuple)):
        got = f"({type(images).__name__.strip('_')}, {type(answers).__name__.strip('_')})"
        raise refused(where, _EXPECTED, got)
    wrong = [i for i, answer in enumerate(answers) if type(answer) not in (bool, int) or answer not in (0, 1)]
    if wrong:
        got = f"{type(answers[wrong[0]]).__name__.strip('_')} at {wrong[0]}"
        raise refused(where, "answers that are True or False, or 1 and 0", got)
    if len(images) != 2 * len(answers) or not answers:
        raise refused(where, "two images for each answer", f"{len(images)} images and {len(answers)} answers")
    held = tuple(_image(where, at, image) for at, image in enumerate(images))
    return VerificationSet(held, as_same(where, list(map(bool, answers))))


def _decoded(name: str, data: bytes, size: tuple[int, int] | None) -> npt.NDArray[np.uint8]:
    image_module = require("PIL.Image", "decode_images")
    with reading(name, "a JPEG, PNG, BMP or WebP image"):
        with image_module.open(io.BytesIO(data), formats=("JPEG", "PNG", "BMP", "WEBP")) as image:
            if image.width * image.height > PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, more than {PIXELS}")
            colours = image.convert("RGB")
        if size is not None and colours.size != size[::-1]:
            colours = colours.resize(size[::-1], image_module.Resampling.BILINEAR)
        return np.array(colours)


def decode_images(
    images: Sequence[bytes], size: int | tuple[int, int] | None = 112, *, first: int = 0
) -> torch.Tensor:
    """Encoded images as uint8 [N, 3, H, W], RGB; through Pillow.

    Args:
        images: JPEG, PNG, BMP or WebP; no other format is tried.
        size: H and W; an image of another size is resized, bilinearly. ``None``: all have one size.
        first: the number of the first image, for messages.

    Raises:
        ValueError: an image that is broken, larger than 2^24 pixels, or of another size, by its number.
        ImportError: without Pillow.
    """
    op = "decode_images"
    if size is not None:
        parts = size if isinstance(size, tuple) and len(size) == 2 else (size, size)
        height, width = (integer(op, "size", part, 1, 1 << 12) for part in parts)
    arrays = [
        _decoded(f"{op}: image {first + at}", data, None if size is None else (height, width))
        for at, data in enumerate(images)
    ]
    shapes = [array.shape for array in arrays]
    if len(set(shapes)) > 1:
        other = next(at for at, shape in enumerate(shapes) if shape != shapes[0])
        raise ValueError(
            f"{op}: expected images of one size, or `size`, got {shapes[0][:2]} and {shapes[other][:2]}"
            f" at image {first + other}"
        )
    if not arrays:
        raise ValueError(f"{op}: expected at least one image, got none")
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
