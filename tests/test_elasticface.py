"""ElasticFace against the formula of its paper, with the draws of the same generator."""

import dense_head
import pytest
import torch
from dense_head import OPTIONS, assert_equal_to_1e10, counted, gradients, on, problem

import normface_ext as nf

HEADS = {
    "arc": (nf.ElasticArcFace, 0.5, lambda c, m: torch.cos(torch.acos(c) + m)),
    "cos": (nf.ElasticCosFace, 0.35, lambda c, m: c - m),
}
every_head = pytest.mark.parametrize("head", HEADS)
STD = 0.2


def handed_out(margins, cosine, plus):
    """The k-th smallest margin for the k-th largest cosine; released: what the code does instead."""
    order = cosine.detach().argsort(descending=True)
    small_first = margins.sort().values
    if plus == "released":
        return small_first[order]
    own = margins.clone()
    for k, row in enumerate(order):
        own[row] = small_first[k]
    return own if plus else margins


@pytest.mark.covering(2)
@every_head
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("plus", [False, True, "released"])
def test_it_is_the_papers(lane, head, options, plus):
    make, m, formula = HEADS[head]
    x, weight, labels = problem()
    given = lane.tensor(x), lane.tensor(weight)
    torch.manual_seed(5)
    draws = (m + STD * torch.randn(len(x), dtype=torch.float64, device=lane.device)).cpu()
    draws = draws[counted(labels, options.get("sample_weight"))]
    expected = gradients(
        lambda x, w: dense_head.loss(
            x, w, labels, 16.0, lambda c: formula(c, handed_out(draws, c, plus)), **options
        ),
        x,
        weight,
    )
    margin = make(m, STD, plus)
    torch.manual_seed(5)
    found = gradients(
        lambda x, w: nf.functional.normface_loss(
            x, w, lane.tensor(labels), 16.0, margin=margin, **on(lane, options)
        ),
        *given,
    )
    assert_equal_to_1e10(found, expected)


@every_head
def test_the_order_is_one_of_difficulty(head):
    """The larger the target cosine the smaller the margin; in the released order it is not so."""
    from normface_ext.softmax.elasticface import by_difficulty

    cosine = torch.tensor([0.1, 0.9, -0.5, 0.4, 0.8], dtype=torch.float64)
    counts = torch.tensor([True, True, True, False, True])
    margins = torch.tensor([0.5, 0.4, 0.3, 9.0, 0.6], dtype=torch.float64)
    assert by_difficulty(margins, cosine, counts, True).tolist() == [0.5, 0.3, 0.6, 9.0, 0.4]
    assert by_difficulty(margins, cosine, counts, "released").tolist() == [0.4, 0.6, 0.3, 9.0, 0.5]
    # argsort of (0.1, 0.9, -0.5, 0.8) from the largest: rows 1, 3, 0, 2; taken as places, not as rows


@every_head
@pytest.mark.parametrize("plus", [False, True])
def test_straight(lane, head, plus):
    """psi is written over the cosine: its value, and the slope 1."""
    make, m, formula = HEADS[head]
    x, weight, labels = problem()
    torch.manual_seed(5)
    draws = (m + STD * torch.randn(len(x), dtype=torch.float64, device=lane.device)).cpu()[counted(labels)]

    def psi(c):
        return c + (formula(c, handed_out(draws, c, plus)) - c).detach()

    expected = gradients(lambda x, w: dense_head.loss(x, w, labels, 16.0, psi), x, weight)
    margin = make(m, STD, plus)
    torch.manual_seed(5)
    found = gradients(
        lambda x, w: nf.functional.normface_loss(
            x, w, lane.tensor(labels), 16.0, margin=margin, margin_gradient="straight"
        ),
        lane.tensor(x),
        lane.tensor(weight),
    )
    assert_equal_to_1e10(found, expected)


@every_head
def test_eval_has_the_mean_margin_and_draws_nothing(head):
    make, m, formula = HEADS[head]
    x, weight, labels = problem()
    before = torch.get_rng_state()
    found = nf.functional.normface_loss(x, weight, labels, 16.0, margin=make(m, STD).eval())
    assert torch.equal(before, torch.get_rng_state())
    expected = dense_head.loss(
        x, weight, labels, 16.0, lambda c: formula(c, torch.tensor(m, dtype=torch.float64))
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@every_head
def test_draws_are_new_each_time_and_repeat_by_seed(head):
    make, m, _ = HEADS[head]
    x, weight, labels = problem()

    def loss(margin):
        return float(nf.functional.normface_loss(x, weight, labels, 16.0, margin=margin))

    torch.manual_seed(1)
    first, second = loss(make(m, STD)), loss(make(m, STD))
    torch.manual_seed(1)
    assert loss(make(m, STD)) == first != second


@every_head
@pytest.mark.parametrize(
    "given, error, sentence",
    [
        ({"m": -0.1}, ValueError, "expected `m` in"),
        ({"std": -1}, ValueError, "expected `std` to be finite and >= 0, got -1"),
        ({"plus": "yes"}, ValueError, "expected `plus` to be True, False or 'released', got 'yes'"),
        ({"plus": 1}, ValueError, "expected `plus` to be True, False or 'released', got 1"),
        ({"m": None}, TypeError, "expected `m` to be a number, got NoneType"),
    ],
)
def test_bad_arguments(head, given, error, sentence):
    make = HEADS[head][0]
    with pytest.raises(error, match=f"{make.__name__}: {sentence}"):
        make(**given)
