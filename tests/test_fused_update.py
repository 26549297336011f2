"""Optimizers whose step of a head's weight is a part of backward: torch's steps, and what they refuse."""

from __future__ import annotations

import copy
import gc
import io

import every_head
import pytest
import torch
from torch import nn

import normface_ext as nf
from normface_ext.engine import checks, updates
from normface_ext.optim import FusedAdam, FusedAdamW, FusedSGD

#: ours, torch's, their arguments
KINDS = {
    "sgd": (FusedSGD, torch.optim.SGD, {"lr": 0.3}),
    "momentum": (FusedSGD, torch.optim.SGD, {"lr": 0.2, "momentum": 0.9, "weight_decay": 1e-2}),
    "nesterov": (
        FusedSGD,
        torch.optim.SGD,
        {"lr": 0.2, "momentum": 0.8, "nesterov": True, "weight_decay": 1e-2},
    ),
    "dampened": (FusedSGD, torch.optim.SGD, {"lr": 0.2, "momentum": 0.9, "dampening": 0.4, "maximize": True}),
    "adam": (FusedAdam, torch.optim.Adam, {"lr": 1e-2, "weight_decay": 1e-2, "betas": (0.8, 0.99)}),
    "adamw": (FusedAdamW, torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    "adamw up": (FusedAdamW, torch.optim.AdamW, {"lr": 1e-2, "maximize": True, "eps": 1e-4}),
}
CLASSES, DIM, BATCH = 37, 19, 12


def head_of(lane, dtype=torch.float32, **options):
    """The same weight in every dtype."""
    options = {"scale": 12.0, **options}
    head = nf.NormFaceLoss(DIM, CLASSES, dtype=dtype, device=lane.device, **options)
    with torch.no_grad():
        head.weight.copy_(lane.randn(*head.weight.shape, dtype=torch.bfloat16, seed=3))
    return head


def batches(lane, dtype, count, ignored=True):
    for k in range(count):
        x = lane.randn(BATCH, DIM, dtype=torch.bfloat16, seed=10 + k).to(dtype)
        labels = lane.labels(BATCH, CLASSES, seed=k)
        if ignored:
            labels[3], x[3] = -100, float("nan")
        yield x.requires_grad_(), labels


def train(head, optimizer, given, schedule=False):
    """The gradients of the features, step by step."""
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.7) if schedule else None
    found = []
    for x, labels in given:
        optimizer.zero_grad()
        head(x, labels).backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        found.append(x.grad.double())
    return torch.stack(found)


def error(value, right, start):
    """Of what was learned."""
    value, right, start = (t.detach().double() for t in (value, right, start))
    return float((value - right).norm() / (right - start).norm())


@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_many_steps_are_those_of_torch(lane, kind, dtype):
    ours, theirs, options = KINDS[kind]
    steps, narrow = 6 if lane.slow else 25, torch.finfo(dtype).eps

    def run(optimizer, dtype):
        head = head_of(lane, dtype, learn_scale=True, margin=nf.CosFace(0.2))
        made = optimizer(head)
        dx = train(head, made, batches(lane, dtype, steps), schedule=True)
        return head, made, dx

    right, _, _ = run(lambda head: theirs(head.parameters(), **options), torch.float64)
    eager, made, eager_dx = run(lambda head: theirs(head.parameters(), **options), dtype)
    fused, optimizer, dx = run(lambda head: ours(head, **options), dtype)
    start = head_of(lane).weight.double()
    allowed = 1.5 * error(eager.weight, right.weight, start) + 8 * narrow
    assert error(fused.weight, right.weight, start) <= allowed
    assert (
        abs(float(fused.scale.detach().double() - right.scale.detach()))
        <= 2 * abs(float(eager.scale.detach().double() - right.scale.detach())) + 64 * narrow
    )
    for name, state in made.state[eager.weight].items():
        mine = optimizer.state[fused.weight][name]
        assert mine.dtype == state.dtype and mine.shape == state.shape
        torch.testing.assert_close(mine.double(), state.double(), rtol=64 * narrow, atol=64 * narrow)
    torch.testing.assert_close(dx, eager_dx, rtol=1024 * narrow, atol=64 * narrow)
    assert fused.weight.grad is None, "step() takes away what stood for the gradient"


