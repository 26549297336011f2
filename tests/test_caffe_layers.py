"""Each layer of normface_ext.caffe against a NumPy transcription of Caffe's, in double precision.

Mode "caffe" must agree in value and gradient; mode "math" in value where Caffe's value is the formula,
and its gradient must be that of its value.
"""

import caffe_numpy as truth
import numpy as np
import pytest
import torch

import normface_ext as nf

pytest.importorskip("google.protobuf")

EPS = {"cpu": truth.CPU_EPS, "gpu": truth.GPU_EPS}
LABELS = [0, 3, 1, 1, 5, 2, 4]


def layer(kind, options="", bottoms=("x",), tops=("y",), extra=""):
    """The text of one layer; `options` is "block: body"."""
    block, _, body = options.partition(":")
    wires = " ".join([f'bottom: "{b}"' for b in bottoms] + [f'top: "{t}"' for t in tops])
    return (
        f'layer {{ name: "it" type: "{kind}" {wires} {extra} {f"{block} {{ {body} }}" if block else ""} }}\n'
    )


def head(text, mode="caffe", **options):
    return nf.caffe.load_head(text, mode=mode, dtype=torch.float64, **options)


def rng(seed=0):
    return np.random.default_rng(seed)


def tensor(array):
    return torch.tensor(np.asarray(array), dtype=torch.float64, requires_grad=True)


def agree(actual, expected, tolerance=1e-12):
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=tolerance, atol=tolerance)


def prose(options):
    """Options as prototxt text."""
    return " ".join(
        f"{k}: {str(v).lower() if isinstance(v, bool) else v}" for k, v in options.items() if v is not None
    )


# Normalize


@pytest.mark.parametrize("device", EPS)
@pytest.mark.parametrize("mode", ["math", "caffe"])
def test_normalize_l2(mode, device):
    x = tensor(rng().normal(size=(4, 5)) * [[1], [1e-3], [1e3], [0]])
    dy = rng(1).normal(size=(4, 5))
    y = head(layer("Normalize"), mode, eps=EPS[device])(x=x).tops["y"]
    agree(y, truth.normalize(x.detach().numpy(), EPS[device])[0])
    y.backward(torch.tensor(dy))
    agree(x.grad, truth.normalize_backward(x.detach().numpy(), dy, EPS[device]))


def test_normalize_zero_row_has_the_gradient_of_its_eps():
    for device, slope in (("cpu", 1e3), ("gpu", 1e6)):
        x = tensor(np.zeros((1, 3)))
        head(layer("Normalize"), eps=EPS[device])(x=x).tops["y"].sum().backward()
        agree(x.grad, np.full((1, 3), slope))


def test_normalize_l1():
    options = 'normalize_param: normalize_type: "L1"'
    x, dy = tensor(rng().normal(size=(4, 5)) * [[1], [1e-3], [1e3], [0]]), rng(1).normal(size=(4, 5))
    y = head(layer("Normalize", options), "caffe", eps=truth.GPU_EPS)(x=x).tops["y"]
    agree(y, truth.normalize(x.detach().numpy(), truth.L1_EPS, 1)[0])
    y.backward(torch.tensor(dy))
    agree(x.grad, truth.normalize_backward(x.detach().numpy(), dy, truth.L1_EPS, 1))
    y = head(layer("Normalize", options), "math", eps=truth.GPU_EPS)(x=x).tops["y"]
    agree(y, truth.normalize(x.detach().numpy(), truth.GPU_EPS, 1)[0])


@pytest.mark.parametrize("kind", ["L1", "L2"])
@pytest.mark.parametrize("bp_norm", [False, True])
@pytest.mark.parametrize("mode", ["math", "caffe"])
def test_normalize_second_top(mode, bp_norm, kind):
    p, eps = int(kind[1]), 1e-6
    options = f'normalize_param: normalize_type: "{kind}" bp_norm: {str(bp_norm).lower()}'
    x, dy, dn = tensor(rng().normal(size=(4, 5))), rng(1).normal(size=(4, 5)), rng(2).normal(size=(4, 1))
    tops = head(layer("Normalize", options, tops=("y", "n")), mode, eps=eps)(x=x).tops
    agree(tops["n"], truth.normalize(x.detach().numpy(), eps, p)[1])
    ((tops["y"] * torch.tensor(dy)).sum() + (tops["n"] * torch.tensor(dn)).sum()).backward()
    agree(x.grad, truth.normalize_backward(x.detach().numpy(), dy, eps, p, dn, bp_norm))


