"""``load_head``: the head in a checkpoint of another library."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..engine import checks
from ..engine.arguments import FINITE, POSITIVE, choice, number, size
from ..engine.extra_state import unpack
from ..engine.files import clip, file_name, quoted, reading
from ..engine.scale import MIN_SCALE, bounds_of
from ..softmax.layers import NormFaceLoss
from ..softmax.margins import Margin
from ..softmax.state import checked_state, margin_of, shown
from ..theory import auto_scale
from .detect import Found, Group, choose
from .files import read_tensors
from .layouts import FORMATS, LAYOUTS
from .ranks import joined, paths_of, siblings
from .report import HeadReport, LoadedHead, left_out, stored_numbers

#: The scale that a library trains with where nobody chooses another: for a sentence only.
USUAL_SCALES = {"insightface": 64, "adaface": 64, "cvlface": 64, "magface": 64, "facex-zoo": 32}


class _Source(NamedTuple):
    """A file, or a dict of the caller's, and the weight in it."""

    where: str
    content: Any
    found: Found
    groups: list[Group]


def load_head(
    path_or_state_dict: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Mapping[str, Any],
    format: str = "auto",
    *,
    entry: str | None = None,
    layout: str | None = None,
    scale: float | Tensor | str | None = None,
    margin: Margin | None = None,
    sub_centers: int | None = None,
    device: torch.device | str | None = None,
) -> LoadedHead:
    """The head of a checkpoint as a ``NormFaceLoss``, and a report of what was found.

    Only tensors and plain values are read; nothing in a file runs. Files of ``torch.save`` are mapped, so
    that of a large checkpoint the head alone takes memory.

    Args:
        path_or_state_dict: a file of ``torch.save`` or safetensors; a folder with the files of the ranks of
            one run, or one of these files, whose others are looked for beside it; a list of files, which are
            joined in the order of their ranks; or a dict of tensors, or of such dicts, as ``torch.load``
            returns it.
        format: whose file it is, one of ``formats.FORMATS``; "auto" goes by the names of the entries, by what
            stands beside them and, where they leave it open, by shapes.
        entry: the weight's name, where several could be it.
        layout: "classes_first" ([C, D], as of ``nn.Linear``) or "features_first" ([D, C]), where it is open.
        scale: s of the head, in the place of a stored one. Without either it is that of ``NormFaceLoss``.
        margin: of the head, in the place of a stored one. A margin with a state, such as AdaFace's mean and
            deviation of the norms, gets what of it is in the file.
        sub_centers: K of a head with K neighbouring rows for each class (``SubCenterArcFaceLoss`` of
            pytorch-metric-learning, InsightFace's sub-center ArcFace). Only the file of a ``NormFaceLoss``
            says so; without this, each row of another is a class.
        device: of the head.

    The weight keeps its dtype, and its rows their lengths. A bias is left out, as a normalised head has none.

    Returns:
        (head, report): the report says which format, entry and layout it was, and what was left out.

    Raises:
        ValueError: no head, or more than one way to read it, with the keyword that chooses; a damaged or
            foreign file; ranks that are missing, there twice, or of different runs; NaN or infinity.
        TypeError: an argument.
        OSError: a file can't be read.
        ImportError: a safetensors file, without safetensors.
    """
    op = "load_head"
    format = choice(op, "format", format, ("auto", *FORMATS))
    order = None if layout is None else choice(op, "layout", layout, LAYOUTS)
    if entry is not None and not isinstance(entry, str):
        raise TypeError(f"{op}: expected `entry` to be a string, got {type(entry).__name__}")
    device = checks.device_or_none(op, device)
    centers = None if sub_centers is None else size(op, "sub_centers", sub_centers)

    def source(content: Any, where: str, file: str) -> _Source:
        return _Source(where, content, *choose(content, where, file, format, entry, order))

    if isinstance(path_or_state_dict, Mapping):
        sources = [source(path_or_state_dict, "state_dict", "")]
        return _built(sources, (), scale, margin, centers, device)
    paths = paths_of(_checked_paths(path_or_state_dict), format)
    sources = _of_files(paths, lambda path: source(read_tensors(path), file_name(path), path.name))
    files = tuple(each.where for each in sources)
    return _built(sources, files, scale, margin, centers, device)


