"""Signals during a long CPU kernel: answered between its tiles, and harmless otherwise."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
import torch

import normface_ext as nf


class Answered(Exception):
    """What the handler of the signal raises."""


@contextmanager
def signal_after(seconds, handler):
    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def stop(*_):
    raise Answered


def head(batch, backward):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 64, generator=generator)
    weight = torch.randn(40_000, 64, generator=generator, requires_grad=True)
    labels = torch.randint(40_000, (batch,), generator=generator)
    loss = nf.functional.normface_loss(x, weight, labels, 16.0, workspace=64 << 20) if backward else None
    if loss is not None:
        return lambda: torch.autograd.grad(loss, weight, retain_graph=True)[0]
    return lambda: nf.functional.normface_loss(x, weight, labels, 16.0).detach()


def agents(loss, **options):
    def made(batch):
        x, weight = torch.randn(batch, 64), torch.randn(40_000, 64)
        return lambda: loss(x, weight, torch.zeros(batch, dtype=torch.int64), **options)

    return made


def matrix(op):
    def made(batch):
        x, weight = torch.randn(batch, 256), torch.randn(20_000, 256)
        if op == "inner_distance":
            return lambda: nf.functional.inner_distance(x, weight, p=1)
        return lambda: nf.functional.norm_linear(x, weight)

    return made


KERNELS = {
    "head forward": lambda batch: head(batch, False),
    "head backward": lambda batch: head(batch, True),
    "agents": agents(nf.functional.c_contrastive_loss),
    "norm_linear": matrix("norm_linear"),
    "inner_distance": matrix("inner_distance"),
}


def long_call(name):
    """A call that takes some time, what it gives, and the time while that is held: memory that is touched for
    the first time costs more than the kernel."""
    batch = 64
    while True:
        call = KERNELS[name](batch)
        expected = call()
        call()
        start = time.monotonic()
        call()
        taken = time.monotonic() - start
        if taken > 0.4:
            return call, expected, taken
        batch *= 2


@pytest.mark.parametrize(
    ("name", "threads"),
    [
        pytest.param(name, threads, marks=[pytest.mark.slow] * ((name, threads) != ("head forward", 2)))
        for name in KERNELS
        for threads in (1, 2)
    ],
)
def test_a_signal_ends_a_long_kernel(name, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        call, expected, full = long_call(name)
        start = time.monotonic()
        with signal_after(full / 4, stop), pytest.raises(Answered):
            call()
        assert time.monotonic() - start < 0.8 * full
        assert torch.equal(call(), expected), "what was interrupted leaves nothing behind"
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_a_handler_that_returns_changes_nothing(one_thread):
    seen = []
    call, expected, full = long_call("head forward")
    start = time.monotonic()
    with signal_after(full / 4, lambda *_: seen.append(time.monotonic() - start)):
        assert torch.equal(call(), expected)
        taken = time.monotonic() - start
    assert seen and seen[0] < 0.8 * taken, "the handler ran while the kernel did"


@pytest.mark.slow
def test_another_thread_may_hold_the_lock_or_call_the_kernel():
    """Signals are the main thread's; nobody waits for anybody."""
    call, expected, _ = long_call("head forward")
    found, done = [], threading.Event()

    def spin():
        while not done.is_set():
            sum(range(1000))

    spinner, caller = threading.Thread(target=spin), threading.Thread(target=lambda: found.append(call()))
    spinner.start(), caller.start()
    try:
        assert torch.equal(call(), expected)
        caller.join()
    finally:
        done.set()
        spinner.join()
    assert torch.equal(found[0], expected)


CTRL_C = """
import os, signal, threading, torch, normface_ext as nf
x, weight = torch.randn(2048, 64), torch.randn(40_000, 64)
labels = torch.zeros(2048, dtype=torch.int64)
signal.signal(signal.SIGINT, signal.default_int_handler)
threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    for _ in range(1000):
        nf.functional.normface_loss(x, weight, labels, 16.0)
except KeyboardInterrupt as error:
    assert error.__context__ is None
    print("stopped")
"""


@pytest.mark.slow
def test_ctrl_c_is_a_keyboard_interrupt():
    ran = subprocess.run([sys.executable, "-c", CTRL_C], capture_output=True, text=True, cwd="/")
    assert ran.returncode == 0 and ran.stdout == "stopped\n", ran.stdout + ran.stderr
