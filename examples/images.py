"""Folders of images, FOLDER/person/image.jpg: what is usable in them, and what is not and why."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


@dataclass
class Scan:
    """What is usable in the folder: good images of each person, and what was left out with the reason."""

    people: dict[str, list[Path]] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)


def read_image(path: Path, size: int) -> Tensor:
    """[3, size, size] uint8, RGB."""
    with Image.open(path) as image:
        rgb = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


def scan(folder: Path, size: int) -> Scan:
    """Decodes every image once, so that nothing unreadable is met in the middle of an epoch."""
    if not folder.is_dir():
        raise SystemExit(
            f"{folder}: expected a folder of people, got {'a file' if folder.exists() else 'nothing'}"
        )
    result = Scan()
    for path in sorted(folder.iterdir()):
        if not path.is_dir():
            result.skipped.append((str(path), "not in a person's folder"))
    people = sorted(path for path in folder.iterdir() if path.is_dir())
    for person in tqdm(people, desc="checking images", unit="person", file=sys.stderr, leave=False):
        good = []
        for path in sorted(person.iterdir()):
            if path.suffix.lower() not in SUFFIXES:
                result.skipped.append((str(path), "not an image by its name"))
                continue
            try:
                read_image(path, size)
                good.append(path)
            except UNREADABLE as error:
                result.skipped.append((str(path), f"unreadable: {error}"))
        if len(good) < 2:
            found = "no readable image" if not good else "only one image, and a pair needs two"
            result.skipped.append((str(person), f"person left out: {found}"))
        else:
            result.people[person.name] = good
    return result
