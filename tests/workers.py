"""Several pytest workers on one machine (`pytest -n 2`, pytest-xdist): what they share, and what they don't.

The emulation is built once, before they start. Each has its part of the cores for torch. The tests of some
files have many processes of their own: one worker runs them all, one after another.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from emulation import build
from lanes import LANES

#: Beginnings of the names of those files.
WITH_PROCESSES = (
    "test_distributed_",
    "test_train_distributed",
    "test_check_finite",
    "test_checkpoint_files",
    "test_second_derivatives",
    "test_adaface",
    "test_agent_weights",
    "test_head_shards",
    "test_margin_contract",
    "test_hard_negatives",
    "test_margin_state",
    "test_ranking",
    "test_recipe_margins",
    "test_sphereface2",
    "test_statistics",
    "test_sub_center_shards",
    "test_sphereface",
    "test_compile",
    "test_every_head",
    "test_fused_shards",
)


def threads_of(workers: int, cores: int) -> int:
    return max(1, cores // workers)


def prepare(config: pytest.Config) -> None:
    """Called in the controller and in each of its workers; does nothing where there are none."""
    given = getattr(config, "workerinput", None)
    if given is not None:
        threads = threads_of(given["workercount"], len(os.sched_getaffinity(0)))
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # for the processes that tests start
    elif config.getoption("numprocesses", None) and not config.option.collectonly:
        for lane in LANES:
            if lane.name == "emulated":
                build.build("emulation")
                build.build("faults")


def scheduler(config: pytest.Config, log: Any) -> Any:
    """Hands out test by test, as `--dist load` does, but for the files with processes."""
    # By the file and not by xdist_group: xdist 3.8 writes that into node ids, which pytest 9.2 made constant.
    from xdist.scheduler import LoadScopeScheduling

    class ByTest(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            name = nodeid.partition("::")[0].rpartition("/")[2]
            return "processes" if name.startswith(WITH_PROCESSES) else nodeid

    return ByTest(config, log) if config.getvalue("dist") == "load" else None
