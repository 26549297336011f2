"""nf.caffe.load_head: NormFace's prototxts as modules, their weights, and what is refused and where."""

import copy
import pickle
import sys
from pathlib import Path

import caffe_numpy as truth
import numpy as np
import pytest
import torch
from torch import nn

import normface_ext as nf
from normface_ext.caffe import proto

pytest.importorskip("google.protobuf")

FILES = Path(__file__).parent / "prototxt"
NAMES = ["scaled_cosine", "c_contrastive", "c_triplet", "combined"]
LABELS = torch.tensor([0, 3, 1, 1, 5, 2, 4])


def load(name, mode="math", **options):
    options = {"in_features": 5, "dtype": torch.float64, **options}
    return nf.caffe.load_head(FILES / f"{name}.prototxt", mode=mode, **options)


def features(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(len(LABELS), 5, generator=generator, dtype=torch.float64)).requires_grad_()


def close(actual, expected, tolerance=1e-9):
    actual = actual.detach().numpy() if isinstance(actual, torch.Tensor) else actual
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def weights(head):
    return {name: p.detach().numpy().copy() for name, p in head.named_parameters()}


def unit(w, eps=truth.GPU_EPS):
    return truth.normalize(w, eps)[0]


# The files, against NumPy


@pytest.mark.parametrize("phase", ["TRAIN", "TEST"])
def test_scaled_cosine_as_caffe(phase):
    head, x = load("scaled_cosine", "caffe").train(phase == "TRAIN"), features()
    w, raw = weights(head)["layers.cosine.weight"], x.detach().numpy()
    y = truth.normalize(raw, truth.GPU_EPS)[0]
    scores, stored = truth.inner_product(y, w, True, truth.GPU_EPS)
    out = head(feature=x, label=LABELS)
    close(out.loss, truth.softmax_loss(10 * scores, LABELS.numpy()))
    out.loss.backward()
    g = truth.softmax_loss_backward(10 * scores, LABELS.numpy())
    close(head.layers["scale"].scale.grad, (g * scores).sum())
    dy, dw = truth.inner_product_backward(y, stored, 10 * g)
    close(head.layers["cosine"].weight.grad, dw)
    close(x.grad, truth.normalize_backward(raw, dy, truth.GPU_EPS))
    assert ("accuracy" in out.tops) == (phase == "TEST")
    if phase == "TEST":
        close(out.tops["accuracy"], truth.accuracy(10 * scores, LABELS.numpy()), 1e-6)


def test_scaled_cosine_steps_as_caffe():
    """SGD with the hook is Caffe's: overwrite by unit rows, step with the plain gradient, and again."""
    head = load("scaled_cosine", "caffe")
    with torch.no_grad():
        head.layers["cosine"].weight.mul_(3)
    w, s = weights(head)["layers.cosine.weight"], 10.0
    optimizer = torch.optim.SGD(head.parameter_groups(0.01, 0.1))
    handle = nf.caffe.renormalize_after_step(optimizer, head)
    for step in range(3):
        x = features(step)
        optimizer.zero_grad()
        head(feature=x, label=LABELS).loss.backward()
        optimizer.step()
        y = truth.normalize(x.detach().numpy(), truth.GPU_EPS)[0]
        scores, w = truth.inner_product(y, w, True, truth.GPU_EPS)
        g = truth.softmax_loss_backward(s * scores, LABELS.numpy())
        w = w - 0.01 * 100 * truth.inner_product_backward(y, w, s * g)[1]
        s = max(s - 0.01 * ((g * scores).sum() + 0.1 * s), 0.01)
    close(head.layers["cosine"].weight, unit(w))
    close(head.layers["scale"].scale, s)
    handle.remove()
    before = head.layers["cosine"].weight.detach().clone()
    optimizer.step()
    assert not torch.allclose(head.layers["cosine"].weight.norm(dim=1), torch.ones(6, dtype=torch.float64))
    assert not torch.equal(before, head.layers["cosine"].weight)


