"""A channel axis on the CPU: however many columns, each has what a contiguous row of its numbers has."""

import math

import pytest
import torch
from lanes import DTYPES

import normface_ext as nf
from normface_ext import testing
from normface_ext.testing import assert_close_to_truth

#: Channels and columns: some fit a vector, leave channels over or parts of vectors, or are not taken at once.
SHAPES = [(512, 196), (133, 49), (70, 5), (600, 3), (40, 300), (9, 2), (19, 1030)]


def rows_that_hurt(samples, channels, columns, dtype):
    """[samples * columns, channels], NaN and infinity among them."""
    rows = testing.make_rows(samples * columns, channels, dtype)
    for place, value in ((0, math.nan), (1, math.inf), (-1, -math.inf)):
        rows[place, channels // 2] = value
    return rows


def as_columns(rows, samples):
    return rows.view(samples, -1, rows.shape[1]).transpose(1, 2).contiguous()


def as_rows(columns):
    return columns.detach().transpose(1, 2).reshape(-1, columns.shape[1])


def gradient(outputs, leaf, upstream):
    wanted = [i for i, u in enumerate(upstream) if u is not None]
    (found,) = torch.autograd.grad(
        [outputs[i] for i in wanted], leaf, [upstream[i] for i in wanted], retain_graph=True
    )
    return found


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "columns"), SHAPES)
def test_a_column_has_what_its_row_has(channels, columns, dtype, p):
    rows = rows_that_hurt(2, channels, columns, dtype).requires_grad_()
    x = as_columns(rows.detach(), 2).requires_grad_()
    y, norm = nf.functional.normalize(x, 1, p, return_norm=True)
    y_row, norm_row = nf.functional.normalize(rows, 1, p, return_norm=True)
    assert_close_to_truth(as_rows(y), y_row.detach().double(), None, "y")
    assert_close_to_truth(as_rows(norm), norm_row.detach().double(), None, "norm")
    g, g_norm = testing.random_like([y_row, norm_row])
    terms = (g.double().abs() / norm_row.detach().double() + g_norm.double().abs()).nan_to_num(0, 0, 0)
    for upstream in ((g, g_norm), (g, None), (None, g_norm)):
        expected = gradient((y_row, norm_row), rows, upstream)
        dx = gradient((y, norm), x, [None if u is None else as_columns(u, 2) for u in upstream])
        assert_close_to_truth(as_rows(dx), expected.double(), None, "dx", terms=terms)