@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing": 0.1, "class_weight": True},
        {"sub_centers": 3},
        {"margin": "learned"},
        {"margin": nf.AdaFace()},
        {"margin": nf.CurricularFace()},
        {"reduction": "sum", "workspace": 16_000},
    ],
    ids=lambda options: "-".join(options),
)
def test_every_kind_of_loss_moves_the_weight_as_torch_does(lane, options):
    options = dict(options)
    if options.pop("class_weight", False):
        options["class_weight"] = lane.tensor(torch.linspace(0.5, 2, CLASSES, dtype=torch.float64))

    def run(optimizer):
        margin = options.get("margin")
        if margin == "learned":
            margin = nf.CosFace(nn.Parameter(torch.full((CLASSES,), 0.2, dtype=torch.float64)))
        head = head_of(lane, torch.float64, **{**options, "margin": copy.deepcopy(margin)})
        made = optimizer(head)
        return head, train(head, made, batches(lane, torch.float64, 3))

    given = {"lr": 0.2, "momentum": 0.9}
    expected, expected_dx = run(lambda head: torch.optim.SGD(head.parameters(), **given))
    head, dx = run(lambda head: FusedSGD(head, **given))
    for (name, one), two in zip(head.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14, msg=name)
    torch.testing.assert_close(dx, expected_dx, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", every_head.EVERY)
def test_every_published_head(name):
    x, labels = torch.randn(BATCH, DIM, dtype=torch.float64), torch.arange(BATCH) % 7
    kind = every_head.EVERY[name]
    torch.manual_seed(5)
    one = kind.make(DIM, 9)
    two = copy.deepcopy(one)
    for head, optimizer in ((one, torch.optim.SGD(one.parameters(), lr=0.1)), (two, FusedSGD(two, lr=0.1))):
        head(x, labels).backward()
        optimizer.step()
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", [nf.CContrastiveLoss, nf.CTripletLoss])
def test_losses_over_agents(lane, kind):
    x, labels = lane.randn(BATCH, DIM, dtype=torch.float64), lane.labels(BATCH, CLASSES)
    torch.manual_seed(5)
    one = kind(DIM, CLASSES, dtype=torch.float64, device=lane.device)
    two = copy.deepcopy(one)
    for head, optimizer in (
        (one, torch.optim.SGD(one.parameters(), lr=0.1)),
        (two, FusedSGD(two, lr=0.1)),
    ):
        for _ in range(2):
            optimizer.zero_grad()
            features = x.clone().requires_grad_()
            head(features, labels).backward()
            optimizer.step()
    torch.testing.assert_close(two.weight, one.weight, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_switches_both_ways(lane, kind):
    ours, theirs, options = KINDS[kind]
    given = list(batches(lane, torch.float64, 6))

    def run(*optimizers):
        head, state = head_of(lane, torch.float64, learn_scale=True), None
        for k, optimizer in enumerate(optimizers):
            made = optimizer(head)
            if state is not None:
                made.load_state_dict(state)
            train(head, made, given[2 * k : 2 * k + 2])
            state = made.state_dict()
            if isinstance(made, (FusedSGD, FusedAdam, FusedAdamW)):
                made.release()
        return head.weight.detach(), state

    def torch_one(head):
        return theirs(head.parameters(), **options)

    def fused_one(head):
        return ours(head, **options)

    expected, state = run(torch_one, torch_one, torch_one)
    for order in ((torch_one, fused_one, torch_one), (fused_one, torch_one, fused_one)):
        found, mine = run(*order)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
        assert mine["param_groups"] == state["param_groups"]
        assert {k: set(v) for k, v in mine["state"].items()} == {k: set(v) for k, v in state["state"].items()}


def stepped(lane, optimizer=FusedSGD, **options):
    """A head after one backward, before step()."""
    head = head_of(lane, **options)
    made = optimizer(head, lr=0.1)
    x, labels = next(batches(lane, torch.float32, 1, ignored=False))
    loss = head(x, labels)
    loss.backward(retain_graph=True)
    return head, made, loss, x, labels


USES = {
    "clip_grad_norm_": lambda head, made: nn.utils.clip_grad_norm_(head.parameters(), 1.0),
    "clip_grad_value_": lambda head, made: nn.utils.clip_grad_value_(head.parameters(), 1.0),
    "norm": lambda head, made: head.weight.grad.norm(),
    "arithmetic": lambda head, made: head.weight.grad * 2,
    "copy": lambda head, made: torch.empty_like(head.weight).copy_(head.weight.grad),
    "another optimizer": lambda head, made: torch.optim.SGD(head.parameters(), lr=0.1).step(),
    "foreach": lambda head, made: torch.optim.SGD(head.parameters(), lr=0.1, foreach=True).step(),
    "clear in place": lambda head, made: nn.Module.zero_grad(head, set_to_none=False),
    "a deep copy": lambda head, made: copy.deepcopy(head.weight.grad),
    "a file": lambda head, made: torch.save(head.weight.grad, io.BytesIO()),
    "GradScaler": lambda head, made: torch.amp.GradScaler("cpu").unscale_(made),
}


@pytest.mark.parametrize("use", USES)
def test_no_use_of_the_gradient_passes_in_silence(lane, use):
    head, made, *_ = stepped(lane)
    if use == "GradScaler":
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(torch.ones(()))
        with pytest.raises(RuntimeError, match="clipping by the global norm, GradScaler, a second backward"):
            scaler.unscale_(made)
        return
    with pytest.raises(RuntimeError, match="clipping by the global norm, GradScaler, a second backward"):
        USES[use](head, made)
    assert "UpdatedGradient" in repr(head.weight.grad)
    assert head.weight.grad.shape == head.weight.shape


@pytest.mark.parametrize("clear", ["step", "zero_grad", "module"])
def test_what_stands_for_the_gradient_goes(lane, clear):
    head, made, _, x, labels = stepped(lane)
    {"step": made.step, "zero_grad": made.zero_grad, "module": head.zero_grad}[clear]()
    assert head.weight.grad is None
    before = head.weight.detach().clone()
    head(x, labels).backward()
    assert not torch.equal(head.weight, before)


def test_a_second_backward_is_refused_before_anything_changes(lane):
    head, made, loss, x, labels = stepped(lane)
    before = head.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"FusedSGD: .* a second backward before step"):
        head(x, labels).backward()
    assert torch.equal(head.weight, before)
    made.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_two_losses_of_one_head_in_one_backward(lane):
    head = head_of(lane)
    FusedSGD(head, lr=0.1)
    made = FusedSGD(head, lr=0.1)
    x, labels = next(batches(lane, torch.float32, 1))
    with pytest.raises(RuntimeError, match="FusedSGD: "):
        (head(x, labels) + head(x, labels)).backward()
    del made


@pytest.mark.parametrize("first", [True, False])
def test_the_weight_elsewhere_in_the_loss(lane, first):
    head = head_of(lane)
    made = FusedSGD(head, lr=0.1)
    x, labels = next(batches(lane, torch.float32, 1))
    loss = head(x, labels)
    penalty = head.weight.abs().sum()  # keeps sign(weight) alone
    with pytest.raises(RuntimeError, match="clipping by the global norm"):
        (penalty + loss if first else loss + penalty).backward()
    del made


def test_a_gradient_from_elsewhere_is_refused_by_step(lane):
    head = head_of(lane)
    made = FusedSGD(head, lr=0.1)
    before = head.weight.detach().clone()
    head.weight.sum().backward()
    with pytest.raises(RuntimeError, match=r"FusedSGD: .* got a gradient in weight\.grad"):
        made.step()
    x, labels = next(batches(lane, torch.float32, 1))
    with pytest.raises(RuntimeError, match="that something else has left"):
        head(x, labels).backward()
    assert torch.equal(head.weight, before)


def test_create_graph_and_hooks_and_float16(lane):
    head = head_of(lane)
    made = FusedSGD(head, lr=0.1)
    x, labels = next(batches(lane, torch.float32, 1))
    before = head.weight.detach().clone()
    with pytest.raises(RuntimeError, match="FusedSGD: expected a backward without create_graph"):
        head(x, labels).backward(create_graph=True)
    with (
        torch.autocast(lane.device.type, torch.float16),
        pytest.raises(RuntimeError, match="float16, which needs a GradScaler"),
    ):
        head(x, labels)
    for hook in (head.weight.register_hook, head.weight.register_post_accumulate_grad_hook):
        handle = hook(lambda _: None)
        with pytest.raises(RuntimeError, match="FusedSGD: expected no hook"):
            head(x, labels)
        with pytest.raises(ValueError, match="FusedSGD: expected no hook"):
            FusedSGD(head)
        handle.remove()
        loss = head(x, labels)
        handle = hook(lambda _: None)  # after the forward
        with pytest.raises(RuntimeError, match="FusedSGD: expected no hook"):
            loss.backward()
        handle.remove()
    assert torch.equal(head.weight, before)
    with pytest.raises(TypeError, match="float16 needs a GradScaler"):
        FusedSGD(head_of(lane, torch.float16))
    del made


@pytest.mark.parametrize("kind", ["momentum", "adam", "adamw"])
def test_a_captured_step_that_a_replay_would_get_wrong(lane, monkeypatch, kind):
    """Adam's corrections are of one step; so is the momentum that begins."""
    head, (ours, _, options) = head_of(lane), KINDS[kind]
    made = ours(head, **options)
    x, labels = next(batches(lane, torch.float32, 1))
    loss, before = head(x, labels), head.weight.detach().clone()
    monkeypatch.setattr(checks, "capturing", lambda _: True)
    with pytest.raises(RuntimeError, match="expected a backward that no CUDA graph captures"):
        loss.backward()
    assert torch.equal(head.weight, before) and not made.state[head.weight]
    monkeypatch.undo()
    head(x, labels).backward()
    made.step()
    made.zero_grad()
    loss = head(x, labels)
    monkeypatch.setattr(checks, "capturing", lambda _: True)
    if kind == "momentum":
        loss.backward()  # the same numbers at every step, as in torch
    else:
        with pytest.raises(RuntimeError, match="expected a backward that no CUDA graph captures"):
            loss.backward()


def test_autograd_grad_gives_gradients_and_moves_nothing(lane):
    head, plain = head_of(lane, learn_scale=True), head_of(lane, learn_scale=True)
    made = FusedSGD(head, lr=0.1)
    x, labels = next(batches(lane, torch.float32, 1))
    asked = torch.autograd.grad(head(x, labels), [x, head.weight, head.scale])
    expected = torch.autograd.grad(plain(x, labels), [x, plain.weight, plain.scale])
    for a, b in zip(asked, expected, strict=True):
        assert torch.equal(a, b)
    torch.autograd.grad(head(x, labels), x)
    head(x, labels).backward(inputs=[x, head.scale])
    assert torch.equal(head.weight, plain.weight) and head.weight.grad is None
    with torch.no_grad():
        head(x, labels)
    del made


def test_who_may_have_the_weight(lane):
    head = head_of(lane)
    other = nf.NormLinear(DIM, CLASSES, device=lane.device)
    other.weight = head.weight
    with pytest.raises(ValueError, match="got one that NormLinear has as well"):
        FusedSGD(nn.ModuleList([head, other]))
    with pytest.raises(ValueError, match="expected `head` to be or to contain a head"):
        FusedSGD(nn.Linear(2, 3))
    with pytest.raises(TypeError, match="expected `head` to be a module"):
        FusedSGD(list(head.parameters()))
    with pytest.raises(ValueError, match="among the parameters"):
        FusedSGD(head, params=[nn.Parameter(torch.zeros(2))])
    nn.utils.parametrizations.weight_norm(head)
    with pytest.raises(ValueError, match="got a parametrized one"):
        FusedSGD(head)


def test_the_last_to_take_a_weight_has_it():
    """Whoever had it before says so at its step, and not that it has moved what it has not."""
    head = nf.NormFaceLoss(DIM, CLASSES)
    first, second = FusedSGD(head), FusedAdam(head)
    before = head.weight.detach().clone()
    head(torch.randn(BATCH, DIM), torch.zeros(BATCH, dtype=torch.long)).backward()
    with pytest.raises(RuntimeError, match=r"FusedSGD: .* that a later optimizer has taken"):
        first.step()
    first.release()
    second.step()
    assert not torch.equal(head.weight, before)


def test_groups_and_a_backbone(lane):
    """Everything else is moved by step(), and lr is read when backward runs."""

    def run(optimizer):
        torch.manual_seed(0)
        model = nn.ModuleDict({"backbone": nn.Linear(DIM, DIM), "head": head_of(lane, learn_scale=True)})
        model = model.to(lane.device)
        groups = nf.parameter_groups(model, weight_decay=0.1, lr=0.05)
        made = optimizer(model, groups)
        for k, (x, labels) in enumerate(batches(lane, torch.float32, 4, ignored=False)):
            for group in made.param_groups:
                group["lr"] = 0.1 / (k + 1)
            made.zero_grad()
            model["head"](model["backbone"](x), labels).backward()
            made.step()
        return model

    expected = run(lambda model, groups: torch.optim.SGD(groups, momentum=0.9))
    found = run(lambda model, groups: FusedSGD(model, momentum=0.9, params=groups))
    for a, b in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_closure_and_hooks_of_the_optimizer(lane):
    torch.optim.SGD([nn.Parameter(torch.zeros(1))])  # torch wraps the step of a class at its first instance
    head, called = head_of(lane), []
    made = FusedSGD(head, lr=0.1)
    made.register_step_post_hook(lambda *_: called.append(1))
    x, labels = next(batches(lane, torch.float32, 1))

    def closure():
        made.zero_grad()
        loss = head(x, labels)
        loss.backward()
        return loss

    first = made.step(closure)
    assert made.step(closure) < first
    assert len(called) == 2
    nf.caffe.renormalize_after_step(made, head)
    made.step(closure)
    torch.testing.assert_close(head.weight.norm(dim=1), torch.ones_like(head.weight[:, 0]))


def test_the_weight_has_gradients_again(lane):
    """After release(), and when the optimizer is gone."""
    head = head_of(lane)
    x, labels = next(batches(lane, torch.float32, 1))
    made = FusedSGD(head, lr=0.1)
    made.release()
    head(x, labels).backward()
    assert type(head.weight.grad) is torch.Tensor
    made.step()
    made.zero_grad()
    other = FusedSGD(head, lr=0.1)
    del made, other
    gc.collect()
    head(x, labels).backward()
    assert type(head.weight.grad) is torch.Tensor
    with nf.optim.accumulate_in_place(head):  # nothing takes it any more
        place = head.weight.grad.data_ptr()
        head(x, labels).backward()
        assert head.weight.grad.data_ptr() == place


@pytest.mark.parametrize("fused", [True, False])
def test_after_release_torch_has_the_state(lane, fused):
    """Where torch's kernel of this optimizer counts the steps on the device, they are there."""
    heads = [head_of(lane), head_of(lane)]
    made = FusedAdam(heads[0], lr=0.1, fused=fused)
    theirs = torch.optim.Adam(heads[1].parameters(), lr=0.1, fused=fused)
    assert not made.state
    for head, optimizer in zip(heads, (made, theirs), strict=True):
        train(head, optimizer, batches(lane, torch.float32, 2))
        made.release()
        train(head, optimizer, batches(lane, torch.float32, 2))
    torch.testing.assert_close(heads[0].weight, heads[1].weight, rtol=1e-4, atol=1e-4)
    mine, right = (o.state[h.weight]["step"] for h, o in zip(heads, (made, theirs), strict=True))
    assert mine.device == right.device and torch.equal(mine, right)


def test_a_head_that_grows(lane):
    head = head_of(lane)
    made = FusedSGD(head, lr=0.1, momentum=0.9)
    train(head, made, batches(lane, torch.float32, 1))
    head.resize_classes(CLASSES + 5, optimizer=made)
    for x, labels in batches(lane, torch.float32, 2):
        made.zero_grad()
        before = head.weight.detach().clone()
        head(x, labels).backward()
        assert not torch.equal(head.weight, before), "moved in backward"
        made.step()
    assert made.state[head.weight]["momentum_buffer"].shape == head.weight.shape


def test_a_compiled_step_runs_the_head_outside_the_graph(lane, compile_fully):
    head, plain = head_of(lane, learn_scale=True), head_of(lane, learn_scale=True)
    made, theirs = FusedSGD(head, lr=0.1), torch.optim.SGD(plain.parameters(), lr=0.1)
    x, labels = next(batches(lane, torch.float32, 1))
    with pytest.raises(Exception, match="which no compiled graph can do"):
        compile_fully(head)(x, labels)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, labels: head(x * 2, labels) + 1, backend="aot_eager")
    for x, labels in batches(lane, torch.float32, 3):
        compiled(x, labels).backward()
        made.step()
        made.zero_grad()
        plain(x.detach() * 2, labels).backward()
        theirs.step()
        theirs.zero_grad()
    torch.testing.assert_close(head.weight, plain.weight)
    torch._dynamo.reset()
    made.release()
    compile_fully(head)(x, labels).backward()
    assert type(head.weight.grad) is torch.Tensor