@pytest.mark.parametrize("name", ["c_contrastive", "c_triplet"])
def test_metric_heads_as_caffe(name):
    head, x = load(name, "caffe"), features()
    (parameter,) = head.parameters()
    raw, w = x.detach().numpy(), parameter.detach().numpy()
    y, stored = unit(raw), unit(w)
    d = truth.inner_distance(y, stored, 2)
    if name == "c_contrastive":
        value, means, g, _ = truth.contrastive(d, LABELS.numpy())
    else:
        value, means, g = truth.triplet(d, LABELS.numpy(), margin=np.float32(0.8), hardest_only=True)
    out = head(feature=x, label=LABELS)
    close(out.loss, value)
    close(out.tops["mean_distance"], means)
    close(out.printed_loss, value + means.sum())
    out.loss.backward()
    dy, dw = truth.inner_distance_backward(y, stored, g, 2)
    close(x.grad, truth.normalize_backward(raw, dy, truth.GPU_EPS))
    # In the layer the plain gradient of the overwritten weight; behind a Normalize layer the true one.
    close(parameter.grad, dw if name == "c_contrastive" else truth.normalize_backward(w, dw, truth.GPU_EPS))
    close(
        head.eval()(feature=x, label=LABELS).tops["accuracy"], truth.accuracy(d, LABELS.numpy(), True), 1e-6
    )


@pytest.mark.parametrize("mode", ["math", "caffe"])
def test_combined(mode):
    """Math and Caffe agree here, where every weight has a Normalize layer and one option set is plain."""
    head, x = load("combined", mode), features()
    w, raw = weights(head), x.detach().numpy()
    y, l2, ip = unit(raw), unit(w["layers.agents_l2.weight"]), unit(w["layers.agents_ip.weight"])
    scores, d = 4 * y @ ip.T, truth.inner_distance(y, l2, 2)
    softmax = truth.softmax_loss(scores, LABELS.numpy())
    value, means, g, _ = truth.contrastive(d, LABELS.numpy())
    out, weight = head(feature=x, label=LABELS), np.float32(0.01)
    close(out.tops["softmax_loss"], softmax)
    close(out.tops["contrastive_loss"], value)
    close(out.loss, softmax + weight * value)
    close(out.printed_loss, softmax + weight * value + means.sum())
    out.loss.backward()
    gs = 4 * truth.softmax_loss_backward(scores, LABELS.numpy())
    dy, dl2 = truth.inner_distance_backward(y, l2, weight * g, 2)
    close(
        head.layers["agents_l2"].weight.grad,
        truth.normalize_backward(w["layers.agents_l2.weight"], dl2, 1e-12),
    )
    close(
        head.layers["agents_ip"].weight.grad,
        truth.normalize_backward(w["layers.agents_ip.weight"], gs.T @ y, 1e-12),
    )
    close(x.grad, truth.normalize_backward(raw, dy + gs @ ip, truth.GPU_EPS))


# Fusion


def without_fusion(name, **options):
    """A prototxt whose TRAIN phase reads the scores too, so that nothing is fused."""
    text = (FILES / f"{name}.prototxt").read_text().replace("include { phase: TEST }", "")
    return nf.caffe.load_head(text, in_features=5, dtype=torch.float64, **options)


CHAINS = {
    "scaled_cosine": ["NormFaceLoss: feature_norm + cosine + scale + softmax_loss"],
    "c_contrastive": ["CContrastiveLoss: feature_norm + distance + contrastive_loss"],
    "c_triplet": ["CTripletLoss: feature_norm + agents_norm + distance + triplet_loss"],
    "combined": [
        "NormFaceLoss: feature_norm + agents_ip_norm + cosine + cosine_scale + softmax_loss",
        "CContrastiveLoss: feature_norm + agents_l2_norm + euclidean + contrastive_loss",
    ],
}


@pytest.mark.parametrize("name", NAMES)
def test_fused_equals_unfused(name):
    fused, plain = load(name), without_fusion(name)
    plain.load_state_dict(fused.state_dict())
    assert all(f"TRAIN: fused into {chain}\n" in repr(fused) for chain in CHAINS[name])
    assert ("TEST: fused" in repr(fused)) == (name == "combined")  # its Accuracy reads the cosines only
    assert ("fused" in repr(plain)) == (name == "combined") and "fused" not in repr(load(name, "caffe"))
    grads = []
    for head in (fused, plain):
        x = features()
        out = head(feature=x, label=LABELS)
        out.loss.backward()
        out.tops.pop("accuracy", None)
        grads.append(
            [out.loss, out.printed_loss, *out.tops.values(), x.grad, *[p.grad for p in head.parameters()]]
        )
    for a, b in zip(*grads, strict=True):
        close(a, b.detach().numpy())


