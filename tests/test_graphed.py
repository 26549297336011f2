"""nf.graphed without a GPU: what stands around torch.cuda.make_graphed_callables, whose part a double has.

The double does what torch's does to tensors: arguments are copied to one place, results and gradients come in
one place each, and both are written again by the next call. test_gpu_graphs.py has the real one.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable

import normface_ext as nf
from normface_ext.engine import checks

module = importlib.import_module("normface_ext.graphed")  # the package has a function of that name


class Double:
    """``make_graphed_callables`` on a CPU: a replay computes anew from what lies in the static places."""

    def __init__(self) -> None:
        self.replays = 0
        self.rehearsed: list[bool] = []

    def __call__(self, step: nn.Module, given: tuple[torch.Tensor, ...]) -> nn.Module:
        assert not torch.is_autocast_enabled("cuda") or not torch.is_autocast_cache_enabled()
        surface = [*given, *step.parameters()]
        leaves = [t for t in surface if t.requires_grad]
        original, double = step.forward, self

        def computed() -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
            with torch.enable_grad():
                loss = original(*given)
            return loss.detach(), torch.autograd.grad(loss, leaves, torch.ones_like(loss))

        for _ in range(3):
            self.rehearsed.append(checks._rehearsing)
            computed()
        out, grads = computed()

        class Replay(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *inputs):
                double.replays += 1
                for place, value in zip(given, inputs, strict=False):
                    place.data.copy_(value)
                fresh = computed()
                out.copy_(fresh[0])
                ctx.fresh = fresh[1]
                return out.detach()

            @staticmethod
            @once_differentiable
            def backward(ctx, upstream):
                for place, value in zip(grads, ctx.fresh, strict=True):
                    place.copy_(value * upstream)
                places = iter(grads)
                return tuple(next(places).detach() if t.requires_grad else None for t in surface)

        parameters = tuple(step.parameters())
        step.forward = lambda *arguments: Replay.apply(*arguments, *parameters)
        return step


@pytest.fixture
def double(monkeypatch):
    made = Double()
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", made)
    monkeypatch.setattr(module, "_on_cuda", lambda *_: None)
    return made


HEADS = {
    "plain": lambda: nf.NormFaceLoss(8, 11, scale=20.0),
    "learned scale and margin": lambda: nf.NormFaceLoss(8, 11, learn_scale=True, margin=nf.ArcFace(0.3)),
    "a margin with a state": lambda: nf.NormFaceLoss(8, 11, scale=20.0, margin=nf.AdaFace()),
    "sphereface2": lambda: nf.SphereFace2Loss(8, 11),
    "triplet": lambda: nf.CTripletLoss(8, 11),
}


def batch(seed: int, rows: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 8, generator=generator)
    return x.requires_grad_(), torch.randint(11, (rows,), generator=generator)


def stepped(loss_of, head: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().requires_grad_(x.requires_grad)
    loss = loss_of(x, labels)
    (4.0 * loss).backward()
    return [loss.detach(), *([x.grad] if x.requires_grad else []), *(p.grad for p in head.parameters())]


@pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)
def test_steps_are_those_of_the_head(double, make):
    """Values, gradients and state over several steps, in which the weight moves."""
    torch.manual_seed(0)
    head, twin = make(), make()
    twin.load_state_dict(head.state_dict())
    before = {name: value.clone() for name, value in head.state_dict().items() if torch.is_tensor(value)}
    loss_of = nf.graphed(head, *batch(0))
    assert all(torch.equal(head.state_dict()[name], value) for name, value in before.items())
    assert all(p.grad is None for p in head.parameters()) and all(double.rehearsed)
    done = double.replays
    for seed in range(1, 4):
        ours, theirs = stepped(loss_of, head, *batch(seed)), stepped(twin, twin, *batch(seed))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        for module_ in (head, twin):
            torch.optim.SGD(module_.parameters(), lr=0.1).step()
            module_.zero_grad()
    assert double.replays == done + 3
    for name, value in twin.state_dict().items():
        if torch.is_tensor(value):
            torch.testing.assert_close(head.state_dict()[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("zero", ["never", "to zero"])
def test_gradients_accumulate(double, zero):
    """What torch leaves to the graph's memory would be counted twice."""
    torch.manual_seed(0)
    head = nf.NormFaceLoss(8, 11, learn_scale=True)
    loss_of, parameters = nf.graphed(head, *batch(0)), list(head.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    x = batch(9)[0].detach().requires_grad_()  # a leaf that keeps its own gradient, too
    of_x = torch.zeros_like(x)
    for seed in range(3):
        _, labels = batch(seed)
        expected = torch.autograd.grad(head(x, labels), [x, *parameters])
        loss_of(x, labels).backward()
        of_x += expected[0]
        for sum_, one in zip(total, expected[1:], strict=True):
            sum_ += one
        for parameter, sum_ in zip(parameters, total, strict=True):
            torch.testing.assert_close(parameter.grad, sum_)
        torch.testing.assert_close(x.grad, of_x)
        if zero == "to zero":
            head.zero_grad(set_to_none=False)
            total = [torch.zeros_like(p) for p in parameters]


ROADS = {
    "a sum of two": lambda a, b: a + b,
    "a view": lambda a, b: a.view_as(a),
    "a residual": lambda a, b: a * 2 + b,
}


@pytest.mark.parametrize("road", ROADS.values(), ids=ROADS)
def test_what_is_behind_the_features_keeps_its_gradient(double, road):
    """It may take the gradient as it comes, and the graph writes it again."""
    head = nf.NormFaceLoss(8, 11)
    loss_of, (a, labels), (b, _) = nf.graphed(head, *batch(0)), batch(1), batch(2)
    a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
    expected = torch.autograd.grad(head(road(a, b), labels), [a, b], allow_unused=True)
    loss_of(road(a, b), labels).backward()
    (asked,) = torch.autograd.grad(loss_of(a, labels), a)
    before = asked.clone()
    loss_of(*batch(3)).backward()
    assert torch.equal(asked, before)
    for leaf, gradient in zip((a, b), expected, strict=True):
        if gradient is None:
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad, gradient)