def test_normalize_fix_gradient_is_for_mode_caffe():
    text = layer("Normalize", "normalize_param: fix_gradient: true")
    x, dy = tensor(rng().normal(size=(4, 5))), rng(1).normal(size=(4, 5))
    head(text)(x=x).tops["y"].backward(torch.tensor(dy))
    agree(x.grad, truth.normalize_backward(x.detach().numpy(), dy, 1e-12, fix_gradient_on_gpu=True))
    with pytest.raises(ValueError, match="fix_gradient"):
        head(text, "math")


# InnerProduct


def product(normalize, mode, eps=1e-12, bias=False):
    options = f"inner_product_param: num_output: 6 bias_term: {str(bias).lower()}"
    options += f' normalize: {str(normalize).lower()} weight_filler {{ type: "gaussian" }}'
    options += ' bias_filler { type: "gaussian" }'
    return head(layer("InnerProduct", options), mode, eps=eps, in_features=5)


@pytest.mark.parametrize("device", EPS)
def test_inner_product_normalize_in_mode_caffe(device):
    net, x, g = (
        product(True, "caffe", EPS[device]),
        tensor(rng().normal(size=(4, 5))),
        rng(1).normal(size=(4, 6)),
    )
    weight = net.layers["it"].weight
    before = weight.detach().numpy().copy()
    top, stored = truth.inner_product(x.detach().numpy(), before, True, EPS[device])
    y = net(x=x).tops["y"]
    agree(y, top)
    y.backward(torch.tensor(g))
    dx, dw = truth.inner_product_backward(x.detach().numpy(), stored, g)
    agree(x.grad, dx)
    agree(weight.grad, dw)
    agree(weight, before, 0)  # forward leaves the stored weight alone, in training and evaluation
    net.eval()(x=x)
    agree(weight, before, 0)
    assert net.renormalize_() == ["it"]
    agree(weight, stored)


def test_inner_product_normalize_in_mode_math_has_the_gradient_of_its_value():
    net, x = product(True, "math"), tensor(rng().normal(size=(4, 5)))
    weight = net.layers["it"].weight
    agree(
        net(x=x).tops["y"], truth.inner_product(x.detach().numpy(), weight.detach().numpy(), True, 1e-12)[0]
    )

    def value(x, w):
        return torch.func.functional_call(net, {"layers.it.weight": w}, ({"x": x},)).tops["y"]

    assert torch.autograd.gradcheck(value, (x, weight.detach().clone().requires_grad_()))


@pytest.mark.parametrize("mode", ["math", "caffe"])
def test_inner_product_plain_with_bias(mode):
    net, x = product(False, mode, bias=True), tensor(rng().normal(size=(4, 5)))
    it = net.layers["it"]
    expected = x.detach().numpy() @ it.weight.detach().numpy().T + it.bias.detach().numpy()
    agree(net(x=x).tops["y"], expected)
    assert [len(group["params"]) for group in net.parameter_groups(1.0, 0.0)] == [2]


def test_inner_product_lumps_the_axes_behind_the_first():
    net, x = product(False, "math"), tensor(rng().normal(size=(4, 5, 1, 1)))
    agree(net(x=x).tops["y"], net(x=x.flatten(1)).tops["y"].detach().numpy())


# InnerDistance


def distances(kind, mode, normalize=False, eps=1e-12):
    options = (
        f'inner_distance_param: num_output: 6 distance_type: "{kind}" normalize: {str(normalize).lower()}'
    )
    return head(
        layer("InnerDistance", options + ' weight_filler { type: "gaussian" }'), mode, in_features=5, eps=eps
    )


@pytest.mark.parametrize("kind", ["L1", "L2"])
def test_inner_distance_in_mode_caffe(kind):
    net, x, g = distances(kind, "caffe"), tensor(rng().normal(size=(4, 5))), rng(1).normal(size=(4, 6))
    weight = net.layers["it"].weight
    with torch.no_grad():
        weight[0, 0] = x[0, 0]  # a difference of exactly zero
    y = net(x=x).tops["y"]
    agree(y, truth.inner_distance(x.detach().numpy(), weight.detach().numpy(), int(kind[1])))
    y.backward(torch.tensor(g))
    dx, dw = truth.inner_distance_backward(x.detach().numpy(), weight.detach().numpy(), g, int(kind[1]))
    agree(x.grad, dx)
    agree(weight.grad, dw)