@pytest.mark.parametrize("normalization", ["FULL", "VALID", "BATCH_SIZE", "NONE"])
@pytest.mark.parametrize("ignore", [None, 1])
def test_fused_keeps_the_loss_options(normalization, ignore):
    given = f"normalization: {normalization}" + (f" ignore_label: {ignore}" if ignore is not None else "")
    text = (FILES / "scaled_cosine.prototxt").read_text()
    text = text.replace("  loss_weight: 1\n", f"  loss_weight: 3 loss_param {{ {given} }}\n")
    head, x = nf.caffe.load_head(text, in_features=5, dtype=torch.float64), features()
    assert "TRAIN: fused into NormFaceLoss: feature_norm + cosine + scale + softmax_loss" in repr(head)
    scores = 10 * unit(x.detach().numpy()) @ unit(weights(head)["layers.cosine.weight"]).T
    close(
        head(feature=x, label=LABELS).loss,
        3 * truth.softmax_loss(scores, LABELS.numpy(), ignore, normalization),
    )


@pytest.mark.parametrize(
    "old, new",
    [
        ("normalize: true", "normalize: false"),
        ('top: "softmax_loss"', 'top: "softmax_loss" top: "probability"'),
        ("bias_term: false\n    normalize", "bias_term: true\n    normalize"),
        ('type: "Normalize"', 'type: "Normalize" normalize_param { normalize_type: "L1" }'),
    ],
)
def test_not_fused_where_it_is_another_function(old, new):
    text = (FILES / "scaled_cosine.prototxt").read_text()
    if "probability" in new:
        text = text.replace("loss_weight: 1", "loss_weight: 1 loss_weight: 0")
    assert text.count(old) == 1
    assert "fused" not in repr(nf.caffe.load_head(text.replace(old, new), in_features=5))


def test_fused_with_spatial_features():
    """[N, D, 1, 1] is the same head; with larger maps Normalize acts at every position."""
    head, x = load("scaled_cosine"), features()
    flat = head(feature=x, label=LABELS).loss
    close(head(feature=x[:, :, None, None], label=LABELS).loss, flat.item())
    maps = torch.randn(7, 5, 2, 1, dtype=torch.float64)
    fused, plain = load("scaled_cosine", in_features=10), without_fusion("scaled_cosine")
    plain = nf.caffe.load_head(
        (FILES / "scaled_cosine.prototxt").read_text().replace("include { phase: TEST }", ""),
        in_features=10, dtype=torch.float64,
    )  # fmt: skip
    plain.load_state_dict(fused.state_dict())
    close(fused(feature=maps, label=LABELS).loss, plain(feature=maps, label=LABELS).loss.item())


# Options, phases, groups, state


def test_layers_keep_their_names_and_options():
    head = load("scaled_cosine")
    assert list(head.layers) == ["feature_norm", "cosine", "scale", "softmax_loss", "accuracy"]
    assert list(head.state_dict()) == ["layers.cosine.weight", "layers.scale.scale"]
    scale = head.layers["scale"]
    assert (
        scale.scale.item() == 10
        and scale.min_value == pytest.approx(0.01)
        and scale.max_value == float("inf")
    )
    close(head.layers["cosine"].weight.norm(dim=1), np.ones(6), 1e-6)
    assert head.inputs == ("feature", "label")
    assert load("c_triplet").layers["triplet_loss"].options.margin == pytest.approx(0.8)


def test_notes_tell_what_has_no_effect():
    notes = load("c_contrastive").notes
    assert any(":39: " in n and "`square`" in n for n in notes)
    assert any(":42: " in n and "`general_triplet_loss_param` is not read" in n for n in notes)
    assert any("inner_product_param" in n and "combined.prototxt:47" in n for n in load("combined").notes)
    assert any("renormalize_after_step" in n for n in load("scaled_cosine", "caffe").notes)
    assert load("scaled_cosine").notes == ()


def test_parameter_groups_carry_the_multipliers():
    head = load("scaled_cosine")
    weight, scale = head.layers["cosine"].weight, head.layers["scale"].scale
    agents, learned = head.parameter_groups(0.1, 5e-4)
    assert agents["params"][0] is weight and agents["lr"] == pytest.approx(10) and agents["weight_decay"] == 0
    # Caffe decays the scale, since the file gives it no param; that can be left out.
    assert learned["params"][0] is scale and learned["lr"] == 0.1 and learned["weight_decay"] == 5e-4
    assert [g["weight_decay"] for g in head.parameter_groups(0.1, 5e-4, decay_scale=False)] == [0, 0]
    torch.optim.SGD(head.parameter_groups(0.1, 5e-4)).step()


def test_lr_mult_zero_fixes_a_parameter():
    text = (FILES / "scaled_cosine.prototxt").read_text()
    text = text.replace(
        'top: "cosine"\n  scale_param', 'top: "cosine"\n  param { lr_mult: 0 }\n  scale_param'
    )
    head = nf.caffe.load_head(text, in_features=5)
    assert not head.layers["scale"].scale.requires_grad and len(head.parameter_groups(1, 0)) == 1
    head(feature=features().float(), label=LABELS).loss.backward()
    assert head.layers["scale"].scale.grad is None


