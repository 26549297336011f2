"""The scale: one attribute, fixed or learned, that no forward changes and that every function reads alike."""

import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import normface_ext as nf
from normface_ext import reference
from normface_ext.functional import norm_linear, normface_loss

HEADS = {
    "NormLinear": lambda **options: nf.NormLinear(12, 20, **options),
    "NormFaceLoss": lambda **options: nf.NormFaceLoss(12, 20, **options),
}
every_head = pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)
learned_or_not = pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
outside = pytest.mark.parametrize("start", [0.25, -3.0, 2.0, 5.0, 8.0, 900.0, 1e30])
BOUNDS = {"scale": 5.0, "min_scale": 2.0, "max_scale": 8.0}

NUMBERS = {
    "int": lambda v: int(v),
    "float": float,
    "float32": np.float32,
    "0-d array": np.array,
    "0-d tensor": torch.tensor,
    "[1]": lambda v: torch.tensor([v]),
    "0-d bfloat16": lambda v: torch.tensor(v, dtype=torch.bfloat16),
    "0-d int": lambda v: torch.tensor(int(v)),
    "parameter": lambda v: nn.Parameter(torch.tensor([v])),
}


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return torch.randn(6, 12), torch.randint(20, (6,))


def run(head, x, labels):
    return head(x, labels) if isinstance(head, nf.NormFaceLoss) else head(x).sin().mean()


def moved(head, value):
    with torch.no_grad():
        head.scale.fill_(value)
    return head


# One attribute --------------------------------------------------------------------------------------


@every_head
@learned_or_not
@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)
def test_every_kind_of_number_makes_and_sets_a_scale(make, learned, number, batch):
    given = number(6.0)
    head = make(scale=given, learn_scale=learned)
    assert head.scale_value() == 6.0 and head.learn_scale is learned
    if isinstance(given, nn.Parameter):
        return  # set, it is the scale itself: see below
    head = make(scale=5.0, learn_scale=learned)
    before = head.scale
    head.scale = given
    assert head.scale_value() == 6.0
    assert (head.scale is before) if learned else type(head.scale) is float
    assert torch.equal(run(head, *batch), run_with(head, 6.0, *batch))


def run_with(head, scale, x, labels):
    if isinstance(head, nf.NormFaceLoss):
        return normface_loss(x, head.weight, labels, scale)
    return norm_linear(x, head.weight, scale).sin().mean()


@every_head
@learned_or_not
@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (1.5, ValueError, r"expected `scale` in \[2, 8\], got 1.5"),
        (torch.tensor([9.0]), ValueError, r"expected `scale` in \[2, 8\], got 9"),
        (0, ValueError, "expected `scale` to be finite and > 0, got 0"),
        (math.nan, ValueError, "expected `scale` to be finite and > 0, got nan"),
        (True, TypeError, "expected `scale` to be a number, got bool"),
        (torch.tensor(True), TypeError, "expected `scale` to be a number, got bool"),
        (None, TypeError, "expected `scale` to be a number, got NoneType"),
        ("5", TypeError, "expected `scale` to be a number, got str"),
        (torch.ones(2), TypeError, r"expected `scale` to be a number or a tensor of one, got cpu .* \[2\]"),
        (torch.ones((), device="meta"), TypeError, r"a tensor of one, got meta tensor of shape \[\]"),
        (
            torch.ones((), requires_grad=True) * 3,
            ValueError,
            "expected `scale` not to require a gradient, got one that would be lost",
        ),
    ],
    ids=str,
)
def test_what_is_no_scale_is_refused_in_the_same_words(make, learned, value, error, text):
    head = make(learn_scale=learned, **BOUNDS)
    name = type(head).__name__
    with pytest.raises(error, match=f"^{name}: .*{text}"):
        head.scale = value
    assert head.scale_value() == 5.0
    if value != "5" or name == "NormLinear":  # a str is said to be no 'auto' there
        with pytest.raises(error, match=f"^{name}: .*{text}"):
            make(**{**BOUNDS, "scale": value, "learn_scale": learned})


@every_head
@learned_or_not
def test_bounds_are_attributes_too(make, learned, batch):
    head = make(learn_scale=learned, **BOUNDS)
    head.max_scale, head.min_scale = 6.0, 3.0
    assert (head.min_scale, head.max_scale) == (3.0, 6.0)
    for name, value, error, text in (
        ("min_scale", 7.0, ValueError, "expected `min_scale` <= `max_scale`, got 7 and 6"),
        ("max_scale", 1.0, ValueError, "expected `min_scale` <= `max_scale`, got 3 and 1"),
        ("min_scale", -1.0, ValueError, "expected `min_scale` to be finite and > 0, got -1"),
        ("max_scale", "9", TypeError, "expected `max_scale` to be a number, got str"),
    ):
        with pytest.raises(error, match=text):
            setattr(head, name, value)
        assert (head.min_scale, head.max_scale) == (3.0, 6.0)
    if learned:
        moved(head, 100.0)
        assert torch.equal(run(head, *batch), run_with(head, 6.0, *batch))
        assert torch.equal(run(head, *batch), run_with(head, head.scale, *batch))
    head.max_scale = None
    assert head.max_scale == math.inf
    with pytest.raises(AttributeError):
        head.learn_scale = not learned


