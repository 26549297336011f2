"""Arguments that are plain values: every function and layer names what is wrong as the caller wrote it."""

import fractions
import math

import numpy as np
import pytest
import torch

import normface_ext as nf
from normface_ext.distributed import ClassSampler, RowAdamW, RowSGD, clip_grad_norm_
from normface_ext.engine import arguments

F = nf.functional
X, W, Y = torch.randn(4, 5), torch.randn(6, 5), torch.tensor([0, 1, 2, 3])
SAME = torch.tensor([True, False, True, False])
CALLS = {
    "normalize": lambda **given: F.normalize(X, **given),
    "norm_linear": lambda **given: F.norm_linear(X, W, **given),
    "normface_loss": lambda **given: F.normface_loss(X, W, Y, **{"scale": 8.0, **given}),
    "inner_distance": lambda **given: F.inner_distance(X, W, **given),
    "c_contrastive_loss": lambda **given: F.c_contrastive_loss(X, W, Y, **given),
    "c_triplet_loss": lambda **given: F.c_triplet_loss(X, W, Y, **given),
    "c_contrastive_stats": lambda **given: F.c_contrastive_stats(X, W, Y, **given),
    "c_triplet_stats": lambda **given: F.c_triplet_stats(X, W, Y, **given),
    "general_contrastive_loss": lambda **given: nf.caffe.general_contrastive_loss(X, Y, **given),
    "general_triplet_loss": lambda **given: nf.caffe.general_triplet_loss(X, Y, **given),
    "pair_contrastive_loss": lambda **given: F.pair_contrastive_loss(X, X + 1, SAME, **given),
    "triplet_loss": lambda **given: F.triplet_loss(X, X + 1, X - 1, **given),
    "plan": lambda **given: nf.plan(**{"batch": 4, "dim": 5, "classes": 6, **given}),
    "NormalizeLayer": lambda **given: nf.NormalizeLayer(**given),
    "NormLinear": lambda **given: nf.NormLinear(**{"in_features": 5, "out_features": 6, **given}),
    "NormFaceLoss": lambda **given: nf.NormFaceLoss(**{"in_features": 5, "num_classes": 6, **given}),
    "InnerDistance": lambda **given: nf.InnerDistance(**{"in_features": 5, "out_features": 6, **given}),
    "CContrastiveLoss": lambda **given: nf.CContrastiveLoss(**{"in_features": 5, "num_classes": 6, **given}),
    "CTripletLoss": lambda **given: nf.CTripletLoss(**{"in_features": 5, "num_classes": 6, **given}),
    "PairContrastiveLoss": lambda **given: nf.PairContrastiveLoss(**given),
    "TripletLoss": lambda **given: nf.TripletLoss(**given),
    "loss_lower_bound": lambda **given: nf.theory.loss_lower_bound(**{"num_classes": 6, **given}),
    "scale_for_bound": lambda **given: nf.theory.scale_for_bound(**{"num_classes": 6, "bound": 0.1, **given}),
    "max_probability": lambda **given: nf.theory.max_probability(**{"num_classes": 6, **given}),
    "CombinedMargin": lambda **given: nf.CombinedMargin(**given),
    "ClassSampler": lambda **given: ClassSampler(**{"rate": 0.5, **given}),
    "RowSGD": lambda **given: RowSGD([torch.nn.Parameter(X)], **given),
    "RowAdamW": lambda **given: RowAdamW([torch.nn.Parameter(X)], **given),
    "clip_grad_norm_": lambda **given: clip_grad_norm_([], **{"max_norm": 1.0, **given}),
}
#: Who takes which argument.
STATS, GENERAL = (
    ("c_contrastive_stats", "c_triplet_stats"),
    ("general_contrastive_loss", "general_triplet_loss"),
)
LOSSES = ("c_contrastive_loss", "c_triplet_loss", "CContrastiveLoss", "CTripletLoss")
INTEGERS = {
    "ignore_index": ("normface_loss", "NormFaceLoss", *LOSSES),
    "workspace": ("plan", "normface_loss", "NormFaceLoss", *LOSSES),
    "active_limit": (*LOSSES, *STATS),
    "dim": ("normalize", "NormalizeLayer", "plan"),
    "batch": ("plan",),
    "classes": ("plan",),
    "in_features": ("NormLinear", "NormFaceLoss", "InnerDistance", *LOSSES[2:]),
    "out_features": ("NormLinear", "InnerDistance"),
    "num_classes": (
        "NormFaceLoss",
        *LOSSES[2:],
        "loss_lower_bound",
        "scale_for_bound",
        "max_probability",
    ),
    "seed": ("ClassSampler",),
}
NONE_IS_FINE = ("ignore_index", "workspace", "active_limit", "normalize_negative", "max_scale")
AGENTS = ("pos_weight", "neg_weight", "positive_upper_bound")
NUMBERS = {
    "eps": (
        "normalize",
        "norm_linear",
        "normface_loss",
        "inner_distance",
        "NormalizeLayer",
        "NormLinear",
        "NormFaceLoss",
        "InnerDistance",
        "RowAdamW",
        *LOSSES,
        *STATS,
    ),
    "scale": ("norm_linear", "normface_loss", "NormLinear", "NormFaceLoss", "max_probability"),
    "min_scale": ("NormLinear", "NormFaceLoss"),
    "max_scale": ("NormLinear", "NormFaceLoss"),
    "label_smoothing": ("normface_loss", "NormFaceLoss"),
    "margin": (
        "c_triplet_loss",
        "pair_contrastive_loss",
        "triplet_loss",
        "CTripletLoss",
        "PairContrastiveLoss",
        "TripletLoss",
    ),
    "neg_margin": ("c_contrastive_loss", "CContrastiveLoss", STATS[0], GENERAL[0]),
    "pos_margin": ("c_contrastive_loss", "CContrastiveLoss"),
    "positive_outlier_thresh": ("c_contrastive_loss", "CContrastiveLoss"),
    "normalize_negative": ("c_contrastive_loss", "CContrastiveLoss"),
    "max_negative_margin": ("CContrastiveLoss",),
    **dict.fromkeys(AGENTS, (*LOSSES, *GENERAL)),
    "m1": ("CombinedMargin",),
    "m2": ("CombinedMargin",),
    "m3": ("CombinedMargin",),
    "bound": ("scale_for_bound",),
    "rate": ("ClassSampler",),
    "lr": ("RowSGD", "RowAdamW"),
    "momentum": ("RowSGD",),
    "weight_decay": ("RowSGD", "RowAdamW"),
    "max_norm": ("clip_grad_norm_",),
}
FLAGS = {
    "return_norm": ("normalize", "NormalizeLayer"),
    "normalize_input": ("norm_linear", "NormLinear"),
    "normalize": ("inner_distance", "InnerDistance"),
    "update_center_only": ("inner_distance", "InnerDistance"),
    "learn_scale": ("NormLinear", "NormFaceLoss"),
    "hardest_only": (*LOSSES, *GENERAL),
    "positive_first": (*LOSSES, *GENERAL),
    "check_finite": ("normface_loss", "NormFaceLoss", *LOSSES, *STATS, *GENERAL),
    "add_center_loss": ("c_triplet_loss", "CTripletLoss"),
    "max_positive_only": ("c_contrastive_loss", "CContrastiveLoss"),
    "exp_negative_weight": ("c_contrastive_loss", "CContrastiveLoss"),
    "add_intra_mae": ("CContrastiveLoss",),
    "nesterov": ("RowSGD",),
}
CHOICES = {
    "reduction": (
        "normface_loss",
        "pair_contrastive_loss",
        "triplet_loss",
        "NormFaceLoss",
        *LOSSES,
        "PairContrastiveLoss",
        "TripletLoss",
    ),
    "p": ("normalize", "inner_distance", "NormalizeLayer", "InnerDistance"),
}
LIST, TEXT = [0], "1"


