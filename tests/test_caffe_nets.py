"""Whole nets for nf.caffe: shared parameters, layers of before 2014, what is the head, what is listed."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

import normface_ext as nf

pytest.importorskip("google.protobuf")
from normface_ext.caffe import proto, upgrade

D, C = 5, 4
LABELS = torch.tensor([0, 3, 1, 1, 2])
UNIT = f"num_output: {C} bias_term: false normalize: true"


def features(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(LABELS), D, generator=generator, dtype=torch.float64).requires_grad_()


def load(text, mode="math", **options):
    torch.manual_seed(1)
    return nf.caffe.load_head(text, mode=mode, **{"in_features": D, "dtype": torch.float64, **options})


def product(name, bottom, param="", options=UNIT, extra="", top=None):
    return (
        f'layer {{ name: "{name}" type: "InnerProduct" bottom: "{bottom}" top: "{top or name}" {param}'
        f" {extra} inner_product_param {{ {options} }} }}\n"
    )


def loss(name, bottom, extra=""):
    return f'layer {{ name: "{name}" type: "SoftmaxWithLoss" bottom: "{bottom}" bottom: "label" {extra} }}\n'


def norm(name, bottom):
    return f'layer {{ name: "{name}" type: "Normalize" bottom: "{bottom}" top: "{name}" }}\n'


def refused(text, *parts, **options):
    with pytest.raises(ValueError) as error:
        load(text, **options)
    for part in parts:
        assert part in str(error.value), str(error.value)
    return str(error.value)


# Parameters of one name


SHARED = (
    norm("n", "f")
    + norm("m", "g")
    + product("a", "n", 'param { name: "w" lr_mult: 10 }')
    + product("b", "m", 'param { name: "w" decay_mult: 0 }')
    + loss("la", "a")
    + loss("lb", "b", "loss_weight: 0.5")
)


@pytest.mark.parametrize("known", [D, None])
@pytest.mark.parametrize("mode", ["math", "caffe"])
def test_two_heads_share_a_weight(mode, known):
    head, x, z = load(SHARED, mode, in_features=known), features(), features(1)
    found = head(f=x, g=z, label=LABELS).loss
    a, b = (head.layers[name].weight for name in "ab")
    assert a is b and len(list(head.parameters())) == 1
    w = normalize(a.detach()).requires_grad_()
    expected = cross_entropy(normalize(x) @ w.t(), LABELS) + cross_entropy(normalize(z) @ w.t(), LABELS) / 2
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    found.backward()
    (gradient,) = torch.autograd.grad(expected, w)
    if mode == "caffe":  # the plain gradient of the unit rows
        torch.testing.assert_close(a.grad, gradient, rtol=1e-9, atol=1e-9)
    (group,) = head.parameter_groups(0.1, 0.5)  # each multiplier from the layer that has it
    assert len(group["params"]) == 1 and group["lr"] == pytest.approx(1) and group["weight_decay"] == 0


def test_a_shared_weight_stays_shared():
    for head in (copy.deepcopy(load(SHARED)), pickle.loads(pickle.dumps(load(SHARED))), load(SHARED).float()):
        assert head.layers["a"].weight is head.layers["b"].weight
    late = load(SHARED, in_features=None)
    late.load_state_dict(load(SHARED).state_dict())
    assert late.layers["a"].weight is late.layers["b"].weight


def test_a_shared_weight_has_the_filler_of_its_first_layer():
    text = SHARED.replace(UNIT, UNIT + ' weight_filler { type: "constant" value: 3 }', 1)
    assert (load(text).layers["b"].weight == 3).all()


def test_bias_and_scale_are_shared_by_their_own_names():
    both = 'param { name: "w%d" } param { name: "bias" lr_mult: 2 }'
    text = "".join(product(n, "f", both % i, f"num_output: {C}") for i, n in enumerate("ab"))
    head = load(text)
    assert head.layers["a"].bias is head.layers["b"].bias
    assert head.layers["a"].weight is not head.layers["b"].weight
    one = 'layer { name: "%s" type: "Scale" bottom: "f" top: "%s" param { name: "s" } scale_param { %s } }'
    for options, shape in (("num_axes: 0", []), ("", [D])):
        head = load(one % ("a", "a", options) + one % ("b", "b", options))
        head(f=features())
        assert (
            head.layers["a"].scale is head.layers["b"].scale and list(head.layers["a"].scale.shape) == shape
        )


@pytest.mark.parametrize(
    "first, second, part",
    [
        ('param {\n name: "w" lr_mult: 1 }', 'param { name: "w" lr_mult: 2 }', "'w', got 1 and 2"),
        ('param {\n name: "w" decay_mult: 1 }', 'param { name: "w" decay_mult: 0 }', "one `decay_mult`"),
    ],
)  # fmt: skip
def test_multipliers_of_a_shared_parameter_must_agree(first, second, part):
    refused(product("a", "f", first) + product("b", "f", second), "<text>:3: ", part)


def test_a_shared_parameter_has_one_shape():
    name = 'param { name: "w" }'
    text = product("a", "f", name) + product("b", "f", name, "num_output: 9 bias_term: false")
    refused(text, "<text>:2: ", "one shape in each layer, got [4, 5] and [9, 5]")
    refused(text, "got [4, D] and [9, D]", in_features=None)
    refused(
        product("a", "f", name + " " + name, f"num_output: {C}"),
        "one shape in each layer, got [4, 5] and [4]",
    )


def test_a_name_that_is_used_once_shares_nothing():
    head = load(
        product("a", "f", 'param { name: "w" lr_mult: 0 }') + product("b", "f", 'param { name: "v" }')
    )
    assert not head.layers["a"].weight.requires_grad and head.layers["b"].weight.requires_grad


def test_the_multipliers_of_a_fixed_weight_hold_in_each_layer():
    text = product("a", "f", 'param { name: "w" }') + product("b", "f", 'param { name: "w" lr_mult: 0 }')
    assert not load(text).layers["a"].weight.requires_grad and load(text).parameter_groups(1, 1) == []


# One name in two phases


TRAIN, TEST = "include { phase: TRAIN }", "include { phase: TEST }"
LARGE = (
    f'layer {{ name: "ip" type: "LargeMarginInnerProduct" bottom: "f" bottom: "label" top: "ip" {TRAIN}'
    f" largemargin_inner_product_param {{ num_output: {C} type: DOUBLE lambda_min: 1 }} }}\n"
    + product("ip", "f", options=f"num_output: {C} bias_term: false", extra=TEST)
    + f'layer {{ name: "acc" type: "Accuracy" bottom: "ip" bottom: "label" top: "acc" {TEST} }}\n'
    + loss("loss", "ip")
)


def test_layers_of_one_name_in_two_phases_share_their_weight():
    head = load(LARGE)
    assert list(head.layers) == ["ip", "ip (TEST)", "acc", "loss"]
    assert head.layers["ip"].weight is head.layers["ip (TEST)"].weight
    assert sum(len(group["params"]) for group in head.parameter_groups(1, 1)) == 1
    x = features()
    head.eval()
    expected = cross_entropy(x @ head.layers["ip"].weight.t(), LABELS)
    torch.testing.assert_close(head(f=x, label=LABELS).loss, expected)
    net = proto.messages()["NetParameter"](name="net")
    blob = net.layer.add(name="ip", type="any").blobs.add(data=np.arange(C * D))
    blob.shape.dim.extend([C, D])
    head.load_caffemodel(net.SerializeToString())
    assert head.layers["ip (TEST)"].weight.flatten().tolist() == list(range(C * D))


def test_layers_of_one_name_must_fit():
    bias = LARGE.replace("bias_term: false", "")
    refused(bias, "<text>:2: ", "expected the 1 parameters", "got 2")
    refused(LARGE.replace(TEST, "", 1), "a name of its own")


# Layers of before 2014


OLD = f"""
layers {{ name: "n" type: NORMALIZE bottom: "f" top: "n" }}
layers {{ name: "ip" type: INNER_PRODUCT bottom: "n" top: "ip" blobs_lr: 10 weight_decay: 0
  inner_product_param {{ {UNIT} }} }}
