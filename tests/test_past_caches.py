"""Results of normalize that have no room in the last cache: they are stored past it, line by line, and are
the same to the bit as those of a few rows, which are stored as ever."""

import os

import pytest
import torch

from normface_ext.functional import normalize

MIB = 1 << 20


def last_cache():
    """In bytes, as csrc/cpu/memory.cpp has it."""
    for name in ("SC_LEVEL3_CACHE_SIZE", "SC_LEVEL2_CACHE_SIZE"):
        if name in os.sysconf_names and (found := os.sysconf(name)) > 0:
            return found
    return 32 * MIB


def step(x, grad, p):
    x = x.detach().requires_grad_()
    y, norm = normalize(x, p=p, return_norm=True)
    torch.autograd.backward([y, norm], [grad, torch.ones_like(norm)])
    return y.detach(), norm.detach(), x.grad


@pytest.fixture
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


# Rows that begin and end within a line, of several parts of 4096 bytes, of less than a vector, and one
# element; tensors that begin anywhere.
@pytest.mark.parametrize(
    "dtype, dim, offset",
    [
        (torch.float32, 1025, 0),
        (torch.float32, 2051, 3),
        (torch.float32, 31, 1),
        (torch.float32, 1, 0),
        (torch.float64, 1031, 1),
        (torch.float64, 1 << 20, 1),
    ],
)
@pytest.mark.parametrize("threads, p", [(1, 2), (3, 1)], indirect=["threads"])
def test_rows_are_those_of_small_tensors(threads, p, dtype, dim, offset):
    rows = (last_cache() + MIB) // (dim * dtype.itemsize) + 1
    torch.manual_seed(dim)
    x, grad = (torch.randn(rows * dim + offset, dtype=dtype)[offset:].view(rows, dim) for _ in range(2))
    zero, large = 0, rows - 1  # rows whose norm eps rules, and whose squares overflow
    x[zero], x[large] = 0, x[large] * torch.finfo(dtype).max ** 0.75
    found = step(x, grad, p)
    few = max(1, MIB // (dim * dtype.itemsize))
    for first in {*range(0, rows, 7 * few), rows - few}:
        last = first + few
        for whole, part in zip(found, step(x[first:last], grad[first:last], p), strict=True):
            torch.testing.assert_close(whole[first:last], part, rtol=0, atol=0, equal_nan=True)
