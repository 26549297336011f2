"""Outputs larger than the last cache are written past it, by whole lines: no bit may depend on that."""

import pytest
import torch

import normface_ext  # noqa: F401  (registers the ops)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("length", [7, 1003, 20_011])  # many rows to a line, parts of lines, parts of a row
def test_large_output_has_the_bits_of_a_small_one(length, p):
    ops = torch.ops.normface_ext
    rows = (48 << 20) // (4 * length) + 1
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(rows, length, generator=generator) for _ in range(2))
    y, norm = ops.normalize(x, 1, p, 1e-12)
    dx = ops.normalize_backward(g, None, x, norm, 1, p, 1e-12)
    few = max(1, rows // 16)
    for first in range(0, rows, few):
        part = slice(first, first + few)
        small, small_norm = ops.normalize(x[part].contiguous(), 1, p, 1e-12)
        assert torch.equal(y[part], small)
        assert torch.equal(norm[part], small_norm)
        small = ops.normalize_backward(
            g[part].contiguous(), None, x[part].contiguous(), small_norm, 1, p, 1e-12
        )
        assert torch.equal(dx[part], small)
