"""The rooms of the package: who may import whom."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest
import touched

FAMILIES = (
    "cosine", "softmax", "agents", "distances", "distributed", "caffe", "evaluation", "engine", "formats",
    "recipes", "sigmoid",
)  # fmt: skip
PACKAGE = touched.PACKAGE


@cache
def modules() -> list[str]:
    return sorted(m for m in touched.modules() if m == PACKAGE or m.startswith(f"{PACKAGE}."))


@cache
def imports(module: str) -> dict[str, set[str]]:
    """The package's modules that are imported when this one is, with the names taken from them."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(touched.tree(module)):
        if not isinstance(node, ast.ImportFrom) or id(node) in for_types_only(module):
            continue
        source = touched.absolute(module, node)
        for alias in node.names:
            inner = f"{source}.{alias.name}"
            if inner in touched.modules():
                found.setdefault(inner, set())
            elif source in touched.modules():
                found.setdefault(source, set()).add(alias.name)
    return {name: names for name, names in found.items() if name in modules()}


@cache
def for_types_only(module: str) -> set[int]:
    """What stands below `if TYPE_CHECKING:`, or in a function."""
    inside = [
        node
        for node in ast.walk(touched.tree(module))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
    ]
    return {id(inner) for node in inside for inner in ast.walk(node)}


def family(module: str) -> str:
    part = module.split(".")[1] if "." in module else ""
    return part if part in FAMILIES else ""


def floors(module: str, above: tuple[str, ...] = (), known: dict[str, int] | None = None) -> int:
    """The longest way of imports from this module to the call of an op (engine.calls); 0: none."""
    known = {f"{PACKAGE}.engine.calls": 1} if known is None else known
    assert module not in above, f"a circle: {' -> '.join([*above, module])}"
    if module not in known:
        ways = [floors(name, (*above, module), known) for name in imports(module)]
        known[module] = 1 + max(ways) if any(ways) else 0
    return known[module]


def test_every_family_is_a_room():
    assert {name for name in map(family, modules()) if name} == set(FAMILIES)


@pytest.mark.parametrize("module", modules())
def test_no_circles_and_no_private_names(module):
    floors(module)  # raises at a circle
    for source, names in imports(module).items():
        if family(source) != family(module):
            private = [name for name in [*names, *source.split(".")[1:]] if re.match("_[a-z]", name)]
            assert not [p for p in private if p != "_checkout"], f"{module} takes {source}'s {private}"


def test_at_most_six_floors_from_functional_to_the_call():
    assert 2 < floors(f"{PACKAGE}.functional") <= 6


@pytest.mark.parametrize("name", ["engine", "cosine", "distances", "softmax", "agents", "sigmoid"])
def test_families_stand_on_each_other_in_one_direction(name):
    """engine below cosine, that below distances, those below the three kinds of loss; the rest above them."""
    below = {
        "engine": set(),
        "cosine": {"engine"},
        "distances": {"engine", "cosine"},
        "softmax": {"engine", "cosine"},
        "agents": {"engine", "cosine", "distances"},
        "sigmoid": {"engine", "cosine", "distances"},
    }[name]
    for module in modules():
        if family(module) == name:
            used = {family(source) for source in imports(module)} - {name, ""}
            assert used <= below, f"{module} imports {used - below}"
