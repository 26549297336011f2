"""MagFace against the formula of its released code; its term of the norms; no part of its gradient lost."""

import math

import dense_head
import pytest
import torch
from dense_head import OPTIONS, assert_equal_to_1e10, counted, gradients, on, problem

import normface_ext as nf

L_M, U_M, L_A, U_A, LAMBDA = 0.45, 0.8, 10.0, 110.0, 35.0


def released(x, weight, labels, scale, options, lambda_g=LAMBDA):
    """MagLinear with easy_margin, the cross-entropy, and lambda_g times calc_loss_G."""
    sample_weight = options.get("sample_weight")
    kept = counted(labels, sample_weight)
    norm = x[kept].norm(dim=1).clamp(L_A, U_A)
    margin = (U_M - L_M) / (U_A - L_A) * (norm - L_A) + L_M

    def psi(cos_theta):
        sin_theta = torch.sqrt(1.0 - cos_theta.square())
        cos_theta_m = cos_theta * margin.cos() - sin_theta * margin.sin()
        return torch.where(cos_theta > 0, cos_theta_m, cos_theta)

    loss = dense_head.loss(x, weight, labels, scale, psi, **options)
    g = lambda_g * (norm / U_A**2 + 1 / norm)
    weights = torch.ones_like(g) if sample_weight is None else sample_weight[kept]
    reduction = options.get("reduction", "mean")
    if reduction == "none":
        return loss + torch.zeros_like(loss).index_put((kept.nonzero()[:, 0],), g * weights)
    return loss + (g * weights).sum() / (1 if reduction == "sum" else weights.sum())


@pytest.mark.covering(2)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("lengths", [(5.0, 130.0), (20.0, 90.0)], ids=["past both ends", "within"])
def test_it_is_the_released_code(lane, options, lengths):
    x, weight, labels = problem(lengths=lengths)
    expected = gradients(lambda x, w: released(x, w, labels, 16.0, options), x, weight)
    found = gradients(
        lambda x, w: nf.functional.normface_loss(
            x, w, lane.tensor(labels), 16.0, margin=nf.MagFace(), **on(lane, options)
        ),
        lane.tensor(x),
        lane.tensor(weight),
    )
    assert_equal_to_1e10(found, expected)


def test_the_norm_has_the_gradient_of_the_paper():
    """dL/dn = s q sin(theta + m) m'(a) [c > 0] + lambda_g (1 / u_a^2 - 1 / a^2) in [l_a, u_a], else 0."""
    weight = torch.eye(3, dtype=torch.float64)
    direction = torch.tensor([0.8, 0.6, 0.0], dtype=torch.float64)
    slope = (U_M - L_M) / (U_A - L_A)
    for norm, target in ((5.0, 0), (50.0, 0), (50.0, 2), (120.0, 0)):
        x = (norm * direction)[None].requires_grad_()
        loss = nf.functional.normface_loss(x, weight, torch.tensor([target]), 8.0, margin=nf.MagFace())
        (dx,) = torch.autograd.grad(loss, x)
        c, m = float(direction[target]), L_M + slope * (norm - L_A)
        psi = math.cos(math.acos(c) + m) if c > 0 else c
        others = sum(math.exp(8 * float(direction[j])) for j in range(3) if j != target)
        q = others / (others + math.exp(8 * psi))
        through_margin = 8 * q * math.sin(math.acos(c) + m) * slope if c > 0 else 0.0
        expected = through_margin + LAMBDA * (1 / U_A**2 - 1 / norm**2) if L_A <= norm <= U_A else 0.0
        assert float(dx[0] @ direction) == pytest.approx(expected, abs=1e-12)


def test_gradcheck(lane):
    x, weight, labels = problem(rows=4, dim=3, classes=4, lengths=(20.0, 90.0), seed=3)

    def loss(x, w, s):
        return nf.functional.normface_loss(
            x, w, lane.tensor(labels), s, margin=nf.MagFace(), reduction="none"
        )

    inputs = [lane.tensor(x, grad=True), lane.tensor(weight, grad=True)]
    scale = lane.tensor(9.0, torch.float64, grad=True)
    assert torch.autograd.gradcheck(loss, (*inputs, scale), fast_mode=lane.slow)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_features(lane, dtype):
    x, weight, labels = problem(dtype=dtype, lengths=(20.0, 90.0))
    expected = gradients(lambda x, w: released(x, w, labels, 16.0, {}), x.double(), weight.double())
    found = gradients(
        lambda x, w: nf.functional.normface_loss(x, w, lane.tensor(labels), 16.0, margin=nf.MagFace()),
        lane.tensor(x),
        lane.tensor(weight),
    )
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    for f, e in zip(found, expected, strict=True):
        assert (f.cpu().double() - e).norm() <= tolerance * e.norm()


@pytest.mark.parametrize(
    "given, sentence",
    [
        ({"l_margin": 4.0}, r"MagFace: expected `l_margin` in \[0, 3.14159\), got 4.0"),
        ({"u_margin": 0.3}, r"MagFace: expected `u_margin` in \[0.45, 3.14159\), got 0.3"),
        ({"l_a": 0}, r"MagFace: expected `l_a` to be finite and > 0, got 0"),
        ({"u_a": 10}, r"MagFace: expected `u_a` > l_a \(10\), got 10"),
        ({"lambda_g": -1}, r"MagFace: expected `lambda_g` to be finite and >= 0, got -1"),
    ],
)
def test_bad_arguments(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        nf.MagFace(**given)
