"""Caffe's losses against an independent transcription of the released layers, in NumPy and float64.

The loops below follow what happynear/caffe-windows (branch ms) does cell by cell, in words of our own:
GeneralContrastiveLoss and GeneralTripletLoss on a matrix of distances. Each deviation of the layers from
the gradient of their own loss has a test that ``caffe.general_*_loss`` (here: mode "caffe") shows it and the
formula (``reference``, mode "math") does not.
"""

import itertools

import numpy as np
import pytest
import torch

import normface_ext as nf

CONTRASTIVE = {
    "pos_margin": 0.0, "neg_margin": 1.0, "pos_weight": 1.0, "neg_weight": 1.0, "hardest_only": False,
    "max_positive_only": False, "positive_outlier_thresh": 4.0, "positive_first": False,
    "positive_upper_bound": 1.0, "exp_negative_weight": False, "normalize_negative": None,
}  # fmt: skip
TRIPLET = {
    "margin": 0.2, "pos_weight": 1.0, "neg_weight": 1.0, "hardest_only": False, "add_center_loss": True,
    "positive_first": False, "positive_upper_bound": 1.0,
}  # fmt: skip


def contrastive_layer(distance, label, **options):
    """(loss, gradient, [mean positive hinge, mean negative hinge]), cell by cell."""
    o = {**CONTRASTIVE, **options}
    rows, columns = distance.shape
    cell = np.zeros_like(distance)
    positives = negatives = 0.0
    kept_positive, kept_negative = 0, [0] * rows
    for i in range(rows):
        for j in range(columns):
            d = distance[i, j]
            if j == label[i]:
                hinge = min(o["positive_outlier_thresh"], max(0.0, d - o["pos_margin"]))
                cell[i, j] = hinge * o["pos_weight"]
                positives += hinge
                if o["max_positive_only"] and cell[i, j] < cell[kept_positive, label[kept_positive]]:
                    kept_positive = i
            elif d < o["neg_margin"]:
                hinge = o["neg_margin"] - d
                cell[i, j] = (np.exp(-d) if o["exp_negative_weight"] else hinge) * o["neg_weight"]
                negatives += hinge
                if o["hardest_only"] and cell[i, j] > cell[i, kept_negative[i]]:
                    kept_negative[i] = j
        if o["positive_first"] and distance[i, label[i]] > o["positive_upper_bound"]:
            for j in range(columns):
                if j != label[i]:
                    cell[i, j] = 0.0
    for i, j in itertools.product(range(rows), range(columns)):
        own = j == label[i]
        if o["max_positive_only"] and own and i != kept_positive:
            cell[i, j] = 0.0
        if o["hardest_only"] and not own and j != kept_negative[i]:
            cell[i, j] = 0.0
    loss = np.abs(cell).sum() / rows

    gradient = np.zeros_like(distance)
    total = 0.0
    for i in range(rows):
        if o["positive_first"] and distance[i, label[i]] > o["positive_upper_bound"]:
            gradient[i, label[i]] = o["pos_weight"]
            continue
        for j in range(columns):
            d = distance[i, j]
            if j == label[i]:
                inside = o["pos_margin"] < d < o["positive_outlier_thresh"]
                if inside and not (o["max_positive_only"] and i != kept_positive):
                    gradient[i, j] = o["pos_weight"]
            elif d < o["neg_margin"] and not (o["hardest_only"] and j != kept_negative[i]):
                size = (np.exp(-d) if o["exp_negative_weight"] else 1.0) * o["neg_weight"]
                gradient[i, j] = -size
                total += size
    if o["normalize_negative"] is not None:
        total = abs(total) / o["normalize_negative"] / rows
        if total > o["pos_weight"]:
            for i, j in itertools.product(range(rows), range(columns)):
                if j != label[i]:
                    gradient[i, j] /= total
    return loss, gradient / rows, [positives / rows, negatives / rows / (columns - 1)]