def test_the_number_of_features_may_come_later():
    head = load("scaled_cosine", in_features=None)
    with pytest.raises(ValueError, match=r'layer "cosine" .*:8\).*in_features'):
        head.parameter_groups(0.1, 0)
    assert list(head.state_dict()) == ["layers.scale.scale"]
    known = load("scaled_cosine")
    head.load_state_dict(known.state_dict())
    close(head.layers["cosine"].weight, known.layers["cosine"].weight.detach().numpy())
    other = load("scaled_cosine", in_features=None)
    other(feature=features(), label=LABELS).loss.backward()
    assert other.layers["cosine"].weight.grad.shape == (6, 5)


def test_copy_and_pickle():
    head, x = load("combined"), features()
    expected = head(feature=x, label=LABELS).loss.item()
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert other(feature=x, label=LABELS).loss.item() == expected


def test_blobs_by_name_or_by_mapping():
    head, x = load("c_triplet"), features()
    by_name = head(feature=x, label=LABELS)
    assert head({"feature": x, "label": LABELS}).loss == by_name.loss
    assert list(by_name.tops) == ["triplet_loss", "mean_distance"]


def test_low_precision_and_float32_features():
    for dtype in (torch.float32, torch.bfloat16):
        for name in NAMES:
            head = load(name, dtype=torch.float32)
            x = features().detach().to(dtype).requires_grad_()
            for phase in (True, False):
                out = head.train(phase)(feature=x, label=LABELS)
                truth64 = copy.deepcopy(head).double()(feature=x.double(), label=LABELS)
                close(out.loss.double(), truth64.loss.item(), 1e-4 if dtype == torch.float32 else 5e-2)


NET = """
name: "whole"
layer { name: "data" type: "Data" top: "data" top: "label" include { phase: TRAIN } data_param { batch: 8 } }
layer { name: "data" type: "Data" top: "data" top: "label" include { phase: TEST } data_param { batch: 8 } }
layer { name: "conv1" type: "Convolution" bottom: "data" top: "conv1" convolution_param { num_output: 4 } }
layer { name: "ip1" type: "InnerProduct" bottom: "conv1" top: "ip1" inner_product_param { num_output: 5 } }
"""


def test_the_head_of_a_whole_net():
    text = NET + (FILES / "c_triplet.prototxt").read_text().replace('"feature"', '"ip1"')
    head = nf.caffe.load_head(text, inputs=("ip1", "label"))
    assert list(head.layers) == list(load("c_triplet").layers) and head.inputs == ("ip1", "label")
    with pytest.raises(
        ValueError, match=r"(?s)<text>:3: .*'Data'.*<text>:5: .*'Convolution'.*inputs="
    ) as error:
        nf.caffe.load_head(text)
    assert "convolution_param" not in str(error.value)
    with pytest.raises(ValueError, match="bottom `ip2`"):
        nf.caffe.load_head(text, inputs=("ip1", "label", "ip2"))
    with pytest.raises(ValueError, match=r'"triplet_loss".*no layer before it .* makes the bottom `label`'):
        nf.caffe.load_head(text, inputs=("ip1",))


def test_deploy_head_without_a_loss():
    text = 'input: "f" layer { name: "n" type: "Normalize" bottom: "f" top: "n" }'
    out = nf.caffe.load_head(text)(f=features())
    assert out.loss is None and out.printed_loss is None and list(out.tops) == ["n"]
    text = 'layer { name: "i" type: "Input" top: "f" input_param { shape { dim: 2 dim: 5 } } }' + text[10:]
    assert list(nf.caffe.load_head(text)(f=features()).tops) == ["n"]


def test_propagate_down_stops_a_gradient():
    text = (
        'layer { name: "e" type: "Eltwise" bottom: "a" bottom: "b" top: "y" propagate_down: [true, false] }'
    )
    a, b = features(), features(1)
    nf.caffe.load_head(text)(a=a, b=b).tops["y"].sum().backward()
    assert a.grad is not None and b.grad is None


