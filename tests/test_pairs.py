"""Heads whose features and weight are bfloat16: a CPU that multiplies pairs of them takes the stored rows
as they are. What has to come out is what the same numbers give in float32, rounded once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import normface_ext as nf
from normface_ext import functional as F
from normface_ext.engine.plan import asking

HERE = Path(__file__).parent


def cpu_has_pairs() -> bool:
    """As csrc/cpu/rows_portable.cpp asks."""
    try:
        words = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    asked = os.environ.get("NORMFACE_SIMD")
    return asked is None and "avx512_bf16" in words and "AuthenticAMD" in words


def sample(batch: int, dim: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(rows, dim, generator=generator).bfloat16() for rows in (batch, classes))
    labels = torch.randint(classes, (batch,), generator=generator)
    # As a head half trained has them: a row near its own class.
    x += 0.7 * weight[labels]
    return x, weight, labels


def step(function, x, weight):
    given = [t.detach().requires_grad_() for t in (x, weight)]
    value = function(*given)
    upstream = torch.linspace(-1, 1, value.numel()).view_as(value) if value.dim() else None
    value.backward(upstream if upstream is None else upstream.bfloat16().to(value.dtype))
    return value.detach(), *(t.grad for t in given)


def rounded_once(got, truth, slack: float = 2.0**-12):
    """Within one unit of bfloat16 of a number, or of a small part of its row."""
    truth = truth.double()
    size = truth.norm(dim=-1, keepdim=True) if truth.dim() else truth.abs()
    assert (truth.abs().amax() > 0) and torch.isfinite(got).all()
    error = (got.double() - truth).abs() - truth.abs() * 2.0**-8
    assert (error <= slack * size).all(), float((error / size).max())


def against_float(function, x, weight, slack: float = 2.0**-12):
    narrow = step(function, x, weight)
    wide = step(function, x.float(), weight.float())
    for got, truth in zip(narrow, wide, strict=True):
        rounded_once(got, truth, slack)
    return narrow


def norm_linear(raw: bool):
    return lambda x, weight: F.norm_linear(x, weight, 30.0, normalize_input=not raw)


SHAPES = [(8, 32, 96), (17, 65, 203), (64, 128, 1500), (300, 34, 130), (33, 512, 700)]


@pytest.mark.parametrize("scale", [4.0, 64.0, 90.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.covering(2)
def test_a_head_as_in_float32(shape, scale):
    x, weight, labels = sample(*shape)
    for store in (True, False):
        with asking("blas", store=store):
            loss, _, _ = against_float(lambda x, w: F.normface_loss(x, w, labels, scale), x, weight)
        truth = nf.reference.normface_loss(x.double(), weight.double(), labels, scale)
        assert abs(float(loss) - float(truth)) <= 2e-6 * abs(float(truth)) + 1e-8


@pytest.mark.parametrize("raw", [False, True], ids=["cosines", "raw features"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scaled_cosines_as_in_float32(shape, raw):
    x, weight, _ = sample(*shape)
    against_float(norm_linear(raw), x, weight)


OTHERS = {
    "label smoothing": lambda y: lambda x, w: F.normface_loss(x, w, y, 32.0, label_smoothing=0.1),
    "sub-centers": lambda y: lambda x, w: F.normface_loss(x, w, y // 3, 32.0, sub_centers=3),
    "no softmax": lambda y: lambda x, w: F.c_contrastive_loss(x, w, y),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_heads_as_in_float32(name):
    x, weight, labels = sample(24, 70, 300)
    against_float(OTHERS[name](labels), x, weight)


def test_the_hardest_of_many_alike():
    """Cells that are a large part of their row's sum: all that a row has lies in a few classes."""
    x, weight, labels = sample(16, 64, 256)
    weight[7::16] = x[0] + 0.01 * weight[7::16]
    against_float(lambda x, w: F.normface_loss(x, w, labels, 64.0), x, weight)


@pytest.mark.parametrize("power", [-60, -33, -31, -3, 20, 31, 33, 60])
def test_rows_of_any_norm(power):
    """A power of two is no rounding; rows too small or large for pairs are multiplied in float32 instead."""
    x, weight, labels = sample(16, 48, 150)
    for rows in (x, weight):
        rows[3:5] *= 2.0**power
    call = lambda x, w: F.normface_loss(x, w, labels, 16.0, eps=0.0)  # noqa: E731
    against_float(call, x, weight)
    against_float(norm_linear(raw=True), x, weight)


