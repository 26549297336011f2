"""Margins that look at the batch, in a layer: state, copies, files, compiled and recomputed steps."""

import copy
import io
import pickle

import pytest
import torch
from dense_head import OPTIONS, allowed, assert_equal_to_1e10, gradients, on, problem
from torch.utils.checkpoint import checkpoint

import normface_ext as nf
from normface_ext.softmax.batch_margins import BatchMargin
from normface_ext.softmax.margins import Margin

KINDS = {
    "adaface": lambda: nf.AdaFace(t_alpha=0.25),
    "magface": nf.MagFace,
    "elastic_arc": nf.ElasticArcFace,
    "elastic_arc_plus": lambda: nf.ElasticArcFace(plus=True),
    "elastic_cos": nf.ElasticCosFace,
    "elastic_cos_plus": lambda: nf.ElasticCosFace(plus=True),
    "curricular": lambda: nf.CurricularFace(alpha=0.25),
    "mv_arc": nf.MVSoftmax,
    "mv_am": lambda: nf.MVSoftmax(kind="am"),
    "mv_fixed": lambda: nf.MVSoftmax(adaptive=False),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def head_of(kind, **options):
    torch.manual_seed(0)
    return nf.NormFaceLoss(16, 7, scale=32.0, margin=KINDS[kind](), dtype=torch.float64, **options)


def trained(kind, steps=2, **options):
    head = head_of(kind, **options)
    for step in range(steps):
        x, _, labels = problem(seed=step)
        head(x, labels)
    return head


def next_loss(head, seed=9):
    x, _, labels = problem(seed=seed)
    x.requires_grad_()
    head.zero_grad()
    torch.manual_seed(seed)
    loss = head(x, labels)
    loss.backward()
    return [loss.detach(), x.grad, head.weight.grad.clone()]


@every_kind
def test_it_is_a_margin_and_the_layers_submodule(kind):
    head = head_of(kind)
    assert isinstance(head.margin, Margin) and isinstance(head.margin, BatchMargin)
    assert head.margin is head.options.margin is dict(head.named_children())["margin"]
    assert not head.eval().margin.training and head.train().margin.training
    assert repr(head.margin) in repr(head) and repr(head.margin).startswith(type(head.margin).__name__)
    assert head.margin == head.margin != KINDS[kind]()
    assert hash(head.options) == hash(head.options)


@every_kind
def test_the_layer_is_the_function(kind):
    head, x = head_of(kind), problem()[0]
    labels, margin = problem()[2], copy.deepcopy(head.margin)
    torch.manual_seed(1)
    loss = head(x, labels)
    torch.manual_seed(1)
    assert loss == nf.functional.normface_loss(x, head.weight, labels, 32.0, margin=margin)
    assert all(torch.equal(a, b) for a, b in zip(head.margin.buffers(), margin.buffers(), strict=True))


@every_kind
def test_resumed_as_if_never_stopped(kind):
    head, file = trained(kind), io.BytesIO()
    torch.save(head.state_dict(), file)
    file.seek(0)
    again = head_of(kind)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert_equal_to_1e10(next_loss(again), next_loss(head))
    assert_equal_to_1e10(next_loss(again), next_loss(head))  # the state moved alike


@pytest.mark.covering(2)
@every_kind
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("gradient", ["exact", "straight"])
def test_it_is_the_specification(lane, kind, gradient, options):
    x, weight, labels = problem()
    ours, plain = KINDS[kind]().to(lane.device), KINDS[kind]()
    options = allowed(plain, options)
    if "elastic" in kind:
        ours.std = plain.std = 0.0  # a GPU draws others
    torch.manual_seed(1)
    found = gradients(
        lambda x, w: nf.functional.normface_loss(
            x, w, lane.tensor(labels), 16.0, margin=ours, margin_gradient=gradient, **on(lane, options)
        ),
        lane.tensor(x),
        lane.tensor(weight),
    )
    torch.manual_seed(1)
    expected = gradients(
        lambda x, w: nf.reference.normface_loss(
            x, w, labels, 16.0, margin=plain, margin_gradient=gradient, **options
        ),
        x,
        weight,
    )
    assert_equal_to_1e10(found, expected)


def test_the_state_is_in_the_state_dict():
    state = trained("adaface").state_dict()
    assert {"margin.mean", "margin.std"} <= set(state)
    assert state["margin.mean"] != 20 and state["margin.std"] != 100


@every_kind
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda head: pickle.loads(pickle.dumps(head))], ids=["deepcopy", "pickle"]
)
def test_copies_have_a_state_of_their_own(kind, copied):
    head = trained(kind)
    twin, before = copied(head), [b.clone() for b in head.buffers()]
    assert twin.margin is twin.options.margin is not head.margin
    found = next_loss(twin)
    assert all(torch.equal(a, b) for a, b in zip(head.buffers(), before, strict=True))
    assert_equal_to_1e10(found, next_loss(head))


def test_the_state_follows_the_layer_and_stays_wide():
    head = nf.NormFaceLoss(16, 7, margin=nf.AdaFace())
    assert head.half().margin.mean.dtype == torch.float64 and head.weight.dtype == torch.float16
    assert head.bfloat16().margin.std.dtype == torch.float64
    assert head.float().margin.mean.dtype == torch.float32
    assert head.half().margin.mean.dtype == torch.float32
    assert head.double().margin.mean.dtype == torch.float64
    assert head.to("meta").margin.mean.is_meta


