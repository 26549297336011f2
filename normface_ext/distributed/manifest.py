"""What a checkpoint holds, as JSON: of every tensor its type, its parts, where they lie, and their checksums.

``torch.distributed.checkpoint`` keeps the same in ``.metadata``, a pickle, which runs whatever code somebody
wrote into it. It is left for that library's own tools and never read here.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

NAME = "manifest.json"
_BLOCK = 1 << 20
_FILE = re.compile(r"__\d+_\d+\.distcp")


def checksum(path: Path, start: int = 0, length: int | None = None) -> str:
    """SHA-256 of `length` bytes of a file, or of all from `start` on; of fewer where the file ends before."""
    digest, left = hashlib.sha256(), math.inf if length is None else length
    with open(path, "rb") as file:
        file.seek(start)
        while left > 0 and (block := file.read(int(min(left, _BLOCK)))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class Part:
    """A block of a tensor, or a plain value, and the bytes of a file that hold it."""

    offset: list[int] | None  # of the block in its tensor; None of a plain value
    size: list[int]
    file: str
    start: int
    length: int
    checksum: str


@dataclass(frozen=True)
class Entry:
    """A tensor, or a plain value: without dtype, in one part."""

    dtype: str | None
    size: list[int]
    parts: list[Part]


@dataclass(frozen=True)
class Manifest:
    step: int
    metadata: str  # checksum of the file .metadata
    entries: dict[str, Entry]

    @staticmethod
    def of(step: int, folder: Path, saved: Metadata, written: Iterable[tuple[str, Part]]) -> Manifest:
        """Of what DCP has just written into a folder: its metadata, and the parts of all ranks by name."""
        entries = {}
        for name, described in saved.state_dict_metadata.items():
            dtype, size = None, []
            if isinstance(described, TensorStorageMetadata):
                dtype, size = str(described.properties.dtype).removeprefix("torch."), list(described.size)
            entries[name] = Entry(dtype, size, [])
        for name, part in written:
            entry = entries[name]
            # Ranks without classes all have the same empty block.
            if math.prod(part.size) or not (math.prod(entry.size) or entry.parts):
                entry.parts.append(part)
        return Manifest(step, checksum(folder / ".metadata"), entries)

    def write(self, folder: Path) -> None:
        content = asdict(self)
        with open(folder / NAME, "w", encoding="utf-8") as file:
            json.dump({"checksum": _of_content(content), "content": content}, file)
            file.flush()
            os.fsync(file.fileno())

    @staticmethod
    def read(folder: Path, step: int) -> Manifest:
        """Of the checkpoint of a step.

        Raises:
            ValueError, OSError: which file is damaged or missing.
        """
        path = folder / NAME
        try:
            with open(path, encoding="utf-8") as file:
                read = json.load(file)
            if read["checksum"] != _of_content(read["content"]):
                raise ValueError("its checksum is another")
            manifest = Manifest._parsed(read["content"])
        except FileNotFoundError:
            raise FileNotFoundError(
                f"load_checkpoint: expected {path}, got a folder without it: it was not made by"
                " save_checkpoint, or has lost a file"
            ) from None
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"load_checkpoint: expected {path} as it was saved, got a damaged file: {str(error)[:80]}"
            ) from None
        if manifest.step != step:
            raise ValueError(f"load_checkpoint: expected step {step} in {path}, got {manifest.step}")
        if checksum(folder / ".metadata") != manifest.metadata:
            raise ValueError(
                f"load_checkpoint: expected {folder / '.metadata'} as it was saved, got other contents"
            )
        return manifest

    @staticmethod
    def _parsed(content: dict[str, Any]) -> Manifest:
        entries = {}
        for name, given in content["entries"].items():
            entry = Entry(given["dtype"], given["size"], [Part(**part) for part in given["parts"]])
            # No file outside the folder, and no rows that would stay as they were before.
            if not all(_FILE.fullmatch(part.file) for part in entry.parts):
                raise ValueError(f"{name} lies in another file than save_checkpoint writes")
            for part in entry.parts:
                if (part.offset is None) != (entry.dtype is None):
                    raise ValueError(f"{name} has a place that is none")
                numbers = [*(part.offset or []), *part.size, part.start, part.length]
                if not all(isinstance(number, int) and number >= 0 for number in numbers):
                    raise ValueError(f"{name} has a place that is none")
            if sum(math.prod(part.size) for part in entry.parts) != math.prod(entry.size):
                raise ValueError(f"the parts of {name} do not make its size")
            if entry.dtype is not None and not isinstance(getattr(torch, entry.dtype), torch.dtype):
                raise ValueError(f"{name} has no dtype")
            entries[name] = entry
        return Manifest(content["step"], content["metadata"], entries)

    def part(self, index: MetadataIndex) -> Part:
        """What an item of DCP's plan reads."""
        wanted = None if index.offset is None else list(index.offset)
        return next(part for part in self.entries[index.fqn].parts if part.offset == wanted)

    def as_metadata(self) -> Metadata:
        """For the planner and the reader of ``torch.distributed.checkpoint``."""
        described: dict[str, Any] = {}
        storage: dict[MetadataIndex, _StorageInfo] = {}
        for name, entry in self.entries.items():
            chunks = []
            for part in entry.parts:
                storage[MetadataIndex(name, part.offset)] = _StorageInfo(part.file, part.start, part.length)
                if part.offset is not None:
                    chunks.append(ChunkStorageMetadata(torch.Size(part.offset), torch.Size(part.size)))
            described[name] = BytesStorageMetadata()
            if entry.dtype is not None:
                properties = TensorProperties(dtype=getattr(torch, entry.dtype))
                described[name] = TensorStorageMetadata(properties, torch.Size(entry.size), chunks)
        return Metadata(described, storage_data=storage)


def _of_content(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