@pytest.mark.parametrize("kind", ["L1", "L2"])
@pytest.mark.parametrize("normalize", [False, True])
def test_inner_distance_in_mode_math_has_the_gradient_of_its_value(kind, normalize):
    net, x = distances(kind, "math", normalize), tensor(rng().normal(size=(4, 5)))
    weight = net.layers["it"].weight
    unit = truth.inner_product(x.detach().numpy(), weight.detach().numpy(), normalize, 1e-12)[1]
    agree(net(x=x).tops["y"], truth.inner_distance(x.detach().numpy(), unit, int(kind[1])))

    def value(x, w):
        return torch.func.functional_call(net, {"layers.it.weight": w}, ({"x": x},)).tops["y"]

    assert torch.autograd.gradcheck(value, (x, weight.detach().clone().requires_grad_()))


@pytest.mark.parametrize("device", EPS)
def test_inner_distance_normalize_in_mode_caffe(device):
    # Caffe's GPU layer has no eps here and makes NaN of a zero row; this one stays zero.
    net, x = distances("L2", "caffe", True, EPS[device]), tensor(rng().normal(size=(4, 5)))
    weight = net.layers["it"].weight
    with torch.no_grad():
        weight[2] = 0
    stored = truth.inner_product(x.detach().numpy(), weight.detach().numpy(), True, EPS[device])[1]
    agree(net(x=x).tops["y"], truth.inner_distance(x.detach().numpy(), stored, 2))


# Scale


@pytest.mark.parametrize("start, low, high", [(3, 0.5, 10), (-1, 0.5, 10), (20, 0.5, 10)])
def test_scale_is_used_within_its_bounds_and_no_gradient_is_masked(start, low, high):
    bounds = f"min_value: {low} max_value: {high}"
    net = head(layer("Scale", f"scale_param: num_axes: 0 filler {{ value: {start} }} {bounds}"))
    x, g = tensor(rng().normal(size=(4, 6))), rng(1).normal(size=(4, 6))
    top, stored = truth.scale(x.detach().numpy(), start, low, high)
    y = net(x=x).tops["y"]
    agree(y, top)
    y.backward(torch.tensor(g))
    scale = net.layers["it"].scale
    assert scale.item() == start  # Caffe has written `stored` there
    agree(scale.grad, (g * x.detach().numpy()).sum())
    agree(x.grad, stored * g)


@pytest.mark.parametrize("start", [-1.0, 3.0, 20.0])
def test_caffe_s_scale_is_clamped_on_request(start):
    """By `renormalize_`, and so after each step of an optimizer that it was asked for."""
    net = nf.caffe.load_head(
        'layer { name: "it" type: "Scale" bottom: "x" top: "y" scale_param { num_axes: 0'
        f" filler {{ value: {start} }} min_value: 0.5 max_value: 10 }} }}"
    )
    scale, held = net.layers["it"].scale, min(max(start, 0.5), 10.0)
    assert torch.equal(net(x=torch.ones(2, 3)).tops["y"], torch.full((2, 3), held)) and scale.item() == start
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    nf.caffe.renormalize_after_step(optimizer, net)
    assert scale.item() == held
    scale.grad = torch.tensor(100.0)
    optimizer.step()
    assert scale.item() == 0.5


# SoftmaxWithLoss


def softmax(loss_param="", mode="caffe", tops=("loss",)):
    options = f"loss_param: {loss_param}" if loss_param else ""
    return head(layer("SoftmaxWithLoss", options, ("x", "label"), tops), mode)


@pytest.mark.parametrize("normalization", ["FULL", "VALID", "BATCH_SIZE", "NONE"])
@pytest.mark.parametrize("ignore", [None, 1])
@pytest.mark.parametrize("mode", ["math", "caffe"])
def test_softmax_loss(mode, ignore, normalization):
    text = f"normalization: {normalization}" + (f" ignore_label: {ignore}" if ignore is not None else "")
    x = tensor(3 * rng().normal(size=(7, 6)))
    loss = softmax(text, mode)(x=x, label=torch.tensor(LABELS)).loss
    agree(loss, truth.softmax_loss(x.detach().numpy(), LABELS, ignore, normalization))
    loss.backward()
    agree(x.grad, truth.softmax_loss_backward(x.detach().numpy(), LABELS, ignore, normalization))


