"""``save_head``: the head as another library loads it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from ..engine import checks
from ..engine.arguments import choice, size
from ..softmax.centers import as_rows, by_class
from ..softmax.layers import NormFaceLoss


class _Shape(NamedTuple):
    """What a library's file holds: of the rows [C, D], and the name of a rank's file where it has such."""

    content: Callable[[Tensor], dict[str, Any]]
    rank_file: str = ""
    flat: bool = False


def _columns(rows: Tensor) -> Tensor:
    return rows.T.contiguous()


def _adaface(rows: Tensor) -> dict[str, Any]:
    """With the statistics that a new AdaFace head starts from, which its load_state_dict asks for."""
    one = torch.ones(1, device=rows.device)
    head = {"kernel": _columns(rows), "t": 0 * one, "batch_mean": 20 * one, "batch_std": 100 * one}
    return {"state_dict": {f"head.{name}": value for name, value in head.items()}}


def _own(head: NormFaceLoss) -> dict[str, Any]:
    return {name: value.detach().cpu() for name, value in head.state_dict().items()}


#: By format, as ``load_head`` calls them.
WRITTEN: Mapping[str, _Shape] = {
    "insightface": _Shape(lambda rows: {"state_dict_softmax_fc": {"weight": rows}}, "checkpoint_gpu_{}.pt"),
    "adaface": _Shape(_adaface),
    "cvlface": _Shape(lambda rows: {"partial_fc.weight": rows}, "classifier_rank{}.pt", flat=True),
    "facex-zoo": _Shape(
        lambda rows: {"state_dict": {"head.weight": _columns(rows)}, "epoch": 0, "batch_id": 0}
    ),
    "pytorch-metric-learning": _Shape(lambda rows: {"W": _columns(rows)}, flat=True),
    "kernel": _Shape(lambda rows: {"kernel": _columns(rows)}, flat=True),
    "linear": _Shape(lambda rows: {"weight": rows}, flat=True),
}


def save_head(
    head: NormFaceLoss, path: str | os.PathLike[str], format: str = "normface", *, ranks: int = 1
) -> tuple[Path, ...]:
    """Writes the head's weight under the names, and in the layout, that another library loads.

    A file appears whole or not at all, and a file of several ranks not before all of them are written.

    Args:
        head: of one process.
        path: of the file; with ``ranks`` > 1 of a folder, which is made if need be.
        format: "normface" (its ``state_dict``, with scale and margin), "insightface", "adaface", "cvlface",
            "facex-zoo", "pytorch-metric-learning", "kernel" (CurricularFace, ElasticFace) or
            "linear" (``nn.Linear`` without bias). A path that ends in .safetensors makes such a file, where
            the format is a plain dict of tensors.
        ranks: into how many files of ranks the classes go: "insightface" and "cvlface" only.

    Sub-centres are rows of the weight, those of a class neighbours, as in InsightFace and
    pytorch-metric-learning. Only "normface" has a place for their number, the scale and the margin: the other
    libraries take them as arguments. What each loads it by is in the documentation, "Checkpoints of other
    libraries".

    Returns:
        The paths of the files, by rank.

    Raises:
        TypeError: not a ``NormFaceLoss`` of one process.
        ValueError: a format; ranks where a format has none, or that do not divide the classes where the
            library asks for that.
        OSError: as the system has it.
        ImportError: a safetensors file, without safetensors.
    """
    op = "save_head"
    if not isinstance(head, NormFaceLoss):
        raise TypeError(f"{op}: expected `head` to be a NormFaceLoss, got {type(head).__name__}")
    if checks.is_dtensor(head.weight):
        raise TypeError(
            f"{op}: expected `head` of one process, got {type(head).__name__}: load its"
            " distributed.full_state_dict into a NormFaceLoss first"
        )
    if head.weight.is_meta:
        raise ValueError(f"{op}: expected `head` with values, got one on the meta device")
    format = choice(op, "format", format, ("normface", *WRITTEN))
    ranks = size(op, "ranks", ranks)
    path = Path(path)
    shape = WRITTEN[format] if format != "normface" else _Shape(lambda rows: _own(head), flat=True)
    weight = head.weight.detach().cpu()
    if ranks == 1:
        return _write({path: shape.content(weight)}, shape.flat)
    if not shape.rank_file:
        raise ValueError(f"{op}: expected `ranks` to be 1 for the format {format!r}, got {ranks}")
    if ranks > head.num_classes or (format == "cvlface" and head.num_classes % ranks):
        wanted = "a divisor of" if format == "cvlface" else "at most"
        raise ValueError(f"{op}: expected `ranks` to be {wanted} {head.num_classes} classes, got {ranks}")
    # tensor_split gives the first ranks one more, as InsightFace does. Each is copied: torch.save would write
    # the storage of all.
    of_classes = by_class(weight, head.options.sub_centers)
    parts = [as_rows(part).clone() for part in of_classes.tensor_split(ranks)]
    path.mkdir(parents=True, exist_ok=True)
    return _write(
        {path / shape.rank_file.format(rank): shape.content(part) for rank, part in enumerate(parts)},
        shape.flat,
    )


def _write(files: Mapping[Path, dict[str, Any]], flat: bool) -> tuple[Path, ...]:
    """All under other names first, then all in place."""
    drafts = {path: path.with_name(f".{path.name}.{os.getpid()}.part") for path in files}
    try:
        for path, content in files.items():
            with open(drafts[path], "xb") as file:
                _put(content, path, file, flat)
                file.flush()
                os.fsync(file.fileno())
        for path in files:
            os.replace(drafts[path], path)
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)
    return tuple(files)


def _put(content: dict[str, Any], path: Path, file: BinaryIO, flat: bool) -> None:
    if path.suffix != ".safetensors":
        torch.save(content, file)
        return
    if not flat:
        raise ValueError(
            f"save_head: expected another suffix for a format with nested names, got {path.name}"
        )
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise ImportError(
            f"save_head: a safetensors file needs safetensors, which is not installed ({error}):"
            " `pip install safetensors`"
        ) from error
    file.write(save(content))
