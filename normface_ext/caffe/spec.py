"""One layer of a prototxt as its constructor reads it: options, their lines, and what is refused."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from ..engine.files import clip, quoted
from .prototxt import Lines

#: So many problems of a file are kept; the others are counted.
MOST_PROBLEMS = 100


@dataclass
class Report:
    """What the loader found in a file: problems make it fail, notes are told."""

    where: str
    problems: list[tuple[int, str]] = field(default_factory=list)
    notes: list[tuple[int, str]] = field(default_factory=list)
    more: int = 0  # problems that were not kept

    def refuse(self, line: int, sentence: str) -> None:
        if len(self.problems) < MOST_PROBLEMS:
            self.problems.append((line, clip(sentence)))
        else:
            self.more += 1

    def lines(self, entries: list[tuple[int, str]]) -> list[str]:
        return [clip(f"{self.where}:{line}: {sentence}") for line, sentence in sorted(entries)]


@dataclass(frozen=True)
class Context:
    """What `load_head` was told beside the file."""

    mode: str
    eps: float
    in_features: int | None
    device: torch.device | str | None
    dtype: torch.dtype | None

    @property
    def caffe(self) -> bool:
        return self.mode == "caffe"


class Spec:
    """A LayerParameter with its lines. ``refuse`` and ``note`` write to the report of the file."""

    def __init__(self, message: Any, lines: Lines, report: Report) -> None:
        self.message: Any = message
        self.lines: Lines = lines
        self.report: Report = report
        self.name: str = str(message.name)
        self.type: str = str(message.type)
        self.bottoms: list[str] = [str(b) for b in message.bottom]
        self.tops: list[str] = [str(t) for t in message.top]
        self.width: int | None = None  # numbers in a row of the first bottom, where the file tells

    def __str__(self) -> str:
        return f'layer "{clip(self.name, 60)}" ({clip(self.type, 40)})'

    def at(self, path: str, index: int = 0) -> str:
        """file:line of an option, or of the layer where it is not written."""
        return f"{self.report.where}:{self.lines.of(path, index)}"

    def refuse(self, sentence: str, path: str = "", index: int = 0) -> None:
        self.report.refuse(self.lines.of(path, index), f"{self}: {sentence}")

    def note(self, sentence: str, path: str = "") -> None:
        self.report.notes.append((self.lines.of(path), clip(f"{self}: {sentence}")))

    def has(self, path: str) -> bool:
        """Whether the file writes the option `block.name`."""
        block, _, name = path.partition(".")
        return self.message.HasField(block) and (not name or getattr(self.message, block).HasField(name))

    def get(self, path: str) -> Any:
        """The option `block.name`, Caffe's default where the file does not write it."""
        value = self.message
        for name in path.split("."):
            value = getattr(value, name)
        return value

    def only(self, path: str, supported: object, why: str = "") -> None:
        """Refuses the option unless it has the value that is supported (or the file does not write it)."""
        value = self.get(path)
        if value != supported:
            self.refuse(
                f"expected `{path}: {_text(supported)}`, got {_text(value)}" + (why and f" ({why})"), path
            )

    def never(self, path: str, why: str) -> None:
        """Refuses the option wherever the file writes it."""
        block, _, name = path.partition(".")
        value = self.get(path)
        written = len(value) > 0 if _repeated(value) else self.has(path)
        if written:
            self.refuse(f"`{name or block}` is not supported ({why})", path)

    def check_fields(self, blocks: tuple[str, ...]) -> None:
        """Refuses unknown options; notes blocks that this type does not read, which Caffe ignores."""
        for name in self.lines.fields:
            if name.endswith("_param") and hasattr(self.message, name) and name not in blocks:
                self.note(f"`{name}` is not read by this layer type and has no effect", name)
        self._check(self.lines, self.message, "", blocks)

    def _check(self, lines: Lines, message: Any, prefix: str, blocks: tuple[str, ...]) -> None:
        for name, line in lines.unknown:
            self.report.refuse(line, f"{self}: unknown option `{prefix}{clip(name, 60)}`")
        for descriptor, value in message.ListFields():
            path = f"{prefix}{descriptor.name}"
            places = lines.fields.get(descriptor.name, [])
            values = value if _repeated(value) else [value]
            for place, one in zip(places, values, strict=False):
                if descriptor.message_type is not None:
                    self._check(place, one, f"{path}.", blocks)
                elif isinstance(one, float) and not math.isfinite(one):
                    self.report.refuse(place.line, f"{self}: expected `{path}` to be finite, got {one}")


def _repeated(value: object) -> bool:
    return hasattr(value, "__len__") and not isinstance(value, (str, bytes))


def _text(value: object) -> str:
    return (
        str(value).lower()
        if isinstance(value, bool)
        else quoted(value)
        if isinstance(value, str)
        else str(value)
    )