def triplet_layer(distance, label, **options):
    o = {**TRIPLET, **options}
    rows, columns = distance.shape
    cell = np.zeros_like(distance)
    hardest = [-1] * rows
    near = far = 0.0
    for i in range(rows):
        own = distance[i, label[i]]
        near += own
        for j in range(columns):
            if j == label[i]:
                continue
            cell[i, j] = max(0.0, own + o["margin"] - distance[i, j]) * o["neg_weight"]
            far += distance[i, j]
            if o["hardest_only"] and cell[i, j] > 0 and (hardest[i] < 0 or cell[i, j] > cell[i, hardest[i]]):
                hardest[i] = j
        for j in range(columns):
            loses = o["hardest_only"] and hardest[i] >= 0 and j != hardest[i]
            drops = o["positive_first"] and own > o["positive_upper_bound"]
            if j != label[i] and (loses or drops):
                cell[i, j] = 0.0
    loss = np.abs(cell).sum() / rows

    gradient = cell.copy()  # the layer writes its gradient over its hinges
    for i in range(rows):
        own = distance[i, label[i]]
        if o["positive_first"] and own > o["positive_upper_bound"]:
            gradient[i] = 0.0
            gradient[i, label[i]] = o["pos_weight"]
            continue
        active = 0
        if o["hardest_only"]:
            if hardest[i] >= 0 and distance[i, hardest[i]] != 0:
                gradient[i, hardest[i]] = -o["neg_weight"]
                active = 1
        else:
            for j in range(columns):
                if j != label[i]:
                    on = own + o["margin"] > distance[i, j]
                    gradient[i, j] = -o["neg_weight"] if on else 0.0
                    active += on
        if o["add_center_loss"] or active:
            gradient[i, label[i]] = o["pos_weight"]
    return loss, gradient / rows, [near / rows, far / rows / (columns - 1)]


RELEASED = {
    "c_contrastive_loss": nf.caffe.general_contrastive_loss,
    "c_triplet_loss": nf.caffe.general_triplet_loss,
}
FORMULA = {
    "c_contrastive_loss": nf.reference.contrastive_of_distances,
    "c_triplet_loss": nf.reference.triplet_of_distances,
}


def run(loss, distance, label, mode, **options):
    """(value, gradient, statistics, which the formula over distances has not)"""
    d, labels = torch.tensor(distance, requires_grad=True), torch.tensor(label)
    if mode == "caffe":
        value, stats = RELEASED[loss](d, labels, **options)
        assert not stats.requires_grad and stats.shape == (2,)
    else:
        value, stats = FORMULA[loss](d, labels, **options), None
    value.backward()
    return float(value.detach()), d.grad.numpy(), None if stats is None else stats.tolist()


def distances(rows=7, columns=9, seed=0, high=2.5):
    generator = np.random.default_rng(seed)
    label = generator.integers(0, columns, rows)
    label[:2] = 0
    return generator.uniform(0, high, (rows, columns)), label


def agree(loss, layer, defaults, distance, label, **options):
    value, gradient, stats = run(loss, distance, label, "caffe", **{**defaults, **options})
    expected, expected_gradient, expected_stats = layer(distance, label, **options)
    assert value == pytest.approx(expected, rel=1e-12)
    assert np.allclose(gradient, expected_gradient, rtol=1e-12, atol=1e-15)
    assert stats == pytest.approx(expected_stats, rel=1e-12)


SWITCHES = ["hardest_only", "max_positive_only", "positive_first", "exp_negative_weight"]


@pytest.mark.parametrize("switches", list(itertools.product([False, True], repeat=4)))
@pytest.mark.parametrize("normalize_negative", [None, 0.2])
def test_contrastive(switches, normalize_negative):
    for seed in range(8):
        distance, label = distances(seed=seed)
        options = dict(zip(SWITCHES, switches, strict=True)) | {"normalize_negative": normalize_negative}
        for numbers in (
            {},
            {"pos_margin": 0.4, "neg_margin": 1.6, "pos_weight": 0.5, "neg_weight": 2.0},
            {"positive_outlier_thresh": 0.9, "positive_upper_bound": 1.4, "pos_margin": 0.2},
            {"neg_weight": -0.5},
        ):
            agree("c_contrastive_loss", contrastive_layer, CONTRASTIVE, distance, label, **options, **numbers)


