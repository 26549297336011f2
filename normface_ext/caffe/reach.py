"""Which layers of a whole net are its head."""

from __future__ import annotations

from .agents import Agents
from .kinds import kind_of
from .layer import Layer
from .layers import Normalize, Parameter
from .spec import Report, Spec


def reachable(specs: list[Spec], given: list[str], report: Report) -> list[Spec]:
    """The layers behind the given blobs: those that get one, directly or not, and their Parameters.

    Layers that work in place on a given blob before any other reads it belong to the net before, up to the
    last one that is not known. So does a layer that gets nothing of the head but labels.
    """
    before = [spec for name in given for spec in _in_place(specs, name)]
    for spec in before:
        spec.note(f"works in place on the input `{spec.tops[0]}`: the head takes it as this layer leaves it")
    known, kept = set(given), []
    for spec in specs:
        reached = spec.type == "Parameter" or any(bottom in known for bottom in spec.bottoms)
        if not reached or any(spec is other for other in before):
            continue
        kind = kind_of(spec)
        labels = () if kind is None else kind.LABELS
        others = [bottom for i, bottom in enumerate(spec.bottoms) if i not in labels]
        if others and len(others) < len(spec.bottoms) and not any(bottom in known for bottom in others):
            spec.note(f"is left out: nothing in `inputs` leads to its bottom `{others[0]}`")
            continue
        kept.append(spec)
        known |= set(spec.tops)
    written = {bottom for spec in specs for bottom in spec.bottoms}
    for name in given:
        if name not in written:
            report.refuse(1, f"expected a layer with the bottom `{name}`, which is in `inputs`, got none")
    wanted = {bottom for spec in kept for bottom in spec.bottoms}
    return [spec for spec in kept if spec.bottoms or wanted & set(spec.tops)]


def _in_place(specs: list[Spec], name: str) -> list[Spec]:
    """The layers that change a given blob before it is the head's."""
    found: list[Spec] = []
    end = 0
    for spec in specs:
        if spec.bottoms == spec.tops == [name]:
            found.append(spec)
            end = len(found) if kind_of(spec) is None else end
        elif name in spec.bottoms:
            break
    return found[:end]


def suggested(specs: list[Spec]) -> list[str]:
    """What to name as ``inputs``: the bottoms of the first products and norms behind which all layers are
    known, and the labels."""
    wanted: set[str] = set()  # blobs that a layer reads which is not of the head
    head: list[Spec] = []
    for spec in reversed(specs):
        if kind_of(spec) is None or set(spec.tops) & wanted:
            wanted |= set(spec.bottoms)
        else:
            head.insert(0, spec)
    made: set[str] = set()
    found: list[str] = []
    for spec in head:
        if issubclass(kind_of(spec) or Layer, (Agents, Normalize, Parameter)) or made & set(spec.bottoms):
            found += [bottom for bottom in spec.bottoms if bottom not in made]
            made |= set(spec.tops)
    return list(dict.fromkeys(found))
