"""The layers: state, initialisation, bounds of a learned scale, and what the world does to modules."""

import copy
import dataclasses
import io
import math
import pickle

import pytest
import torch
from torch import nn

import normface_ext as nf
from normface_ext import reference, theory
from normface_ext.softmax.margins import Margin
from normface_ext.testing import assert_close_to_truth

HEADS = {
    "NormLinear": lambda **options: nf.NormLinear(12, 20, **options),
    "NormFaceLoss": lambda **options: nf.NormFaceLoss(12, 20, **options),
}
every_head = pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)


def run(head, x, labels):
    """A scalar of either head."""
    return head(x, labels) if isinstance(head, nf.NormFaceLoss) else head(x).sin().mean()


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return torch.randn(6, 12), torch.randint(20, (6,))


# What they compute ----------------------------------------------------------------------------------


def test_normalize_layer_is_normalize():
    x = torch.randn(3, 5, 4)
    for dim, p, eps in ((1, 2, 1e-12), (-1, 1, 0.5)):
        y, norm = nf.NormalizeLayer(dim, p, eps, return_norm=True)(x)
        truth, truth_norm = reference.normalize(x.double(), dim, p, eps, return_norm=True)
        assert_close_to_truth(y, truth, None, "y", dim=dim)
        assert_close_to_truth(norm, truth_norm, None, "norm", dim=dim)
        assert torch.equal(nf.NormalizeLayer(dim, p, eps)(x), y)
    assert not list(nf.NormalizeLayer().parameters())


@pytest.mark.parametrize("normalize_input", [True, False])
def test_norm_linear_is_norm_linear(batch, normalize_input):
    head = nf.NormLinear(12, 20, scale=7.0, normalize_input=normalize_input, eps=0.25)
    truth = reference.norm_linear(
        batch[0].double(), head.weight.double(), 7.0, normalize_input=normalize_input, eps=0.25
    )
    assert_close_to_truth(head(batch[0]), truth, None, "out", floor=16)


def test_norm_face_loss_is_normface_loss(batch):
    x, labels = batch
    labels[2] = -1
    options = {"margin": nf.ArcFace(0.2), "reduction": "none", "ignore_index": -1, "eps": 0.25}
    head = nf.NormFaceLoss(12, 20, scale=9.0, **options)
    truth = reference.normface_loss(x.double(), head.weight.double(), labels, 9.0, **options)
    assert_close_to_truth(head(x, labels), truth, None, "loss", floor=16)


def test_workspace_is_passed_on(batch):
    with pytest.raises(ValueError, match="expected `workspace` of at least"):
        nf.NormFaceLoss(12, 20, workspace=1)(*batch)


@pytest.mark.parametrize("classes", [10, 10_575])
def test_auto_scale_and_its_bound(classes):
    head = nf.NormFaceLoss(4, classes)
    assert head.scale == theory.auto_scale(classes)
    assert head.loss_lower_bound() == pytest.approx(theory.AUTO_SCALE_BOUND, rel=1e-6, abs=0)
    learned = nf.NormFaceLoss(4, classes, scale=5.0, learn_scale=True)
    assert learned.loss_lower_bound() == theory.loss_lower_bound(classes, 5.0)


def test_a_learned_scale_without_margin_improves_when_rows_are_right(batch):
    """A few steps of gradient descent on everything: the loss falls, and s grows."""
    x, labels = batch
    x.requires_grad_()
    head = nf.NormFaceLoss(12, 20, scale=4.0, learn_scale=True)
    optimizer = torch.optim.SGD([x, *head.parameters()], lr=1.0)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = head(x, labels)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0] and float(head.scale.detach()) > 4.0
    assert losses[-1] > 0


# State ----------------------------------------------------------------------------------------------


@every_head
@pytest.mark.parametrize("learn_scale", [True, False])
def test_state_dict_round_trip(make, learn_scale, batch):
    first, second = (make(scale=5.0, learn_scale=learn_scale) for _ in range(2))
    if learn_scale:
        first.scale.data.fill_(6.5)
    assert not torch.equal(first.weight, second.weight)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert sorted(state) == ["_extra_state", *(["scale"] if learn_scale else []), "weight"]
    second.load_state_dict(state)
    assert torch.equal(run(first, *batch), run(second, *batch))