def cases(table):
    return [pytest.param(call, name, id=f"{call}-{name}") for name, calls in table.items() for call in calls]


def refused(call, name, values):
    for value in values:
        if value is None and name in NONE_IS_FINE:
            continue
        with pytest.raises((TypeError, ValueError)) as raised:
            CALLS[call](**{name: value})
        assert str(raised.value).startswith(f"{call}: expected `{name}` "), f"{value!r}: {raised.value}"
        assert len(str(raised.value)) < 200


@pytest.mark.parametrize(("call", "name"), cases(INTEGERS))
def test_what_is_no_integer_is_refused(call, name):
    kinds = [None, TEXT, 1.5, 2.0, math.nan, -math.inf, math.inf, LIST, (1, 2), True, np.bool_(True), 1j]
    arrays = [
        np.float64(2),
        np.array([2]),
        np.array(2.0),
        torch.tensor(2.0),
        torch.tensor([2]),
        torch.ones(2),
    ]
    refused(call, name, [*kinds, *arrays, torch.tensor(True), fractions.Fraction(2)])
    if name != "dim" and call != "plan":
        refused(call, name, [2**70, -(2**70), 10**5000])


@pytest.mark.parametrize(("call", "name"), cases(INTEGERS))
def test_integers_of_other_libraries_count(call, name):
    value = {"workspace": 1 << 30, "dim": 1}.get(name, 5)
    for kind in (np.int64, np.int32, np.uint8 if value < 256 else np.uint64, np.array, torch.tensor):
        CALLS[call](**{name: kind(value)})


