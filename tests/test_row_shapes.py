"""Rows of every length that kernels tell apart (dispatch_rows in csrc/cuda/device/row_access.cuh)."""

from __future__ import annotations

import math

import pytest
import torch
from test_head_kernels import choose, cuda_lane  # noqa: F401  (a fixture)
from test_normalize import check as check_normalize
from test_normalize import exactly_normalized
from test_normface_loss import check as check_head
from test_normface_loss import sample

import normface_ext as nf
from normface_ext.testing import assert_close_to_truth

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Vectors that a lane has of a row, of which it holds up to eight; 0: one of half the size.
every_held = pytest.mark.parametrize("held", [0, 1, 2, 4, 8, 9])


def length_of(held, item):
    """Of a row in whole vectors of 16 bytes, the last of which some lane lacks."""
    vector = 16 // item
    return (16 if held == 0 else 32 * held) * vector - vector


@pytest.mark.covering(1)
@every_held
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [1, 2])
def test_normalize(cuda_lane, held, dtype, p):  # noqa: F811
    """Seven rows: where a warp takes two or four, the last warp has fewer."""
    x = cuda_lane.rows(7, length_of(held, dtype.itemsize), dtype, kinds=("plain", "ones", "spike"), grad=True)
    check_normalize(x, 1, p, return_norm=True)


@pytest.mark.covering(1)
@every_held
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [1, 2])
def test_rows_that_are_summed_again(cuda_lane, held, dtype, p):  # noqa: F811
    """Huge, tiny and poisoned rows, which leave the rows beside them what they are alone, bit by bit.

    The last row is one that a warp has alone: the sanitizers see whether something behind it is read.
    """
    length = length_of(held, dtype.itemsize)
    x = cuda_lane.rows(5, length, dtype, kinds=("plain",), grad=True)
    g = cuda_lane.randn(5, length, dtype=dtype, seed=1)

    def both(x):
        leaf = x.detach().requires_grad_()
        y = nf.functional.normalize(leaf, 1, p, 0.0)
        return y.detach(), torch.autograd.grad(y, leaf, g)[0]

    alone = both(x)
    others = [0, 2, 3, 4]
    huge = cuda_lane.rows(1, length, dtype, kinds=("huge",))
    tiny = cuda_lane.rows(1, length, dtype, kinds=("tiny",))
    for row in (huge, tiny, torch.full_like(huge, math.nan), torch.full_like(huge, -math.inf)):
        worse = x.detach().clone()
        worse[1] = row[0]
        y, dx = both(worse)
        assert torch.equal(y[others], alone[0][others]) and torch.equal(dx[others], alone[1][others])
        if row is huge or row is tiny:
            assert_close_to_truth(y[1:2], exactly_normalized(row, p, 0.0), None, "y")
        else:
            assert y[1].isnan().all() and dx[1].isnan().all()


CLASSES = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]


@pytest.mark.covering(1)
@every_held
@pytest.mark.parametrize("dtypes", CLASSES, ids=str)
def test_class_gradients(cuda_lane, monkeypatch, held, dtypes):  # noqa: F811
    """A product by cuBLAS, with targets in some of the classes that a warp takes together, several in one."""
    choose(monkeypatch, "library", 7)
    x, weight, labels = sample(cuda_lane, 6, length_of(held, max(4, dtypes[0].itemsize)), 11, *dtypes)
    labels[2:4] = labels[0]
    check_head(cuda_lane, x, weight, labels, 10.0)


@pytest.mark.parametrize("dtypes", CLASSES[1:4], ids=str)
def test_classes_that_are_summed_again(cuda_lane, monkeypatch, dtypes):  # noqa: F811
    """A class times a power of two has the gradient divided by it, and the other classes theirs."""
    choose(monkeypatch, "library", 20)
    allowed = 1e-5 if dtypes[0] == torch.float32 else 2.0**-6
    for held in (0, 1, 4):
        x, weight, labels = sample(cuda_lane, 5, length_of(held, 4), 11, *dtypes, grad=False)

        def gradient(weight, x=x, labels=labels):
            leaf = weight.detach().requires_grad_()
            loss = nf.functional.normface_loss(x, leaf, labels, 10.0, eps=0.0)
            return torch.autograd.grad(loss, leaf)[0].double()

        plain = gradient(weight)
        for power in (2.0**80, 2.0**-80):
            scaled = weight.clone()
            scaled[3] *= power
            got = gradient(scaled)
            got[3] *= power
            errors = (got - plain).norm(dim=1) / plain.norm(dim=1)
            assert (errors <= allowed).all(), errors


@pytest.mark.slow
def test_blocks_of_many_classes(cuda_lane, monkeypatch):  # noqa: F811
    """Above a thousand rows a block has more classes, so that it looks less often through the labels."""
    choose(monkeypatch, "library", 1700)
    x, weight, labels = sample(cuda_lane, 1200, 4, 1700)
    labels[::7] = 1699
    check_head(cuda_lane, x, weight, labels, 10.0)
