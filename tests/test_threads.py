"""What a forward leaves to its backward serves whatever the number of threads has become."""

from __future__ import annotations

import pytest
import torch
from kernel_cases.engine_ops import arguments, backward, sweep
from kernel_cases.plain_terms import CASES
from lanes import LANES
from thread_count import threads

N, D, C = 24, 32, 700


@pytest.mark.parametrize("after", [1, 2, 3])
@pytest.mark.parametrize("before", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_stored_coefficients_of_another_number_of_threads(case, dtype, before, after):
    lane = LANES[0]
    x, weight = lane.randn(N, D, dtype=dtype), lane.randn(C, D, dtype=dtype, seed=1)
    threshold = torch.full((N,), 0.1 if case.softmax else 1.8, dtype=torch.float64)
    given = arguments(
        x, weight, lane.labels(N, C), **case.options(lane, threshold), store=True, product="blas",
        workspace=1 << 30,
    )  # fmt: skip
    slopes = lane.randn(4, N, dtype=torch.float64, seed=5)
    one = torch.ones((), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    with threads(before):
        swept, _, _ = sweep(given)
    with threads(after):
        dx, dw, _ = backward(given, swept, slopes, one)
    again = swept._replace(stored=swept.stored[:0])
    for got, expected in zip((dx, dw), backward(given, again, slopes, one), strict=False):
        size = expected.double().abs().max()
        assert size > 0
        assert (got.double() - expected.double()).abs().max() <= 64 * torch.finfo(dtype).eps * size