def test_fillers():
    for filler, check in {
        'type: "constant" value: 3': lambda w: (w == 3).all(),
        'type: "uniform" min: 2 max: 3': lambda w: ((w >= 2) & (w <= 3)).all() and w.std() > 0.2,
        'type: "gaussian" mean: 5 std: 0.1': lambda w: abs(w.mean() - 5) < 0.02 and abs(w.std() - 0.1) < 0.02,
        'type: "xavier"': lambda w: w.abs().max() <= (3 / 50) ** 0.5 and w.std() > 0.1,
        'type: "xavier" variance_norm: FAN_OUT': lambda w: (
            w.abs().max() <= (3 / 40) ** 0.5 and w.std() > 0.13
        ),
        'type: "msra"': lambda w: abs(w.std() - (2 / 50) ** 0.5) < 0.02,
        'type: "gaussian_unitball"': lambda w: torch.allclose(w.norm(dim=1), torch.ones(40)),
    }.items():
        torch.manual_seed(0)
        param = f"parameter_param {{ shape {{ dim: [40, 50] }} blob_filler {{ {filler} }} }}"
        head = nf.caffe.load_head(f'layer {{ name: "p" type: "Parameter" top: "w" {param} }}')
        assert check(head().tops["w"].detach()), filler


# What is refused


def test_everything_unsupported_is_listed_with_its_line():
    text = """layer {
  name: "n" type: "Normalize" bottom: "f" top: "n"
  normalize_param { normalize_type: "L3" momentum: 1 }
}
layer { name: "c" type: "InnerProduct" bottom: "n" top: "c"
  inner_product_param {
    num_output: 6 axis: 2
    transpose: true
    weight_filler { type: "bilinear" }
  }
}
layer { name: "s" type: "Scale" bottom: "c" top: "s" scale_param { num_axes: -1 } }
layer { name: "d" type: "Pooling" bottom: "s" top: "d" }
layer { name: "l" type: "SoftmaxWithLoss" bottom: "s" top: "l" loss_weight: 1 loss_weight: 2
  softmax_param { label_smooth_factor: 0.1 class_weight: 1 normalize_type: "L2"
    hard_ratio: 0.5 }
}
"""
    with pytest.raises(ValueError) as error:
        nf.caffe.load_head(text)
    message = str(error.value)
    for line, part in [
        (3, "'L1' or 'L2', got 'L3'"), (3, "unknown option `normalize_param.momentum`"),
        (7, "axis: 1`, got 2"), (8, "transpose: false`, got true"), (9, "got 'bilinear'"),
        (12, "num_axes: 0"), (13, "'Pooling'"),
        (14, "expected 2 `bottom` (the second is the label), got 1"), (14, "`loss_weight` once per top"),
        (15, "label_smooth_factor"), (15, "class_weight"), (15, "normalize_type"), (16, "hard_ratio"),
    ]:  # fmt: skip
        assert any(row.startswith(f"<text>:{line}: ") and part in row for row in message.splitlines()), (
            part,
            message,
        )
    assert "<text> has 13 things that are not supported" in message


def one(kind, body):
    """A layer of a type, its name and the start of its text on line 1."""
    return f"layer {{ name: 'it' type: '{kind}' {body} }}"