def test_born_on_the_meta_device():
    with torch.device("meta"):
        head = nf.NormFaceLoss(16, 7, margin=nf.AdaFace())
    assert head.margin.mean.is_meta
    head.to_empty(device="cpu")
    for module in head.modules():
        module.reset_parameters()
    assert (float(head.margin.mean), float(head.margin.std)) == (20.0, 100.0)
    x, _, labels = problem(dtype=torch.float32)
    assert head(x, labels).isfinite()


def test_another_margin_may_take_its_place():
    head = trained("adaface")
    head.margin = nf.MagFace()
    assert head.margin is dict(head.named_children())["margin"] and "margin.mean" not in head.state_dict()
    head.margin = nf.CosFace(0.35)
    assert "margin" not in dict(head.named_children())
    assert head(*problem()[::2]).isfinite()


def test_functional_call_brings_another_state():
    head = head_of("adaface").eval()
    x, _, labels = problem()
    state = {name: t.detach().clone() for name, t in head.state_dict().items()}
    state["margin.mean"].fill_(40.0)
    found = torch.func.functional_call(head, state, (x, labels))
    assert found != head(x, labels)
    head.margin.mean.fill_(40.0)
    assert found == head(x, labels)


# Rows that do not count -------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_what_ignored_rows_hold_reaches_nothing(kind, reduction):
    x, weight, labels = problem()
    weights = torch.ones(9)
    weights[0] = 0
    found = []
    for filler in (1.0, float("nan"), float("inf"), 1e300):
        given = x.clone()
        given[4], given[0] = filler, filler
        given.requires_grad_()
        w, margin = weight.clone().requires_grad_(), KINDS[kind]()
        torch.manual_seed(2)
        loss = nf.functional.normface_loss(
            given, w, labels, 32.0, margin=margin, reduction=reduction, sample_weight=weights
        )
        loss.sum().backward()
        assert not given.grad[[0, 4]].any()
        found.append([loss.detach(), given.grad, w.grad, *margin.buffers()])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


@every_kind
def test_nothing_counts(kind):
    x, weight, labels = problem()
    x.requires_grad_()
    loss = nf.functional.normface_loss(x, weight, torch.full_like(labels, -100), 32.0, margin=KINDS[kind]())
    loss.backward()
    assert loss == 0 and not x.grad.any()
    empty = nf.functional.normface_loss(x[:0], weight, labels[:0], 32.0, margin=KINDS[kind]())
    assert empty == 0


@every_kind
def test_no_label_is_ignored_if_so_asked(kind):
    x, weight, labels = problem()
    with pytest.raises(IndexError, match="expected `labels` in"):
        nf.functional.normface_loss(x, weight, labels, 32.0, margin=KINDS[kind](), ignore_index=None)
    loss = nf.functional.normface_loss(
        x, weight, labels.clamp_min(0), 32.0, margin=KINDS[kind](), ignore_index=None
    )
    assert loss.isfinite()


# Compiled and recomputed steps ------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_compiled_without_a_break(kind, mode, compile_fully):
    """With the draws of the compiled step's own: ElasticFace is held to its loss in eval mode."""
    eager, x = head_of(kind).train(mode == "train"), problem()[0]
    compiled, labels = copy.deepcopy(eager), problem()[2]
    step = compile_fully(compiled)
    for _ in range(2):
        torch.manual_seed(3)
        expected = eager(x, labels)
        torch.manual_seed(3)
        given = x.clone().requires_grad_()
        found = step(given, labels)
        found.backward()
        assert given.grad.isfinite().all()
        torch.testing.assert_close(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(eager.buffers(), compiled.buffers(), strict=True))


@every_kind
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_in_the_backward(kind, reentrant):
    """The state moves once, and both runs have the same margins."""
    plain = trained(kind)
    again = copy.deepcopy(plain)
    x, _, labels = problem(seed=7)
    results = []
    for head, run in ((plain, plain), (again, lambda *a: checkpoint(again, *a, use_reentrant=reentrant))):
        given = x.clone().requires_grad_()
        torch.manual_seed(4)
        loss = run(given, labels)
        loss.backward()
        results.append([loss.detach(), given.grad, head.weight.grad, *(b.clone() for b in head.buffers())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_under_no_grad_a_training_step_moves_the_state():
    """As BatchNorm's does."""
    head = head_of("adaface")
    with torch.no_grad():
        head(*problem()[::2])
    assert float(head.margin.mean) != 20.0


@every_kind
def test_features_without_values(kind):
    """Shapes come out, and a state that is elsewhere stays as it is."""
    head = nf.NormFaceLoss(16, 7, margin=KINDS[kind](), device="meta")
    before = [state.clone() for state in head.margin.buffers()]
    x = torch.empty(5, 16, device="meta", requires_grad=True)
    loss = head(x, torch.empty(5, dtype=torch.int64, device="meta"))
    loss.backward()
    assert loss.is_meta and loss.shape == () and x.grad.is_meta
    assert all(map(torch.equal, head.margin.buffers(), before))


@pytest.mark.parametrize("margin", [nf.AdaFace, nf.CurricularFace])
@pytest.mark.parametrize("device", ["nowhere", 3.5])
def test_what_is_no_device(margin, device):
    sentence = rf"{margin.__name__}: expected `device` to be a device, got {device!r}"
    with pytest.raises(ValueError, match=sentence):
        margin(device=device)
