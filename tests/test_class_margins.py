"""Margins per class from how many images each has."""

import dense_head
import numpy as np
import pytest
import torch
from dense_head import OPTIONS, assert_equal_to_1e10, counted, gradients, on, problem

import normface_ext as nf

COUNTS = [1000, 20, 3, 1, 1, 77, 500]


def test_ldam_is_the_authors():
    """LDAMLoss.__init__ of the authors, in NumPy."""
    m_list = 1.0 / np.sqrt(np.sqrt(COUNTS))
    m_list = m_list * (0.5 / np.max(m_list))
    np.testing.assert_allclose(nf.ldam_margins(COUNTS).numpy(), m_list, rtol=1e-14)
    np.testing.assert_allclose(nf.ldam_margins(torch.tensor(COUNTS), 0.3).numpy(), m_list * 0.6, rtol=1e-14)


def test_class_margins_are_the_third_places():
    """The third place of Google Landmark Recognition 2020, in NumPy."""
    tmp = np.sqrt(1 / np.sqrt(COUNTS))
    margins = (tmp - tmp.min()) / (tmp.max() - tmp.min()) * 0.45 + 0.05
    found = nf.class_margins(COUNTS)
    np.testing.assert_allclose(found.numpy(), margins, rtol=1e-13)
    assert found[0] == 0.05 and abs(float(found[3]) - 0.5) < 1e-15
    assert nf.class_margins(np.array(COUNTS), low=0.2, high=0.2).tolist() == [0.2] * 7


def test_classes_alike():
    assert nf.class_margins([4, 4, 4]).tolist() == [0.05] * 3
    assert nf.ldam_margins([4, 4, 4]).tolist() == [0.5] * 3


@pytest.mark.covering(2)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", ["arc", "cos"])
def test_the_loss(lane, options, kind):
    x, weight, labels = problem()
    margins = nf.class_margins(COUNTS, 0.05, 0.9) if kind == "arc" else nf.ldam_margins(COUNTS)
    m = margins[labels[counted(labels, options.get("sample_weight"))]]

    def psi(c):
        if kind == "cos":
            return c - m
        return torch.where(c.acos() + m > torch.pi, c - m * m.sin(), torch.cos(c.acos() + m))

    expected = gradients(lambda x, w: dense_head.loss(x, w, labels, 16.0, psi, **options), x, weight)
    margin = {"arc": nf.ArcFace, "cos": nf.CosFace}[kind](lane.tensor(margins))
    found = gradients(
        lambda x, w: nf.functional.normface_loss(
            x, w, lane.tensor(labels), 16.0, margin=margin, **on(lane, options)
        ),
        lane.tensor(x),
        lane.tensor(weight),
    )
    assert_equal_to_1e10(found, expected)


@pytest.mark.parametrize("make", [nf.ldam_margins, nf.class_margins])
@pytest.mark.parametrize(
    "counts, error, sentence",
    [
        ([3, 0, 1], ValueError, "expected `counts` to be finite and > 0, got 0 for class 1"),
        ([3.0, float("nan")], ValueError, "expected `counts` to be finite and > 0, got nan for class 1"),
        ([], ValueError, r"expected `counts` to be \[C\] with C >= 1, got shape \[0\]"),
        ([[1, 2]], ValueError, r"expected `counts` to be \[C\] with C >= 1, got shape \[1, 2\]"),
        ("many", TypeError, r"expected `counts` to be \[C\] numbers, got str"),
        (None, TypeError, r"expected `counts` to be \[C\] numbers, got NoneType"),
        (
            torch.ones(2, device="meta"),
            ValueError,
            "expected `counts` to have values, got a meta tensor without",
        ),
        (torch.tensor([True, False]), TypeError, r"expected `counts` to be \[C\] numbers, got torch.bool"),
    ],
)
def test_bad_counts(make, counts, error, sentence):
    with pytest.raises(error, match=f"{make.__name__}: {sentence}"):
        make(counts)


def test_bad_ranges():
    with pytest.raises(ValueError, match="ldam_margins: expected `max_m` to be finite and > 0, got 0"):
        nf.ldam_margins([1, 2], 0)
    with pytest.raises(ValueError, match=r"class_margins: expected `high` in \[0.5, 3.14159\), got 0.1"):
        nf.class_margins([1, 2], low=0.5, high=0.1)
