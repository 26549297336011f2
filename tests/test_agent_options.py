"""The options of the losses over agents: declared once, checked everywhere; what is shown is what runs."""

import copy
import inspect
import pickle
import re
from dataclasses import MISSING, fields, make_dataclass
from typing import ClassVar, get_origin, get_type_hints

import numpy as np
import pytest
import torch

import normface_ext as nf
from normface_ext import distributed, reference
from normface_ext.agents import functions, losses, ops, options
from normface_ext.engine import calls, lists

F = nf.functional
LAYERS = {"c_contrastive_loss": nf.CContrastiveLoss, "c_triplet_loss": nf.CTripletLoss}
#: name -> (dataclass of options, what static checkers know of it, who takes it)
DECLARED = {
    "contrastive": (
        options.ContrastiveOptions,
        options.ContrastiveKeywords,
        [
            *(F.c_contrastive_loss, F.c_contrastive_stats, distributed.c_contrastive_loss),
            *(reference.c_contrastive_loss, reference.c_contrastive_stats),
            reference.contrastive_of_distances,
        ],
    ),
    "triplet": (
        options.TripletOptions,
        options.TripletKeywords,
        [
            *(F.c_triplet_loss, F.c_triplet_stats, distributed.c_triplet_loss, nf.CTripletLoss),
            *(reference.c_triplet_loss, reference.c_triplet_stats, reference.triplet_of_distances),
        ],
    ),
    "contrastive layer": (
        options.ContrastiveLayerOptions,
        options.ContrastiveLayerKeywords,
        [nf.CContrastiveLoss],
    ),
    "released contrastive": (
        options.ContrastiveTerms,
        options.ContrastiveTermKeywords,
        [nf.caffe.general_contrastive_loss],
    ),
    "released triplet": (
        options.TripletTerms,
        options.TripletTermKeywords,
        [nf.caffe.general_triplet_loss],
    ),
}
#: Another value of every option, that a problem of 7 rows and 9 classes sees where a loss can see it.
OTHERS = {
    "pos_weight": 0.5,
    "neg_weight": 2.0,
    "hardest_only": True,
    "positive_first": True,
    "positive_upper_bound": 0.25,
    "pos_margin": 0.3,
    "neg_margin": 2.5,
    "max_positive_only": True,
    "positive_outlier_thresh": 0.2,
    "exp_negative_weight": True,
    "normalize_negative": 0.05,
    "margin": 2.0,
    "add_center_loss": True,
    "ignore_index": 3,
    "reduction": "sum",
    "eps": 0.5,
    "workspace": 1 << 24,
    "active_limit": 0,
    "check_finite": True,
    "add_intra_mae": True,
    "max_negative_margin": 0.5,
}
#: What changes how a loss is computed, or when, and not what it is in one step from scratch.
UNSEEN = ("workspace", "active_limit", "check_finite", "add_intra_mae", "max_negative_margin")
#: What an option needs beside it to be seen.
TOGETHER = {"positive_upper_bound": {"positive_first": True}, "pos_weight": {"add_center_loss": True}}
both = pytest.mark.parametrize("loss", LAYERS)


