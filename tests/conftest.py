"""Fixtures: the lanes of lanes.py, and torch.compile without graph breaks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from lanes import LANES, MISSING, Lane

pytest_plugins = ["fuzz_options"]


def pytest_report_header() -> list[str]:
    return [f"normface_ext lanes: {', '.join(lane.name for lane in LANES)}", *MISSING]


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
