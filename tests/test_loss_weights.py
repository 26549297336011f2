"""Sample weights, class weights and label smoothing of normface_loss: against torch, against the
reference in values and gradients on every lane, and their errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from lanes import Lane
from torch import Tensor

import normface_ext as nf

OPTIONS = {
    "smoothing": ["label_smoothing"],
    "classes": ["class_weight"],
    "samples": ["sample_weight"],
    "all": ["label_smoothing", "class_weight", "sample_weight"],
}


def options(names: list[str], batch: int, classes: int) -> dict[str, float | Tensor]:
    generator = torch.Generator().manual_seed(3)
    made: dict[str, float | Tensor] = {
        "label_smoothing": 0.1,
        "class_weight": torch.rand(classes, generator=generator, dtype=torch.float64),
        "sample_weight": torch.rand(batch, generator=generator, dtype=torch.float64),
    }
    made["class_weight"][0] = 0.0  # a class, and a row, that counts for nothing
    made["sample_weight"][1] = 0.0
    return {name: made[name] for name in names}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_reference_is_torchs_cross_entropy(reduction: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 6, generator=generator, dtype=torch.float64)
    w = torch.randn(11, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(11, (9,), generator=generator)
    labels[2] = -100
    weight = torch.rand(11, generator=generator, dtype=torch.float64)
    logits = 7 * F.normalize(x) @ F.normalize(w).t()
    truth = F.cross_entropy(logits, labels, weight=weight, label_smoothing=0.1, reduction=reduction)
    ours = nf.reference.normface_loss(
        x, w, labels, 7.0, class_weight=weight, label_smoothing=0.1, reduction=reduction, eps=0.0
    )
    torch.testing.assert_close(ours, truth, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("margin", nf.reference.MARGINS.values(), ids=nf.reference.MARGINS)
@pytest.mark.parametrize("names", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("algorithm", ["stored", "recompute"])
def test_values_and_gradients(
    lane: Lane, names: list[str], margin: nf.CombinedMargin | None, algorithm: str
) -> None:
    batch, dim, classes = 17, 12, 67
    x = lane.randn(batch, dim, dtype=torch.float64, grad=True)
    w = lane.randn(classes, dim, dtype=torch.float64, seed=1, grad=True)
    s = lane.tensor(12.0, torch.float64, grad=True)
    labels = lane.labels(batch, classes)
    labels[4] = -100
    given = {
        name: value if isinstance(value, float) else lane.tensor(value)
        for name, value in options(names, batch, classes).items()
    }
    workspace = None
    if algorithm == "recompute":
        kind = "cpu" if lane.widens else "cuda"
        workspace = nf.plan(batch, dim, classes, torch.float64, kind).workspace_bytes - 1
    for reduction in ("mean", "none"):
        ours = nf.functional.normface_loss(
            x, w, labels, s, margin=margin, reduction=reduction, workspace=workspace, **given
        )
        truth = nf.reference.normface_loss(x, w, labels, s, margin=margin, reduction=reduction, **given)
        torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-12)
        upstream = torch.linspace(0.5, 1.5, batch, dtype=torch.float64, device=truth.device)
        upstream = upstream if reduction == "none" else upstream[0]
        for mine, theirs in zip(
            torch.autograd.grad(ours, (x, w, s), upstream),
            torch.autograd.grad(truth, (x, w, s), upstream),
            strict=True,
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


def test_weights_that_are_all_zero_give_a_loss_of_zero(lane: Lane) -> None:
    x, w = lane.randn(3, 4, grad=True), lane.randn(5, 4, seed=1, grad=True)
    loss = nf.functional.normface_loss(
        x, w, lane.labels(3, 5), 4.0, sample_weight=lane.tensor(torch.zeros(3))
    )
    loss.backward()
    assert loss.item() == 0
    assert not x.grad.any() and not w.grad.any()


def test_the_module_passes_them_on_and_keeps_the_class_weight() -> None:
    weight = torch.tensor([1.0, 0.5, 2.0])
    head = nf.NormFaceLoss(4, 3, scale=5.0, class_weight=weight, label_smoothing=0.2)
    assert torch.equal(head.class_weight, weight) and "class_weight" not in head.state_dict()
    x, labels, sample = torch.randn(6, 4), torch.randint(3, (6,)), torch.rand(6)
    expected = nf.reference.normface_loss(
        x, head.weight, labels, 5.0, class_weight=weight, label_smoothing=0.2, sample_weight=sample
    )
    torch.testing.assert_close(head(x, labels, sample), expected)


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        ({"label_smoothing": 1.0}, ValueError, r"expected `label_smoothing` in \[0, 1\), got 1.0"),
        ({"label_smoothing": float("nan")}, ValueError, "expected `label_smoothing` in"),
        ({"label_smoothing": "some"}, TypeError, "expected `label_smoothing` to be a number, got str"),
        (
            {"class_weight": torch.ones(4)},
            ValueError,
            r"expected `class_weight` to have shape \[5\], got \[4\]",
        ),
        (
            {"class_weight": torch.ones(5, dtype=torch.int64)},
            TypeError,
            "expected `class_weight` to be float64",
        ),
        ({"sample_weight": torch.ones(3, 1)}, ValueError, r"expected `sample_weight` to have shape \[3\]"),
        (
            {"sample_weight": torch.ones(3, requires_grad=True)},
            ValueError,
            "expected `sample_weight` not to require a gradient",
        ),
    ],
)
def test_errors(wrong: dict[str, object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match="normface_loss: " + text):
        nf.functional.normface_loss(
            torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2]), 4.0, **wrong
        )
