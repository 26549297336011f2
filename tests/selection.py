"""Which cases plain `pytest` runs: all but those marked `slow` (for `--all`) or `fuzz` (for `--fuzz`).

    @pytest.mark.fuzz           for --fuzz: minutes of drawn input
    @pytest.mark.slow           for --all (a test, or one value: pytest.param(..., marks=pytest.mark.slow))
    @pytest.mark.covering(2)    of the product of the parameters, fixtures such as `lane` among them, a part
                                is quick in which any two values of two parameters meet; the rest is slow.
                                1: each value once. 0: the first case alone.

A test asked for by its node id (`pytest tests/test_x.py::test_y`) runs wholly, slow or not. The hooks below
do all this; conftest.py has them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from itertools import combinations

import pytest


def covering(cases: Sequence[Sequence[Hashable]], strength: int) -> set[int]:
    """Positions of few cases in which every `strength` values meet that do so in any; greedy, repeatable.

    A case is one value for each parameter.
    """
    columns = [column for column in zip(*cases, strict=True) if len(set(column)) > 1]
    strength = min(strength, len(columns))
    if strength == 0:
        return {0} if cases else set()
    held = [
        {(group, *(columns[k][case] for k in group)) for group in combinations(range(len(columns)), strength)}
        for case in range(len(cases))
    ]
    missing, chosen = set().union(*held), set()
    while missing:
        best = max(range(len(cases)), key=lambda case: (len(held[case] & missing), -case))
        chosen.add(best)
        missing -= held[best]
    return chosen


def values_of(item: pytest.Function) -> list[tuple[int, ...]]:
    """What the case is made of: a row for each parametrize, then a value for each fixture with parameters."""
    values = dict(item.callspec.params)
    rows = []
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0]
        rows.append(tuple(id(values.pop(name.strip())) for name in names))
    return rows + [(id(value),) for _, value in sorted(values.items())]


def mark_what_is_not_covered(items: Iterable[pytest.Item]) -> None:
    """Marks the cases slow that @pytest.mark.covering leaves out."""
    families: dict[str, list[pytest.Function]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("covering"):
            families.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for family in families.values():
        (strength,) = family[0].get_closest_marker("covering").args
        chosen = covering([values_of(item) for item in family], strength)
        for position, item in enumerate(family):
            if position not in chosen:
                item.add_marker("slow")


def asked_by_name(config: pytest.Config, item: pytest.Item) -> bool:
    """Whether the command line has this case's node id, or that of its test or class."""
    name = item.nodeid.partition("::")[2]
    for argument in config.args:
        path, found, asked = argument.partition("::")
        same_file = found and (config.invocation_params.dir / path).resolve() == item.path.resolve()
        if same_file and (name == asked or name.startswith((f"{asked}[", f"{asked}::"))):
            return True
    return False


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all", action="store_true", dest="every_case", help="run every case, those marked slow too"
    )


def register(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "fuzz: runs under --fuzz")
    config.addinivalue_line("markers", "covering(strength): a part runs every day, see tests/selection.py")
    config.addinivalue_line(
        "markers", "xdist_group(name): for one worker of `pytest -n`"
    )  # xdist may be absent


@pytest.hookimpl(tryfirst=True)  # before -m and -k, which may then ask for `slow`
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mark_what_is_not_covered(items)
    wanted = {"slow": config.option.every_case, "fuzz": config.getoption("fuzz", False)}
    needed = [mark for mark, given in wanted.items() if not given]
    left_out = [
        item
        for item in items
        if any(map(item.get_closest_marker, needed)) and not asked_by_name(config, item)
    ]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        gone = set(left_out)
        items[:] = [item for item in items if item not in gone]
