"""Folders of images, FOLDER/person/image.jpg: what is usable in them, and what is not and why."""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
#: Pillow looks at contents, not at names, and for some kinds (PostScript) it starts other programs.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
#: A few bytes can claim to be an image that fills the memory. The largest cameras' have less than this, and
#: a photograph never has so many pixels in a byte.
MOST_PIXELS, MOST_PER_BYTE, SMALL = 1 << 25, 100, 1 << 21


def readable(name: str | Path) -> str:
    """A name of the file system that any file or terminal takes: bytes that are no UTF-8 become \\xe9."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def printable(path: Path) -> str:
    """A path in a message: of a long one the end."""
    text = readable(path)
    return text if len(text) <= 120 else f"...{text[-117:]}"


def sentence(text: str) -> str:
    """A message on one line of at most 300 characters."""
    line = " ".join(text.split())
    return line if len(line) <= 300 else f"{line[:297]}..."


@dataclass
class Scan:
    """What is usable in the folder: good images of each person, and what was left out with the reason."""

    people: dict[str, list[Path]] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)


def read_image(path: Path, size: int) -> Tensor:
    """[3, size, size] uint8, RGB.

    Raises:
        ValueError, OSError: what is no image of FORMATS with 8 bits per colour; one sentence with the path.
    """
    try:
        if not path.is_file():  # a pipe would be waited for
            raise ValueError("no regular file")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                pixels, size_of_file = image.width * image.height, path.stat().st_size
                if pixels > MOST_PIXELS or pixels > max(SMALL, MOST_PER_BYTE * size_of_file):
                    raise ValueError(f"{image.width} x {image.height} pixels in {size_of_file} bytes")
                if image.mode.startswith(("I", "F")):  # which `convert` would cut off at 255
                    raise ValueError(f"an image of mode {image.mode}")
                rgb = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    except Exception as error:  # decoders raise errors of a dozen kinds
        known = not isinstance(error, UnidentifiedImageError)  # which repeats the path
        got = f"{type(error).__name__}: {error}" if known else "another file"
        raise ValueError(
            sentence(f"{printable(path)}: expected an image ({', '.join(FORMATS)}), got {got}")
        ) from error
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


def scan(folder: Path, size: int) -> Scan:
    """Decodes every image once, so that nothing unreadable is met in the middle of an epoch."""
    if not os.path.isdir(folder):  # where Path.is_dir fails if a folder above may not be read
        got = "a file" if os.path.exists(folder) else "nothing"
        raise SystemExit(f"{printable(folder)}: expected a folder of people, got {got}")
    result = Scan()
    entries = _entries(folder)
    if isinstance(entries, OSError):
        raise SystemExit(
            sentence(f"{printable(folder)}: expected a folder of people, got {entries.strerror}")
        )
    for path in entries:
        if not os.path.isdir(path):
            result.skipped.append((readable(path), "not in a person's folder"))
    people = [path for path in entries if os.path.isdir(path)]
    for person in tqdm(people, desc="checking images", unit="person", file=sys.stderr, leave=False):
        images = _entries(person)
        if isinstance(images, OSError):
            result.skipped.append((readable(person), f"person left out: {images.strerror}"))
            continue
        good = []
        for path in images:
            if path.suffix.lower() not in SUFFIXES:
                result.skipped.append((readable(path), "not an image by its name"))
                continue
            try:
                read_image(path, size)
                good.append(path)
            except (ValueError, OSError) as error:
                reason = str(error).removeprefix(f"{printable(path)}: ")
                result.skipped.append((readable(path), f"unreadable: {reason}"))
        if len(good) < 2:
            found = "no readable image" if not good else "only one image, and a pair needs two"
            result.skipped.append((readable(person), f"person left out: {found}"))
        else:
            result.people[readable(person.name)] = good
    return result


def _entries(folder: Path) -> list[Path] | OSError:
    """What a folder has, or why nobody may know."""
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        return error
