"""Heads of public forks: margins on the label, SphereFace, scales of every form, deploy nets, names of L2.

Each is held against its formula in plain torch, in double precision: the value in both modes, the gradient
where it is that of the value.
"""

import copy
import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize
from torch.utils.checkpoint import checkpoint

import normface_ext as nf

pytest.importorskip("google.protobuf")
from normface_ext.caffe import proto

D, C = 8, 7
LABELS = torch.tensor([0, 6, 3, 3, 1, 2])
SIX = torch.tensor([0, 5, 3, 3, 1, 2])  # of six classes


def layer(kind, name, bottoms, tops=None, options="", extra=""):
    wires = " ".join([f'bottom: "{b}"' for b in bottoms] + [f'top: "{t}"' for t in tops or [name]])
    return f'layer {{ name: "{name}" type: "{kind}" {wires} {extra} {options} }}\n'


NORM = layer("Normalize", "n", ["f"])
XAVIER = 'weight_filler { type: "xavier" }'
PRODUCT = layer(
    "InnerProduct",
    "ip",
    ["n"],
    options=f"inner_product_param {{ num_output: {C} bias_term: false normalize: true {XAVIER} }}",
)
FROZEN = "param { lr_mult: 0 decay_mult: 0 }"


def scale(bottom, value, options="num_axes: 0", extra=FROZEN, name="s"):
    options = f'scale_param {{ {options} filler {{ type: "constant" value: {value} }} }}'
    return layer("Scale", name, [bottom], options=options, extra=extra)


def loss(bottom, extra=""):
    return layer("SoftmaxWithLoss", "loss", [bottom, "label"], extra=extra)


def load(text, mode="math", **options):
    torch.manual_seed(3)
    return nf.caffe.load_head(text, mode=mode, **{"in_features": D, "dtype": torch.float64, **options})


def features(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(len(LABELS), D, generator=generator, dtype=torch.float64)).requires_grad_()


