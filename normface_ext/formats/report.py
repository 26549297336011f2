"""What ``load_head`` says it found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..engine.files import clip
from ..softmax.layers import NormFaceLoss
from .detect import Found, Group

#: Where Lightning keeps the arguments of the module: a head's numbers of them are reported by name.
_HYPER = "hyper_parameters"


@dataclass(frozen=True)
class HeadReport:
    """What ``load_head`` found; ``print(report)`` shows it.

    Attributes:
        format: one of ``formats.FORMATS``.
        files: those that were read; empty for a state_dict.
        entry: the weight's, with the keys on the way to it: "state_dict/head.kernel".
        layout: of the stored weight, "[C, D]" or "[D, C]".
        classes: C.
        features: D.
        dtype: of the weight, which the head keeps.
        scale: as stored; None where it is not.
        stored: numbers that stand beside the weight, by name: a margin's, AdaFace's statistics.
        margin: as stored, in words; "None" for none, empty where the file does not say.
        left_out: what was not taken, in words.
        notes: what was chosen for want of a number in the file.
    """

    format: str
    files: tuple[str, ...]
    entry: str
    layout: str
    classes: int
    features: int
    dtype: torch.dtype
    scale: float | None
    stored: Mapping[str, float] = field(default_factory=dict)
    margin: str = ""
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.format} head of {self.classes} classes, {self.features} features, {self.dtype}"]
        lines.append(f"  entry: {self.entry or 'the whole file'}, {self.layout}")
        lines += [f"  files: {', '.join(self.files)}"] if self.files else []
        lines.append(f"  scale: {'not stored' if self.scale is None else f'{self.scale:g}'}")
        lines += [f"  margin: {self.margin}"] if self.margin else []
        if self.stored:
            lines.append("  stored: " + ", ".join(f"{key} {value:g}" for key, value in self.stored.items()))
        lines += [f"  left out: {what}" for what in self.left_out]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


class LoadedHead(NamedTuple):
    """A head and where it comes from: ``head, report = load_head(...)``."""

    head: NormFaceLoss
    report: HeadReport


def left_out(content: Any, groups: list[Group], found: Found, used: set[str]) -> tuple[str, ...]:
    """What beside the entries `used` of the weight's dict a file holds: its head's entries one by one, other
    tensors by the module they belong to, the rest by name."""
    tensors, modules = found.group.tensors, dict[str, list[str]]()
    mine = {name for name in tensors if found.owner and name.startswith(found.owner)}
    for name in sorted(tensors.keys() - used, key=lambda name: (name not in mine, name)):
        module = name if name in mine else name.partition(".")[0]
        modules.setdefault(module, []).append(f"{name} {list(tensors[name].shape)}")
    said = [names[0] if len(names) == 1 else f"{m} ({len(names)} tensors)" for m, names in modules.items()]
    for group in groups:
        if group is not found.group:
            said.append(f"{group.place.container or 'the top'} ({len(group.tensors)} tensors)")
    shown = {group.place.container.partition("/")[0] for group in groups} | {_HYPER}
    if isinstance(content, Mapping):
        others = (key for key, value in content.items() if not isinstance(value, Tensor))
        said += [str(key) for key in others if key not in shown]
    said = [clip(each, 80) for each in said]
    return tuple(said[:20] + [f"{len(said) - 20} more"] * (len(said) > 20))


def stored_numbers(content: Any, found: Found) -> dict[str, float]:
    """Single numbers of the head's module, and of Lightning's hyper-parameters those that are a head's."""
    numbers = {
        name.removeprefix(found.owner): value.item()
        for name, value in found.group.tensors.items()
        if name.startswith(found.owner) and "." not in name.removeprefix(found.owner)
        if value.numel() == 1 and value.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    }
    return numbers | dict(_hyper_parameters(content))


def _hyper_parameters(content: Any) -> Iterator[tuple[str, float]]:
    given = content.get(_HYPER) if isinstance(content, Mapping) else None
    if isinstance(given, Mapping):
        for name in ("s", "m", "h", "t_alpha"):
            value = given.get(name)
            if isinstance(value, Real) and not isinstance(value, bool):
                yield name, float(value)
