"""How other libraries store a head: the name of its weight, and which way round it is. One row for each.

A name alone says less than it seems: ``head.weight`` is [C, D] in timm and [D, C] in FaceX-Zoo, ``W`` is
[D, C] in pytorch-metric-learning and [C, D] in FaceX-Zoo's AdaCos. So a row also says what else stands in its
files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

CLASSES_FIRST, FEATURES_FIRST = "classes_first", "features_first"
#: layout -> how it is written in sentences
LAYOUTS = {CLASSES_FIRST: "[C, D]", FEATURES_FIRST: "[D, C]"}


@dataclass(frozen=True)
class Place:
    """Where an entry was found: what a row may look at.

    Attributes:
        container: the keys on the way to the dict of tensors, such as "state_dict"; empty at the top.
        tensors: that dict's, by names without wrappers' prefixes.
        top: the keys of the file's outermost dict.
        file: the file's name, or empty.
    """

    container: str
    tensors: Mapping[str, Tensor]
    top: Collection[str]
    file: str

    def begins(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self.tensors)

    def has_number(self, name: str) -> bool:
        return name in self.tensors and self.tensors[name].numel() == 1


def _any_place(place: Place, owner: str) -> bool:
    return True


def _no_place(place: Place, owner: str) -> bool:
    return False


@dataclass(frozen=True)
class Layout:
    """A name of a format's weight.

    Attributes:
        format: what ``load_head(format=)`` calls it.
        names: of the weight's entry, without wrappers' prefixes; the group "owner" is the module's path.
        order: CLASSES_FIRST or FEATURES_FIRST.
        possible: whether it can be this one, by what stands beside it.
        certain: whether it can be no other.
    """

    format: str
    names: re.Pattern[str]
    order: str
    possible: Callable[[Place, str], bool] = _any_place
    certain: Callable[[Place, str], bool] = _no_place


#: Names of the ranks' files: what they share, the rank, and the end. InsightFace's since 2022 and before, and
#: those of the first Partial FC, which are bare tensors; CVLface's.
RANK_FILES: dict[str, tuple[re.Pattern[str], ...]] = {
    "insightface": (
        re.compile(r"(checkpoint_gpu_|softmax_fc_gpu_)(\d+)(\.pt)"),
        re.compile(r"(rank_)(\d+)(_softmax_weight\.pt)"),
    ),
    "cvlface": (re.compile(r"(.*_rank)(\d+)(\.(?:pt|pth|bin|safetensors))"),),
}

_HEADS = (
    r"fc|head|classifier|classifier\.\d+|head\.fc|heads\.head|classifier\.fc|last_linear|linear|output|logits"
)


def _names(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def _no_bias(place: Place, owner: str) -> bool:
    return f"{owner}bias" not in place.tensors


def _is_backbone(place: Place) -> bool:
    """InsightFace's backbones: their fc makes the embedding, and a BatchNorm1d ``features`` follows it."""
    return "features.running_mean" in place.tensors and "fc.weight" in place.tensors


LAYOUT_TABLE = (
    Layout(
        "normface", _names(r"(?P<owner>(?:.+\.)?)weight"), CLASSES_FIRST,
        possible=lambda place, owner: (
            f"{owner}_extra_state" in place.tensors or place.has_number(f"{owner}scale")
        ),
        certain=lambda place, owner: f"{owner}_extra_state" in place.tensors,
    ),
    Layout(
        "insightface", _names(r"(?P<owner>)(?:weight)?"), CLASSES_FIRST,
        possible=lambda place, owner: (
            place.container.endswith("state_dict_softmax_fc")
            or any(pattern.fullmatch(place.file) for pattern in RANK_FILES["insightface"])
        ),
        certain=_any_place,
    ),
    Layout(
        "adaface",
        _names(r"(?P<owner>(?:head\.)?)kernel"),
        FEATURES_FIRST,
        possible=lambda place, owner: (
            f"{owner}batch_mean" in place.tensors or (owner == "head." and place.begins("model."))
        ),
        certain=lambda place, owner: f"{owner}batch_mean" in place.tensors,
    ),
    Layout(
        "cvlface", _names(r"(?P<owner>(?:partial_fc|classifier)\.)weight"), CLASSES_FIRST,
        possible=lambda place, owner: owner == "partial_fc." or f"{owner}batch_mean" in place.tensors,
        certain=_any_place,
    ),
    Layout(
        "facex-zoo", _names(r"(?P<owner>head\.)(?:weight|kernel)"), FEATURES_FIRST,
        possible=_no_bias,
        certain=lambda place, owner: "batch_id" in place.top,
    ),
    Layout(
        "facex-zoo", _names(r"(?P<owner>head\.)W"), CLASSES_FIRST,
        certain=lambda place, owner: "batch_id" in place.top,
    ),
    Layout("pytorch-metric-learning", _names(r"(?P<owner>(?:.+\.)?)W"), FEATURES_FIRST),
    Layout("pytorch-metric-learning", _names(r"(?P<owner>(?:.+\.)?)proxies"), CLASSES_FIRST),
    # Of one process: its class-parallel trainer has [C, D] there, a part on each rank.
    Layout(
        "magface", _names(r"(?P<owner>fc\.)weight"), FEATURES_FIRST,
        possible=lambda place, owner: place.begins("features.") and _no_bias(place, owner),
    ),
    # CurricularFace, ElasticFace, InsightFace_Pytorch: a Parameter of that name, [D, C] in all of them.
    Layout("kernel", _names(r"(?P<owner>(?:.+\.)?)kernel"), FEATURES_FIRST),
    Layout(
        "linear", _names(rf"(?P<owner>(?:(?:{_HEADS})\.)?)weight"), CLASSES_FIRST,
        possible=lambda place, owner: not (owner == "fc." and _is_backbone(place)),
    ),
)  # fmt: skip

FORMATS = tuple(dict.fromkeys(layout.format for layout in LAYOUT_TABLE))
