"""Class-parallel heads whose weight is moved in backward, or whose gradients add up in place."""

from __future__ import annotations

import fused_jobs as jobs
import pytest
import torch
from ranks import ranks

CLASSES = [11, 2]  # of three ranks the last has none of two classes


@pytest.mark.covering(1)
@pytest.mark.parametrize("name", jobs.HEADS)
@pytest.mark.parametrize("optimizer", jobs.OPTIMIZERS)
@pytest.mark.parametrize("classes", CLASSES)
def test_steps_are_those_of_torch(name, optimizer, classes):
    given = jobs.trained, name, optimizer, classes
    for found, expected in zip(ranks(3).run(*given, True), ranks(3).run(*given, False), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.covering(1)
@pytest.mark.parametrize("name", jobs.HEADS)
@pytest.mark.parametrize("classes", CLASSES)
def test_sums_are_those_of_autograd(name, classes):
    given = jobs.accumulated, name, classes
    for found, expected in zip(ranks(3).run(*given, True), ranks(3).run(*given, False), strict=True):
        assert torch.equal(found, expected)


def test_what_is_refused():
    for found in ranks(2).run(jobs.refused):
        sampled, agents, wrapped, active = found
        assert "sample_rate < 1" in sampled
        assert "got ShardedCTripletLoss" in agents
        assert "DistributedDataParallel averages" in wrapped and "DistributedDataParallel averages" in active