@every_head
def test_parameters_are_parameters(make):
    head = make(scale=5.0, learn_scale=True)
    assert {name: tuple(p.shape) for name, p in head.named_parameters()} == {
        "weight": (20, 12),
        "scale": (1,),
    }
    assert isinstance(make(scale=5.0).scale, float)


@every_head
def test_rows_start_on_the_unit_sphere(make):
    torch.manual_seed(0)
    head = make(scale=5.0)
    assert (head.weight.double().norm(dim=1) - 1).abs().max() <= 2e-7
    assert head.weight.mean().abs() < 0.1 and not torch.equal(head.weight[0], head.weight[1])


def test_gaussian_unitball_is_uniform_and_in_place():
    torch.manual_seed(0)
    weight = torch.zeros(4000, 3)
    assert nf.gaussian_unitball_(weight) is weight
    assert (weight.double().norm(dim=1) - 1).abs().max() <= 2e-7
    # Archimedes: each coordinate of a uniform point on the sphere is uniform in [-1, 1].
    for quantile in (0.1, 0.5, 0.9):
        assert (weight.quantile(quantile, dim=0) - (2 * quantile - 1)).abs().max() < 0.06
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        rows = nf.gaussian_unitball_(torch.empty(5, 40, dtype=dtype), eps=0.0).double()
        assert (rows.norm(dim=1) - 1).abs().max() <= 4 * torch.finfo(dtype).eps


@every_head
def test_reset_parameters_draws_anew(make):
    head = make(scale=5.0, learn_scale=True)
    before = head.weight.detach().clone()
    parameters = list(head.parameters())
    head.scale.data.fill_(9.0)
    head.reset_parameters()
    assert float(head.scale.detach()) == 5.0 and not torch.equal(head.weight, before)
    assert (head.weight.double().norm(dim=1) - 1).abs().max() <= 2e-7
    assert all(now is then for now, then in zip(head.parameters(), parameters, strict=True))


@every_head
@pytest.mark.parametrize("learn_scale", [True, False])
def test_deepcopy_is_independent(make, learn_scale, batch):
    head = make(scale=5.0, learn_scale=learn_scale)
    twin = copy.deepcopy(head)
    assert torch.equal(run(head, *batch), run(twin, *batch))
    twin.weight.data.neg_()
    assert not torch.equal(run(head, *batch), run(twin, *batch))
    run(twin, *batch).backward()
    assert twin.weight.grad is not None and head.weight.grad is None


@every_head
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_to_another_dtype(make, dtype, batch):
    head = make(scale=5.0, learn_scale=True).to(dtype)
    x = batch[0].to(dtype).requires_grad_()
    run(head, x, batch[1]).backward()
    for tensor in (x, head.weight, head.scale):
        assert tensor.dtype == dtype and tensor.grad.dtype == dtype and torch.isfinite(tensor.grad).all()


@every_head
def test_made_in_a_dtype_and_on_a_device(make):
    head = make(scale=5.0, learn_scale=True, dtype=torch.float64, device="cpu")
    assert head.weight.dtype == torch.float64 and head.weight.device.type == "cpu"
    assert make(scale=5.0, device="meta").weight.is_meta


# A learned scale ------------------------------------------------------------------------------------


@every_head
def test_a_learned_scale_is_used_within_bounds_and_left_alone(make, batch):
    head = make(scale=5.0, learn_scale=True, min_scale=2.0, max_scale=8.0)
    for outside, bound in ((100.0, 8.0), (-3.0, 2.0), (4.5, 4.5)):
        head.scale.data.fill_(outside)
        loss = run(head, *batch)
        assert float(head.scale.detach()) == outside and head.scale_value() == bound
        fixed = make(scale=bound, min_scale=2.0, max_scale=8.0)
        fixed.weight = head.weight
        assert torch.equal(loss, run(fixed, *batch))
        loss.backward()
        assert head.scale.grad != 0  # not masked: a scale at its bound can come back
        head.zero_grad()


@every_head
def test_two_forwards_before_one_backward(make, batch):
    """Gradient accumulation: the bound of the second does not break the graph of the first."""
    x, labels = batch
    head = make(scale=5.0, learn_scale=True)
    (run(head, x[:3], labels[:3]) + run(head, x[3:], labels[3:])).backward()
    together = [p.grad.clone() for p in head.parameters()]
    head.zero_grad()
    run(head, x[:3], labels[:3]).backward()
    run(head, x[3:], labels[3:]).backward()
    for p, expected in zip(head.parameters(), together, strict=True):
        assert torch.allclose(p.grad, expected, rtol=1e-5, atol=1e-8)


