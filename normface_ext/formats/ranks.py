"""Files of the ranks of one run, each with some of the classes: which belong together, and in which order."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..engine.files import clip, file_name
from .layouts import RANK_FILES

_ALL = tuple(pattern for patterns in RANK_FILES.values() for pattern in patterns)


def kind_and_rank(name: str, format: str) -> tuple[str, int] | None:
    """What the files of one run share, and the rank, by a file's name."""
    for pattern in RANK_FILES.get(format, _ALL):
        match: re.Match[str] | None = pattern.fullmatch(name)
        if match:
            return f"{match[1]}*{match[3]}", int(match[2])
    return None


def of_folder(folder: Path, format: str) -> list[Path]:
    """The files of all ranks in a folder, by rank."""
    kinds: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        known = kind_and_rank(path.name, format)
        if known and path.is_file():
            kinds.setdefault(known[0], []).append(path)
    where = file_name(folder)
    if not kinds:
        raise ValueError(
            f"{where}: expected files of ranks (checkpoint_gpu_0.pt, softmax_fc_gpu_0.pt,"
            " rank_0_softmax_weight.pt, classifier_rank0.pt) in the folder, got none"
        )
    if len(kinds) > 1:
        shown = " and ".join(sorted(kinds)[:3])
        raise ValueError(
            clip(f"{where}: expected the files of one run, got {shown}; pass the path of one of them")
        )
    return in_order(kinds.popitem()[1], format)


def siblings(path: Path, format: str) -> list[Path]:
    """The file and those of the other ranks beside it, by rank."""
    known = kind_and_rank(path.name, format)
    if known is None:
        return [path]
    kin = [p for p in path.parent.iterdir() if (kind_and_rank(p.name, format) or [None])[0] == known[0]]
    return in_order(kin, format)


def in_order(paths: Sequence[Path], format: str) -> list[Path]:
    """By rank; ValueError where one is missing or there twice. As given, where the names have no ranks."""
    known = [kind_and_rank(path.name, format) for path in paths]
    ranks = [each[1] for each in known if each is not None]
    if len(ranks) < len(paths):
        return list(paths)
    by_rank: dict[int, Path] = {}
    for rank, path in zip(ranks, paths, strict=True):
        if rank in by_rank:
            raise ValueError(
                clip(f"load_head: expected every rank once, got rank {rank} in {by_rank[rank]} and in {path}")
            )
        by_rank[rank] = path
    missing = sorted(set(range(max(by_rank) + 1)) - by_rank.keys())
    if missing:
        shown = ", ".join(map(str, missing[:5])) + ", ..." * (len(missing) > 5)
        last = file_name(by_rank[max(by_rank)])
        raise ValueError(
            f"{last}: expected the files of all ranks from 0 to {max(by_rank)}, got none of {shown}"
        )
    return [by_rank[rank] for rank in sorted(by_rank)]


def joined(parts: Sequence[tuple[str, Tensor]], evenly: bool, centers: int) -> Tensor:
    """[C, D] out of (where, [C_r, D]) of each rank, copied once.

    Args:
        evenly: whether the classes were spread as InsightFace does: numbers that differ by one at most, the
            larger ones first. Others are of different runs.
        centers: rows of a class, which is on one rank.
    """
    (first, head), counts = parts[0], [part.shape[0] // centers for _, part in parts]
    for where, part in parts:
        if part.shape[0] % centers:
            raise ValueError(
                f"{where}: expected sub_centers={centers} rows for each class, got {part.shape[0]} rows"
            )
    for where, part in parts[1:]:
        if part.shape[1] != head.shape[1] or part.dtype != head.dtype:
            raise ValueError(
                clip(
                    f"{where}: expected rows [{head.shape[1]}] of {head.dtype} as in {first}, got"
                    f" [{part.shape[1]}] of {part.dtype}"
                )
            )
    if evenly:
        share, more = divmod(sum(counts), len(counts))
        for rank, (where, _) in enumerate(parts):
            if counts[rank] != share + (rank < more):
                raise ValueError(
                    f"{where}: expected {share + (rank < more)} of {sum(counts)} classes on rank {rank} of"
                    f" {len(counts)}, got {counts[rank]}: a rank is missing, or this file is of another run"
                )
    whole = torch.empty(sum(counts) * centers, head.shape[1], dtype=head.dtype, device=head.device)
    torch.cat([part for _, part in parts], out=whole)
    return whole


def paths_of(given: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], format: str) -> list[Path]:
    """The files that are asked for."""
    if isinstance(given, (str, os.PathLike)):
        path = Path(given)
        return of_folder(path, format) if path.is_dir() else [path]
    return in_order([Path(each) for each in given], format)