@pytest.mark.parametrize("switches", list(itertools.product([False, True], repeat=3)))
def test_triplet(switches):
    names = ["hardest_only", "add_center_loss", "positive_first"]
    for seed in range(8):
        distance, label = distances(seed=seed)
        distance[2, 5] = 0.0
        options = dict(zip(names, switches, strict=True))
        for numbers in ({}, {"margin": 0.8, "pos_weight": 0.5, "neg_weight": 2.0}, {"margin": -0.9}):
            agree("c_triplet_loss", triplet_layer, TRIPLET, distance, label, **options, **numbers)


def test_upstream_gradient_and_agents():
    """The whole path of the released nets: Normalize, InnerDistance with normalize, then the loss."""
    torch.manual_seed(0)
    x, w = torch.randn(5, 6, dtype=torch.float64), torch.randn(8, 6, dtype=torch.float64)
    labels = torch.tensor([0, 7, 3, 3, 1])
    for loss, layer, options in (
        ("c_contrastive_loss", contrastive_layer, {**CONTRASTIVE, "neg_margin": 1.9}),
        ("c_triplet_loss", triplet_layer, TRIPLET),
    ):
        leaves = [t.clone().requires_grad_() for t in (x, w)]
        unit = [t / (t.square().sum(1, keepdim=True) + 1e-12).sqrt() for t in leaves]
        d = (unit[0][:, None] - unit[1]).square().sum(2)
        expected, gradient, stats = layer(d.detach().numpy(), labels.numpy(), **options)
        d.backward(3 * torch.tensor(gradient))
        mine = [t.clone().requires_grad_() for t in (x, w)]
        unit = nf.functional.normalize(mine[0])
        distance = nf.functional.inner_distance(unit, mine[1], normalize=True)
        value, got_stats = RELEASED[loss](distance, labels, **options)
        (3 * value).backward()
        assert float(value.detach()) == pytest.approx(expected, rel=1e-12)
        assert got_stats.tolist() == pytest.approx(stats, rel=1e-12)
        for a, b in zip(mine, leaves, strict=True):
            assert torch.allclose(a.grad, b.grad, rtol=1e-10, atol=1e-13)


# Where both modes agree, they agree -----------------------------------------------------------------


def test_plain_contrastive_is_the_same_in_both_modes():
    distance, label = distances()
    caffe, math = (run("c_contrastive_loss", distance, label, mode) for mode in ("caffe", "math"))
    assert caffe[0] == pytest.approx(math[0]) and np.allclose(caffe[1], math[1])


def test_triplet_with_one_active_negative_is_the_same_in_both_modes():
    distance, label = np.array([[0.5, 0.6, 3.0, 3.0]]), np.array([0])
    options = {**TRIPLET, "add_center_loss": False}
    caffe, math = (run("c_triplet_loss", distance, label, mode, **options) for mode in ("caffe", "math"))
    assert caffe[0] == pytest.approx(math[0]) and np.allclose(caffe[1], math[1])


def slope(loss, distance, label, mode, **options):
    """The gradient of the value itself, by central differences."""
    result = np.zeros_like(distance)
    for at in np.ndindex(*distance.shape):
        values = []
        for step in (1e-6, -1e-6):
            moved = distance.copy()
            moved[at] += step
            values.append(run(loss, moved, label, mode, **options)[0])
        result[at] = (values[0] - values[1]) / 2e-6
    return result


