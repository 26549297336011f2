"""Scores by wgmma where a block has many tiles: two consumers take them in turn, from one ring of stages."""

from __future__ import annotations

import pytest
import torch
from kernel_cases.engine_ops import arguments, sweep
from kernel_cases.softmax import is_here
from test_head_kernels import cuda_lane  # noqa: F401  (a fixture)

from normface_ext.engine.row_state import ROW_FIELDS


def swept(x, weight, labels, product, **options):
    """(fields of the rows, E with the columns up to a multiple of eight)"""
    given = {"store": True, "need_x": False, "need_largest": True, "product": product, "workspace": 1 << 40}
    rows, *_ = sweep(arguments(x, weight, labels, **given, **options))
    columns = -(-len(weight) // 8) * 8
    return rows.rows, rows.stored.view(len(x), columns)


@pytest.mark.parametrize(
    ("batch", "dim", "classes"),
    [
        (9, 24, 1500),
        pytest.param(20, 512, 900, marks=pytest.mark.slow),
        pytest.param(131, 136, 1037, marks=pytest.mark.slow),
    ],
)
def test_many_tiles_of_a_block(cuda_lane, monkeypatch, batch, dim, classes):  # noqa: F811
    """The ring begins anew at every place of a tile, the last tile has few classes; any order of threads."""
    if not is_here("sm90_scores"):
        pytest.skip("a GPU of another architecture")
    x, weight = (cuda_lane.randn(n, dim, dtype=torch.float16, seed=n) for n in (batch, classes))
    labels = cuda_lane.labels(batch, classes)
    expected, e = swept(x, weight, labels, "sm80_scores")
    cosines = torch.nn.functional.normalize(x.double()) @ torch.nn.functional.normalize(weight.double()).T
    runs = []
    for order in ("forward", "reverse", "5"):
        monkeypatch.setenv("NORMFACE_EMULATION_ORDER", order)
        runs.append(swept(x, weight, labels, "sm90_scores"))
    for rows, stored in runs[1:]:
        assert torch.equal(rows, runs[0][0]) and torch.equal(stored, runs[0][1])
    rows, stored = runs[0]
    for name, got, wanted in zip(ROW_FIELDS, rows, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    assert (stored[:, classes:] == 0).all()  # as read with the last classes
    assert (stored[torch.arange(batch), labels] == 0).all()
    others = torch.ones(batch, classes, dtype=torch.bool).scatter_(1, labels.cpu()[:, None], False)
    assert (stored[:, :classes].cpu()[others] > 0).all()
    # One rounding to bfloat16 apart, where the products were added in another order.
    torch.testing.assert_close(stored, e, rtol=2**-7, atol=0)
    exact = (8.0 * cosines - rows[list(ROW_FIELDS).index("shift")][:, None]).exp()
    torch.testing.assert_close(
        stored[:, :classes].cpu()[others].double(), exact.cpu()[others], rtol=2**-7, atol=0
    )