FLIP = "bottom: 'x' top: 'y'"
REFUSED = [
    ("layer {\n  name: 3\n}", 2, "expected a prototxt"),
    ("layer {\n  type: 'Scale'\n", 3, "expected a prototxt"),
    ("nonsense: 1\n" + one("Flip", FLIP), 1, "unknown option `nonsense`"),
    (one("Flip", FLIP) + "\nlayers { name: 'x' type: SILENCE }", 2, "either `layer` or the older `layers`"),
    ("layers { name: 'x' type: CONVOLUTION }\nname: 'n'", 1, "type 'Convolution' is not part"),
    ("layers { layer { name: 'x' type: 'relu' } }\nname: 'n'", 1, "before 2013"),
    ("name: 'n'\n", 1, "at least one layer"),
    ("layer {\n type: 'Flip' bottom: 'x' top: 'y' }", 1, "a name of its own"),
    ((one("Flip", FLIP) + "\n") * 2, 2, "a name of its own"),
    (one("Flip", "\n bottom: 'x' bottom: 'z' top: 'y'"), 2, "expected 1 `bottom`, got 2"),
    (one("Flip", FLIP + "\n nothing_param { a: 1 }"), 2, "`nothing_param`"),
    (one("Flip", FLIP + "\n param { lr_mult: 1 }"), 2, "at most 0 `param`"),
    (one("Flip", FLIP + "\n include { stage: 'a' phase: TEST }"), 2, "`stage`"),
    (one("Flip", FLIP + "\n include { phase: TEST }\n exclude { phase: TEST }"), 3, "got both"),
    (one("Flip", FLIP + "\n blobs { data: 1 }"), 2, "load_caffemodel"),
    (one("Flip", FLIP + "\n propagate_down: [1, 1]"), 2, "`propagate_down`"),
    (one("Scale", FLIP + " scale_param { num_axes: 0\n min_value: nan }"), 2, "finite"),
    (one("Scale", FLIP + " scale_param { num_axes: 0\n min_value: 2 max_value: 1 }"), 2, "min_value"),
    (one("Scale", FLIP + " scale_param {\n axis: 2 }"), 2, "got axis 2 and num_axes 1"),
    (one("Scale", FLIP + " bottom: 's' scale_param {\n bias_term: true }"), 2, "bias_term"),
    (one("Scale", FLIP + " bottom: 's' scale_param {\n axis: -1 }"), 2, "`axis` >= 0"),
    (one("Scale", FLIP + " scale_param { num_axes: 0 }\n param { lr_mult: -1 }"), 2, ">= 0"),
    (one("Parameter", "top: 'y'\n parameter_param { shape { dim: 0 } }"), 2, "`shape` of sizes"),
    (
        one("InnerDistance", FLIP + " bottom: 'w' inner_distance_param {\n update_center_only: true }"),
        2,
        "update",
    ),
    (
        one("InnerDistance", FLIP + " bottom: 'w' inner_distance_param {\n normalize: true }"),
        2,
        "is a bottom",
    ),
    (one("InnerDistance", FLIP + "\n inner_product_param { num_output: 2 }"), 2, "belongs in"),
    (one("InnerProduct", FLIP + " bottom: 'w'\n inner_product_param { axis: 1 }"), 2, "`bias_term: false`"),
    (
        one("InnerProduct", FLIP + " inner_product_param { num_output: 2\n distance_type: 'L2' }"),
        2,
        "distance",
    ),
    (
        one(
            "GeneralContrastiveLoss",
            FLIP + " bottom: 'l'\n general_contrastive_loss_param { normalize_negative: 0 }",
        ),
        2,
        "normalize_negative",
    ),
    (one("Eltwise", FLIP + " bottom: 'z'\n eltwise_param { operation: SORT }"), 2, "SORT"),
    (one("Eltwise", FLIP + " bottom: 'z'\n eltwise_param { coeff: 1 }"), 2, "`coeff`"),
    (one("Slice", FLIP + "\n slice_param { slice_point: 1 }"), 2, "`slice_point`"),
    (
        one("Flip", "bottom: 'late' top: 'y'")
        + "\n layer { name: 'b' type: 'Flip' bottom: 'x' top: 'late' }",
        1,
        "makes the bottom `late`",
    ),
    (one("Flip", FLIP) + "layer { name: 'b' type: 'Flip' bottom: 'x'\n top: 'y' }", 2, "exists already"),
]


@pytest.mark.parametrize("text, line, part", REFUSED)
def test_refused(text, line, part):
    with pytest.raises(ValueError) as error:
        nf.caffe.load_head(text + "\n")
    assert any(f"<text>:{line}: " in row and part in row for row in str(error.value).splitlines()), str(
        error.value
    )


def test_a_file_is_named_in_its_errors(tmp_path):
    path = tmp_path / "head.prototxt"
    path.write_text("layer { name: 'f'\n type: 'Fold' bottom: 'x' top: 'y' }")
    with pytest.raises(ValueError, match=f"{path}:2: .*'Fold'"):
        nf.caffe.load_head(str(path))
    with pytest.raises(FileNotFoundError):
        nf.caffe.load_head(tmp_path / "none.prototxt")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="text file"):
        nf.caffe.load_head(path)


def test_arguments_of_load_head():
    path = FILES / "c_triplet.prototxt"
    for options, part in [
        ({"mode": "exact"}, "math, caffe"),
        ({"in_features": 0}, ">= 1"),
        ({"eps": -1}, "eps"),
    ]:
        with pytest.raises(ValueError, match=part):
            nf.caffe.load_head(path, **options)
    with pytest.raises(TypeError, match="got int"):
        nf.caffe.load_head(3)


def test_forward_refuses_and_changes_nothing():
    head, x = load("scaled_cosine"), features()
    state = {name: value.clone() for name, value in head.state_dict().items()}
    for blobs, kind, part in [
        ({"feature": x}, ValueError, "got no label"),
        ({"feature": x, "label": LABELS, "extra": x}, ValueError, "no layer reads extra"),
        ({"feature": x, "label": LABELS[:3]}, ValueError, r'layer "softmax_loss".*shape \[7\], got \[3\]'),
        ({"feature": x, "label": LABELS.double()}, TypeError, "int64"),
        ({"feature": x, "label": LABELS + 1}, IndexError, "got 6 at row 4"),
        ({"feature": x, "label": LABELS - 200}, IndexError, "got -200 at row 0"),
        ({"feature": x[:, :4], "label": LABELS}, ValueError, r'layer "softmax_loss" .*\[C, 4\]'),
        ({"feature": [1], "label": LABELS}, TypeError, "got list"),
        ({"feature": x.float(), "label": LABELS}, TypeError, "both float64"),
        ({"feature": LABELS, "label": LABELS}, TypeError, "floating|float64"),
    ]:
        for phase in (True, False):
            with pytest.raises(kind, match=part if phase else None):
                head.train(phase)(blobs)
    assert all(torch.equal(state[name], value) for name, value in head.state_dict().items())


