"""--fuzz and what belongs to it, for conftest.py to load."""

from __future__ import annotations

import pytest

CALLS, SLICE = 100_000, 1_200  # of `pytest --fuzz`, and of a run without it


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fuzz")
    group.addoption("--fuzz", action="store_true", help=f"tests/fuzz makes {CALLS} calls, not {SLICE}")
    group.addoption(
        "--fuzz-seed", type=int, default=0, metavar="N", help="other calls; the same for the same N"
    )
    group.addoption("--fuzz-calls", type=int, default=None, metavar="N", help="this many calls in all")


def calls_of(config: pytest.Config) -> int:
    """How many calls tests/fuzz makes in all."""
    given = config.getoption("--fuzz-calls")
    if given is not None:
        return int(given)
    return CALLS if config.getoption("--fuzz") else SLICE
