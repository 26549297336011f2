"""The specification itself, against rows worked by hand and against torch's own functions."""

import math

import pytest
import torch
import torch.nn.functional as F

from normface_ext import ArcFace, CombinedMargin, CosFace, reference
from normface_ext.softmax.margins import NO_MARGIN


def tensor(*values, grad=False):
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def close(actual, expected, tolerance=1e-12):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance, f"{actual} is not {expected}"


# normalize: y, norm, dx for g and for a gradient of the norm; eps sits inside.
@pytest.mark.parametrize(
    ("x", "p", "eps", "norm", "y", "g", "g_norm", "dx"),
    [
        ([3, 4], 2, 0, 5, [0.6, 0.8], [1, 0], 0, [0.128, -0.096]),
        ([3, 4], 2, 0, 5, [0.6, 0.8], [0, 0], 10, [6, 8]),
        ([3], 2, 16, 5, [0.6], [1], 0, [0.128]),  # (1 - 0.6 * 0.6) / 5
        ([0, 0], 2, 4, 2, [0, 0], [6, -2], 3, [3, -1]),
        ([1, -3], 1, 0, 4, [0.25, -0.75], [1, 0], 0, [0.1875, 0.0625]),
        ([1, -3], 1, 0, 4, [0.25, -0.75], [0, 0], 2, [2, -2]),
        ([1, 0], 1, 1, 2, [0.5, 0], [0, 8], 0, [0, 4]),  # sign(0) = 0
        ([0, 0], 1, 0.5, 0.5, [0, 0], [1, 2], 9, [2, 4]),
    ],
)
def test_normalize_by_hand(x, p, eps, norm, y, g, g_norm, dx):
    rows = tensor(x, grad=True)
    got_y, got_norm = reference.normalize(rows, 1, p, eps, return_norm=True)
    close(got_y, [y])
    close(got_norm, [[norm]])
    torch.autograd.backward([got_y, got_norm], [tensor(g), tensor([g_norm])])
    close(rows.grad, [dx])
    written = reference.normalize_backward(tensor(g), tensor([g_norm]), rows.detach(), 1, p, eps)
    close(written, [dx])


@pytest.mark.parametrize("p", [1, 2])
def test_normalize_is_torch_normalize_away_from_zero(p):
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    for dim in (0, 1, 2, -1):
        close(reference.normalize(x, dim, p, 0.0), F.normalize(x, p, dim))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_zero_row_stays_zero_in_every_dtype(dtype):
    """torch's own F.normalize gives NaN for it in float16, where its eps is 0."""
    y, norm = reference.normalize(torch.zeros(1, 4, dtype=dtype), return_norm=True)
    assert y.dtype == dtype and norm.dtype == torch.float32
    assert y.abs().max() == 0 and float(norm) == pytest.approx(1e-6)


def test_cosines_by_hand():
    x, weight = tensor([1, 0], [0, -2]), tensor([1, 0], [0, 2], [-3, 0], [1, 1])
    half = math.sqrt(0.5)
    close(reference.cosine(x, weight, 0.0), [[1, 0, -1, half], [0, -1, 0, -half]])
    close(reference.cosine(x, weight, 0.0, False), [[1, 0, -1, half], [0, -2, 0, -2 * half]])
    close(reference.norm_linear(x, weight, 3.0, eps=0.0), [[3, 0, -3, 3 * half], [0, -3, 0, -3 * half]])


@pytest.mark.parametrize("normalize_input", [True, False])
def test_written_backward_of_norm_linear_is_its_derivative(normalize_input):
    generator = torch.Generator().manual_seed(0)
    x, weight, g = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((4, 3), (5, 3), (4, 5))
    )
    scale = torch.tensor(7.0, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (x, weight, scale)]
    out = reference.norm_linear(*inputs, normalize_input=normalize_input, eps=0.1)
    expected = torch.autograd.grad(out, inputs, g)
    written = reference.norm_linear_backward(g, *inputs, 0.1, normalize_input)
    for got, truth in zip(written, expected, strict=True):
        close(got, truth)


def degrees(angle):
    return math.cos(math.radians(angle))