def test_softmax_loss_of_ignored_rows_only_is_zero():
    x = tensor(rng().normal(size=(2, 6)))
    loss = softmax("ignore_label: 4")(x=x, label=torch.tensor([4, 4])).loss
    loss.backward()
    agree(loss, truth.softmax_loss(x.detach().numpy(), [4, 4], 4))
    agree(x.grad, np.zeros((2, 6)))


def test_softmax_loss_floor():
    scores = np.zeros((2, 6))
    scores[0, 0] = -200
    for mode, expected in (("caffe", truth.softmax_loss(scores, [0, 1])), ("math", None)):
        x = tensor(scores)
        loss = softmax(mode=mode)(x=x, label=torch.tensor([0, 1])).loss
        agree(loss, (200 + 2 * np.log(5) + np.log(6 / 5)) / 2 if expected is None else expected)
        loss.backward()  # the floor is in the value only
        agree(x.grad, truth.softmax_loss_backward(scores, [0, 1]))


def test_softmax_loss_second_top_is_the_probability():
    x = tensor(rng().normal(size=(7, 6)))
    out = softmax(tops=("loss", "p"))(x=x, label=torch.tensor(LABELS))
    agree(out.tops["p"], truth.softmax(x.detach().numpy()))


@pytest.mark.parametrize("normalize, mode", [("true", "VALID"), ("false", "BATCH_SIZE")])
def test_softmax_loss_old_normalize_option(normalize, mode):
    x = tensor(rng().normal(size=(7, 6)))
    loss = softmax(f"normalize: {normalize} ignore_label: 1")(x=x, label=torch.tensor(LABELS)).loss
    agree(loss, truth.softmax_loss(x.detach().numpy(), LABELS, 1, mode))


# GeneralContrastiveLoss and GeneralTripletLoss

CONTRASTIVE = [
    {},
    {"positive_margin": 0.3, "negative_margin": 1.3, "positive_weight": 2.0, "negative_weight": 0.5},
    {"positive_outlier_thresh": 0.9, "positive_margin": 0.2},
    {"exp_negative_weight": True},
    {"max_negative_only": True},
    {"max_negative_only": True, "exp_negative_weight": True},
    {"max_positive_only": True},
    {"positive_first": True, "positive_upper_bound": 0.8},
    {
        "positive_first": True,
        "positive_upper_bound": 0.8,
        "max_negative_only": True,
        "max_positive_only": True,
    },
    {"normalize_negative": 0.5},
    {"normalize_negative": 0.5, "exp_negative_weight": True},
    {"negative_weight": -0.5},
    {"add_intra_mae": True, "max_negative_margin": 0.004},
]
TRIPLET = [
    {},
    {"margin": 0.8, "hardest_only": True},
    {"add_center_loss": False},
    {"add_center_loss": False, "hardest_only": True},
    {"positive_first": True, "positive_upper_bound": 0.8},
    {"positive_first": True, "positive_upper_bound": 0.8, "hardest_only": True},
    {"positive_weight": 3.0, "negative_weight": 0.5},
]


def metric(kind, options, mode):
    block = {"Contrastive": "general_contrastive_loss_param", "Triplet": "general_triplet_loss_param"}[kind]
    return head(
        layer(f"General{kind}Loss", f"{block}: {prose(options)}", ("x", "label"), ("loss", "means")), mode
    )


def some_distances(seed=0):
    return rng(seed).uniform(0.0, 2.0, size=(len(LABELS), 6))


@pytest.mark.parametrize("options", CONTRASTIVE, ids=prose)
@pytest.mark.parametrize("seed", range(3))
def test_contrastive_in_mode_caffe(options, seed):
    d, intra = tensor(some_distances(seed)), 0.0
    net = metric("Contrastive", options, "caffe")
    for _ in range(3):  # the running mean moves the margin
        d.grad = None
        value, means, gradient, intra = truth.contrastive(d.detach().numpy(), LABELS, intra, **options)
        out = net(x=d, label=torch.tensor(LABELS))
        out.loss.backward()
        # float32 options: 0.3 is not 0.3
        agree(out.loss, value, 1e-6)
        agree(out.tops["means"], means, 1e-6)
        agree(d.grad, gradient, 1e-6)


