"""Options and fixtures: --all, the lanes of lanes.py, and torch.compile without graph breaks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import selection
import torch
import workers
from lanes import LANES, MISSING, Lane
from selection import pytest_addoption, pytest_collection_modifyitems  # noqa: F401  (hooks)

pytest_plugins = ["fuzz_options"]


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    return workers.scheduler(config, log)


def pytest_configure(config: pytest.Config) -> None:
    selection.register(config)
    workers.prepare(config)


def pytest_report_header(config: pytest.Config) -> list[str]:
    cases = "all" if config.option.every_case else "the quick ones (pytest --all: all)"
    lanes = ", ".join(lane.name for lane in LANES)
    return [f"normface_ext lanes: {lanes}; cases: {cases}", *MISSING]


@pytest.fixture(params=LANES, ids=lambda lane: lane.name)
def lane(request: pytest.FixtureRequest) -> Iterator[Lane]:
    with request.param.active() as active:
        yield active


@pytest.fixture
def compile_fully():
    """torch.compile without graph breaks, tracing forward and backward; state of Dynamo cleared."""
    torch._dynamo.reset()
    yield lambda function: torch.compile(function, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