def test_the_registry_lets_go():
    for _ in range(3):
        head = nf.NormFaceLoss(4, 5)
        FusedSGD(head)
        del head
    gc.collect()
    nf.optim.accumulate_in_place(nf.NormFaceLoss(4, 5)).remove()
    assert updates._count == len(updates._takers) == 0


def test_a_head_that_nobody_takes_compiles_whole_beside_one_that_is_taken():
    taken, free = (nf.NormFaceLoss(16, 50, scale=8.0) for _ in range(2))
    optimizer = nf.optim.FusedSGD(taken, lr=0.1)
    x, labels = torch.randn(8, 16), torch.randint(50, (8,))
    compiled = torch.compile(free, fullgraph=True, backend="aot_eager")
    compiled(x, labels).backward()
    gradient = free.weight.grad
    free.weight.grad = None
    free(x, labels).backward()
    torch.testing.assert_close(gradient, free.weight.grad)
    # A weight that is taken after it was compiled: where torch.compile does not notice (2.11), step() raises.
    optimizer.release()
    later = nf.optim.FusedSGD(free, lr=0.1)
    free.weight.grad, before = None, free.weight.detach().clone()
    torch.compile(free, backend="aot_eager")(x, labels).backward()
    if torch.equal(free.weight, before):
        with pytest.raises(RuntimeError, match=r"a gradient in weight\.grad"):
            later.step()
    else:
        torch.testing.assert_close(free.weight.detach(), before - 0.1 * gradient)
    later.release()