def test_running_mean_is_saved_and_rests_in_evaluation():
    net = metric("Contrastive", {"add_intra_mae": True}, "math")
    d, labels = tensor(some_distances()), torch.tensor(LABELS)
    net(x=d, label=labels)
    mean = truth.contrastive(d.detach().numpy(), LABELS, add_intra_mae=True)[3]
    agree(net.state_dict()["layers.it.intra_mae"], mean, 1e-6)
    net.eval()(x=d, label=labels)
    agree(net.layers["it"].intra_mae, mean, 1e-6)


def test_contrastive_slips_of_caffe():
    """Class 0's positive hides its negatives; max_positive_only keeps the smallest; math does neither."""
    d = np.array([[1.9, 0.5, 1.5], [1.5, 0.1, 1.5]])
    for mode, expected in (("caffe", [0, 0, 0]), ("math", [0.5, -0.5, 0])):
        x = tensor(d)
        net = metric("Contrastive", {"max_negative_only": True, "max_positive_only": True}, mode)
        net(x=x, label=torch.tensor([0, 1])).loss.backward()
        agree(x.grad[0], expected)
        agree(x.grad[1], [0, 0.5 if mode == "caffe" else 0, 0])


def test_contrastive_beyond_the_outlier_threshold():
    """Caffe's value clips d - m+ at T, its gradient is gated at d = T; math's is where the value is flat."""
    options = {"positive_margin": 0.5, "positive_outlier_thresh": 1.0}
    for mode, slope in (("caffe", 0.0), ("math", 1.0)):
        x = tensor([[1.2, 5.0]])
        out = metric("Contrastive", options, mode)(x=x, label=torch.tensor([0]))
        out.loss.backward()
        agree(out.loss, 0.7)
        agree(x.grad, [[slope, 0.0]])


@pytest.mark.parametrize("options", TRIPLET, ids=prose)
@pytest.mark.parametrize("seed", range(3))
def test_triplet_in_mode_caffe(options, seed):
    d = tensor(some_distances(seed))
    value, means, gradient = truth.triplet(d.detach().numpy(), LABELS, **options)
    out = metric("Triplet", options, "caffe")(x=d, label=torch.tensor(LABELS))
    out.loss.backward()
    agree(out.loss, value, 1e-6)
    agree(out.tops["means"], means)
    agree(d.grad, gradient, 1e-6)


def test_triplet_hardest_distance_of_zero():
    d = np.array([[0.5, 0.0, 0.3]])
    for center in (True, False):
        options = {"hardest_only": True, "add_center_loss": center}
        x = tensor(d)
        metric("Triplet", options, "caffe")(x=x, label=torch.tensor([0])).loss.backward()
        agree(x.grad, truth.triplet(d, [0], **options)[2], 1e-6)
        assert x.grad[0, 1] > 0  # pulled instead of pushed


def test_triplet_positive_gradient():
    """Four active negatives: the true slope of the positive is 4, Caffe's is 1."""
    for mode, expected in (("caffe", 1.0), ("math", 4.0)):
        x = tensor([[1.0, 0.1, 0.2, 0.3, 0.4]])
        metric("Triplet", {"add_center_loss": False}, mode)(x=x, label=torch.tensor([0])).loss.backward()
        agree(x.grad, [[expected, -1, -1, -1, -1]])


@pytest.mark.parametrize(
    "kind, options", [("Contrastive", o) for o in CONTRASTIVE[:-4]] + [("Triplet", o) for o in TRIPLET]
)
def test_metric_losses_in_mode_math_have_the_gradient_of_their_value(kind, options):
    net = metric(kind, options, "math")
    labels = torch.tensor(LABELS)
    assert torch.autograd.gradcheck(lambda d: net(x=d, label=labels).loss, (tensor(some_distances()),))


@pytest.mark.parametrize("options", [CONTRASTIVE[i] for i in (0, 1, 3)] + [CONTRASTIVE[7]], ids=prose)
def test_contrastive_in_mode_math_has_the_value_of_caffe(options):
    d = some_distances()
    out = metric("Contrastive", options, "math")(x=tensor(d), label=torch.tensor(LABELS))
    value, means, _, _ = truth.contrastive(d, LABELS, **options)
    agree(out.loss, value, 1e-6)
    agree(out.tops["means"], means, 1e-6)