def _checked_paths(given: object) -> Any:
    if isinstance(given, (str, os.PathLike)):
        return given
    if isinstance(given, (list, tuple)) and given and all(isinstance(p, (str, os.PathLike)) for p in given):
        return given
    hint = "; pass its state_dict()" if isinstance(given, nn.Module) else ""
    raise TypeError(
        "load_head: expected `path_or_state_dict` to be a path, a list of paths or a dict of tensors,"
        f" got {type(given).__name__}{hint}"
    )


def _of_files(paths: Sequence[Path], read: Callable[[Path], _Source]) -> list[_Source]:
    """Those that were asked for; of a file of one rank those of the others too."""
    first = read(paths[0])
    if len(paths) == 1 and (first.found.format == "insightface" or first.found.owner == "partial_fc."):
        kin = siblings(paths[0], first.found.format)
        return [first if path == paths[0] else read(path) for path in kin]
    return [first, *map(read, paths[1:])]


def _weight(sources: Sequence[_Source], centers: int) -> Tensor:
    """[C, D], a copy; [C centers, D]."""
    parts = []
    for where, _, found, _ in sources:
        rows = found.rows.detach()
        with reading(where, f"a dense matrix in {quoted(found.path, 80)}"):
            checks.matrix("load_head", found.path, rows, "[C, D]")
            held = rows.untyped_storage().nbytes()
        if not rows.numel() or (rows.device.type == "cpu" and rows.numel() * rows.element_size() > held):
            raise ValueError(
                clip(
                    f"{where}: expected a dense matrix in {quoted(found.path, 80)}, got {list(rows.shape)} of"
                    f" {held} bytes"
                )
            )
        parts.append((where, rows))
    weight = joined(
        parts, evenly=sources[0].found.format == "insightface" and len(parts) > 1, centers=centers
    )
    least, most = weight.aminmax(dim=1)  # of a row; isfinite would take the weight's memory twice
    finite = least.isfinite() & most.isfinite()
    if not finite.all():
        (where, _, found, _), of_class = sources[0], int((~finite).nonzero()[0]) // centers
        raise ValueError(
            f"{where}: expected finite numbers in {quoted(found.path, 80)}, got NaN or infinity for class"
            f" {of_class}"
        )
    return weight


def _built(
    sources: Sequence[_Source],
    files: tuple[str, ...],
    scale: float | Tensor | str | None,
    margin: Margin | None,
    centers: int | None,
    device: torch.device | None,
) -> LoadedHead:
    where, content, found, groups = sources[0]
    stored = stored_numbers(content, found)
    own = _own_state(found, where) if found.format == "normface" else _others_state(found, where, stored)
    for name in ("scale", "s"):
        stored.pop(name, None)
    used = {found.name, *(found.owner + name for name in (*stored, *own.entries))}
    used |= {found.owner + name for name in own.margin_entries}
    given, margin = own.first_scale if scale is None else scale, own.margin if margin is None else margin
    centers = own.sub_centers if centers is None else centers
    weight = _weight(sources, centers)
    classes, features = weight.shape[0] // centers, weight.shape[1]
    with torch.random.fork_rng(devices=[]):  # of the head's own weight, which one class is enough for
        head = NormFaceLoss(
            features,
            1,
            scale=auto_scale(classes, margin) if given is None or given == "auto" else given,
            learn_scale=own.learned,
            min_scale=own.bounds[0],
            max_scale=None if own.bounds[1] == math.inf else own.bounds[1],
            sub_centers=centers,
            device="cpu",
            dtype=weight.dtype,
        )
    head.weight, head.num_classes = nn.Parameter(weight), classes
    head.margin = margin
    head.to(weight.device if device is None else device)
    if own.learned and scale is None:
        with torch.no_grad():
            head.scale.fill_(own.scale)  # type: ignore[union-attr,arg-type]
    if own.margin_state and isinstance(margin, nn.Module):
        if found.format == "normface":
            used |= {f"{found.owner}margin.{name}" for name in own.margin_state}
        if found.format == "normface" or margin.state_dict().keys() == own.margin_state.keys():
            what = f"the state of {type(margin).__name__} in {quoted(found.owner + 'margin', 80)}"
            with reading(where, what):
                margin.load_state_dict(own.margin_state)
    report = HeadReport(
        found.format,
        files,
        found.path,
        LAYOUTS[found.order],
        head.num_classes,
        head.in_features,
        weight.dtype,
        own.scale,
        stored,
        own.margin_text,
        left_out(content, groups, found, used),
        _notes(found, len(sources), head, own, scale),
    )
    return LoadedHead(head, report)