layers {{ name: "drop" type: DROPOUT bottom: "ip" top: "ip" exclude {{ phase: TRAIN }} }}
layers {{ name: "loss" type: SOFTMAX_LOSS bottom: "ip" bottom: "label" loss_weight: 2 }}
layers {{ name: "acc" type: ACCURACY bottom: "ip" bottom: "label" top: "acc" include: {{ phase: TEST }} }}
"""  # fmt: skip


def test_old_layers_are_upgraded():
    new = load(
        norm("n", "f") + product("ip", "n", "param { lr_mult: 10 decay_mult: 0 }") + loss("loss", "ip")
    )
    head, x = load(OLD), features()
    assert list(head.layers) == ["n", "ip", "drop", "loss", "acc"]
    assert "TRAIN: fused into NormFaceLoss: n + ip + loss" in repr(head)
    head.layers["ip"].weight.data.copy_(new.layers["ip"].weight.data)
    torch.testing.assert_close(head(f=x, label=LABELS).loss, 2 * new(f=x, label=LABELS).loss)
    (group,) = head.parameter_groups(0.1, 0.5)
    assert group["lr"] == pytest.approx(1) and group["weight_decay"] == 0
    assert "acc" in head.eval()(f=x, label=LABELS).tops


@pytest.mark.parametrize(
    "old, new",
    {
        "INNER_PRODUCT": "InnerProduct", "SOFTMAX_LOSS": "SoftmaxWithLoss", "SOFTMAX": "Softmax",
        "RELU": "ReLU",
        "LRN": "LRN", "HDF5_DATA": "HDF5Data", "TANH": "TanH", "CONTRASTIVE_LOSS": "ContrastiveLoss",
        "L2_NORM": "L2Norm", "TRIPLET_LOSS": "TripletLoss", "IMAGE_DATA": "ImageData", "MVN": "MVN",
    }.items(),
)  # fmt: skip
def test_old_types_have_new_names(old, new):
    assert upgrade.new_type(old) == new


def test_old_parameters_and_their_lines():
    shared = OLD.replace("blobs_lr: 10 weight_decay: 0", 'param: "w" blobs_lr: 3')
    twin = (
        shared.replace('name: "n"', 'name: "o"')
        .replace('top: "n"', 'top: "o"')
        .replace('bottom: "n"', 'bottom: "o"')
    )
    twin = (
        twin.replace('"ip"', '"jp"')
        .replace('"drop"', '"drop2"')
        .replace('"loss"', '"loss2"')
        .replace('"acc"', '"acc2"')
    )
    head = load(shared + twin)
    assert head.layers["ip"].weight is head.layers["jp"].weight
    assert head.parameter_groups(1.0, 1.0)[0]["lr"] == 3
    refused(
        OLD.replace("blobs_lr: 10", "blobs_lr: 10\n blobs_lr: 20"), "as many `blobs_lr` as `weight_decay`"
    )
    two = OLD.replace("weight_decay: 0", "\n blobs_lr: 1\n weight_decay: [1, 1]")
    refused(two, "<text>:4: ", "at most 1 `param`, got 2")
    refused(OLD.replace("type: DROPOUT", "type: POOLING"), "<text>:5: ", "type 'Pooling'")
    assert refused(OLD.replace("num_output: 4", "nothing: 4"), "<text>:4: ", "unknown option")
    assert load(OLD.replace("NORMALIZE", '"NORMALIZE"')).layers["n"] is not None


# The head of a net


TRUNK = """name: "net"  # { a comment's brace
layer { name: "data" type: "ImageData" top: "data" top: "label" image_data_param { source: "a\\"b\\\\c{" } }
layer { name: "conv1" type: "Convolution" bottom: "data" top: "conv1" }
layer { name: "relu1" type: "ReLU" bottom: "conv1" top: "conv1" }
layer { name: "f" type: "InnerProduct" bottom: "conv1" top: "f" inner_product_param { num_output: 5 } }
layer { name: "bn" type: "BatchNorm" bottom: "f" top: "f" }
layer { name: "act" type: "PReLU" bottom: "f" top: "f" }
"""


def test_layers_that_are_not_known_are_listed_by_type():
    convolutions = "".join(
        f'layer {{ name: "c{i}" type: "Convolution" bottom: "data" top: "c{i}" }}\n' for i in range(200)
    )
    message = refused(TRUNK + convolutions + norm("n", "f") + product("ip", "n") + loss("loss", "ip"))
    rows = [row for row in message.splitlines() if "is not part of a NormFace head" in row]
    assert [row.split("'")[1] for row in rows] == ["ImageData", "Convolution", "ReLU", "BatchNorm", "PReLU"]
    assert all(f"<text>:{line}: " in row for line, row in zip((2, 3, 4, 6, 7), rows, strict=True))
    assert "layers 'conv1' (line 3), 'c0' (line 8), 'c1' (line 9), 'c2' (line 10) and 197 more" in rows[1]
    assert "has 5 things" in message and "makes the bottom" not in message
    assert message.endswith("such as inputs=('f', 'label').")


def test_suggested_inputs_are_those_of_the_first_product():
    join = 'layer { name: "j" type: "Eltwise" bottom: "f" bottom: "data" top: "j" }\n'
    message = refused(TRUNK + join + product("ip", "j") + loss("loss", "ip"))
    assert message.endswith("such as inputs=('j', 'label').")
    assert list(load(TRUNK + join + product("ip", "j") + loss("loss", "ip"), inputs=("j", "label")).layers)
    assert refused(TRUNK).endswith("such as inputs=('ip1', 'label').")  # there is no head


def test_what_works_in_place_on_an_input_belongs_to_the_net_before():
    text = TRUNK + norm("n", "f") + product("ip", "n") + loss("loss", "ip")
    head = load(text, inputs=("f", "label"))
    assert list(head.layers) == ["n", "ip", "loss"]
    assert [note.split(":")[1] for note in head.notes] == [
        "6",
        "7",
    ] and "in place on the input `f`" in head.notes[0]
    dropout = 'layer { name: "d" type: "Dropout" bottom: "f" top: "f" }\n'
    scale = dropout.replace("Dropout", "Scale")
    kept = load(TRUNK + dropout + norm("n", "f"), inputs=["f"])
    assert list(kept.layers) == ["d", "n"]  # known, and behind the last one that is not
    before = TRUNK.replace('layer { name: "bn"', scale + 'layer { name: "bn"')
    assert list(load(before + norm("n", "f"), inputs=["f"]).layers) == ["n"]
    read = TRUNK.replace('layer { name: "bn"', norm("m", "f") + 'layer { name: "bn"')
    refused(read + norm("n", "f"), "'BatchNorm'", "'PReLU'", inputs=["f"])


def test_a_layer_that_gets_only_labels_is_left_out():
    other = product("aux", "conv1") + loss("aux_loss", "aux")
    head = load(
        TRUNK + other + norm("n", "f") + product("ip", "n") + loss("loss", "ip"), inputs=("f", "label")
    )
    assert list(head.layers) == ["n", "ip", "loss"]
    assert any('"aux_loss"' in note and "its bottom `aux`" in note for note in head.notes)
    refused(TRUNK + other, "'BatchNorm'", inputs=("conv1", "label"))


def test_in_features_of_a_later_product_come_from_the_file():
    text = (
        product("f1", "x", options="num_output: 6") + norm("n", "f1") + product("ip", "n") + loss("l", "ip")
    )
    head = load(text, in_features=9)
    assert head.layers["f1"].weight.shape == (6, 9) and head.layers["ip"].weight.shape == (C, 6)
    assert head(x=torch.randn(5, 9, dtype=torch.float64), label=LABELS).loss.isfinite()


# Losses without a top


@pytest.mark.parametrize("weight", ["", "loss_weight: 3"])
def test_losses_without_a_top(weight):
    text = (
        norm("n", "f")
        + product("ip", "n")
        + loss("first", "ip", weight)
        + loss("ip2", "ip").replace("ip2", "f")
    )
    head, x = load(text), features()
    out = head(f=x, label=LABELS)
    assert list(out.tops) == ["first", "f (automatic)"]
    one = cross_entropy(normalize(x) @ normalize(head.layers["ip"].weight).t(), LABELS)
    torch.testing.assert_close(out.loss, (3 if weight else 1) * one + one)
    distance = (
        'layer { name: "d" type: "InnerDistance" bottom: "f" top: "d"'
        " inner_distance_param { num_output: 4 } }\n"
        'layer { name: "t" type: "GeneralTripletLoss" bottom: "d" bottom: "label" }'
    )
    assert list(load(distance, "caffe")(f=x, label=LABELS).tops) == ["t"]
    refused('layer { name: "n" type: "Normalize" bottom: "f" }', "expected 1 or 2 `top`, got 0")


def test_silence_hides_tops():
    head = load(norm("n", "f") + 'layer { name: "s" type: "Silence" bottom: "n" }')
    assert head(f=features()).tops == {}


def test_flatten_and_a_sparse_filler():
    head = load('layer { name: "y" type: "Flatten" bottom: "f" top: "y" }')
    assert head(f=torch.ones(2, 3, 2, 2)).tops["y"].shape == (2, 12)
    options = 'num_output: 100 weight_filler { type: "gaussian" std: 1 sparse: 15 } bias_term: false'
    weight = load(product("p", "f", options=options), in_features=400).layers["p"].weight
    assert 0.12 < (weight != 0).double().mean() < 0.18
    refused(
        product("p", "f", options=options.replace("15", "-2")), "`inner_product_param.weight_filler.sparse`"
    )


def test_a_shared_blob_takes_memory_once(monkeypatch):
    monkeypatch.setattr("normface_ext.caffe.build.free_memory", lambda device: 8 * C * D + 1)
    assert load(SHARED).layers["a"].weight.shape == (C, D)
    refused(SHARED.replace('name: "w"', ""), "free memory")