def test_triplet_in_mode_math_adds_the_centre_loss_to_the_value():
    d = some_distances()
    for options in ({"add_center_loss": False}, {"add_center_loss": True}, {"hardest_only": True}):
        value = truth.triplet(d, LABELS, **options)[0]
        if options.get("add_center_loss", True):
            value += d[range(len(LABELS)), LABELS].mean()
        agree(metric("Triplet", options, "math")(x=tensor(d), label=torch.tensor(LABELS)).loss, value, 1e-6)


def test_statistics_count_in_the_printed_loss_and_have_no_gradient():
    d = tensor(some_distances())
    text = layer(
        "GeneralContrastiveLoss", "", ("x", "label"), ("loss", "means"), "loss_weight: 2 loss_weight: 1"
    )
    out = head(text)(x=d, label=torch.tensor(LABELS))
    agree(out.loss, 2 * out.tops["loss"].item())
    agree(out.printed_loss, 2 * out.tops["loss"].item() + out.tops["means"].sum().item())
    assert not out.tops["means"].requires_grad and not out.printed_loss.requires_grad


# Accuracy


@pytest.mark.parametrize("min_is_better", [False, True])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("ignore", [None, 1])
def test_accuracy(min_is_better, top_k, ignore):
    scores = rng().integers(0, 3, size=(40, 6)).astype(float)  # many ties
    labels = rng(1).integers(0, 6, size=40)
    options = f"accuracy_param: min_is_better: {str(min_is_better).lower()} top_k: {top_k}"
    options += f" ignore_label: {ignore}" if ignore is not None else ""
    out = head(layer("Accuracy", options, ("x", "label")))(x=tensor(scores), label=torch.tensor(labels))
    agree(out.tops["y"], truth.accuracy(scores, labels, min_is_better, top_k, ignore))


def test_accuracy_ties():
    """Caffe sorts (value, class) pairs: the smaller class wins for distances, the larger for similarities."""
    scores = torch.tensor([[0.5, 0.5]])
    for min_is_better, winner in ((True, 0), (False, 1)):
        for label in (0, 1):
            right = nf.caffe.accuracy(scores, torch.tensor([label]), min_is_better=min_is_better)
            assert right == float(label == winner)


def test_accuracy_refuses():
    scores, labels = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"top_k.*got 4"):
        nf.caffe.accuracy(scores, labels, top_k=4)
    with pytest.raises(ValueError, match="NaN, got one in row 1"):
        nf.caffe.accuracy(torch.tensor([[0.0, 1], [0, torch.nan]]), labels)
    with pytest.raises(IndexError, match="got 3 at row 1"):
        nf.caffe.accuracy(scores, torch.tensor([0, 3]))


# Flip, Eltwise, Slice, Concat


def test_flip():
    x = rng().normal(size=(2, 3, 4, 5))
    agree(head(layer("Flip"))(x=tensor(x)).tops["y"], x[:, :, :, ::-1])
    both = layer("Flip", "flip_param: flip_width: false flip_height: true")
    agree(head(both)(x=tensor(x)).tops["y"], x[:, :, ::-1])
    with pytest.raises(ValueError, match=r'layer "it" \(Flip\).*4-D'):
        head(layer("Flip"))(x=tensor(x[0]))


@pytest.mark.parametrize(
    "options, expected",
    [
        ("", lambda a, b: a + b),
        ("eltwise_param: operation: SUM coeff: 2 coeff: -1", lambda a, b: 2 * a - b),
        ("eltwise_param: operation: MAX", np.maximum),
        ("eltwise_param: operation: PROD", np.multiply),
    ],
)
def test_eltwise(options, expected):
    a, b = rng().normal(size=(2, 4, 3))
    net = head(layer("Eltwise", options, ("a", "b")))
    agree(net(a=tensor(a), b=tensor(b)).tops["y"], expected(a, b))
    with pytest.raises(ValueError, match="one shape"):
        net(a=tensor(a), b=tensor(b[:2]))


def test_slice_and_concat_undo_each_other():
    x = rng().normal(size=(6, 3))
    for param in ("axis: 0", "slice_dim: 0", "axis: 0 slice_point: 2"):
        text = layer("Slice", f"slice_param: {param}", tops=("a", "b"))
        tops = head(text)(x=tensor(x)).tops
        cut = 2 if "point" in param else 3
        agree(tops["a"], x[:cut])
        agree(tops["b"], x[cut:])
    net = head(layer("Concat", "concat_param: axis: 0", ("a", "b")))
    agree(net(a=tensor(x[:2]), b=tensor(x[2:])).tops["y"], x)