def test_accumulated_micro_batches_equal_one_batch(batch):
    x, labels = batch
    head = nf.NormFaceLoss(12, 20, scale=10.0, learn_scale=True, reduction="sum")
    head(x, labels).backward()
    whole = [p.grad.clone() for p in head.parameters()]
    head.zero_grad()
    for i in range(0, 6, 2):
        head(x[i : i + 2], labels[i : i + 2]).backward()
    for p, expected in zip(head.parameters(), whole, strict=True):
        assert torch.allclose(p.grad, expected, rtol=1e-5, atol=1e-6)


# The world around -----------------------------------------------------------------------------------


@every_head
def test_autocast_leaves_parameters_alone(make, batch):
    """Others recast W.data to float16 for good (field notes, line 7)."""
    x, labels = batch
    body, head = nn.Linear(12, 12), make(scale=5.0, learn_scale=True)
    before = [p.detach().clone() for p in head.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        features = body(x)
        assert features.dtype == torch.bfloat16
        loss = run(head, features, labels)
    loss.backward()
    for p, then in zip(head.parameters(), before, strict=True):
        assert p.dtype == torch.float32 and torch.equal(p, then) and p.grad.dtype == torch.float32
    assert body.weight.grad.dtype == torch.float32 and body.weight.grad.abs().max() > 0
    if isinstance(head, nf.NormFaceLoss):
        assert loss.dtype == torch.float32
        truth = reference.normface_loss(features.double(), before[0].double(), labels, 5.0)
        assert_close_to_truth(loss, truth, None, "loss", floor=16)


@every_head
def test_compiled_module_equals_eager(make, batch, compile_fully):
    x, labels = batch
    head = make(scale=5.0, learn_scale=True)
    eager = run(head, x, labels)
    eager.backward()
    expected = [p.grad.clone() for p in head.parameters()]
    head.zero_grad()
    compiled = compile_fully(lambda x, labels: run(head, x, labels))(x, labels)
    compiled.backward()
    assert torch.allclose(compiled, eager, rtol=1e-6)
    for p, gradient in zip(head.parameters(), expected, strict=True):
        assert torch.allclose(p.grad, gradient, rtol=1e-6, atol=1e-9)


@every_head
def test_inference_mode(make, batch):
    head = make(scale=5.0, learn_scale=True)
    expected = run(head, *batch).detach()
    with torch.inference_mode():
        assert torch.equal(run(head, *batch), expected)


def test_margins_come_in_every_spelling(batch):
    losses = [
        float(nf.NormFaceLoss.forward(head, *batch).detach())
        for head in _same_weight(
            nf.NormFaceLoss(12, 20, scale=9.0),
            nf.NormFaceLoss(12, 20, scale=9.0, margin=nf.CosFace(0.0)),
            nf.NormFaceLoss(12, 20, scale=9.0, margin=nf.CosFace(0.3)),
            nf.NormFaceLoss(12, 20, scale=9.0, margin=nf.CombinedMargin(1.0, 0.0, 0.3)),
            nf.NormFaceLoss(12, 20, scale=9.0, margin=nf.ArcFace(0.3)),
            nf.NormFaceLoss(12, 20, scale=9.0, margin=nf.CombinedMargin(m2=0.3)),
        )
    ]
    assert losses[0] == losses[1] and losses[2] == losses[3] and losses[4] == losses[5]
    assert losses[0] < losses[4] < losses[2]


def _same_weight(*heads):
    for head in heads:
        head.weight.data.copy_(heads[0].weight)
    return heads


def test_repr():
    assert repr(nf.NormalizeLayer(-1, 1, 0.5, True)) == (
        "NormalizeLayer(dim=-1, p=1, eps=0.5, return_norm=True)"
    )
    assert repr(nf.NormLinear(3, 4, scale=2.5)) == "NormLinear(3, 4, scale=2.5)"
    assert repr(nf.NormLinear(3, 4, eps=0.5)) == "NormLinear(3, 4, scale=1, eps=0.5)"
    assert repr(nf.NormFaceLoss(3, 4, scale=2.5, learn_scale=True, margin=nf.CosFace(0.35))) == (
        "NormFaceLoss(3, 4, scale=2.5, learn_scale=True, margin=CosFace(m=0.35))"
    )
    assert repr(nf.NormFaceLoss(3, 4, scale=2.5, margin=nf.ArcFace(0.5))).endswith("margin=ArcFace(m=0.5))")


# Errors ---------------------------------------------------------------------------------------------


BAD = [
    ({"scale": 0.0}, ValueError, "expected `scale` to be finite and > 0, got 0.0"),
    ({"scale": -1.0}, ValueError, "expected `scale` to be finite and > 0, got -1.0"),
    ({"scale": math.nan}, ValueError, "expected `scale` to be finite and > 0, got nan"),
    ({"scale": True}, TypeError, "expected `scale` to be a number, got bool"),
    (
        {"scale": torch.ones(2)},
        TypeError,
        r"expected `scale` to be a number or a tensor of one, got cpu tensor of shape \[2\]",
    ),
    ({"min_scale": 0.0}, ValueError, "expected `min_scale` to be finite and > 0, got 0.0"),
    ({"max_scale": math.inf}, ValueError, "expected `max_scale` to be finite and > 0, got inf"),
    ({"scale": 5.0, "max_scale": 4.0}, ValueError, r"expected `scale` in \[0.01, 4\], got 5"),
    ({"scale": 5.0, "min_scale": 6.0}, ValueError, r"expected `scale` in \[6, inf\], got 5"),
]


@every_head
@pytest.mark.parametrize(("options", "error", "sentence"), BAD, ids=str)
def test_bad_options_are_named(make, options, error, sentence):
    name = next(name for name, maker in HEADS.items() if maker is make)
    with pytest.raises(error, match=rf"^{name}: {sentence}$"):
        make(**{"scale": 5.0, **options})


def test_bad_sizes_and_names():
    with pytest.raises(ValueError, match=r"^NormLinear: expected `out_features` >= 1, got 0$"):
        nf.NormLinear(3, 0)
    with pytest.raises(ValueError, match=r"^NormFaceLoss: expected `in_features` >= 1, got -2$"):
        nf.NormFaceLoss(-2, 3)
    with pytest.raises(
        ValueError, match=r"^NormFaceLoss: expected `scale` to be a number or 'auto', got 'Auto'$"
    ):
        nf.NormFaceLoss(3, 3, scale="Auto")


@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (lambda: nf.CosFace(-0.1), ValueError, r"CosFace: expected `m` in \[0, inf\), got -0.1"),
        (lambda: nf.ArcFace(math.pi), ValueError, r"ArcFace: expected `m` in \[0, 3.14159\), got 3.14159"),
        (
            lambda: nf.CombinedMargin(0.0),
            ValueError,
            r"CombinedMargin: expected `m1` to be finite and > 0, got 0.0",
        ),
        (lambda: nf.CombinedMargin(m3=math.nan), ValueError, r"expected `m3` in \[0, inf\), got nan"),
        (lambda: nf.ArcFace("0.5"), TypeError, r"ArcFace: expected `m` to be a number, got str"),
        (lambda: nf.CosFace(True), TypeError, r"CosFace: expected `m` to be a number, got bool"),
    ],
)
def test_bad_margins_are_named(make, error, sentence):
    with pytest.raises(error, match=sentence):
        make()


def test_the_bare_base_is_no_margin():
    with pytest.raises(TypeError, match=r"^NormFaceLoss: expected `margin` to be CosFace, .*, got Margin$"):
        nf.NormFaceLoss(3, 4, margin=Margin())


def test_equal_numbers_are_equal_margins():
    assert nf.CosFace(0.3) == nf.CombinedMargin(m3=0.3) and nf.ArcFace(0.3) == nf.CombinedMargin(m2=0.3)
    assert nf.CosFace(0.3) != nf.ArcFace(0.3) and nf.CosFace(0.3) != 0.3
    assert dataclasses.replace(nf.ArcFace(0.1), m=0.4) == nf.ArcFace(0.4)
    assert pickle.loads(pickle.dumps(nf.CosFace(0.3))) == nf.CosFace(0.3)


def test_margins_are_values():
    assert nf.CosFace(0.35) == nf.CosFace(0.35) and nf.CosFace(0.35) != nf.CosFace(0.3)
    assert hash(nf.ArcFace(0.5)) == hash(nf.ArcFace(0.5))
    with pytest.raises(AttributeError):
        nf.ArcFace(0.5).m2 = 0.1
    assert nf.CombinedMargin(1, 0.25, 0).numbers() == [1.0, 0.25, 0.0]
