"""Which entry of a file is the head's weight, and which way round: by names, and where they leave it open by
shapes. What stays open is asked for, by keyword."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..engine.files import clip, quoted
from .layouts import CLASSES_FIRST, FEATURES_FIRST, LAYOUT_TABLE, LAYOUTS, Place

#: Dicts within dicts that are looked into: {"state_dict": {...}} and one more.
_DEEPEST = 3
#: What DataParallel, torch.compile and FSDP put before names.
_WRAPPERS = re.compile(r"(?:module\.|_orig_mod\.|_fsdp_wrapped_module\.)+")


@dataclass(frozen=True)
class Group:
    """A dict of tensors in a file, and its names with the wrappers' prefixes."""

    place: Place
    full_names: Mapping[str, str]

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return self.place.tensors

    def path(self, name: str) -> str:
        return "/".join(part for part in (self.place.container, self.full_names[name]) if part)


@dataclass(frozen=True)
class Found:
    """The weight: where it is, and what that means."""

    group: Group
    name: str
    format: str
    order: str
    owner: str

    @property
    def path(self) -> str:
        return self.group.path(self.name)

    @property
    def value(self) -> Tensor:
        return self.group.tensors[self.name]

    @property
    def rows(self) -> Tensor:
        """[C, D]"""
        return self.value if self.order == CLASSES_FIRST else self.value.T

    def __str__(self) -> str:
        path = quoted(self.path, 80) if self.path else "the tensor"
        return f"{path} {list(self.value.shape)} as {LAYOUTS[self.order]} of {self.format}"


def groups(content: Any, file: str) -> list[Group]:
    """The dicts of tensors in a file's content, which may be a single tensor."""
    if isinstance(content, Tensor):
        content = {"": content}
    if not isinstance(content, Mapping):
        return []
    top = [key for key in content if isinstance(key, str)]
    return list(_groups(content, (), top, file, set()))


def _groups(
    content: Mapping[Any, Any], path: tuple[str, ...], top: list[str], file: str, seen: set[int]
) -> Iterator[Group]:
    if id(content) in seen or len(path) > _DEEPEST:  # a file may tie knots
        return
    seen.add(id(content))
    named = {key: value for key, value in content.items() if isinstance(key, str)}
    tensors: dict[str, Tensor] = {}
    full: dict[str, str] = {}
    for key, value in named.items():
        if isinstance(value, Tensor):
            name = _WRAPPERS.sub("", key)
            name = key if name in tensors else name
            tensors[name], full[name] = value, key
    if tensors:
        yield Group(Place("/".join(path), tensors, top, file), full)
    for key, value in named.items():
        if isinstance(value, Mapping):
            yield from _groups(value, (*path, key), top, file, seen)


def choose(
    content: Any, where: str, file: str, format: str, entry: str | None, order: str | None
) -> tuple[Found, list[Group]]:
    """The one weight; ValueError where there is none, or more than one way to read it."""
    inside = groups(content, file)
    matrices = [
        (group, name)
        for group in inside
        for name, value in group.tensors.items()
        if value.dim() == 2 and value.is_floating_point()
    ]
    if entry is not None:
        matrices = [(group, name) for group, name in matrices if entry in (group.path(name), name)]
    readings = [reading for group, name in matrices for reading in _readings(group, name, format)]
    found = [match for match, certain in readings if certain] or [match for match, _ in readings]
    if order is not None:
        found = _turned(found, matrices, format, order)
    found = _one_per_way(found)
    if len(found) == 2 and found[0].path == found[1].path:
        found = _by_shape(*found)
    if not found:
        raise ValueError(clip(_nothing(where, inside, matrices, format, entry)))
    if len(found) > 1:
        raise ValueError(clip(_too_much(where, found)))
    return found[0], inside


def _readings(group: Group, name: str, format: str) -> list[tuple[Found, bool]]:
    """The ways to read an entry, in the table's order, and whether that one is certain."""
    readings = []
    for layout in LAYOUT_TABLE:
        match = layout.names.fullmatch(name)
        nameless = not name and format == layout.format  # a file of one tensor, and the caller knows of what
        if (match is None and not nameless) or format not in ("auto", layout.format):
            continue
        owner = match["owner"] if match else ""
        possible = layout.possible(group.place, owner)
        if format == "auto" and not possible:
            continue
        found = Found(group, name, layout.format, layout.order, owner)
        readings.append((found, possible and layout.certain(group.place, owner)))
    return readings


def _turned(
    found: list[Found], matrices: Sequence[tuple[Group, str]], format: str, order: str
) -> list[Found]:
    """Those of the given order; of an entry that no format knows, that order."""
    kept = [match for match in found if match.order == order]
    if kept or len(matrices) != 1:
        return kept
    group, name = matrices[0]
    known = format if format != "auto" else "linear" if order == CLASSES_FIRST else "kernel"
    return [Found(group, name, known, order, name.rpartition(".")[0] + "." * ("." in name))]


def _one_per_way(found: list[Found]) -> list[Found]:
    ways: dict[tuple[str, str], Found] = {}
    for match in found:
        ways.setdefault((match.path, match.order), match)
    return list(ways.values())


def _by_shape(one: Found, other: Found) -> list[Found]:
    """D is the size of what the network before the head puts out, so some tensor of it begins with D."""
    sizes = {
        value.shape[0]
        for name, value in one.group.tensors.items()
        if value.dim() and not name.startswith(one.owner or name)
    }
    first, second = one.value.shape
    if (first in sizes) == (second in sizes):
        return [one, other]
    order = FEATURES_FIRST if first in sizes else CLASSES_FIRST
    return [match for match in (one, other) if match.order == order]


def _nothing(
    where: str,
    inside: Sequence[Group],
    matrices: Sequence[tuple[Group, str]],
    format: str,
    entry: str | None,
) -> str:
    kind = "a head" if format == "auto" else f"a head of {format}"
    if not inside:
        return f"{where}: expected the weight of {kind}, got no tensors by name"
    if entry is not None and not matrices:
        return f"{where}: expected a floating matrix in the entry {quoted(entry)}, got none"
    names = [f"{quoted(g.path(n), 40) if n else 'a tensor'} {list(g.tensors[n].shape)}" for g, n in matrices]
    shown = ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)
    if not names:
        return f"{where}: expected the weight of {kind}, got no floating matrix"
    which = "" if entry is not None or len(names) == 1 else "`entry` and "
    return (
        f"{where}: expected the weight of {kind} by a known name, got {shown}; {which}`layout`"
        f" ({CLASSES_FIRST} or {FEATURES_FIRST}) choose one"
    )


def _too_much(where: str, found: Sequence[Found]) -> str:
    paths = {match.path for match in found}
    shown = " and ".join(map(str, found[:2])) + f" and {len(found) - 2} more" * (len(found) > 2)
    keyword = "`entry` chooses" if len(paths) > 1 else "`format` or `layout` chooses"
    return f"{where}: expected one weight of a head, got {shown}; {keyword}"