def test_nan_features_show():
    """As everywhere in the library, NaN is not hidden: the loss is NaN, the parameters stay."""
    for name in NAMES:
        x = features().detach()
        x[2, 3] = float("nan")
        for mode in ("math", "caffe"):
            assert load(name, mode)(feature=x, label=LABELS).loss.isnan(), (name, mode)


def test_without_protobuf(monkeypatch):
    for module in [m for m in sys.modules if m.startswith("google.protobuf")]:
        monkeypatch.setitem(sys.modules, module, None)
    proto.messages.cache_clear()
    with pytest.raises(ImportError, match=r"normface_ext\[caffe\]"):
        load("c_triplet")
    proto.messages.cache_clear()


# Weights


def caffemodel(blobs, *, legacy=False, double=False, old=False):
    """A binary NetParameter: layer name -> arrays."""
    net = proto.messages()["NetParameter"](name="net")
    net.layer.add(name="conv1", type="Convolution").blobs.add(data=[1, 2, 3]).shape.dim.append(3)
    for name, arrays in blobs.items():
        layer = net.layers.add(name=name) if old else net.layer.add(name=name, type="any")
        for array in arrays:
            blob = layer.blobs.add()
            (blob.double_data if double else blob.data).extend(np.asarray(array, float).ravel().tolist())
            if legacy:
                shape = [1] * (4 - np.ndim(array)) + list(np.shape(array))
                blob.num, blob.channels, blob.height, blob.width = shape
            else:
                blob.shape.dim.extend(np.shape(array))
                blob.shape.SetInParent()
    return net.SerializeToString()


def some_weights():
    generator = np.random.default_rng(3)
    return {"cosine": [generator.normal(size=(6, 5))], "scale": [np.array(7.5)]}


@pytest.mark.parametrize("options", [{}, {"legacy": True}, {"double": True}, {"old": True}], ids=str)
@pytest.mark.parametrize("known", [5, None])
def test_load_caffemodel(tmp_path, options, known):
    head, blobs = load("scaled_cosine", in_features=known), some_weights()
    path = tmp_path / "net.caffemodel"
    path.write_bytes(caffemodel(blobs, **options))
    assert head.load_caffemodel(path) == ["cosine", "scale"]
    tolerance = 0 if options.get("double") else 1e-6
    close(head.layers["cosine"].weight, blobs["cosine"][0], tolerance)
    close(head.layers["scale"].scale, 7.5)
    assert head.layers["cosine"].weight.requires_grad
    parameter = head.layers["cosine"].weight
    head.load_caffemodel(caffemodel(some_weights()))
    assert head.layers["cosine"].weight is parameter  # an optimizer keeps its parameter


def test_load_caffemodel_refuses_and_changes_nothing():
    good = some_weights()
    bad_values = good["cosine"][0].copy()
    bad_values[1, 1] = np.nan
    for blobs, part in [
        ({**good, "cosine": [np.zeros((5, 6))]}, r'layer "cosine".*`weight` of shape \[6, 5\], got \[5, 6\]'),
        ({**good, "cosine": [bad_values]}, "`weight` to be finite, got nan"),
        ({**good, "cosine": [good["cosine"][0], np.zeros(6)]}, r"1 blobs \(weight\), got 2"),
        ({**good, "scale": [np.zeros(1)]}, r'layer "scale".*shape \[\], got \[1\]'),
        ({"cosine": good["cosine"]}, r'layer "scale".*got none'),
    ]:
        head = load("scaled_cosine")
        before = copy.deepcopy(head.state_dict())
        with pytest.raises(ValueError, match=part):
            head.load_caffemodel(caffemodel(blobs))
        assert all(torch.equal(before[name], value) for name, value in head.state_dict().items())
    with pytest.raises(ValueError, match="binary NetParameter"):
        load("scaled_cosine").load_caffemodel(b"\xff\xff\xffnot a model")
    with pytest.raises(ValueError, match=r"shape \[6, D\], got \[5\]"):
        load("scaled_cosine", in_features=None).load_caffemodel(caffemodel({**good, "cosine": [np.zeros(5)]}))


