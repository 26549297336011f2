"""What drawn calls found, each kind kept as a few calls of its own."""

import math

import pytest
import torch
from fuzz import calls
from fuzz.functions import Call
from fuzz.inputs import Labels, Rows, Same

import normface_ext as nf

F = nf.functional


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["nan", "inf"])
@pytest.mark.parametrize("other", ["plain", "same"])
def test_a_pair_without_a_distance_has_no_loss(kind, other, reduction):
    """A comparison with NaN is false: the push apart took such pairs for equal rows, at margin^2 / 2."""
    a = Rows(4, 3, kinds=("plain", kind, "plain"), seed=1)
    b = a if other == "same" else Rows(4, 3, seed=2)
    for seed in range(4):  # the pair is one of equals, or not
        call = Call(
            "pair_contrastive_loss",
            {"a": a, "b": b, "same": Same(4, seed)},
            {"margin": 1.0, "reduction": reduction},
        )
        calls.check(call, "cpu")


def test_pairs_without_a_distance_by_hand():
    a, b = torch.tensor([[math.nan, 0.0], [1.0, 0.0]]), torch.zeros(2, 2)
    losses = F.pair_contrastive_loss(a, b, torch.tensor([False, False]), reduction="none")
    assert losses[0].isnan() and losses[1] == 0
    assert F.pair_contrastive_loss(a, b, torch.tensor([False, False])).isnan()


@pytest.mark.parametrize("loss", ["c_contrastive_loss", "c_triplet_loss"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows_of_given_distances(loss, reduction):
    """The largest positive of no rows: argmax of an empty tensor raised an unrelated IndexError."""
    options = {"max_positive_only": True} if loss == "c_contrastive_loss" else {}
    distances = torch.zeros(0, 5, requires_grad=True)
    labels = torch.zeros(0, dtype=torch.int64)
    of_distances = getattr(nf.reference, f"{loss[2:-5]}_of_distances")
    value = of_distances(distances, labels, reduction=reduction, **options)
    assert value.shape == ((0,) if reduction == "none" else ()) and value.sum() == 0
    value.sum().backward()
    assert distances.grad.shape == (0, 5)


@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("ignored", ["random", "ignored"])
def test_the_largest_positive_of_given_distances(rows, ignored):
    for hardest in (False, True):
        options = {
            "pos_weight": 1.0,
            "neg_weight": 0.5,
            "hardest_only": hardest,
            "positive_first": True,
            "positive_upper_bound": 1.0,
            "ignore_index": -1,
            "reduction": "mean",
            "eps": 1e-12,
            "workspace": None,
            "active_limit": None,
            "pos_margin": 0.1,
            "neg_margin": 1.0,
            "max_positive_only": True,
            "positive_outlier_thresh": 4.0,
            "exp_negative_weight": False,
            "normalize_negative": None,
        }
        tensors = {"x": Rows(rows, 4, seed=3), "labels": Labels(rows, 4, ignored, -1)}
        calls.check(Call("c_contrastive_loss", tensors, options), "cpu")


@pytest.mark.parametrize("tiny", [5e-324, -3e-310, 2e-300])
def test_an_entry_that_vanishes_beside_the_largest_keeps_its_sign(lane, tiny):
    """dn/dx = sign(x) for p = 1, in the kernels and in the reference, whatever stands beside x."""
    x = lane.tensor(torch.tensor([[tiny, 1e14, -2e14]], dtype=torch.float64))
    sign = math.copysign(1.0, tiny)
    for normalize in (nf.functional.normalize, nf.reference.normalize):
        leaf = x.clone().requires_grad_()
        y, norm = normalize(leaf, 1, 1, return_norm=True)
        (slopes,) = torch.autograd.grad(norm.sum(), leaf, retain_graph=True)
        (dx,) = torch.autograd.grad(y[0, 1], leaf)
        assert slopes.tolist() == [[sign, 1.0, -1.0]]
        expected = torch.tensor([[-sign / 9e14, 2 / 9e14, 1 / 9e14]], dtype=torch.float64)
        torch.testing.assert_close(dx.cpu(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("classes", [1, 2, 5])
@pytest.mark.parametrize("wanted", [True, False])
def test_a_value_is_judged_alike_with_and_without_gradients(classes, wanted):
    """The loss of one class is 0, and with label smoothing a difference of rounded cosines: the judge allowed
    for it only where a gradient was asked for."""
    for seed in range(8):
        tensors = {
            "x": Rows(3, 2, seed=seed, grad=wanted),
            "weight": Rows(classes, 2, seed=seed + 50),
            "labels": Labels(3, classes, "random", -100, seed),
        }
        options = {"margin": (1.0, 0.0, 0.0), "reduction": "mean", "ignore_index": -100, "eps": 1e-12}
        options |= {"label_smoothing": 0.1, "workspace": None, "scale": 30.0, "sub_centers": 1}
        calls.check(Call("normface_loss", tensors, options), "cpu")