def test_rows_that_do_not_count_and_rows_of_zeros():
    x, weight, labels = sample(16, 48, 150)
    x[2] = torch.nan
    labels[2] = -100
    x[5] = 0
    weight[9] = 0
    narrow = step(lambda x, w: F.normface_loss(x, w, labels, 16.0), x, weight)
    wide = step(lambda x, w: F.normface_loss(x, w, labels, 16.0), x.float(), weight.float())
    for got, truth in zip(narrow, wide, strict=True):
        assert torch.isfinite(got).all()
        assert (got.double() - truth.double()).abs().max() <= 2.0**-8 * truth.abs().max()
    assert (narrow[1][2] == 0).all()


UNUSUAL = {
    "not a number": lambda row: torch.full_like(row, torch.nan),
    "one infinity": lambda row: torch.cat((row[:1] * torch.inf, row[1:])),
    "a norm beyond float32": lambda row: row.sign() * 3e38,
    "denormal numbers": lambda row: row.sign() * 1e-39,
}


@pytest.mark.parametrize("place", ["features", "weight"])
@pytest.mark.parametrize("kind", UNUSUAL)
def test_an_unusual_row_reaches_what_it_reaches_in_float32(kind, place):
    """Infinities and NaN stand where they do there, and all else is as near as ever."""
    x, weight, labels = sample(16, 48, 150)
    rows = x if place == "features" else weight
    rows[3] = UNUSUAL[kind](rows[3])
    labels[:2] = 3
    functions = (
        lambda x, w: F.normface_loss(x, w, labels, 16.0, eps=0.0, reduction="none"),
        lambda x, w: F.norm_linear(x, w, 30.0, eps=0.0),
        lambda x, w: F.norm_linear(x, w, 30.0, normalize_input=False, eps=0.0),
    )
    for function in functions:
        narrow = step(function, x, weight)
        wide = step(function, x.float(), weight.float())
        for got, rounded in zip(narrow, (t.bfloat16() for t in wide), strict=True):
            finite = rounded.isfinite() & got.isfinite()
            assert torch.equal(got.bfloat16().isfinite(), rounded.isfinite())
            difference = (got.float() - rounded.float()).abs()[finite]
            size = rounded.float().where(finite, 0.0).abs().amax(-1, keepdim=True).expand_as(rounded)[finite]
            assert (difference <= 2.0**-7 * rounded.float().abs()[finite] + 2.0**-10 * size).all()


PROGRAM = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch, normface_ext as nf
from test_pairs import sample, step
x, weight, labels = sample(24, 70, 300)
got = step(lambda x, w: nf.functional.normface_loss(x, w, labels, 32.0), x, weight)
print(json.dumps([nf.build_info()["simd"], *(t.float().tolist() for t in got)]))
"""


def run_with(simd: str | None):
    environment = {name: value for name, value in os.environ.items() if name != "NORMFACE_SIMD"}
    if simd is not None:
        environment["NORMFACE_SIMD"] = simd
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(HERE)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    name, *values = json.loads(ran.stdout)
    return name, [torch.tensor(value) for value in values]


@pytest.mark.slow
def test_without_the_instructions_the_library_multiplies():
    """Not bit by bit the same, which shows that it is another product, and as near to the truth."""
    name, plain = run_with("avx512")
    assert name != "avx512bf16"
    x, weight, labels = sample(24, 70, 300)
    wide = step(lambda x, w: F.normface_loss(x, w, labels, 32.0), x.float(), weight.float())
    own_name, own = run_with(None)
    assert (own_name == "avx512bf16") == cpu_has_pairs() or "NORMFACE_SIMD" in os.environ
    for values in (plain, own):
        for got, truth in zip(values, wide, strict=True):
            rounded_once(got, truth)
    if own_name == "avx512bf16":
        assert not all(torch.equal(a, b) for a, b in zip(plain, own, strict=True))


def test_results_do_not_depend_on_where_a_class_lies():
    """A row's cosine with a class is the same number in every column of every tile."""
    x, weight, _ = sample(24, 70, 300)
    weight[:] = weight[0]
    cosines = F.norm_linear(x.requires_grad_(False), weight, 1.0)
    if cpu_has_pairs():
        assert (cosines == cosines[:, :1]).all()
    rounded_once(cosines, F.norm_linear(x.float(), weight.float(), 1.0))


@pytest.mark.parametrize("scale", [4.0, 16.0, 31.0, 64.0])
def test_features_on_their_own_class_lose_nothing_but_the_rounding(scale):
    """The projection takes the target's part away, and of a small scale nothing large is left."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1500, 64, generator=generator).bfloat16()
    labels = torch.randint(len(weight), (16,), generator=generator)
    x = weight[labels].clone()

    def grad(dtype):
        given = x.to(dtype).requires_grad_()
        F.normface_loss(given, weight.to(dtype), labels, scale).backward()
        return given.grad

    truth = grad(torch.float64)
    error = float((grad(torch.bfloat16).double() - truth).norm() / truth.norm())
    rounding = float((truth.bfloat16().double() - truth).norm() / truth.norm())
    assert error < 1.02 * rounding