class _Own(NamedTuple):
    """What a file says of a head besides its weight: the scale as it stands there, whether it was learned, a
    margin of numbers, and the state of one that is a module."""

    scale: float | None = None
    learned: bool = False
    margin: Margin | None = None
    margin_state: Mapping[str, Tensor] = MappingProxyType({})
    entries: tuple[str, ...] = ()
    margin_text: str = ""
    margin_entries: tuple[str, ...] = ()
    stored_bounds: tuple[float, float] | None = None
    sub_centers: int = 1

    @property
    def bounds(self) -> tuple[float, float]:
        """Of the scale; where a file has none, with room for its scale below."""
        if self.stored_bounds is not None:
            return self.stored_bounds
        return MIN_SCALE if self.scale is None or self.scale <= 0 else min(MIN_SCALE, self.scale), math.inf

    @property
    def first_scale(self) -> float | None:
        """A head can be made with it: a learned scale may stand outside its bounds."""
        return None if self.scale is None else min(max(self.scale, self.bounds[0]), self.bounds[1])


#: The states of other libraries' heads: their names -> those of ours.
_STATES = ({"batch_mean": "mean", "batch_std": "std"}, {"t": "t"})


def _others_state(found: Found, where: str, stored: Mapping[str, float]) -> _Own:
    """Lightning's hyper-parameter s; AdaFace's mean and deviation of the norms, CurricularFace's t."""
    scale = stored.get("s")
    if scale is not None:
        with reading(where, "a scale in the hyper-parameters"):
            scale = number("load_head", "s", scale, POSITIVE)
    for names in _STATES:
        state = {ours: found.group.tensors.get(f"{found.owner}{theirs}") for theirs, ours in names.items()}
        given = {ours: tensor for ours, tensor in state.items() if tensor is not None}
        if given.keys() == state.keys():
            return _Own(scale, margin_state=given)
    return _Own(scale)


def _own_state(found: Found, where: str) -> _Own:
    """Of a state_dict of ``NormFaceLoss``: the scale, learned or not; a margin, or the state of one."""
    tensors, owner = found.group.tensors, found.owner
    scale, extra = tensors.get(f"{owner}scale"), tensors.get(f"{owner}_extra_state")
    with reading(where, f"the state of a NormFaceLoss in {quoted(found.path, 80)}"):
        values = {} if extra is None else unpack("load_head", extra)
        given = checked_state("load_head", values.get("margin"))
        entries = tuple(f"margin_{name}" for name in (given or {}).get("tensors", ()))
        inside = {name: tensors.get(f"{owner}margin_{name}") for name in (given or {}).get("tensors", ())}
        learned = {name: nn.Parameter(value.clone()) for name, value in inside.items() if value is not None}
        margin = margin_of("load_head", given, learned)
        bounds = bounds_of("load_head", values["bounds"]) if "bounds" in values else None
        if scale is not None and scale.numel() != 1:
            raise ValueError(f"a scale of shape {list(scale.shape)}")
        centers = size("load_head", "sub_centers", values.get("sub_centers", 1))
        value = values.get("scale") if scale is None else scale.item()
        if value is not None:
            value = number("load_head", "scale", value, POSITIVE if scale is None else FINITE)
    under = f"{owner}margin."
    state = {name.removeprefix(under): each for name, each in tensors.items() if name.startswith(under)}
    said = shown(given) if "margin" in values else ""
    entries = entries if margin is not None else ()
    used = "scale", "_extra_state"
    return _Own(value, scale is not None, margin, state, used, said, entries, bounds, centers)


def _notes(found: Found, ranks: int, head: NormFaceLoss, own: _Own, scale: object) -> tuple[str, ...]:
    notes = []
    if own.scale is None and scale is None:
        usual = USUAL_SCALES.get(found.format)
        usually = "" if usual is None else f"; {found.format} trains with {usual}"
        taken = f"{head.scale_value():g} by the class count"
        notes.append(f"the scale is not stored, `scale` sets it: {taken}{usually}")
    if own.margin is None and head.options.margin is None and found.format not in ("linear", "normface"):
        notes.append("no margin is stored as numbers, `margin` sets it: none")
    if own.margin is None and own.margin_text not in ("", "None") and head.options.margin is None:
        notes.append(
            f"the margin is not made from the file, `margin` sets it: none; {own.margin_text} is stored"
        )
    if found.format == "cvlface" and ranks > 1:
        notes.append(f"the last classes, {ranks - 1} at most, may be the padding that spreads them evenly")
    return tuple(notes)