@pytest.mark.parametrize(("call", "name"), cases(NUMBERS))
def test_what_is_no_number_is_refused(call, name):
    kinds = [None, TEXT, math.nan, -math.inf, LIST, True, np.bool_(True), 1j, -(10**5000), 10**400]
    kinds += [fractions.Fraction(10**400)]
    arrays = [np.float32("nan"), np.array([0.5]), np.array("0.5"), np.array(True)]
    # A margin's numbers may be tensors, of integers never.
    arrays += [torch.ones(2, dtype=torch.int64 if call == "CombinedMargin" else torch.float32)]
    refused(call, name, [*kinds, *arrays])


@pytest.mark.parametrize(("call", "name"), cases(NUMBERS))
def test_numbers_of_other_libraries_count(call, name):
    value = {"rate": 0.5, "label_smoothing": 0.5, "m1": 1.5, "min_scale": 0.5, "max_scale": 64.0}.get(
        name, 1.0
    )
    for kind in (float, np.float64, np.float32, np.float16, np.array, fractions.Fraction):
        CALLS[call](**{name: kind(value)})
    if value == 1:
        CALLS[call](**{name: 1})
        CALLS[call](**{name: np.int32(1)})


@pytest.mark.parametrize(("call", "name"), cases(FLAGS))
def test_what_is_neither_true_nor_false_is_refused(call, name):
    refused(call, name, [None, "no", 0, 1, 0.0, LIST, torch.tensor(True), np.array([False])])
    CALLS[call](**{name: np.bool_(False)})


@pytest.mark.parametrize(("call", "name"), cases(CHOICES))
def test_what_is_no_choice_is_refused(call, name):
    refused(call, name, [None, "no", 0, 3, -1.0, math.nan, LIST, X, np.array([1, 2]), "x" * 10_000])


def test_torch_s_own_exponent_counts():
    assert torch.equal(F.normalize(X, p=2.0), F.normalize(X)) and nf.NormalizeLayer(p=np.int64(1)).p == 1


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool, None, "float32", np.float32])
def test_a_plan_names_a_bad_dtype(dtype):
    with pytest.raises(TypeError, match=r"^plan: expected `dtype` to be "):
        nf.plan(4, 5, 6, dtype)


@pytest.mark.parametrize("device", ["gpu", None, 1.5, []])
def test_a_plan_names_a_bad_device(device):
    with pytest.raises(ValueError, match=r"^plan: expected `device` to be a device, got "):
        nf.plan(4, 5, 6, device=device)


def test_layers_keep_python_s_own_numbers():
    """What a layer shows, saves and passes on is an int, a float or a bool, whoever made it."""
    head = nf.NormFaceLoss(np.int64(5), torch.tensor(6), scale=np.float32(8), ignore_index=np.int32(-1))
    assert (type(head.in_features), type(head.num_classes), type(head.scale)) == (int, int, float)
    assert type(head.ignore_index) is int and repr(head) == "NormFaceLoss(5, 6, scale=8, ignore_index=-1)"
    layer = nf.CContrastiveLoss(
        5, 6, neg_margin=np.array(1.5), pos_weight=np.float16(0.5), active_limit=np.int8(3)
    )
    assert type(layer.neg_margin) is float and type(layer.pos_weight) is float
    assert type(layer.active_limit) is int
    assert nf.CosFace(np.array(0.25)) == nf.CosFace(0.25) and hash(nf.CosFace(np.float16(0.25)))


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.array])
def test_options_of_other_libraries_give_the_same_bits(kind):
    x = X.clone().requires_grad_()
    given = {"pos_margin": 0.25, "neg_margin": 1.5, "pos_weight": 0.5, "neg_weight": 2.0}
    expected = F.c_contrastive_loss(x, W, Y, **given)
    got = F.c_contrastive_loss(x, W, Y, **{name: kind(value) for name, value in given.items()})
    assert torch.equal(got, expected) and got.dtype == expected.dtype
    expected = F.normface_loss(x, W, Y, 30.0, margin=nf.CosFace(0.25), label_smoothing=0.125)
    got = F.normface_loss(x, W, Y, kind(30.0), margin=nf.CosFace(m=kind(0.25)), label_smoothing=kind(0.125))
    assert torch.equal(got, expected)


def test_symbolic_sizes_are_not_made_fixed():
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    size = ShapeEnv().create_unbacked_symint()
    torch._check(size >= 0)
    assert arguments.integer("op", "n", size, 0) is size


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("op", ["normface_loss", "c_contrastive_loss", "c_triplet_loss", "target_rank"])
def test_sparse_tensors_are_refused(op, place):
    given = [X, W, Y]
    given[place] = given[place].to_sparse()
    more = [16.0] if op == "normface_loss" else []
    sentence = (
        rf"^{op}: expected `{('x', 'weight', 'labels')[place]}` to be a dense Tensor, got torch.sparse_coo$"
    )
    with pytest.raises(TypeError, match=sentence):
        getattr(F, op)(*given, *more)