# Pairs and triplets of rows

PAIRS = ("a", "b", "la", "lb")


def pair_problem():
    a = rng(1).normal(size=(8, 5))
    b = a + rng(2).normal(size=(8, 5)) * np.linspace(0, 0.9, 8)[:, None]  # the first pair has d = 0
    return a, b, torch.tensor([0, 1, 2, 3, 4, 5, 6, 7]), torch.tensor([9, 1, 9, 3, 9, 5, 9, 9])


@pytest.mark.parametrize("shape", [(8, 5), (8, 5, 1, 1)])
@pytest.mark.parametrize("options", [{}, {"margin": 2.5}, {"margin": 3.0, "legacy_version": True}])
def test_pair_contrastive_in_mode_caffe(options, shape):
    a, b, la, lb = pair_problem()
    text = layer("ContrastiveLoss", f"contrastive_loss_param: {prose(options)}", PAIRS)
    blobs = {"a": tensor(a.reshape(shape)), "b": tensor(b.reshape(shape)), "la": la, "lb": lb}
    out = head(text)(**blobs)
    margin, legacy = options.get("margin", 1.0), options.get("legacy_version", False)
    loss, da, db = truth.pair_contrastive(a, b, la, lb, margin, legacy)
    active = (da != 0).any(1)
    assert active[la == lb].all() and 0 < active[la != lb].sum() < 5
    agree(out.loss, loss)
    out.loss.backward()
    agree(blobs["a"].grad.flatten(1), da)
    agree(blobs["b"].grad.flatten(1), db)


@pytest.mark.parametrize("options", [{"margin": 2.5}, {"margin": 3.0, "legacy_version": True}])
def test_pair_contrastive_in_mode_math_has_the_gradient_of_its_value(options):
    a, b, la, lb = pair_problem()
    loaded = head(layer("ContrastiveLoss", f"contrastive_loss_param: {prose(options)}", PAIRS), "math")
    legacy = options.get("legacy_version", False)
    expected = truth.pair_contrastive(a, b, la, lb, options["margin"], legacy)[0]
    agree(loaded(a=tensor(a), b=tensor(b), la=la, lb=lb).loss, expected)
    apart = slice(1, None)  # at d = 0 the distance has no slope
    leaves = tensor(a[apart]), tensor(b[apart])
    assert torch.autograd.gradcheck(
        lambda x, y: loaded(a=x, b=y, la=la[apart], lb=lb[apart]).loss, leaves, atol=1e-7
    )


@pytest.mark.parametrize("mode", ["math", "caffe"])
@pytest.mark.parametrize("options", [{}, {"margin": 0.125}])
def test_triplet_of_rows(options, mode):
    rows = [rng(seed).normal(size=(9, 5)) for seed in (1, 2, 3)]
    text = layer("TripletLoss", f"triplet_loss_param: {prose(options)}", ("a", "p", "n"))
    blobs = [tensor(r) for r in rows]
    out = head(text, mode)(a=blobs[0], p=blobs[1], n=blobs[2])
    loss, *gradients = truth.triplet_of_rows(*rows, options.get("margin", 1.0))
    assert 0 < (gradients[0] != 0).any(1).sum() < 9
    agree(out.loss, loss)
    out.loss.backward()
    for blob, expected in zip(blobs, gradients, strict=True):
        agree(blob.grad, expected)


def test_pair_losses_say_what_they_take():
    with pytest.raises(ValueError, match=r"3 or 4 `bottom` \(features a, .* or one similarity\), got 2"):
        head(layer("ContrastiveLoss", bottoms=("a", "b")))
    with pytest.raises(ValueError, match=r"3 `bottom` \(anchors, positives, negatives\), got 2"):
        head(layer("TripletLoss", bottoms=("a", "p")))
    loaded = head(layer("TripletLoss", bottoms=("a", "p", "n")))
    x = tensor(rng().normal(size=(3, 4)))
    with pytest.raises(ValueError, match=r"expected bottom 2 to be \[N, D\] .* got shape \[3, 3\]"):
        loaded(a=x, p=x, n=x[:, :3])
    with pytest.raises(ValueError, match=r"expected bottom 0 to be \[N, D\] or .* got shape \[3, 2, 2\]"):
        loaded(a=x.view(3, 2, 2), p=x, n=x)