def problem(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(7, 6, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.tensor([0, 8, 3, 3, 1, 5, 2])


def options_of(layer):
    return [field.name for field in fields(layer.options)]


EVERY = [
    pytest.param(loss, name, id=f"{loss}-{name}")
    for loss, layer in LAYERS.items()
    for name in options_of(layer(6, 9))
]


@pytest.mark.parametrize("name", DECLARED)
def test_what_type_checkers_know_is_what_is_declared(name):
    declared, keywords, takers = DECLARED[name]
    hints = {key: hint for key, hint in get_type_hints(declared).items() if get_origin(hint) is not ClassVar}
    assert get_type_hints(keywords) == hints and list(hints)
    for taker in takers:
        parameters = inspect.signature(taker).parameters
        for field in fields(declared):
            assert parameters[field.name].kind is inspect.Parameter.KEYWORD_ONLY
            assert parameters[field.name].default == field.default is not MISSING
        assert not [p for p in parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]


@pytest.mark.parametrize(("loss", "name"), EVERY)
def test_an_option_that_is_set_is_the_option_that_runs(loss, name):
    """Set on a layer, given to its constructor or to the function: the same bits; and not the default's."""
    x, labels = problem()
    given = {**TOGETHER.get(name, {}), name: OTHERS[name]}
    given = {key: value for key, value in given.items() if key in options_of(LAYERS[loss](6, 9))}
    torch.manual_seed(1)
    made = LAYERS[loss](6, 9, **given)
    changed = LAYERS[loss](6, 9)
    changed.load_state_dict(made.state_dict(), strict=False)
    before = changed(x, labels)
    for key, value in given.items():
        setattr(changed, key, value)
    assert getattr(changed, name) == getattr(made, name) == OTHERS[name]
    assert repr(changed) == repr(made) != repr(LAYERS[loss](6, 9))
    assert f"{name}={OTHERS[name]!r}" in repr(made)
    value = changed(x, labels)
    assert torch.equal(value, made(x, labels))
    if name not in ("add_intra_mae", "max_negative_margin"):
        assert torch.equal(value, getattr(F, loss)(x, made.weight, labels, **given))
    if name in UNSEEN:
        torch.testing.assert_close(value, before)
    elif not (name == "pos_weight" and loss == "c_triplet_loss"):
        assert abs(float(value.detach()) - float(before.detach())) > 1e-4


@pytest.mark.parametrize(("loss", "name"), EVERY)
def test_what_is_no_option_s_value_is_refused_wherever_it_is_given(loss, name):
    x, labels = problem()
    layer = LAYERS[loss](6, 9)
    kept, owner = getattr(layer, name), type(layer).__name__
    for bad in ([], object(), "nonsense", np.array([1, 2])):
        for op, call in (
            (owner, lambda bad=bad: LAYERS[loss](6, 9, **{name: bad})),
            (owner, lambda bad=bad: setattr(layer, name, bad)),
            (loss, lambda bad=bad: getattr(F, loss)(x, layer.weight, labels, **{name: bad})),
            (loss, lambda bad=bad: getattr(reference, loss)(x, layer.weight, labels, **{name: bad})),
        ):
            if op == loss and name in ("add_intra_mae", "max_negative_margin"):
                continue
            with pytest.raises((TypeError, ValueError), match=f"^{op}: expected `{name}` "):
                call()
    assert getattr(layer, name) is kept


@both
def test_what_is_no_option_is_refused(loss):
    x, labels = problem()
    layer = LAYERS[loss](6, 9)
    for name in ("mode", "return_stats", "scale"):
        for op, call in (
            (loss, lambda name=name: getattr(F, loss)(x, layer.weight, labels, **{name: True})),
            (type(layer).__name__, lambda name=name: LAYERS[loss](6, 9, **{name: True})),
        ):
            with pytest.raises(TypeError, match=f"^{op}: got an unexpected keyword argument `{name}`$"):
                call()


@both
def test_layers_check_their_options_once(loss, monkeypatch):
    """A step passes them on as they are."""
    layer, (x, labels) = LAYERS[loss](6, 9), problem()
    checked = []
    kind = type(layer.options)
    monkeypatch.setattr(kind, "CHECKS", {n: lambda *given: checked.append(given) for n in kind.CHECKS})
    layer(x, labels).backward()
    layer.stats(x, labels)
    assert not checked


@both
def test_layers_are_copied_and_saved_with_their_options(loss):
    layer, (x, labels) = LAYERS[loss](6, 9, hardest_only=True, reduction="sum"), problem()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(twin) == repr(layer) and torch.equal(twin(x, labels), layer(x, labels))


def test_a_margin_that_is_a_tensor_is_shown():
    layer = nf.CContrastiveLoss(6, 9, neg_margin=torch.tensor(1.5))
    assert repr(layer) == "CContrastiveLoss(6, 9, neg_margin=tensor(1.5000))"
    x, labels = problem()
    assert torch.equal(layer(x, labels), F.c_contrastive_loss(x, layer.weight, labels, neg_margin=1.5))


@both
def test_nobody_has_to_be_ignored(loss):
    """ignore_index=None: -100 is a label out of range, and so is the number that stands for nobody."""
    layer, (x, labels) = LAYERS[loss](6, 9, ignore_index=None), problem()
    plain = LAYERS[loss](6, 9)
    plain.weight = layer.weight
    assert torch.equal(layer(x, labels), plain(x, labels))
    for nobody in (-100, torch.iinfo(torch.int64).min):
        with pytest.raises(IndexError, match=rf"expected `labels` in \[0, 9\), got {nobody} at row 2"):
            layer(x, torch.where(torch.arange(7) == 2, nobody, labels))


@both
def test_int32_labels_count(loss):
    layer, (x, labels) = LAYERS[loss](6, 9), problem()
    assert torch.equal(layer(x, labels.int()), layer(x, labels))
    assert torch.equal(layer.stats(x, labels.int()), layer.stats(x, labels))


# The ops' arguments ---------------------------------------------------------------------------------


def test_the_options_of_an_op_end_its_arguments():
    x, _ = problem()
    chosen = options.ContrastiveOptions(exp_negative_weight=True, eps=1e-6)
    given = functions.sweep_options("", x, x, 7, 9, -100, chosen, True, is_shard=True)[1]
    for op in ("target_cosine", "hinge_threshold", "hinge_slopes", "hinge_pairs", "cosine_pairs_backward"):
        names, values = calls.argument_names(op), calls.options_of(op, ops.AgentSweepOptions)(given)
        assert len(values) >= 2
        for name, value in zip(names[-len(values) :], values, strict=True):
            assert value is getattr(given, name)
    some = make_dataclass("Some", ["hardest", "triplet"])
    for op in ("hinge_slopes", "normalize"):
        with pytest.raises(TypeError, match=f"^{op}: expected its arguments to end in those of Some, got "):
            calls.options_of(op, some)


def test_a_list_is_for_what_it_is_quicker_at():
    """By default where little of much work is active; an explicit limit is obeyed."""
    shares, float32, much = lists.LISTED_SHARE, torch.float32, 1 << 31

    def limits(device, dtype, workspace, limit, *shape):
        return lists.list_limits(*shape, device, dtype, workspace, limit)

    for device in ("cpu", "cuda"):
        assert limits(device, float32, much, None, 32, 64, 100) == (0, 0)
        wanted = int(2 * 10_572 * shares[device]), int(256 * 10_572 * shares[device])
        assert limits(device, float32, much, None, 256, 512, 10_572) == wanted
        for limit, capacity in ((7, 7), (0, 0), (1000, 99)):
            assert limits(device, float32, much, limit, 32, 64, 100) == (capacity, 32 * capacity)
        # A list has an eighth of the workspace.
        capacity = limits(device, float32, 1 << 20, None, 256, 512, 100_000)[0]
        assert 256 * capacity * lists.LISTED_BYTES <= 1 << 17 < 256 * (capacity + 1) * lists.LISTED_BYTES
    assert limits("cuda", torch.bfloat16, much, None, 256, 512, 10_572) == (0, 0)
    narrow = limits("cuda", torch.bfloat16, much, None, 1024, 512, 1_000_000)
    assert narrow == (7812, 4_000_000)


def test_lists_are_a_part_of_the_workspace():
    """What they take, the sweep has not; where nothing fits beside them there are none."""
    x, weight = torch.randn(256, 64), torch.randn(10_572, 64)

    def swept(workspace, limit=None):
        chosen = options.TripletOptions(workspace=workspace, active_limit=limit)
        return functions.sweep_options("", x, weight, 256, 10_572, -100, chosen, True)[1]

    much = 1 << 28
    listed = swept(much)
    assert listed.capacity > 0
    assert listed.workspace == much - lists.list_bytes(256, listed.capacity)
    assert swept(much, 0).workspace == much and swept(much, 0).capacity == 0
    said = nf.plan(256, 64, 10_572, workspace=much, agents=True)
    assert said.listed == listed.capacity and said.list_bytes == lists.list_bytes(256, said.listed)
    assert said.list_bytes < said.workspace_bytes <= much
    assert f"lists of {said.listed} active classes a row" in str(said)
    plain = nf.plan(256, 64, 10_572, workspace=much)
    assert plain.listed == plain.list_bytes == 0 and "lists of" not in str(plain)
    with pytest.raises(ValueError) as told:
        nf.plan(256, 64, 10_572, workspace=1)
    least = int(re.search(r"at least (\d+) bytes", str(told.value))[1])
    none = swept(least, 1000)
    assert (none.capacity, none.most_listed, none.workspace) == (0, 0, least)
    few = nf.plan(256, 64, 10_572, workspace=least, agents=True)
    assert few.listed == 0 and few.workspace_bytes <= least


@pytest.mark.parametrize(
    ("active", "width"), [([3, 2, 0], 3), ([4, 4, 0], None), ([5, 0, 0], None), ([0, 0, 0], 0), ([], None)]
)
def test_a_list_is_followed_where_it_holds_all_and_that_is_little(active, width):
    x, _ = problem()
    given = functions.sweep_options("", x, x, 3, 9, -100, options.TripletOptions(active_limit=4), True)[1]
    given.most_listed = 7
    counts = torch.tensor(active, dtype=torch.float64)
    assert ops.listed_width(counts, given) == width
    given.capacity = 0
    assert ops.listed_width(counts, given) is None
    given.hardest = True
    assert ops.listed_width(counts, given) == 1


# torch.compile --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: nf.CContrastiveLoss(6, 9),
        lambda: nf.CContrastiveLoss(6, 9, add_intra_mae=True, normalize_negative=0.1),
        lambda: nf.CTripletLoss(6, 9, add_center_loss=True),
        lambda: nf.CTripletLoss(6, 9, hardest_only=True, reduction="none"),
    ],
    ids=["contrastive", "running mean", "triplet", "hardest"],
)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_layers_compile_into_one_graph(make, dynamic, weighted):
    torch.manual_seed(0)
    eager = make()
    other = copy.deepcopy(eager)
    torch._dynamo.reset()
    compiled = torch.compile(other, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (7, 4, 6):
        x, labels = problem(rows)
        x, labels = x[:rows].clone().requires_grad_(), labels[:rows]
        given = (torch.rand(rows),) if weighted else ()
        runs = [layer(x, labels, *given).mean() for layer in (eager, compiled)]
        torch.testing.assert_close(*runs)
        slopes = [
            torch.autograd.grad(value, (x, layer.weight))
            for value, layer in zip(runs, (eager, other), strict=True)
        ]
        for a, b in zip(*slopes, strict=True):
            torch.testing.assert_close(b, a)
    torch.testing.assert_close(dict(eager.named_buffers()), dict(other.named_buffers()))


@both
def test_statistics_compile(loss, compile_fully):
    layer, (x, labels) = LAYERS[loss](6, 9), problem()
    assert torch.equal(compile_fully(layer.stats)(x, labels), layer.stats(x, labels))


def test_rows_are_reduced_as_the_mean_of_those_that_count():
    rows = losses.AgentRows(torch.tensor([True, False, True]), None, *[torch.zeros(3)] * 3)
    values = torch.tensor([1.0, float("nan"), 4.0])
    assert rows.reduced(values, "mean") == 2.5 and rows.reduced(values, "sum") == 5
    weighted = rows._replace(factor=torch.tensor([3.0, float("nan"), 1.0]))
    assert weighted.reduced(values, "mean") == 7 / 4 and weighted.reduced(values, "sum") == 7
    none = weighted._replace(kept=torch.zeros(3, dtype=torch.bool))
    assert none.reduced(values, "mean") == 0 and none.reduced(values, "none").tolist() == [0, 0, 0]
