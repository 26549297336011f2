"""Outputs for which the caches have no room are written past them, by whole lines: no bit may depend on that.

Only an output whose pages are there is, so this file runs itself in a process whose allocator keeps them.
"""

import os
import subprocess
import sys

import pytest
import torch

import normface_ext  # noqa: F401  (registers the ops)

#: Many rows to a line, parts of lines, whole lines, parts of a row; channels by lines and by parts of them.
SHAPES = ["7", "1003", "512", "20011", "512x196", "70x5", "40x1030"]
ELEMENTS = 8 << 20


def check(sizes, p):
    ops = torch.ops.normface_ext
    row = tuple(map(int, sizes.split("x")))
    count = ELEMENTS // torch.Size(row).numel() + 1
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(count, *row, generator=generator) for _ in range(2))

    def both(x, g):
        y, norm = ops.normalize(x, 1, p, 1e-12)
        return y, norm, ops.normalize_backward(g, None, x, norm, 1, p, 1e-12)

    both(x, g)  # leaves its pages
    large = both(x, g)
    few = max(1, count // 16)
    for first in range(0, count, few):
        part = slice(first, first + few)
        for whole, small in zip(large, both(x[part], g[part]), strict=True):
            assert torch.equal(whole[part], small), f"{sizes}, p = {p}, rows {part}"


@pytest.mark.parametrize("p", [1, 2])
def test_large_output_has_the_bits_of_a_small_one(p):
    kept = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
    kept |= {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}  # quick beside others, too
    command = [sys.executable, __file__, str(p), *SHAPES]
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **kept})
    assert ran.returncode == 0, ran.stderr


if __name__ == "__main__":
    for shape in sys.argv[2:]:
        check(shape, int(sys.argv[1]))
