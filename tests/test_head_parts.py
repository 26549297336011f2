"""The head opened at the target: target cosine and the others' logsumexp, and losses made of them."""

import math

import pytest
import torch
from lanes import DTYPES

import normface_ext as nf
from normface_ext import reference
from normface_ext.engine.dtypes import accumulator
from normface_ext.softmax import functions
from normface_ext.softmax.options import HeadOptions

F = nf.functional
WIDE = [torch.float64, torch.float32]
#: Of the largest entry of a result: a few roundings of the operands, times the scale.
TOLERANCES = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 3e-2, torch.bfloat16: 2e-1}


def problem(lane, dtype, batch=7, dim=16, classes=11, ignored=True):
    x = lane.randn(batch, dim, dtype=dtype, grad=True)
    weight = lane.randn(classes, dim, dtype=dtype, seed=1, grad=True)
    labels = lane.labels(batch, classes)
    if ignored:
        labels[batch // 2] = -100
    return x, weight, labels


def doubled(*tensors):
    return [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in tensors]


def close(got, truth, dtype, name=""):
    truth = truth.detach().double()
    bound = TOLERANCES[dtype] * max(1.0, float(truth.abs().max()) if truth.numel() else 1.0)
    assert (got.double() - truth).abs().max() <= bound if truth.numel() else got.shape == truth.shape, name


def mixed(parts, rows):
    """A scalar of both parts, with a different weight for each number."""
    ramp = torch.arange(1, rows + 1, dtype=torch.float64, device=parts.counts.device) / rows
    return (parts.target_cosine * ramp).sum() + (parts.log_sum_others * (1.5 - ramp)).sum()


SCALES = {
    "number": 12.0,
    "negative": -7.0,
    "tensor": torch.tensor(12.0, dtype=torch.float64),
    "beyond the window": torch.tensor(900.0, dtype=torch.float64),
    "of each row": torch.tensor([12.0, 0.5, 900.0, 30.0, -3.0, 64.0, 0.0], dtype=torch.float64),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SCALES)
def test_parts_and_gradients_are_those_of_the_reference(lane, dtype, name):
    x, weight, labels = problem(lane, dtype)
    scale = SCALES[name]
    if isinstance(scale, torch.Tensor):
        scale = lane.tensor(scale, accumulator(dtype), grad=True)
    leaves = [x, weight, *([scale] if isinstance(scale, torch.Tensor) else [])]
    true_x, true_weight, *rest = truth = doubled(*leaves)
    parts = F.head_parts(x, weight, labels, scale)
    true = reference.head_parts(true_x, true_weight, labels, rest[0] if rest else scale)
    assert parts.counts.tolist() == true.counts.tolist() == [label != -100 for label in labels.tolist()]
    magnitude = dtype if dtype.itemsize > 2 or name not in ("beyond the window", "of each row") else None
    for part, expected in zip(parts[:2], true[:2], strict=True):
        assert part.dtype == torch.float64 and part.shape == labels.shape
        if magnitude is not None:
            close(part, expected, dtype)
    if magnitude is None:  # a scale of 900 multiplies 16-bit roundings until nothing is left to compare
        return
    mixed(parts, len(labels)).backward()
    mixed(true, len(labels)).backward()
    for leaf, expected in zip(leaves, truth, strict=True):
        assert leaf.grad.dtype == leaf.dtype and leaf.grad.shape == leaf.shape
        close(leaf.grad, expected.grad, dtype)


@pytest.mark.parametrize("scale", [9.0, 900.0], ids=["fixed shift", "largest logits"])
def test_gradcheck(lane, scale):
    x, weight, labels = problem(lane, torch.float64, batch=4, dim=6, classes=5)
    scales = lane.tensor([scale, 1.0, 0.3 * scale, 2.0], torch.float64, grad=True)
    scalar = lane.tensor(scale, torch.float64, grad=True)
    for s in (scales, scalar):
        assert torch.autograd.gradcheck(lambda x, w, s: F.head_parts(x, w, labels, s)[:2], (x, weight, s))


def test_the_loss_of_the_parts_keeps_the_digits_of_a_sure_row(lane):
    """1 - p of 1e-40: what float32 logits would lose, and a subtraction from 1 anyway."""
    weight = lane.tensor(torch.eye(4), grad=True)
    x = lane.tensor(torch.eye(4)[:1], grad=True)
    parts = F.head_parts(x, weight, lane.tensor([0]), 90.0)
    loss = torch.logaddexp(parts.log_sum_others - 90.0 * parts.target_cosine, lane.tensor(0.0, torch.float64))
    assert loss.item() == pytest.approx(3 * math.exp(-90.0), rel=1e-5)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_what_does_not_count_reaches_nothing(lane, dtype):
    x, weight, labels = problem(lane, dtype)
    poisoned = x.detach().clone()
    poisoned[len(labels) // 2] = math.nan
    poisoned.requires_grad_()
    results = []
    for rows in (x, poisoned):
        parts = F.head_parts(rows, weight, labels, 8.0)
        results.append([*parts, *torch.autograd.grad(mixed(parts, len(labels)), (rows, weight))])
    for clean, dirty in zip(*results, strict=True):
        torch.testing.assert_close(dirty, clean, rtol=0, atol=0)
    assert parts.target_cosine[3] == parts.log_sum_others[3] == 0 and not parts.counts[3]
    assert (results[1][3][3] == 0).all()


def test_no_label_is_ignored_where_there_is_none_to_ignore(lane):
    x, weight, labels = problem(lane, torch.float32, ignored=False)
    assert F.head_parts(x, weight, labels, 8.0, ignore_index=None).counts.all()
    assert not F.head_parts(x, weight, labels, 8.0, ignore_index=int(labels[0])).counts[0]


@pytest.mark.parametrize("scale", [8.0, 900.0])
def test_one_class_has_no_others(lane, scale):
    x, weight, _ = problem(lane, torch.float32, batch=3, classes=2)
    weight = weight.detach()[:1].requires_grad_()
    parts = F.head_parts(x, weight, lane.tensor([0, 0, -100]), scale)
    assert parts.log_sum_others.tolist() == [-math.inf, -math.inf, 0.0]
    assert reference.head_parts(x, weight, lane.tensor([0, 0, -100]), scale).log_sum_others.tolist() == [
        -math.inf,
        -math.inf,
        0.0,
    ]
    loss = torch.logaddexp(
        parts.log_sum_others - scale * parts.target_cosine, torch.zeros_like(parts.target_cosine)
    )
    dx, dw = torch.autograd.grad(loss.sum(), (x, weight))
    assert (dx == 0).all() and (dw == 0).all()


def test_an_empty_batch(lane):
    x, weight, labels = problem(lane, torch.float32)
    x = x.detach()[:0].requires_grad_()
    parts = F.head_parts(x, weight, labels[:0], 8.0)
    assert [part.shape for part in parts] == [(0,)] * 3
    (parts.target_cosine.sum() + parts.log_sum_others.sum()).backward()
    assert x.grad.shape == (0, 16) and (weight.grad == 0).all()


def test_bad_input_is_answered_by_a_sentence(lane):
    x, weight, labels = problem(lane, torch.float32)
    with pytest.raises(TypeError, match="head_parts: got an unexpected keyword argument `margin`"):
        F.head_parts(x, weight, labels, 8.0, margin=None)
    with pytest.raises(ValueError, match=r"head_parts: expected `weight` to be \[C, 16\]"):
        F.head_parts(x, weight[:, :3], labels, 8.0)
    with pytest.raises(ValueError, match="head_parts: expected `scale` to be a float or a floating"):
        F.head_parts(x, weight, labels, labels)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(lane, compile_fully, dynamic):
    x, weight, labels = problem(lane, torch.float32)

    def loss(x, weight, labels):
        cosine, others, _ = F.head_parts(x, weight, labels, 8.0)
        return torch.logaddexp(others - 8.0 * (cosine - 0.2), torch.zeros_like(cosine)).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (7, 5):
        given = x.detach()[:rows].requires_grad_()
        eager = loss(given, weight, labels[:rows])
        traced = compiled(given, weight, labels[:rows])
        torch.testing.assert_close(traced, eager)
        for a, b in zip(
            torch.autograd.grad(traced, (given, weight)),
            torch.autograd.grad(eager, (given, weight)),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


# Losses of a psi made in torch ------------------------------------------------------------------------

OPTIONS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothed": {"label_smoothing": 0.2},
    "smoothed, none": {"label_smoothing": 0.2, "reduction": "none"},
}


@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("scale", [9.0, "tensor", "of each row"])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_psi_in_torch_has_the_loss_of_the_fused_margin(lane, dtype, name, weighted, scale):
    x, weight, labels = problem(lane, dtype)
    wide = accumulator(dtype)
    leaves = [x, weight]
    if scale == "tensor":
        scale = lane.tensor(9.0, wide, grad=True)
    elif scale == "of each row":
        scale = lane.tensor(torch.linspace(1, 20, len(labels)), wide, grad=True)
    leaves += [scale] if isinstance(scale, torch.Tensor) else []
    sample = lane.randn(len(labels), dtype=wide, seed=5).abs() if weighted else None
    classes = lane.randn(len(weight), dtype=wide, seed=6).abs() if weighted else None
    if weighted:
        sample[1] = 0
    m = lane.tensor(0.4, torch.float64, grad=True)
    margin = nf.ArcFace(m)
    fused = F.normface_loss(
        x, weight, labels, scale, margin=margin, sample_weight=sample, class_weight=classes, **OPTIONS[name]
    )
    opened, _ = functions.loss_of_psi(
        x,
        weight,
        labels,
        scale,
        lambda cosine: reference.margin(cosine, margin),
        sample,
        classes,
        HeadOptions.of("normface_loss", OPTIONS[name]),
    )
    assert opened.dtype == fused.dtype and opened.shape == fused.shape
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(opened, fused, **tolerance)
    upstream = torch.ones_like(fused).cumsum(0) if fused.dim() else torch.ones_like(fused)
    for a, b in zip(
        torch.autograd.grad(opened, [*leaves, m], upstream),
        torch.autograd.grad(fused, [*leaves, m], upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b, **tolerance)


def test_a_mean_over_nothing_is_zero(lane):
    x, weight, labels = problem(lane, torch.float32)
    loss, _ = functions.loss_of_psi(
        x, weight, torch.full_like(labels, -100), 8.0, lambda c: c - 0.1, None, None, HeadOptions()
    )
    assert loss == 0
    dx, dw = torch.autograd.grad(loss, (x, weight))
    assert (dx == 0).all() and (dw == 0).all()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("how", ["ignored", "weightless"])
def test_the_scale_of_a_row_that_does_not_count_reaches_nothing(lane, poison, how):
    x, weight, labels = problem(lane, torch.float32)
    scale = lane.tensor(torch.full((len(labels),), 9.0))
    labels, weights = labels.clone(), lane.tensor(torch.ones(len(labels)))
    if how == "ignored":
        labels[2] = -100
    else:
        weights[2] = 0
    results = []
    for value in (9.0, poison):
        scale[2] = value
        loss = F.normface_loss(x, weight, labels, scale, sample_weight=weights, margin=nf.CosFace(0.2))
        results.append([loss, *torch.autograd.grad(loss, [x, weight])])
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)
