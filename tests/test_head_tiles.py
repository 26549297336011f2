"""Tiles of classes on the CPU: how wide they are, and the second sweep over those that were kept."""

import math

import pytest
import torch
from thread_count import threads

import normface_ext as nf

LINE = 16  # floats of a cache line


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("classes", [10_000, 10_572, 85_742, 1_000_000])
@pytest.mark.parametrize(("batch", "dim"), [(256, 512), (64, 128), (8, 16), (2048, 512), (4096, 4096)])
def test_tiles_are_an_odd_number_of_lines_and_shared_evenly(batch, dim, classes, count):
    with threads(count):
        tile = nf.plan(batch, dim, classes).class_chunk
    assert tile % LINE == 0 and tile // LINE % 2 == 1
    of_the_busiest = math.ceil(math.ceil(classes / tile) / count) * tile
    assert of_the_busiest <= 1.1 * classes / count


@pytest.mark.parametrize("classes", [1, 2, 17, 256, 257, 300])
@pytest.mark.parametrize("count", [1, 2, 8])
def test_few_classes_are_a_tile_or_more_and_none_is_empty(classes, count):
    with threads(count):
        plan = nf.plan(16, 8, classes)
    assert 1 <= plan.class_chunk <= classes
    assert (plan.chunks - 1) * plan.class_chunk < classes <= plan.chunks * plan.class_chunk


#: (powers of two of rows of W, of the upstream gradient): the gradients of the tiniest rows are numbers, and
#: those of plain ones normal.
POWERS = {
    torch.float32: ((-140, -100, 64, 120), -25),
    torch.bfloat16: ((-120, -100, 64, 120), -20),
    torch.float16: ((-12, 8), 0),
    torch.float64: ((-1060, -700, 512, 1000), -60),
}


def times_power(values, power):
    """In two steps: 2^-1060 is a number, and so is 2^1000, but not every product on the way."""
    half = (power / 2).floor()
    return values.double() * (2.0**half)[:, None] * (2.0 ** (power - half))[:, None]


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "made again"])
@pytest.mark.parametrize("centers", [1, 3])
@pytest.mark.parametrize("dtype", POWERS, ids=str)
def test_rows_of_any_magnitude_side_by_side_in_a_tile(dtype, centers, kept):
    """With eps = 0 the power of two that a row of W is multiplied by divides its gradient, and no other's.
    Rows whose 1 / ||.|| has no value in the accumulator lie among plain ones."""
    batch, dim, rows, (powers, upstream) = 6, 24, 60, POWERS[dtype]
    generator = torch.Generator().manual_seed(0)
    signs = 2 * torch.randint(2, (rows, dim), generator=generator) - 1
    weight = (signs * torch.randint(1, 8, (rows, dim), generator=generator)).double()
    x = torch.randn(batch, dim, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(rows // centers, (batch,), generator=generator)
    power = torch.zeros(rows, dtype=torch.float64)
    for k, exponent in enumerate(powers):
        power[k + 1 :: 7] = exponent
    shape = (batch, dim, rows // centers, dtype)
    workspace = None
    if not kept:
        with pytest.raises(ValueError, match="at least") as raised:
            nf.plan(*shape, workspace=0, sub_centers=centers)
        workspace = int(str(raised.value).split("at least ")[1].split()[0])
    assert (nf.plan(*shape, workspace=workspace, sub_centers=centers).algorithm == "stored") == kept

    def gradient(w):
        leaf = w.to(dtype, copy=True).requires_grad_()
        loss = nf.functional.normface_loss(
            x, leaf, labels, 8.0, eps=0.0, workspace=workspace, sub_centers=centers
        )
        loss.backward(torch.tensor(2.0**upstream, dtype=loss.dtype))
        return leaf.grad.double()

    plain, scaled = gradient(weight), gradient(times_power(weight, power))
    assert scaled.isfinite().all()
    # Rows whose gradient has not left the normal numbers, those of a power below 0 among them.
    whole = (scaled.abs().amax(1) > 2.0**4 * torch.finfo(dtype).tiny) & (plain.abs().amax(1) > 0)
    assert set(power[whole].tolist()) >= {0.0, *(p for p in powers if p < 0)}
    back = times_power(scaled, power)[whole]
    error = (back - plain[whole]).norm(dim=1) / plain[whole].norm(dim=1)
    assert error.max() <= (1e-2 if dtype.itemsize == 2 else 1e-5)