# Each deviation: (loss, distances, labels, options, cell, caffe's gradient there, math's), rows = 1 or 2.
BUGS = {
    "outlier threshold gates d, clips d - m": (
        "c_contrastive_loss", [[1.2, 3.0]], [0], {"pos_margin": 0.5, "positive_outlier_thresh": 1.0},
        (0, 0), 0.0, 1.0,
    ),
    "the search for the hardest negative starts at the label": (
        "c_contrastive_loss", [[2.0, 0.8, 0.5]], [0], {"hardest_only": True}, (0, 2), 0.0, -1.0,
    ),
    "max_positive_only keeps the smallest": (
        "c_contrastive_loss", [[0.2, 3.0], [0.9, 3.0]], [0, 0], {"max_positive_only": True},
        (1, 0), 0.0, 0.5,
    ),
    "positive_first pulls past the threshold": (
        "c_contrastive_loss", [[3.0, 3.5]], [0], {"positive_first": True, "positive_outlier_thresh": 2.0},
        (0, 0), 1.0, 0.0,
    ),
    "positive_first pulls within the margin": (
        "c_contrastive_loss", [[1.5, 3.5]], [0], {"positive_first": True, "pos_margin": 2.0},
        (0, 0), 1.0, 0.0,
    ),
    "negative weights count by magnitude in the loss": (
        # The printed loss falls with d where the gradient says that it rises; math: the signed loss.
        "c_contrastive_loss", [[0.1, 0.6]], [0], {"neg_weight": -1.0}, (0, 1), 1.0, 1.0,
    ),
    "the positive is pulled once, not once per active negative": (
        "c_triplet_loss", [[0.9, 1.0, 1.0, 1.0, 1.0]], [0], {"margin": 0.2, "add_center_loss": False},
        (0, 0), 1.0, 4.0,
    ),
    "add_center_loss has a gradient without a value": (
        "c_triplet_loss", [[0.3, 3.0]], [0], {"margin": 0.2, "add_center_loss": True}, (0, 0), 1.0, 1.0,
    ),
    "a hardest distance of 0 leaves the hinge as the gradient": (
        "c_triplet_loss", [[0.5, 0.0, 0.4]], [0],
        {"margin": 0.2, "hardest_only": True, "add_center_loss": False}, (0, 1), 0.7, -1.0,
    ),
    "positive_first pulls in the triplet too": (
        "c_triplet_loss", [[1.5, 1.0]], [0],
        {"margin": 0.2, "positive_first": True, "add_center_loss": False}, (0, 0), 1.0, 0.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BUGS)
def test_deviation(name):
    loss, distance, label, options, at, caffe, math = BUGS[name]
    distance, label = np.array(distance), np.array(label)
    layer = contrastive_layer if loss == "c_contrastive_loss" else triplet_layer
    assert layer(distance, label, **options)[1][at] == pytest.approx(caffe)
    assert run(loss, distance, label, "caffe", **options)[1][at] == pytest.approx(caffe)
    gradient = run(loss, distance, label, "math", **options)[1]
    assert gradient[at] == pytest.approx(math)
    # Mode "math" is the gradient of its own value. In mode "caffe" that is wrong, or the value is.
    assert np.allclose(slope(loss, distance, label, "math", **options), gradient, atol=1e-8)
    value, released, _ = run(loss, distance, label, "caffe", **options)
    assert (
        not np.allclose(slope(loss, distance, label, "caffe", **options), released, atol=1e-8)
        or abs(value - run(loss, distance, label, "math", **options)[0]) > 0.1
    )


def test_deviation_normalize_negative_leaves_the_loss():
    """caffe divides the gradient alone; math divides the terms, loss and gradient alike."""
    distance, label = distances(high=1.0)
    options = {"normalize_negative": 0.1}
    plain = run("c_contrastive_loss", distance, label, "caffe")
    caffe = run("c_contrastive_loss", distance, label, "caffe", **options)
    math = run("c_contrastive_loss", distance, label, "math", **options)
    assert caffe[0] == pytest.approx(plain[0]) and math[0] < 0.5 * plain[0]
    assert np.allclose(caffe[1], math[1])
    assert not np.allclose(caffe[1], plain[1])


def test_deviation_triplet_has_four_pulls_where_caffe_has_one():
    """The (ran) numbers of the field map: true gradient 4, Caffe 1."""
    distance, label = np.array([[0.9, 1.0, 1.0, 1.0, 1.0]]), np.array([0])
    options = {"margin": 0.2, "add_center_loss": False}
    assert slope("c_triplet_loss", distance, label, "caffe", **options)[0, 0] == pytest.approx(4)
    assert run("c_triplet_loss", distance, label, "caffe", **options)[1][0, 0] == 1
    assert run("c_triplet_loss", distance, label, "math", **options)[1][0, 0] == 4


def test_center_loss_is_in_the_value_in_math_mode_only():
    distance, label = distances()
    for mode, added in (("caffe", 0.0), ("math", distance[np.arange(7), label].mean())):
        with_center, without = (
            run("c_triplet_loss", distance, label, mode, **{**TRIPLET, "add_center_loss": on})[0]
            for on in (True, False)
        )
        assert with_center - without == pytest.approx(added)


def test_both_have_the_same_statistics():
    """Of agents at the distances that the released layer is given."""
    torch.manual_seed(0)
    x, w = torch.randn(5, 6, dtype=torch.float64), torch.randn(8, 6, dtype=torch.float64)
    labels = torch.tensor([0, 7, 3, 3, 1])
    d = nf.functional.inner_distance(nf.functional.normalize(x), w, normalize=True)
    for loss, stats in (("c_contrastive_loss", "c_contrastive_stats"), ("c_triplet_loss", "c_triplet_stats")):
        _, released = RELEASED[loss](d, labels)
        assert released.tolist() == pytest.approx(getattr(nf.functional, stats)(x, w, labels).tolist())


def test_what_is_no_matrix_of_distances_is_refused():
    d, labels = torch.rand(3, 4), torch.tensor([0, 1, 3])
    for call in RELEASED.values():
        op = call.__name__
        with pytest.raises(
            ValueError, match=rf"^{op}: expected `distances` to be 2-D \[N, C\], got shape \[3\]"
        ):
            call(d[:, 0], labels)
        with pytest.raises(ValueError, match=f"^{op}: expected `distances` to have at least one class"):
            call(d[:, :0], labels)
        with pytest.raises(IndexError, match=rf"^{op}: expected `labels` in \[0, 4\), got -100 at row 1"):
            call(d, torch.tensor([0, -100, 3]))
        with pytest.raises(TypeError, match=f"^{op}: got an unexpected keyword argument `reduction`"):
            call(d, labels, reduction="sum")
        assert torch.equal(call(d.half(), labels.int())[0], call(d.half().float(), labels)[0])


def test_l1_gradient_is_the_derivative():
    """The layer's sign macro turned g * sign(d) into -1 for d < 0, whatever g."""
    x, w = torch.tensor([[1.0, 2.0]], requires_grad=True), torch.tensor([[3.0, 0.0]], requires_grad=True)
    nf.functional.inner_distance(x, w, p=1).backward(torch.tensor([[10.0]]))
    assert x.grad.tolist() == [[-10.0, 10.0]] and w.grad.tolist() == [[10.0, -10.0]]


def test_normalize_does_not_touch_the_weight_and_survives_a_zero_row():
    """The layer overwrote its weight in every forward pass, and on the GPU a zero row became NaN."""
    w = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    x = torch.tensor([[0.6, 0.8]])
    d = nf.functional.inner_distance(x, w, normalize=True)
    d.sum().backward()
    assert w.tolist() == [[3.0, 4.0], [0.0, 0.0]]
    assert d.tolist() == [[pytest.approx(0, abs=1e-12), pytest.approx(1)]]
    assert w.grad.isfinite().all()