def agree(head, expected, tolerance=1e-9, labels=LABELS):
    """Value and gradients of the head's loss, against a function of (features, weight)."""
    x, weight = features(), next(p for p in head.parameters() if p.dim() == 2)
    found = head(f=x, label=labels).loss
    wanted = expected(x, weight)
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    gradients = [torch.autograd.grad(value, (x, weight)) for value in (found, wanted)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def cosines(x, weight):
    return normalize(x) @ normalize(weight).t()


def with_target(scores, change, labels=LABELS):
    target = scores.gather(1, labels[:, None])
    return scores.scatter(1, labels[:, None], change(target))


# LabelSpecificAdd


def adding(bias, bottom, more="", tops=("m",)):
    return layer(
        "LabelSpecificAdd",
        "m",
        [bottom, "label"],
        tops,
        f"label_specific_add_param {{ bias: {bias} {more} }}",
    )


ORDERS = {
    "margin, scale": lambda m, s: adding(-m, "ip") + scale("m", s) + loss("s"),
    "scale, margin": lambda m, s: scale("ip", s) + adding(-m * s, "s") + loss("m"),
    "in place": lambda m, s: adding(-m, "ip", tops=("ip",)) + scale("ip", s, name="ip2") + loss("ip2"),
    "default axes": lambda m, s: adding(-m, "ip") + scale("m", s, options="") + loss("s"),
    "no scale": lambda m, s: adding(-m, "ip") + loss("m"),
    "learned": lambda m, s: adding(-m, "ip") + scale("m", s, "num_axes: 0 min_value: 1", "") + loss("s"),
}


@pytest.mark.parametrize("m, s", [(0.25, 30), (0.5, 8)])
@pytest.mark.parametrize("order", ORDERS)
def test_label_specific_add_is_cosface(order, m, s):
    head = load(NORM + PRODUCT + ORDERS[order](m, s))
    by = 1.0 if order == "no scale" else s

    def cosface(x, weight):
        return cross_entropy(by * with_target(cosines(x, weight), lambda c: c - m), LABELS)

    agree(head, cosface)
    assert "TRAIN: fused into NormFaceLoss: n + " in repr(head)
    plain = load(NORM + PRODUCT + ORDERS[order](m, s) + layer("Softmax", "p", ["ip"]))
    assert "fused" not in repr(plain)
    agree(plain, cosface)
    head.eval()  # Caffe adds nothing in its TEST net
    agree(head, lambda x, weight: cross_entropy(by * cosines(x, weight), LABELS))
    agree(plain.eval(), lambda x, weight: cross_entropy(by * cosines(x, weight), LABELS))


def test_label_specific_add_in_mode_caffe_leaves_small_scores():
    head = load(NORM + PRODUCT + adding(-0.25, "ip") + scale("m", 30) + loss("s"), "caffe")
    x, weight = features(), head.layers["ip"].weight
    cosine = cosines(x, weight)
    own = cosine.gather(1, LABELS[:, None])
    assert (own > 0.25).any() and (own <= 0.25).any()
    expected = cross_entropy(30 * with_target(cosine, lambda c: torch.where(c > 0.25, c - 0.25, c)), LABELS)
    torch.testing.assert_close(head(f=x, label=LABELS).loss, expected, rtol=1e-9, atol=1e-9)
    assert any("leaves a score up to -bias" in note for note in load(NORM + PRODUCT + adding(-1, "ip")).notes)


def test_label_specific_add_learned_scale_before_it():
    """A bias behind a learned scale is no fixed margin of the cosine; the scale's gradient shows it."""
    text = NORM + PRODUCT + scale("ip", 8, extra="", options="num_axes: 0 min_value: 0.01")
    head = load(text + adding(-2, "s") + loss("m"))
    x, weight, s = features(), head.layers["ip"].weight, head.layers["s"].scale
    assert "fused into NormFaceLoss" in repr(head)
    expected = cross_entropy(with_target(s * cosines(x, weight), lambda z: z - 2), LABELS)
    found = head(f=x, label=LABELS).loss
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for a, b in zip(
        torch.autograd.grad(found, (x, weight, s)), torch.autograd.grad(expected, (x, weight, s)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert "fused" not in repr(load(NORM + PRODUCT + scale("ip", 8, extra="") + adding(-2, "s") + loss("m")))


def test_a_positive_bias_is_no_margin():
    head = load(NORM + PRODUCT + adding(0.5, "ip") + loss("m"))
    agree(head, lambda x, w: cross_entropy(with_target(cosines(x, w), lambda c: c + 0.5), LABELS))


def test_annealed_bias_counts_training_passes():
    schedule = "bias_base: -0.5 bias_gamma: 0.1 bias_power: 2 bias_min: -0.4 bias_max: -0.2 iteration: 1"
    head = load(NORM + PRODUCT + adding(0, "ip", schedule, ("m", "bias")) + scale("m", 9) + loss("s"))
    found = [head(f=features(), label=LABELS).tops["bias"].item() for _ in range(4)]
    told = [min(max(-0.5 + (1 + 0.1 * t) ** 2 - 1, -0.4), -0.2) for t in (1, 2, 3, 4)]
    assert found == pytest.approx(told, rel=1e-6)
    head.eval()(f=features(), label=LABELS)
    assert head.state_dict()["layers.m.iteration"] == 5
    fused = load(NORM + PRODUCT + adding(0, "ip", schedule) + scale("m", 9) + loss("s"))
    assert "TRAIN: fused" in repr(fused)
    for bias in told[:2]:

        def expected(x, w, bias=bias):
            return cross_entropy(9 * with_target(cosines(x, w), lambda c: c + bias), LABELS)

        agree(fused, expected, 1e-6)


def test_the_file_with_a_margin_and_the_one_with_an_angle():
    files = Path(__file__).parent / "prototxt"
    for name, formula in (
        ("margin_cosine", lambda x, w: 30 * with_target(cosines(x, w), lambda c: c - 0.35, SIX)),
        ("angular", lambda x, w: angular_scores(x, w, "QUADRUPLE", 1000 / 1.12, 1.0, SIX)),
    ):
        head, x = load(files / f"{name}.prototxt"), features()
        assert "TRAIN: fused into NormFaceLoss" in repr(head)
        weight = next(p for p in head.parameters() if p.dim() == 2)
        found = head(feature=x, label=SIX).loss
        expected = cross_entropy(formula(x, weight), SIX)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# CombinedMargin, CosinAddm


@pytest.mark.parametrize(
    "kind, options, margin",
    [
        (
            "CombinedMargin", "combined_margin_param { m1: 1 m2: 0.5 m3: 0.25 }",
            nf.CombinedMargin(1, 0.5, 0.25, guard="none"),
        ),
        ("CombinedMargin", "", nf.CombinedMargin(4, 0.5, 0.3499999940395355, guard="none")),
        ("CosinAddm", "", nf.ArcFace(0.5)),
        ("CosinAddm", "cosin_add_m_param { m: 1.5 }", nf.ArcFace(1.5)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("mode", ["math", "caffe"])
def test_margins_of_the_angle(kind, options, margin, mode):
    text = NORM + PRODUCT + layer(kind, "m", ["ip", "label"], options=options) + scale("m", 16) + loss("s")
    head = load(text, mode)
    assert ("fused into NormFaceLoss: n + ip + m + s + loss" in repr(head)) == (mode == "math")
    for phase in (True, False):
        head.train(phase)
        x, weight = features(), head.layers["ip"].weight
        expected = nf.reference.normface_loss(x, weight, LABELS, 16.0, margin=margin)
        torch.testing.assert_close(head(f=x, label=LABELS).loss, expected, rtol=1e-9, atol=1e-9)
    if mode == "math":
        agree(head, lambda x, w: nf.reference.normface_loss(x, w, LABELS, 16.0, margin=margin))


def test_margins_out_of_range_are_refused():
    text = (
        NORM
        + PRODUCT
        + layer("CombinedMargin", "m", ["ip", "label"], options="combined_margin_param {\nm3: -1 }")
    )
    with pytest.raises(ValueError, match=r"<text>:4: .*`m3`"):
        load(text)


def test_a_label_that_the_loss_ignores_has_no_margin():
    labels = torch.tensor([0, -1, 3, -1, 1, 2])
    kept = labels >= 0
    text = NORM + PRODUCT + adding(-0.25, "ip") + scale("m", 9) + loss("s", "loss_param { ignore_label: -1 }")
    for more in ("", layer("Softmax", "p", ["ip"])):

        def expected(x, w):
            scores = 9 * with_target(cosines(x, w)[kept], lambda c: c - 0.25, labels[kept])
            return cross_entropy(scores, labels[kept])

        agree(load(text + more), expected, labels=labels)


# MarginInnerProduct, LargeMarginInnerProduct

TYPES = ["SINGLE", "DOUBLE", "TRIPLE", "QUADRUPLE"]
SCHEDULE = "base: 1000 gamma: 0.12 power: 1 lambda_min: 5"


def margin_product(kind, size, schedule, kind_of_layer="MarginInnerProduct", tops=("fc", "lambda")):
    block = {"MarginInnerProduct": "margin", "LargeMarginInnerProduct": "largemargin"}[kind_of_layer]
    return layer(
        kind_of_layer,
        "fc",
        ["f", "label"],
        tops,
        f"{block}_inner_product_param {{ num_output: {size} type: {kind} {XAVIER} {schedule} }}",
    )


def angular_scores(x, weight, kind, blend, lengths, labels=LABELS):
    """By the angle itself: (-1)^k cos(m theta) - 2k."""
    m, norms = TYPES.index(kind) + 1, x.norm(dim=1, keepdim=True)
    cosine = cosines(x, weight)

    def change(c):
        theta = c.clamp(-1, 1).acos()
        k = (m * theta / math.pi).floor()
        return (blend * c + (-1) ** k * (m * theta).cos() - 2 * k) / (1 + blend)

    return norms * lengths * with_target(cosine, change, labels)


@pytest.mark.parametrize("blend", [0.0, 5.0])
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("layer_type", ["MarginInnerProduct", "LargeMarginInnerProduct"])
def test_angular_products(layer_type, kind, blend):
    text = margin_product(kind, C, f"base: 0 lambda_min: {blend}", layer_type) + loss("fc")

    def expected(x, weight):
        lengths = 1.0 if layer_type == "MarginInnerProduct" else weight.norm(dim=1)
        return cross_entropy(angular_scores(x, weight, kind, blend, lengths), LABELS)

    fused, plain = load(text), load(text + layer("Softmax", "p", ["fc"]))
    assert ("fused into NormFaceLoss: fc + loss" in repr(fused)) == (layer_type == "MarginInnerProduct")
    assert "fused" not in repr(plain)
    for head in (fused, plain):
        agree(head, expected)
        assert head(f=features(), label=LABELS).tops["lambda"].tolist() == [blend]
    released = load(text, "caffe")
    x = features()
    value = released(f=x, label=LABELS).loss
    torch.testing.assert_close(value, expected(x, released.layers["fc"].weight), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", TYPES)
def test_margin_inner_product_in_mode_caffe_has_the_released_gradient(kind):
    """dW is the plain product's; the label's part of dx is (a w + b x) / |(a, b)| with the slopes a and b."""
    head, x, g = (
        load(margin_product(kind, C, "base: 0 lambda_min: 3"), "caffe"),
        features(),
        torch.randn(6, C).double(),
    )
    weight = head.layers["fc"].weight
    found = torch.autograd.grad(head(f=x, label=LABELS).tops["fc"], (x, weight), g)
    w, norms, m = normalize(weight.detach()), x.detach().norm(dim=1), TYPES.index(kind) + 1
    torch.testing.assert_close(found[1], g.t() @ x.detach(), rtol=1e-9, atol=1e-9)
    cosine = ((x.detach() @ w.t()).gather(1, LABELS[:, None]).squeeze(1) / norms).requires_grad_()
    k = (m * cosine.acos() / math.pi).floor().detach()
    phi = (-1) ** k * (m * cosine.acos()).cos() - 2 * k
    (a,) = torch.autograd.grad(phi.sum(), cosine)
    b = (phi.detach() - cosine.detach() * a) / norms
    length = (a * a + b * b).sqrt()
    own = (a / length)[:, None] * w[LABELS] + (b / length)[:, None] * x.detach()
    others = g.scatter(1, LABELS[:, None], 0.0) @ w
    of_label = g.gather(1, LABELS[:, None])
    torch.testing.assert_close(found[0], others + of_label * (3 * w[LABELS] + own) / 4, rtol=1e-9, atol=1e-9)


def test_lambda_follows_its_schedule_and_is_saved():
    head = load(margin_product("QUADRUPLE", C, SCHEDULE) + loss("fc"))

    def told(t):
        return max(5, 1000 / (1 + 0.12 * t))

    for t in (1, 2):
        assert head(f=features(), label=LABELS).tops["lambda"].item() == pytest.approx(told(t), rel=1e-6)
    head.eval()
    for _ in range(2):  # rests
        assert head(f=features(), label=LABELS).tops["lambda"].item() == pytest.approx(told(3), rel=1e-6)
    other = load(margin_product("QUADRUPLE", C, SCHEDULE + " iteration: 9999") + loss("fc"))
    assert other(f=features(), label=LABELS).tops["lambda"].item() == 5
    other.load_state_dict(head.state_dict())
    copied = copy.deepcopy(other)
    for resumed in (other, copied):
        assert resumed.train()(f=features(), label=LABELS).tops["lambda"].item() == pytest.approx(
            told(3), rel=1e-6
        )


def test_a_recomputed_pass_has_the_lambda_it_had():
    text = margin_product("DOUBLE", C, "base: 9 gamma: 1 power: 1") + loss("fc")
    grads = []
    for again in (False, True):
        head = load(text)
        xs = [features(seed) for seed in (0, 1)]
        labels = [LABELS.clone(), LABELS.clone()]
        losses = [
            checkpoint(lambda x, y: head(f=x, label=y).loss, x, y, use_reentrant=False)  # noqa: B023
            if again
            else head(f=x, label=y).loss
            for x, y in zip(xs, labels, strict=True)
        ]
        sum(losses).backward()
        assert head.layers["fc"].iteration == 2
        grads.append([x.grad for x in xs])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_margin_inner_product_with_readers_of_its_scores_and_its_lambda():
    accuracy = layer("Accuracy", "acc", ["fc", "label"], extra="include { phase: TEST }")
    head = load(margin_product("DOUBLE", C, SCHEDULE) + loss("fc") + accuracy)
    assert "TRAIN: fused" in repr(head) and "TEST: fused" not in repr(head)
    assert set(head.eval()(f=features(), label=LABELS).tops) == {"lambda", "loss", "acc"}
    read = load(margin_product("DOUBLE", C, SCHEDULE) + layer("Power", "twice", ["lambda"]) + loss("fc"))
    assert "fused" not in repr(read)
    x = features()
    one = load(margin_product("DOUBLE", C, SCHEDULE, tops=("fc",)) + loss("fc"))
    losses = [net(f=x, label=LABELS).loss for net in (read, one)]
    torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-9)


def test_margin_inner_product_in_other_dtypes_and_of_maps():
    text = margin_product("QUADRUPLE", C, SCHEDULE) + loss("fc")
    x = features().detach()
    expected = load(text)(f=x, label=LABELS).loss
    narrow = load(text).float()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        narrow.layers["fc"].iteration.zero_()
        found = narrow(f=x.to(dtype), label=LABELS).loss
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    late = load(text, in_features=None)
    assert late(f=x[:, :, None, None], label=LABELS).loss.isfinite()
    assert late.layers["fc"].weight.shape == (C, D)
    zero = load(text)(f=torch.zeros(6, D, dtype=torch.float64), label=LABELS).loss
    torch.testing.assert_close(zero, torch.tensor(math.log(C), dtype=torch.float64), rtol=1e-4, atol=1e-4)


def test_margin_inner_product_is_renormalized():
    head = load(margin_product("DOUBLE", C, SCHEDULE) + loss("fc"), "caffe")
    with torch.no_grad():
        head.layers["fc"].weight.mul_(3)
    assert head.renormalize_() == ["fc"]
    torch.testing.assert_close(head.layers["fc"].weight.norm(dim=1), torch.ones(C, dtype=torch.float64))
    assert (
        load(margin_product("DOUBLE", C, SCHEDULE, "LargeMarginInnerProduct"), "caffe").renormalize_() == []
    )


@pytest.mark.parametrize(
    "option, part", [("lambda_min: -1", "lambda_min"), ("num_output: 0", "num_output"), ("axis: 2", "axis")]
)
def test_margin_inner_product_refuses(option, part):
    with pytest.raises(ValueError, match=part):
        load(margin_product("DOUBLE", C, option))


# Scale


@pytest.mark.parametrize("options", ["", "axis: 1 num_axes: 1", "num_axes: 0", "num_axes: 0 axis: 1"])
@pytest.mark.parametrize("learned", [False, True])
def test_scales(options, learned):
    head = load(NORM + PRODUCT + scale("ip", 12, options, "" if learned else FROZEN) + loss("s"))
    per_class = learned and "num_axes: 0" not in options
    s = head.layers["s"].scale
    assert list(s.shape) == ([C] if per_class else []) and s.requires_grad == learned
    assert ("fused" in repr(head)) != per_class
    agree(head, lambda x, w: cross_entropy(12 * cosines(x, w), LABELS))
    groups = head.parameter_groups(0.1, 0.5)
    assert sum(s is p for group in groups for p in group["params"]) == learned


def test_a_scale_per_class_has_its_gradient_and_its_bias():
    text = NORM + PRODUCT + scale("ip", 12, "bias_term: true bias_filler { value: 0.5 }", "") + loss("s")
    head, x = load(text), features()
    layers = head.layers
    assert layers["s"].bias.tolist() == [0.5] * C
    with torch.no_grad():
        layers["s"].scale.copy_(torch.arange(C))
    parameters = layers["ip"].weight, layers["s"].scale, layers["s"].bias
    expected = cross_entropy(cosines(x, parameters[0]) * parameters[1] + parameters[2], LABELS)
    found = head(f=x, label=LABELS).loss
    for a, b in zip(
        torch.autograd.grad(found, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_a_scale_per_class_may_come_with_its_first_scores():
    text = scale("f", 3, "", "")
    head = load(text)
    with pytest.raises(ValueError, match="no shape yet"):
        head.parameter_groups(0.1, 0)
    assert head(f=features()).tops["s"].shape == (6, D) and list(head.layers["s"].scale.shape) == [D]
    other = load(text)
    other.load_state_dict(head.state_dict())
    assert list(other.layers["s"].scale.shape) == [D]


def scale_blob(numbers, legacy=False):
    net = proto.messages()["NetParameter"](name="net")
    blob = net.layer.add(name="s").blobs.add(data=numbers)
    if legacy:
        blob.num, blob.channels, blob.height, blob.width = 1, 1, 1, len(numbers)
    else:
        blob.shape.dim.append(len(numbers))
    return net.SerializeToString()


@pytest.mark.parametrize("legacy", [False, True])
def test_scales_of_a_caffemodel(legacy):
    """Caffe stores one per class of a Scale with default axes; a fixed one is one number here."""
    fixed, learned = load(scale("f", 12, "")), load(scale("f", 12, "", ""))
    fixed.load_caffemodel(scale_blob([7.0] * C, legacy))
    assert fixed.layers["s"].scale.item() == 7
    with pytest.raises(ValueError, match=r"`scale` of shape \[\]"):
        fixed.load_caffemodel(scale_blob([7.0] * (C - 1) + [8.0], legacy))
    learned.load_caffemodel(scale_blob(list(range(C)), legacy))
    assert learned.layers["s"].scale.tolist() == list(range(C))
    with pytest.raises(ValueError, match=r"`scale` of shape \[7\]"):
        learned.load_caffemodel(scale_blob([1.0, 2.0], legacy))
    with pytest.raises(ValueError, match=r"`scale` of shape \[\]"):
        load(scale("f", 12)).load_caffemodel(scale_blob([7.0] * C, legacy))


def test_a_scale_that_is_a_bottom():
    text = layer("Scale", "y", ["a", "b"], options="scale_param { axis: %d }")
    a, b = features(), torch.arange(1.0, 9).double()
    torch.testing.assert_close(load(text % 1)(a=a, b=b).tops["y"], a * b)
    torch.testing.assert_close(load(text % 0)(a=a, b=b[:6]).tops["y"], a * b[:6, None])
    torch.testing.assert_close(load(text % 0)(a=a, b=b[0]).tops["y"], a * b[0])
    with pytest.raises(ValueError, match=r"layer \"y\".*axes 1 to 1 of \[6, 8\], got shape \[6\]"):
        load(text % 1)(a=a, b=b[:6])


def test_scores_times_the_features_own_norms():
    norm = layer("Normalize", "n", ["f"], ["n", "norm"], "normalize_param { bp_norm: true }")
    text = norm + PRODUCT + adding(-0.25, "ip") + layer("ChannelScale", "s", ["m", "norm"]) + loss("s")
    agree(
        load(text),
        lambda x, w: cross_entropy(
            x.norm(dim=1, keepdim=True) * with_target(cosines(x, w), lambda c: c - 0.25), LABELS
        ),
    )
    with pytest.raises(ValueError, match="global_scale"):
        load(layer("ChannelScale", "s", ["m", "n"], options="channel_scale_param { global_scale: true }"))


def test_power_is_a_fixed_scale():
    text = layer("Power", "y", ["f"], options="power_param { scale: 3 shift: 1 power: 2 }")
    torch.testing.assert_close(load(text)(f=features()).tops["y"], (1 + 3 * features()) ** 2)


# L2 by its names


@pytest.mark.parametrize(
    "name",
    ["L2N", "L2Norm", "L2Normalization", "L2Normalize", "Norm", "NormL2", "Normalization", "NormalizeLayer"],
)
def test_l2_normalisation_by_other_names(name):
    head = load(layer(name, "n", ["f"]) + PRODUCT + loss("ip"))
    assert "fused into NormFaceLoss: n + ip + loss" in repr(head)
    assert any(f"({name}): read as the L2" in note for note in head.notes)
    agree(head, lambda x, w: cross_entropy(cosines(x, w), LABELS))
    alone = load(layer(name, "n", ["f"]))
    assert alone(f=features()[:, :, None, None]).tops["n"].shape == (6, D, 1, 1)
    with pytest.raises(ValueError, match=r"\[N, D\] or \[N, D, 1, 1\]"):
        alone(f=torch.randn(2, 3, 4, 1))
    with pytest.raises(ValueError, match="unknown option `oops_param`"):
        load(layer(name, "n", ["f"], options="oops_param { eps: 1 }"))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("across", [True, False])
def test_the_normalize_layer_of_ssd(shared, across):
    flags = f"across_spatial: {str(across).lower()} channel_shared: {str(shared).lower()}"
    options = f"norm_param {{ {flags} scale_filler {{ value: 20 }} }}"
    head, x = load(layer("Normalize", "n", ["f"], options=options)), features()
    torch.testing.assert_close(head(f=x).tops["n"], 20 * normalize(x), rtol=1e-7, atol=1e-7)
    assert list(head.layers["n"].scale.shape) == ([] if shared else [D])
    maps = torch.randn(2, D, 3, 3, dtype=torch.float64)
    if across:
        with pytest.raises(ValueError, match="got shape"):
            head(f=maps)
    else:
        torch.testing.assert_close(head(f=maps).tops["n"], 20 * normalize(maps), rtol=1e-7, atol=1e-7)


# Deploy nets, dropout, pairs


def test_deploy_nets_end_in_a_softmax():
    text = (
        'input: "f" input_dim: 1 input_dim: 8\n'
        + NORM
        + PRODUCT
        + scale("ip", 12)
        + layer("Softmax", "prob", ["s"])
    )
    head = load(text).eval()
    expected = (12 * cosines(features(), head.layers["ip"].weight)).softmax(1)
    torch.testing.assert_close(head(f=features()).tops["prob"], expected, rtol=1e-9, atol=1e-9)
    assert head(f=features()).loss is None
    with pytest.raises(ValueError, match=r"softmax_param.axis: 1`, got 2"):
        load(layer("Softmax", "p", ["f"], options="softmax_param { axis: 2 }"))


def test_dropout_in_training_only():
    head, x = load(layer("Dropout", "d", ["f"], ["f"])), torch.ones(500, 8)
    dropped = head(f=x).tops["f"]
    assert set(dropped.unique().tolist()) == {0.0, 2.0} and 0.4 < (dropped == 0).float().mean() < 0.6
    torch.testing.assert_close(head.eval()(f=x).tops["f"], x)
    with pytest.raises(ValueError, match="dropout_ratio"):
        load(layer("Dropout", "d", ["f"], options="dropout_param { dropout_ratio: 1 }"))


@pytest.mark.parametrize("mode", ["math", "caffe"])
def test_contrastive_loss_of_bvlc_takes_a_similarity(mode):
    a, b, same = features(1), features(2), torch.tensor([1, 0, 0, 1, 0, 1])
    text = layer("ContrastiveLoss", "l", ["a", "b", "sim"], options="contrastive_loss_param { margin: 5 }")
    distance = (a - b).norm(dim=1)
    expected = torch.where(same == 1, distance**2, (5 - distance).clamp_min(0) ** 2).sum() / 12
    torch.testing.assert_close(load(text, mode)(a=a, b=b, sim=same).loss, expected)


def test_running_mean_stays_wide_and_finite():
    options = "general_contrastive_loss_param { add_intra_mae: true }"
    text = layer("GeneralContrastiveLoss", "l", ["d", "label"], options=options)
    head = load(text, dtype=torch.float16)
    assert head.half().layers["l"].intra_mae.dtype == torch.float32
    head(d=torch.rand(6, C), label=LABELS)
    before = head.layers["l"].intra_mae.clone()
    assert before > 0
    head(d=torch.full((6, C), math.nan), label=LABELS)
    assert torch.equal(head.layers["l"].intra_mae, before)
