"""A layer out of its `Spec`: what all types have in common is checked here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from .fillers import free_memory, size_problem
from .layer import Layer
from .spec import Context, Report, Spec

PHASES = ("TRAIN", "TEST")
#: Layers of a head; the heads of the paper have six.
MOST_LAYERS = 1000


class Layers(nn.ModuleDict):
    """Layers by their names in the file.

    torch forbids some names to modules ("fc.1", "training"); such a layer has another one in the state dict.
    """

    def __init__(self) -> None:
        super().__init__()
        self.words: dict[str, str] = {}

    def __setitem__(self, name: str, layer: nn.Module) -> None:
        word = name.replace(".", "_")
        while hasattr(self, word):
            word += "_"
        self.words[name] = word
        self.add_module(word, layer)

    def __getitem__(self, name: str) -> Any:
        return getattr(self, self.words[name])

    def __contains__(self, name: object) -> bool:
        return name in self.words

    def __iter__(self) -> Iterator[str]:
        return iter(self.words)

    def keys(self) -> Any:
        return self.words.keys()

    def items(self) -> Any:
        return {name: self[name] for name in self.words}.items()


def phases(spec: Spec) -> tuple[str, ...]:
    """The phases that a layer's include and exclude rules allow."""
    message = spec.message
    if message.include and message.exclude:
        spec.refuse("expected `include` or `exclude`, got both", "exclude")
    for name in ("include", "exclude"):
        for i, rule in enumerate(getattr(message, name)):
            for other in ("min_level", "max_level", "stage", "not_stage"):
                if other in spec.lines.fields[name][i].fields:
                    spec.refuse(f"`{other}` in `{name}` is not supported", name, i)
            if not rule.HasField("phase"):
                spec.refuse(f"expected a phase in `{name}`", name, i)
    include = {PHASES[rule.phase] for rule in message.include}
    exclude = {PHASES[rule.phase] for rule in message.exclude}
    if message.HasField("phase"):
        include.add(PHASES[message.phase])
    return tuple(p for p in PHASES if (p in include or not include) and p not in exclude)


def build(kind: type[Layer], spec: Spec, context: Context) -> tuple[Layer, list[tuple[float, float]]]:
    """(the layer, lr_mult and decay_mult of each of its blobs)."""
    message = spec.message
    spec.check_fields(kind.BLOCKS)
    for what, count, (least, most) in (
        ("bottom", len(spec.bottoms), kind.BOTTOMS), ("top", len(spec.tops), kind.TOPS)
    ):  # fmt: skip
        if not least <= count <= most:
            wanted = str(least) if least == most else f"{least} or more" if most > 9 else f"{least} or {most}"
            hint = f" ({kind.BOTTOM_NAMES})" if what == "bottom" and kind.BOTTOM_NAMES else ""
            spec.refuse(f"expected {wanted} `{what}`{hint}, got {count}", what)
    if message.blobs:
        spec.refuse("`blobs` in a text file are not supported: load_caffemodel reads weights", "blobs")
    if len(message.loss_weight) not in (0, len(spec.tops)):
        spec.refuse(f"expected `loss_weight` once per top, got {len(message.loss_weight)}", "loss_weight")
    if len(message.propagate_down) not in (0, len(spec.bottoms)):
        spec.refuse(
            f"expected `propagate_down` once per bottom, got {len(message.propagate_down)}", "propagate_down"
        )
    layer = kind(spec, context)
    most = len(layer.BLOBS) + layer.SPARE_BLOBS
    if len(message.param) > most:
        spec.refuse(f"expected at most {most} `param`, got {len(message.param)}", "param", most)
    multipliers = [(1.0, 1.0)] * len(layer.BLOBS)
    for i, param in enumerate(message.param[: len(multipliers)]):
        if param.lr_mult < 0 or param.decay_mult < 0:
            spec.refuse("expected `lr_mult` and `decay_mult` >= 0", "param", i)
        multipliers[i] = (float(param.lr_mult), float(param.decay_mult))
    layer.lr_mults = [lr for lr, _ in multipliers]
    return layer, multipliers


def create_blobs(layers: list[tuple[Layer, Spec]], context: Context, report: Report) -> None:
    """Makes the blobs whose size is known, once all of them are known to fit in memory."""
    free = free_memory(context.device)
    for layer, spec in layers:
        for name, shape in layer.shapes.items():
            if layer.peers.get(name, [(layer, name)])[0] != (layer, name):
                continue  # the memory of another layer's blob
            problem = size_problem(shape, context.dtype, free)
            if problem:
                spec.refuse(f"expected `{name}` {problem}", layer.SIZE)
            else:
                free -= layer.bytes_of(name)
    for layer, spec in [] if report.problems else layers:
        try:
            layer.create(context.dtype, context.device)
        except ValueError as error:
            spec.refuse(str(error), layer.SIZE)
            return
