"""Class-parallel heads whose classes have several centres: what one process finds."""

import pytest
import sub_center_jobs as jobs
import torch
from ranks import ranks

OPTIONS = {
    "mean": {},
    "none": {"reduction": "none"},
    "wide scale": {"scale": 900.0},
    "filter": {"filter_threshold": 0.2},
    "class_weight": {"class_weight": torch.linspace(0.5, 2, jobs.CLASSES)},
    "small workspace": {"workspace": 20_000},
}


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(
    "name, option",
    [*((name, "mean") for name in jobs.MARGINS), *(("arcface", option) for option in list(OPTIONS)[1:])],
)
def test_loss_and_gradients(world, name, option):
    loss, dx, dw = jobs.alone(name, OPTIONS[option])
    found = ranks(world).run(jobs.together, name, OPTIONS[option], True)
    if loss.dim():
        torch.testing.assert_close(torch.cat([of_rank[0] for of_rank in found]), loss)
    else:
        for of_rank in found:
            torch.testing.assert_close(of_rank[0], loss)
    torch.testing.assert_close(torch.cat([of_rank[1] for of_rank in found]), dx)
    for of_rank in found:
        torch.testing.assert_close(of_rank[2], dw)


def test_what_is_asked_of_all_ranks():
    head, (x, labels) = jobs.make(), jobs.rows()
    found = ranks(3).run(jobs.asked)
    expected = head(x).detach(), head.predict(x), head._ranks(x, labels), head.centers_of(x, labels)
    for place, whole in enumerate(expected):
        torch.testing.assert_close(torch.cat([of_rank[place] for of_rank in found]), whole)
    assert "sub_centers=3" in found[0][4] and "classes 0..2 here" in found[0][4]


def test_sampled_classes_do_not_depend_on_the_ranks():
    (losses, weight), *_ = ranks(2).run(jobs.sampled, 4)
    for others, found in ranks(3).run(jobs.sampled, 4):
        torch.testing.assert_close(torch.tensor(others), torch.tensor(losses))
        torch.testing.assert_close(found, weight)
    assert weight.shape == (jobs.CLASSES, jobs.CENTERS, 6)


def test_the_start_does_not_depend_on_the_ranks():
    (first, again), *_ = ranks(2).run(jobs.from_meta)
    for other, other_again in ranks(3).run(jobs.from_meta):
        assert torch.equal(other, first) and torch.equal(other_again, again)
    assert torch.equal(first, again)
    torch.testing.assert_close(first.norm(dim=2), torch.ones(jobs.CLASSES, jobs.CENTERS))


def test_rows_that_are_not_by_class_are_refused():
    for sentence in ranks(2).run(jobs.refused):
        assert "expected `weight` to be [classes, sub_centers=3, D], got shape [" in sentence


def test_what_is_not_finite_is_named_by_its_class():
    sentences = ["`weight` to be finite, got NaN or infinity in class 6"] * 2
    sentences += ["`weight` to be finite, got NaN or infinity in class 2"] * 2
    sentences += ["`scale` to be finite, got NaN or infinity"] * 2
    for said in ranks(2).run(jobs.not_finite):
        assert len(said) == len(sentences)
        assert all(got.endswith(wanted) for got, wanted in zip(said, sentences, strict=True)), said


def test_a_head_with_two_names_is_that_of_one_process_under_both():
    first, second = ranks(2).run(jobs.shared)
    assert first["first.weight"] == first["second.weight"] == [jobs.CLASSES * jobs.CENTERS, jobs.DIM]
    assert second == {}