@every_head
def test_a_parameter_that_is_set_is_the_scale(make, batch):
    """Two heads of one scale; and a fixed one becomes learned."""
    shared = nn.Parameter(torch.tensor([6.0]))
    heads = [make(scale=5.0), make(scale=5.0, learn_scale=True)]
    for head in heads:
        head.scale = shared
        assert head.scale is shared and head.learn_scale and "scale" in dict(head.named_parameters())
    sum(run(head, *batch) for head in heads).backward()
    assert shared.grad.shape == (1,) and shared.grad != 0
    with pytest.raises(ValueError, match=r"expected `scale` of one element, got shape \[3\]"):
        heads[0].scale = nn.Parameter(torch.ones(3))


# What forward does ----------------------------------------------------------------------------------


@every_head
@outside
@pytest.mark.parametrize("mode", ["train", "eval", "no_grad", "inference"])
def test_no_forward_changes_a_parameter(make, start, mode, batch):
    head = moved(make(learn_scale=True, **BOUNDS), start).train(mode == "train")
    before, version = copy.deepcopy(head.state_dict()), head.scale._version
    context = {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(mode, torch.enable_grad)
    with context():
        value = run(head, *batch)
        repr(head)
    assert all(torch.equal(before[name], tensor) for name, tensor in head.state_dict().items())
    assert head.scale._version == version and head.scale.item() == torch.tensor(start).item()
    held = min(max(start, 2.0), 8.0)
    assert head.scale_value() == held and torch.equal(value, run_with(head, held, *batch))


@every_head
@outside
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_functions_agree_with_the_head(make, start, dtype, batch):
    """Value and gradients, from the parameter alone."""
    start = max(min(start, 60000.0), -60000.0) if dtype == torch.float16 else start
    head = moved(make(learn_scale=True, **BOUNDS).to(dtype), start)
    x, labels = batch[0].to(dtype).requires_grad_(), batch[1]
    leaves = [x, head.weight, head.scale]
    one = torch.autograd.grad(run(head, x, labels), leaves)
    two = torch.autograd.grad(run_with(head, head.scale, x, labels), leaves)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert one[2].shape == (1,) and one[2].dtype == dtype and one[2] != 0  # at a bound it can come back


@every_head
def test_the_gradient_outside_is_that_at_the_bound(make, batch):
    for start, bound in ((-3.0, 2.0), (900.0, 8.0)):
        head = moved(make(learn_scale=True, **BOUNDS), start)
        (got,) = torch.autograd.grad(run(head, *batch), [head.scale])
        at_bound = torch.tensor(bound, requires_grad=True)
        (expected,) = torch.autograd.grad(run_with(head, at_bound, *batch), [at_bound])
        assert torch.equal(got, expected.reshape(1))


def test_a_scale_at_its_bound_comes_back():
    torch.manual_seed(0)
    x, labels = torch.randn(6, 12), torch.randint(20, (6,))
    head = moved(nf.NormFaceLoss(12, 20, scale=5.0, learn_scale=True, max_scale=8.0), 9.0)
    head.weight.requires_grad_(False)
    optimizer = torch.optim.SGD(head.parameters(), lr=5.0)
    for _ in range(50):
        optimizer.zero_grad()
        head(x, labels).backward()
        optimizer.step()
    assert head.scale.item() < 8.0  # rows that point anywhere want a small scale


@pytest.mark.parametrize("shape", [[], [1]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_functions_take_a_tensor_of_one_element(lane, shape, dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, weight = lane.randn(6, 12, dtype=wide), lane.randn(20, 12, dtype=wide, seed=1)
    labels = lane.labels(6, 20)
    s = torch.full(shape, 3.0, dtype=dtype, device=lane.device, requires_grad=True)
    for function in (
        lambda s: norm_linear(x, weight, s).sin().sum(),
        lambda s: normface_loss(x, weight, labels, s),
    ):
        value = function(s)
        (gradient,) = torch.autograd.grad(value, [s])
        assert torch.equal(value, function(3.0)) and gradient.shape == s.shape and gradient.dtype == dtype
        flat = torch.tensor(3.0, dtype=dtype, device=lane.device, requires_grad=True)
        assert torch.equal(gradient.reshape(()), torch.autograd.grad(function(flat), [flat])[0])


@pytest.mark.parametrize("scale", [torch.ones(2), torch.ones(1, 1), torch.ones(0)], ids=str)
def test_functions_refuse_other_tensors(scale, batch):
    text = r"expected `scale` to be a float or a floating tensor of one element, got torch.float32 of shape"
    with pytest.raises(ValueError, match=text):
        norm_linear(batch[0], torch.randn(20, 12), scale)


def test_second_derivatives_through_a_learned_scale(batch):
    head = moved(nf.NormLinear(12, 20, learn_scale=True, **BOUNDS).double(), 7.0)
    x = batch[0].double().requires_grad_()

    def penalty(function):
        (dx,) = torch.autograd.grad(function().sin().sum(), [x], create_graph=True)
        return torch.autograd.grad(dx.square().sum(), [x, head.weight, head.scale])

    got = penalty(lambda: head(x))
    truth = penalty(lambda: reference.norm_linear(x, head.weight, head.scale))
    for a, b in zip(got, truth, strict=True):
        torch.testing.assert_close(a, b)


# What the world does to it --------------------------------------------------------------------------

TRIPS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda head: pickle.loads(pickle.dumps(head)),
    "torch.save": lambda head: torch.load(saved(head), weights_only=False),
    "double and back": lambda head: head.double().float(),
    "meta and back": lambda head: emptied(head, copy.deepcopy(head.state_dict())),
    "load": lambda head: loaded(head, assign=False),
    "load by assignment": lambda head: loaded(head, assign=True),
    "share_memory": lambda head: head.share_memory(),
}


def saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return file


def emptied(head, state):
    head = head.to("meta").to_empty(device="cpu")
    head.load_state_dict(state)
    return head


def loaded(head, assign):
    other = copy.deepcopy(head)
    other.load_state_dict(torch.load(saved(head.state_dict()), weights_only=True), assign=assign)
    return other


@every_head
@pytest.mark.parametrize("trip", TRIPS.values(), ids=TRIPS)
def test_the_bounds_travel(make, trip, batch):
    head = moved(make(learn_scale=True, **BOUNDS), 900.0)
    expected = run(head, *batch).detach()
    other = trip(head)
    assert other.scale.item() == 900.0 and other.scale.shape == (1,) and other.scale.requires_grad
    assert torch.equal(run(other, *batch), expected)
    assert torch.equal(run_with(other, other.scale, *batch), expected)


@every_head
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_it_has_the_dtype_of_the_layer(make, dtype):
    for head in (make(learn_scale=True, dtype=dtype), make(learn_scale=True).to(dtype)):
        assert head.scale.dtype == head.weight.dtype == dtype


@every_head
def test_a_head_made_on_meta_is_made_whole_by_reset(make, batch):
    head = make(learn_scale=True, device="meta", **BOUNDS)
    assert "scale=5, learn_scale=True" in repr(head)
    head.to_empty(device="cpu")
    with torch.no_grad():
        for p in head.parameters():
            p.fill_(math.nan)
    head.reset_parameters()
    assert head.scale.item() == 5.0 and (head.weight.norm(dim=1) - 1).abs().max() < 1e-6
    assert torch.equal(run(moved(head, 900.0), *batch), run_with(head, head.scale, *batch))


@every_head
def test_a_number_of_no_dimension_can_be_loaded(make):
    head = make(learn_scale=True, scale=5.0)
    head.load_state_dict({**head.state_dict(), "scale": torch.tensor(7.0)})
    assert head.scale.item() == 7.0 and head.scale.shape == (1,)


@pytest.mark.covering(1)
@every_head
@pytest.mark.parametrize("start", [5.0, 900.0])
def test_compiled(make, start, batch, compile_fully):
    head = moved(make(learn_scale=True, **BOUNDS), start)
    leaves = [head.weight, head.scale]
    for function in (run, lambda head, *batch: run_with(head, head.scale, *batch)):
        eager = torch.autograd.grad(function(head, *batch), leaves)
        value = compile_fully(lambda x, y, function=function: function(head, x, y))(*batch)
        torch.testing.assert_close(value, function(head, *batch))
        for got, expected in zip(torch.autograd.grad(value, leaves), eager, strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.covering(1)
@every_head
@pytest.mark.parametrize("start", [5.0, 900.0])
@pytest.mark.parametrize("strict", [False, True])
def test_exported(make, start, strict, batch):
    head = moved(make(learn_scale=True, **BOUNDS), start).eval()
    given = batch if isinstance(head, nf.NormFaceLoss) else batch[:1]
    program = torch.export.export(head, given, strict=strict).run_decompositions()
    torch.testing.assert_close(program.module()(*given), head(*given))


def test_functional_call_with_tensors_of_the_caller(batch):
    head = nf.NormFaceLoss(12, 20, learn_scale=True, **BOUNDS)
    given = {"weight": head.weight.detach(), "scale": torch.tensor([900.0])}
    assert torch.equal(torch.func.functional_call(head, given, batch), run_with(head, 8.0, *batch))


def test_parameter_groups_find_it():
    model = nn.ModuleList([nn.Linear(3, 3), nf.NormLinear(3, 4, learn_scale=True), nf.NormFaceLoss(3, 4)])
    decayed, scales = nf.parameter_groups(model, 0.1)
    assert [id(p) for p in scales["params"]] == [id(model[1].scale)] and scales["weight_decay"] == 0
    assert len(decayed["params"]) == 4
