"""A process for each competitor, so that none can hang, crash or slow down the others.

The run asks one of them at a time, by the name of a method of `measure.Measured`, and waits no longer than
it may: past that the process is killed, with whatever it started, and its row says so. It may sit in a
kernel, a compiler or a lock then; no signal handler would be heard there. A CUDA error, too, stays within
the process that made it. And when the run itself is gone, none is left behind.

The processes come from a fork server that has imported torch once and run nothing, so one costs
milliseconds, and each is as fresh as the one before: resident memory can be read there.
"""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import signal
import time
import warnings
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext

from cases import Case
from measure import Measured

PRELOAD = ["torch", "normface_ext"]


class Dropped(Exception):
    """Why a competitor is out; `outcome` is the word for it in its row."""

    outcome = "failed"


class OverBudget(Dropped):
    outcome = "over budget"


class Worker:
    """`budget`: seconds that all calls together may take, but for those that have a limit of their own."""

    def __init__(
        self,
        name: str,
        case: Case,
        mode: str,
        device: str,
        threads: int,
        budget: float,
        measured: type = Measured,
    ) -> None:
        self.budget = self.left = budget
        context = _fork_server()
        self.pipe, theirs = context.Pipe()
        lifeline, self.lifeline = context.Pipe(duplex=False)
        about = (name, case, mode, device, threads)
        self.process = context.Process(target=_serve, args=(theirs, lifeline, measured, about))
        self.process.start()
        theirs.close()
        lifeline.close()

    def ask(self, method: str, *arguments: object, limit: float | None = None) -> object:
        """What the method gives there; `Dropped` if it fails, `OverBudget` if it takes too long."""
        start, allowed = time.monotonic(), self.left if limit is None else limit
        try:
            self.pipe.send((method, arguments))
            if not self.pipe.poll(max(0.0, allowed)):
                self.close()
                raise OverBudget(f"stopped: {method} took longer than the {allowed:.0f} s left")
            failed, value = self.pipe.recv()
        except (EOFError, OSError):  # it died: for want of memory, or in a crash
            self.close()
            raise Dropped(f"its process died in {method} (exit code {self.process.exitcode})") from None
        finally:
            if limit is None:
                self.left -= time.monotonic() - start
        if failed:
            self.close()
            raise Dropped(value)
        return value

    def close(self) -> None:
        """Ends the process and all it started, a compiler for example, whatever they are doing."""
        if self.process.is_alive():
            with contextlib.suppress(ProcessLookupError, PermissionError):  # not yet a group of its own
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()
        self.process.join()
        self.pipe.close()
        self.lifeline.close()


def _fork_server() -> BaseContext:
    """Started in "/": it looks for modules where it starts, and the sources lie where users start it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    # Killed processes leave semaphores of torch.compile's; the tracker removes them, and would say so.
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")
    here = os.getcwd()
    os.chdir("/")
    try:
        forkserver.ensure_running()
    finally:
        os.chdir(here)
    return context


def _serve(
    pipe: Connection, lifeline: Connection, kind: type, about: tuple[str, Case, str, str, int]
) -> None:
    os.setsid()  # a group to be killed together; Ctrl-C is for the run, which then ends this one
    # When the run is gone, its end of the lifeline closes, and the kernel sends this group SIGIO, which ends
    # it. A thread that waits for that could not: a call may hang with the interpreter's lock.
    fcntl.fcntl(lifeline.fileno(), fcntl.F_SETOWN, -os.getpgrp())
    flags = fcntl.fcntl(lifeline.fileno(), fcntl.F_GETFL)
    fcntl.fcntl(lifeline.fileno(), fcntl.F_SETFL, flags | os.O_ASYNC)
    if lifeline.poll():  # it closed before
        return
    warnings.filterwarnings("ignore", module="torch")  # torch.compile's, about itself
    measured = kind(*about)
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            return
        try:
            reply = (False, getattr(measured, method)(*arguments))
        except Exception as error:
            reply = (True, _sentence(error))
        pipe.send(reply)


def _sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