def test_a_loss_keeps_its_value(double):
    loss_of = nf.graphed(nf.NormFaceLoss(8, 11), *batch(0))
    kept = loss_of(*batch(1)).detach()
    value = float(kept)
    loss_of(*batch(2))
    assert float(kept) == value


def without_gradient(x, labels):
    return x.detach(), labels


OTHERS = {
    "a smaller batch": lambda x, y: (x[:1], y[:1]),
    "another dtype": lambda x, y: (x.bfloat16(), y),
    "other labels": lambda x, y: (x, y.int()),
    "features without a gradient": without_gradient,
}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_what_the_graph_does_not_know_goes_by_the_head(double, monkeypatch, change):
    torch.manual_seed(0)
    head = nf.NormFaceLoss(8, 11)
    loss_of, done = nf.graphed(head, *batch(0)), double.replays
    given = change(*batch(1))
    assert torch.equal(loss_of(*given), head(*given))
    with torch.no_grad():
        assert torch.equal(loss_of(*batch(1)), head(*batch(1)))
    head.eval()
    assert torch.equal(loss_of(*batch(1)), head(*batch(1)))
    head.train()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(module, "_autocast", lambda: (True, torch.bfloat16))
        assert torch.equal(loss_of(*batch(1)), head(*batch(1)))
    assert double.replays == done
    loss_of(*batch(1))
    assert double.replays == done + 1


CHANGES = {
    "moved": lambda head: head.double(),
    "resized": lambda head: head.resize_classes(13),
    "an option": lambda head: setattr(head, "label_smoothing", 0.1),
    "a margin": lambda head: setattr(head, "margin", nf.CosFace(0.2)),
    "frozen": lambda head: head.weight.requires_grad_(False),
    "a fixed scale": lambda head: setattr(head, "scale", 30.0),
}
#: Of a head whose scale is learned and whose margin is a module.
CHANGES_WITH_A_STATE = {
    "a bound of the scale": lambda head: setattr(head, "max_scale", 5.0),
    "a number of the margin": lambda head: setattr(head.margin, "m", 0.1),
}


@pytest.mark.parametrize("change", CHANGES_WITH_A_STATE.values(), ids=CHANGES_WITH_A_STATE)
def test_numbers_of_a_head_with_a_state_raise_too(double, change):
    head = nf.NormFaceLoss(8, 11, learn_scale=True, margin=nf.AdaFace())
    loss_of = nf.graphed(head, *batch(0))
    loss_of(*batch(1))
    head.scale = 12.0  # a tensor, which is read at every call
    loss_of(*batch(2))
    change(head)
    with pytest.raises(RuntimeError, match="graphed: expected the head as it was captured"):
        loss_of(*batch(1))


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_head_that_is_another_now_raises(double, change):
    head = nf.NormFaceLoss(8, 11)
    loss_of = nf.graphed(head, *batch(0))
    change(head)
    with pytest.raises(RuntimeError, match="graphed: expected the head as it was captured"):
        loss_of(*batch(1))


def test_a_backward_pass_after_the_next_call_raises(double):
    loss_of = nf.graphed(nf.NormFaceLoss(8, 11), *batch(0))
    first = loss_of(*batch(1))
    loss_of(*batch(2))
    with pytest.raises(RuntimeError, match="expected the backward pass of a call before the next"):
        first.backward()


def test_arguments():
    head, (x, labels) = nf.NormFaceLoss(8, 11), batch(0)
    with pytest.raises(TypeError, match="graphed: expected `head` to be a module, got function"):
        nf.graphed(lambda x, y: x, x, labels)
    with pytest.raises(TypeError, match="graphed: expected `labels` to be a tensor, got list"):
        nf.graphed(head, x, [1])
    with pytest.raises(ValueError, match="graphed: expected `x` on a CUDA device, got cpu"):
        nf.graphed(head, x, labels)


# Whether a step is being captured ---------------------------------------------------------------------


@pytest.fixture
def two_cards(monkeypatch):
    """A machine whose current device is 0, and whose stream on device 1 is capturing."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    current = [0]

    class Device:
        def __init__(self, device):
            self.index = torch.device(device).index

        def __enter__(self):
            current.append(self.index)

        def __exit__(self, *_):
            current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[-1] == 1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield [torch.empty(2, device=f"cuda:{index}") for index in range(2)]


def test_the_stream_of_the_tensors_own_device_is_asked(two_cards):
    first, second = two_cards
    assert not checks.capturing(first)
    assert checks.capturing(second)
    assert not checks.capturing(torch.empty(2, device="cpu"))


def test_a_rehearsal_is_a_capture_to_cuda_tensors(two_cards):
    first, _ = two_cards
    with checks.rehearsal():
        assert checks.capturing(first) and not checks.capturing(torch.empty(2, device="cpu"))
    assert not checks.capturing(first)
