"""What does not count is selected away, not multiplied by 0: rows, branches, and what they are divided by.

The rows that do not count here hold NaN or infinity, or would have a NaN gradient; everything else must be
what it is without them.
"""

import math

import pytest
import torch
from test_class_shards import make, sharded, whole
from test_normface_loss import least_workspace

import normface_ext as nf
from normface_ext import reference

F = nf.functional
both_libraries = pytest.mark.parametrize("library", [F, reference], ids=["kernels", "reference"])
bad_number = pytest.mark.parametrize("bad", [math.nan, math.inf])

#: name -> (library, x, weight, labels, **options) -> loss
LOSSES = {
    "softmax": lambda lib, x, w, y, **o: lib.normface_loss(x, w, y, 8.0, **o),
    "smoothing": lambda lib, x, w, y, **o: lib.normface_loss(x, w, y, 8.0, label_smoothing=0.1, **o),
    "steep softmax": lambda lib, x, w, y, **o: lib.normface_loss(x, w, y, 1000.0, **o),
    "contrastive": lambda lib, x, w, y, **o: lib.c_contrastive_loss(x, w, y, **o),
    "hardest": lambda lib, x, w, y, **o: lib.c_contrastive_loss(x, w, y, hardest_only=True, **o),
    "exponential": lambda lib, x, w, y, **o: lib.c_contrastive_loss(x, w, y, exp_negative_weight=True, **o),
    "triplet": lambda lib, x, w, y, **o: lib.c_triplet_loss(x, w, y, add_center_loss=True, **o),
}
every_loss = pytest.mark.parametrize("loss", LOSSES)


def sample(lane, batch=6, dim=9, classes=40):
    return lane.randn(batch, dim), lane.randn(classes, dim, seed=1), lane.labels(batch, classes)


def run(call, *tensors):
    """(value, gradients of the tensors)"""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    value = call(*leaves)
    value.sum().backward()
    return value.detach(), [leaf.grad for leaf in leaves]


@both_libraries
@every_loss
@bad_number
@pytest.mark.parametrize("classes", [5, 40])  # below 16 the hinges have no list
def test_ignored_rows_reach_nothing(lane, library, loss, bad, classes):
    x, weight, labels = sample(lane, classes=classes)
    kept = lane.tensor([True, False, True, True, False, True])
    _, (dx, dw) = run(lambda x, w: LOSSES[loss](library, x, w, labels[kept]), x[kept], weight)
    x[1], x[4, 2] = bad, bad
    gone = torch.where(kept, labels, -100)
    value, (got_x, got_w) = run(lambda x, w: LOSSES[loss](library, x, w, gone), x, weight)
    assert value.isfinite()
    assert (got_x[~kept] == 0).all()
    torch.testing.assert_close(got_x[kept], dx, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got_w, dw, rtol=1e-4, atol=1e-5)


@both_libraries
@every_loss
@bad_number
@pytest.mark.parametrize("classes", [5, 40])
def test_ignored_rows_beside_a_poisoned_class(lane, library, loss, bad, classes):
    x, weight, labels = sample(lane, classes=classes)
    labels[:2] = -100
    weight[3, 0] = bad
    value, (dx, _) = run(lambda x, w: LOSSES[loss](library, x, w, labels), x, weight)
    assert not value.isfinite()  # the rows that count show it
    assert (dx[:2] == 0).all()


@both_libraries
@bad_number
@pytest.mark.parametrize("loss", ["softmax", "smoothing", "steep softmax"])
@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_rows_of_weight_zero_are_ignored_rows(lane, library, loss, bad, tight, reduction):
    """What they hold does not matter, nor whether the scores are kept or computed again."""
    x, weight, labels = sample(lane, classes=12)  # a chunk each where it is tight
    factors = lane.tensor([1.0, 0.0, 2.0, 0.5, 0.0, 1.0])
    x[1], x[4, 2] = bad, bad
    options = {"reduction": reduction}
    if library is F:
        options["workspace"] = least_workspace(lane, x, weight) if tight else None
    results = []
    for given in ({"sample_weight": factors}, {"sample_weight": factors.clamp_min(0.5)}):
        y = labels if len(results) == 0 else torch.where(factors == 0, -100, labels)
        results.append(
            run(lambda x, w, y=y, g=given: LOSSES[loss](library, x, w, y, **g, **options), x, weight)
        )
    (value, gradients), (expected, expected_gradients) = results
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    for got, truth in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [8.0, 300.0, 2000.0])
@pytest.mark.parametrize("tight", [False, True])
def test_rows_of_weight_zero_far_from_every_class(lane, scale, tight):
    """The shift is that of the row as it is taken: that of a replaced one makes exp(-shift) infinite."""
    x, weight, labels = sample(lane)
    weight = weight.abs()
    x[3] = -x[3].abs()
    factors = lane.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 1.0])
    workspace = least_workspace(lane, x, weight) if tight else None

    def call(library, **options):
        return lambda x, w: library.normface_loss(x, w, labels, scale, sample_weight=factors, **options)

    value, gradients = run(call(F, workspace=workspace), x, weight)
    truth, expected = run(call(reference), x.double(), weight.double())
    torch.testing.assert_close(value.double(), truth, rtol=1e-4, atol=1e-5)
    for got, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.parametrize("workspace", [None, 30_000])
