"""What a call costs the host, in what can be counted: memory that is made, ops that are entered, plans."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import normface_ext as nf
from normface_ext.engine import native
from normface_ext.softmax import arguments

SHAPE = 32, 64, 100


def inputs(lane):
    batch, dim, classes = SHAPE
    x, weight = lane.randn(batch, dim, grad=True), lane.randn(classes, dim, seed=1, grad=True)
    return x, weight, lane.labels(batch, classes)


def watched(call):
    """(pieces of memory that were made, our ops that were entered) in a call."""
    if torch.cuda.is_available():
        pytest.skip("memory events of the host's tensors are counted")
    call()  # what is found once
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        call()
    events = profiler.profiler.kineto_results.events()
    made = [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]
    return made, [event.name().split("::")[1] for event in events if event.name().startswith("normface_")]


@pytest.mark.parametrize("margin", [None, nf.ArcFace(0.3)], ids=str)
@pytest.mark.parametrize("learned", [False, True], ids=["number", "learned"])
def test_a_step_makes_six_tensors(lane, learned, margin):
    """Of the loss, what it saves, and scratch; of both gradients, and scratch. A learned scale has a gradient
    too, float64 and then in its own type."""
    x, weight, labels = inputs(lane)
    scale = lane.tensor(30.0, grad=True) if learned else 30.0
    wanted = (x, weight, scale) if learned else (x, weight)
    upstream = torch.ones((), device=x.device)

    def step():
        loss = nf.functional.normface_loss(x, weight, labels, scale, margin=margin)
        torch.autograd.grad(loss, wanted, upstream)

    made, entered = watched(step)
    assert len(made) <= 6 + 2 * learned, made
    assert len(made) >= 5  # the meter sees both directions
    assert entered == ["softmax_loss", "softmax_loss_backward"]


def test_without_a_gradient_one_op_and_three_tensors(lane):
    x, weight, labels = inputs(lane)
    with torch.no_grad():
        made, entered = watched(lambda: nf.functional.normface_loss(x, weight, labels, 30.0))
    assert entered == ["softmax_loss"] and 1 <= len(made) <= 3, made


def test_a_plan_is_made_once_for_all_that_it_is_made_from(lane, monkeypatch):
    x, weight, labels = inputs(lane)
    made, real = [], arguments._planned_anew

    def counted(*given):
        made.append(given)
        return real(*given)

    monkeypatch.setattr(arguments, "_planned", {})
    monkeypatch.setattr(arguments, "_planned_anew", counted)

    def call(scale=30.0, rows=SHAPE[0], **options):
        return nf.functional.normface_loss(x[:rows], weight, labels[:rows], scale, **options)

    first = call()
    assert torch.equal(first, call()) and len(made) == 1
    others = [
        {"scale": 31.0},
        {"rows": 5},
        {"reduction": "sum"},
        {"eps": 1e-6},
        {"workspace": 1 << 20},
        {"label_smoothing": 0.1},
        {"margin": nf.CosFace(0.2)},
        {"ignore_index": 3},
    ]
    for count, options in enumerate(others, 2):
        assert torch.equal(call(**options), call(**options)) and len(made) == count, options
    assert torch.equal(first, call()) and len(made) == 1 + len(others)


def test_few_plans_are_remembered(lane, monkeypatch):
    x, weight, _ = inputs(lane)
    monkeypatch.setattr(arguments, "_planned", {})
    for step in range(arguments._MOST_PLANNED + 10):
        arguments.loss_options(float(step), nf.softmax.options.HeadOptions(), x, weight, *SHAPE[::2])
    assert 0 < len(arguments._planned) <= arguments._MOST_PLANNED


def test_a_plan_of_symbolic_sizes_is_not_remembered(monkeypatch):
    """What make_fx traces has sizes that no key of a dict can be."""
    monkeypatch.setattr(arguments, "_planned", {})
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(6, 8, generator=draw), torch.randn(5, 8, generator=draw)
    labels = torch.tensor([0, 1, 2, 3, 4, -100])

    def step(*given):
        return nf.functional.normface_loss(*given, 20.0, margin=nf.ArcFace(0.3))

    traced = make_fx(step, tracing_mode="symbolic")(x, weight, labels)
    assert not arguments._planned
    torch.testing.assert_close(traced(x, weight, labels), step(x, weight, labels))


@pytest.mark.parametrize(
    ("labels", "within"),
    [
        ([0, 1, 2], True),
        ([0, 3, 2], False),
        ([0, -1, 2], False),
        ([-(1 << 63), 0], False),
        ([(1 << 63) - 1], False),
        ([], True),
    ],
    ids=str,
)
def test_labels_within(labels, within):
    whole = torch.tensor(labels, dtype=torch.int64)
    assert native.labels_within(whole, 3) is within
    strided = torch.stack([whole, torch.full_like(whole, 7)], 1)[:, 0]
    assert strided.is_contiguous() is (len(labels) < 2) and native.labels_within(strided, 3) is within