def test_load_caffemodel_not_strict():
    head = load("scaled_cosine")
    assert head.load_caffemodel(caffemodel({"cosine": some_weights()["cosine"]}), strict=False) == ["cosine"]
    assert head.layers["scale"].scale.item() == 10


def test_inner_distance_bias_blob_is_skipped_while_it_is_zero():
    """Caffe's InnerDistance has bias_term: true by default and stores the bias."""
    head, weight = load("c_contrastive"), some_weights()["cosine"][0]
    head.load_caffemodel(caffemodel({"distance": [weight, np.zeros(6)]}))
    close(head.layers["distance"].weight, weight, 1e-6)
    with pytest.raises(ValueError, match="1 blobs"):
        head.load_caffemodel(caffemodel({"distance": [weight, np.ones(6)]}))


# Hard normalisation and the scale's weight decay, outside of a prototxt


def heads():
    return [nf.NormLinear(5, 6, learn_scale=True), nf.NormFaceLoss(5, 6, learn_scale=True)]


def metric_heads():
    return [nf.InnerDistance(5, 6), nf.CContrastiveLoss(5, 6), nf.CTripletLoss(5, 6)]


@pytest.mark.parametrize("head", heads() + metric_heads(), ids=lambda head: type(head).__name__)
def test_renormalize_after_step(head):
    model = nn.ModuleList([nn.Linear(5, 5), head])
    with torch.no_grad():
        head.weight.mul_(torch.arange(1, 7)[:, None])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = nf.caffe.renormalize_after_step(optimizer, model)
    rows = torch.ones(6)
    torch.testing.assert_close(head.weight.norm(dim=1), rows)
    head.weight.grad = torch.randn(6, 5)
    expected = nn.functional.normalize(head.weight.detach() - 0.1 * head.weight.grad)
    optimizer.step()
    torch.testing.assert_close(head.weight.detach(), expected)
    handle.remove()
    optimizer.step()
    assert not torch.allclose(head.weight.norm(dim=1), rows)


def test_renormalize_is_no_surprise():
    head = nf.NormFaceLoss(5, 6)
    with torch.no_grad():
        head.weight.mul_(3)
    before = head.weight.detach().clone()
    head(torch.randn(2, 5), torch.tensor([0, 1]))
    head.eval()(torch.randn(2, 5), torch.tensor([0, 1]))
    assert torch.equal(head.weight, before)
    head.renormalize_()
    torch.testing.assert_close(head.weight.detach(), before / 3)


def test_renormalize_refuses_and_changes_nothing():
    head = nf.NormLinear(5, 6)
    with torch.no_grad():
        head.weight.mul_(2)[3, 1] = float("nan")
    before = head.weight.detach().clone()
    with pytest.raises(ValueError, match="NormLinear: expected finite weights, got row 3"):
        head.renormalize_()
    assert torch.equal(head.weight.nan_to_num(9), before.nan_to_num(9))
    with pytest.raises(ValueError, match="without one"):
        nf.caffe.renormalize_after_step(torch.optim.SGD(head.parameters()), nn.Linear(2, 2))
    with pytest.raises(TypeError, match="`optimizer`"):
        nf.caffe.renormalize_after_step(head, head)
    with pytest.raises(ValueError, match="in_features"):
        lazy = load("scaled_cosine", in_features=None)
        nf.caffe.renormalize_after_step(torch.optim.SGD(lazy.parameters()), lazy)


def test_parameter_groups_leave_the_scale_undecayed():
    model = nn.ModuleList([nn.Linear(5, 5), *heads(), nf.NormFaceLoss(5, 6), load("scaled_cosine")])
    model[0].bias.requires_grad_(False)
    decayed, scales = nf.parameter_groups(model, 5e-4, lr=0.1)
    assert (
        decayed["weight_decay"] == 5e-4
        and scales["weight_decay"] == 0
        and decayed["lr"] == scales["lr"] == 0.1
    )
    assert {id(p) for p in scales["params"]} == {
        id(model[1].scale),
        id(model[2].scale),
        id(model[4].layers["scale"].scale),
    }
    assert len(decayed["params"]) == 5
    assert len(nf.parameter_groups(nn.Linear(2, 2), 0.1)) == 1
    optimizer = torch.optim.SGD(nf.parameter_groups(heads()[1], 0.5), lr=1.0)
    scale = optimizer.param_groups[1]["params"][0]
    scale.grad = torch.zeros(1)
    before = float(scale.detach())
    optimizer.step()
    assert float(scale.detach()) == before