@pytest.mark.parametrize("bad", [1.0, math.nan, math.inf])
def test_rows_of_weight_zero_in_shards(lane, workspace, bad):
    """The shift that shards agree on comes from the rows as given; one without weight is not taken so."""
    x, weight, labels = make(lane, torch.float32)
    weight = weight.abs()
    x[3] = -x[3].abs() * bad
    factors = torch.ones(len(x), device=x.device)
    factors[3] = 0
    given = x, weight, labels, lane.tensor(1000.0), lane.tensor(1.0)
    option = {"sample_weight": factors, "workspace": workspace}
    parts, once = sharded(*given, shift=True, **option), whole(*given, **option)
    for name, got, expected in zip(("loss", "dx", "dW", "ds"), parts, once, strict=True):
        assert got.isfinite().all(), name
        largest = expected.abs().max().item()
        torch.testing.assert_close(got.float(), expected.float(), rtol=1e-3, atol=1e-4 * largest)


@both_libraries
@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("zero", ["sample_weight", "class_weight", "their sum"])
def test_a_mean_over_no_weight_is_zero(lane, library, tight, smoothing, zero):
    x, weight, labels = sample(lane)
    x[3] = -weight.sum(0)
    options = {"label_smoothing": smoothing}
    if zero == "class_weight":
        options["class_weight"] = torch.ones(40, device=x.device).index_fill(0, labels, 0.0)
    else:
        factors = [0.0] * 6 if zero == "sample_weight" else [1.0, -1.0, 2.0, -2.0, 0.0, 0.0]
        options["sample_weight"] = lane.tensor(factors)
    if library is F:
        options["workspace"] = least_workspace(lane, x, weight) if tight else None
    value, (dx, dw) = run(lambda x, w: library.normface_loss(x, w, labels, 1000.0, **options), x, weight)
    assert value == 0
    assert (dx == 0).all() and (dw == 0).all()


# Divisors that may be 0 ----------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["kernels", "reference", "caffe"])
@pytest.mark.parametrize("options", [{}, {"exp_negative_weight": True}, {"hardest_only": True}], ids=str)
@pytest.mark.parametrize(
    "weights", [{}, {"neg_weight": 0.0}, {"pos_weight": -1.0}, {"pos_weight": 0.0}], ids=str
)
@pytest.mark.parametrize("active", [False, True])
def test_normalised_negatives_without_any(lane, way, options, weights, active):
    """size = 0 divides nothing: neither in the branch that is taken nor in the other."""
    agents, labels = torch.eye(20, device=lane.device), lane.tensor([0, 1, 2, 3])
    features = agents[:4] + (0.8 if active else 0.1) * torch.eye(20, device=lane.device).roll(1, 0)[:4]
    given = {"normalize_negative": 1.0, **options, **weights}

    def loss(x, w):
        if way == "caffe":
            distances = F.inner_distance(F.normalize(x), w, normalize=True)
            return nf.caffe.general_contrastive_loss(distances, labels, **given)[0]
        return (reference if way == "reference" else F).c_contrastive_loss(x, w, labels, **given)

    value, gradients = run(loss, features, agents)
    assert value.isfinite() and all(g.isfinite().all() for g in gradients)
    if not active:
        del given["normalize_negative"]
        _, expected = run(loss, features, agents)
        for got, wanted in zip(gradients, expected, strict=True):
            torch.testing.assert_close(got, wanted)


@both_libraries
@bad_number
def test_a_poisoned_pair_shows(lane, library, bad):
    a, b = lane.randn(4, 5), lane.randn(4, 5, seed=1)
    a[1, 2] = math.nan
    losses = library.pair_contrastive_loss(a, b, lane.tensor([0, 0, 1, 1]), margin=9.0, reduction="none")
    assert losses.isnan().tolist() == [False, True, False, False]
    a[1, 2] = bad
    triplets = library.triplet_loss(a, b, b + 1, reduction="none")
    assert triplets.isfinite().tolist() == [True, False, True, True]
