"""Several pytest workers on one machine (`pytest -n 2`, pytest-xdist): what they share, and what they don't.

The emulation is built once, before they start. Each has its part of the cores for torch. Tests with many
processes of their own run one after another, in one worker:

    pytestmark = pytest.mark.xdist_group("processes")
"""

from __future__ import annotations

import os

import pytest
import torch
from emulation import build
from lanes import LANES


def threads_of(workers: int, cores: int) -> int:
    return max(1, cores // workers)


def keep_groups(config: pytest.Config) -> None:
    """Makes `-n 2` mean `-n 2 --dist loadgroup`, as long as no other --dist is asked for."""
    if config.getoption("numprocesses", None) and config.option.dist == "no":
        config.option.dist = "loadgroup"


def tell(node) -> None:
    """Workers read the command line by themselves, where it says nothing of groups."""
    node.workerinput["dist"] = node.config.option.dist


def prepare(config: pytest.Config) -> None:
    """Called in the controller and in each of its workers; does nothing where there are none."""
    given = getattr(config, "workerinput", None)
    if given is not None:
        config.option.loadgroup = given["dist"] == "loadgroup"
        threads = threads_of(given["workercount"], len(os.sched_getaffinity(0)))
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # for the processes that tests start
    elif config.getoption("numprocesses", None) and not config.option.collectonly:
        for lane in LANES:
            if lane.name == "emulated":
                build.build("emulation")
                build.build("faults")
