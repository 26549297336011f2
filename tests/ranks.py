"""Real processes in a gloo group on the loopback interface, kept for the whole test session.

``ranks(3).run(job, ...)`` calls ``job(rank, world, ...)``, a function of distributed_jobs.py, in three
processes at once and returns what they returned, by rank. A job that fails ends its processes; the next
run starts new ones.
"""

from __future__ import annotations

import atexit
import multiprocessing as mp
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

TIMEOUT = 120  # seconds a job may take, on a machine that is busy


def _serve(rank: int, world: int, store: str, jobs: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=TIMEOUT),
    )
    while (job := jobs.recv()) is not None:
        function, arguments = job
        try:
            jobs.send((True, function(rank, world, *arguments)))
        except BaseException:
            jobs.send((False, traceback.format_exc()))
            return
    dist.destroy_process_group()


class Ranks:
    def __init__(self, world: int) -> None:
        self.world = world
        self._processes: list[Any] = []
        self._pipes: list[Any] = []

    def _start(self) -> None:
        context = mp.get_context("spawn")
        store = Path(tempfile.mkdtemp()) / "store"
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world, str(store), theirs), daemon=True)
            process.start()
            theirs.close()  # so that a dead process reads as the end of the pipe
            self._processes.append(process)
            self._pipes.append(ours)

    def run(self, job: Callable[..., Any], *arguments: Any, dying: int | None = None) -> list[Any]:
        """What the job returned on every rank; None on the one that is to die in it, if any."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((job, arguments))
        results, failures = [], []
        for rank, pipe in enumerate(self._pipes):
            # Where one rank failed the others wait for it in a collective: do not wait with them.
            try:
                answered = pipe.poll(1 if failures else TIMEOUT)
                ok, result = pipe.recv() if answered else (False, "no answer in time")
            except EOFError:
                ok, result = rank == dying, None if rank == dying else "the process died"
            (results if ok else failures).append(result if ok else f"rank {rank}: {result}")
        if failures or dying is not None:
            self.stop()
        if failures:
            raise AssertionError("\n".join(failures))
        return results

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []


@cache
def ranks(world: int) -> Ranks:
    made = Ranks(world)
    atexit.register(made.stop)
    return made