@pytest.mark.parametrize(
    ("margin", "cos", "psi"),
    [
        (NO_MARGIN, 0.3, 0.3),
        (CosFace(0.35), 0.5, 0.15),
        (CosFace(0.35), -1.0, -1.35),
        (ArcFace(math.radians(30)), degrees(60), 0.0),
        (ArcFace(math.radians(30)), degrees(120), degrees(150)),
        # past 180 degrees: cos - m sin m
        (ArcFace(math.radians(30)), degrees(160), degrees(160) - math.radians(30) * 0.5),
        (CombinedMargin(2.0, 0.0, 0.0), degrees(30), 0.5),
        (CombinedMargin(2.0, 0.0, 0.1), degrees(90), -1.1),
        (CombinedMargin(2.0, 0.0, 0.0), degrees(120), degrees(120) - 1),  # k = 1 + cos 90
        (CombinedMargin(2.0, math.radians(30), 0.25), degrees(45), degrees(120) - 0.25),
    ],
)
def test_margins_by_hand(margin, cos, psi):
    close(reference.margin(tensor(cos), margin), [psi])


@pytest.mark.parametrize("margin", reference.MARGINS.values(), ids=reference.MARGINS)
def test_a_margin_never_helps_and_never_turns_back(margin):
    cos = torch.linspace(-1, 1, 4001, dtype=torch.float64).requires_grad_()
    psi = reference.margin(cos, margin or NO_MARGIN)
    (slope,) = torch.autograd.grad(psi.sum(), cos)
    assert torch.isfinite(psi).all() and torch.isfinite(slope).all()
    assert (psi <= cos + 1e-4).all()  # sin(theta) is held at 1e-4
    assert (slope[1:-1] > 0).all()  # a better cosine is always worth something


def test_loss_by_hand():
    x, weight = tensor([2, 0], [0, 5]), tensor([1, 0], [-1, 0])
    first = math.log(1 + math.exp(-2 * 3))  # cosines 1 and -1, s = 3
    second = math.log(2)  # both cosines 0
    labels = torch.tensor([0, 1])

    def loss(**options):
        return reference.normface_loss(x, weight, labels, 3.0, eps=0.0, **options)

    close(loss(reduction="none"), [first, second])
    close(loss(reduction="sum"), first + second)
    close(loss(), (first + second) / 2)
    margined = [math.log(1 + math.exp(3 * (-1 - 0.6))), math.log(1 + math.exp(3 * 0.4))]
    close(loss(reduction="none", margin=CosFace(0.4)), margined)


def test_gradient_of_the_scale_by_hand():
    x, weight = tensor([1, 0]), tensor([1, 0], [-1, 0])
    scale = tensor(0.5, grad=True)[0]
    loss = reference.normface_loss(x, weight, torch.tensor([0]), scale, eps=0.0)
    (ds,) = torch.autograd.grad(loss, scale)
    close(ds, -2 / (1 + math.e))  # d/ds log(1 + exp(-2 s)) at s = 1/2


def test_ignored_rows_leave_the_loss_and_the_mean():
    x, weight = torch.randn(4, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    labels = torch.tensor([1, -100, 4, -100])
    kept = [0, 2]
    mean = reference.normface_loss(x, weight, labels, 8.0)
    close(mean, reference.normface_loss(x[kept], weight, labels[kept], 8.0))
    losses = reference.normface_loss(x, weight, labels, 8.0, reduction="none")
    assert losses[[1, 3]].tolist() == [0, 0] and (losses[kept] > 0).all()
    labels = torch.where(labels == -100, 3, labels)
    as_class_3 = reference.normface_loss(x, weight, labels, 8.0, ignore_index=3, reduction="none")
    close(as_class_3, losses)
    nothing = reference.normface_loss(x, weight, torch.full((4,), 3), 8.0, ignore_index=3)
    assert float(nothing) == 0


def test_without_margin_it_is_cross_entropy():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(9, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(9, (6,), generator=generator)
    logits = 16 * F.linear(F.normalize(x), F.normalize(weight))
    for reduction in ("none", "mean", "sum"):
        ours = reference.normface_loss(x, weight, labels, 16.0, reduction=reduction)
        close(ours, F.cross_entropy(logits, labels, reduction=reduction), 1e-10)


@pytest.mark.parametrize("margin", reference.MARGINS.values(), ids=reference.MARGINS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_gradients_are_finite_at_cosine_one(margin, sign):
    x = tensor([1, 2, 2], grad=True)
    weight = torch.stack([sign * x.detach()[0], tensor(1, 0, 0)]).requires_grad_()
    reference.normface_loss(x, weight, torch.tensor([0]), 30.0, margin=margin).backward()
    assert torch.isfinite(x.grad).all() and torch.isfinite(weight.grad).all()
