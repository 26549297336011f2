"""normalize and norm_linear."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from normface_ext import functional, reference

from .case import Case, case, number, randn

# Rows that a warp takes four, two and one at a time, by their bytes, rows of which it keeps a part, and those
# of no whole vectors; the channel axis of NCHW; an axis that needs a copy.
ROWS = [((33, 40), 1), ((5, 31), 1), ((7, 120), 1), ((3, 256), 1), ((3, 1104), 1), ((2, 2200), 1)]
ROWS += [((2, 7, 3, 35), 1), ((6, 9), 0)]


def cases(dtype: torch.dtype) -> Iterator[Case]:
    for p in (1, 2):
        for shape, dim in ROWS:
            options = {"dim": dim, "p": p, "return_norm": True}
            yield case(
                f"normalize {shape} dim={dim} p={p}",
                partial(functional.normalize, **options),
                partial(reference.normalize, **options),
                [randn(*shape, dtype=dtype)],
            )
        yield case(
            f"normalize channels_last p={p}",
            lambda x, p=p: functional.normalize(x.to(memory_format=torch.channels_last), 1, p),
            lambda x, p=p: reference.normalize(x, 1, p),
            [randn(2, 37, 3, 5, dtype=dtype)],
        )
    # The last is so large that the scale's gradient is summed by several blocks.
    for batch, dim, classes in ((17, 40, 101), (5, 33, 7), (430, 40, 3)):
        for normalize_input in (True, False):
            options = {"normalize_input": normalize_input}
            yield case(
                f"norm_linear {(batch, dim, classes)} normalize_input={normalize_input}",
                partial(functional.norm_linear, **options),
                partial(reference.norm_linear, **options),
                [randn(batch, dim, dtype=dtype), randn(classes, dim, dtype=dtype), number(7.0, dtype)],
                by_library=(0,),  # the scaled cosines are a product as it is
            )
