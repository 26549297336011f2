"""The running mean of CContrastiveLoss(add_intra_mae=True): what moves it, and what must not."""

import copy
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import normface_ext as nf
from normface_ext.agents import functions

F = nf.functional


def problem(seed=0):
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(seed))
    return x, torch.tensor([0, 8, 3, 3, 1, 5, 2])


def running(**given):
    torch.manual_seed(0)
    layer = nf.CContrastiveLoss(6, 9, add_intra_mae=True, neg_margin=1.9, **given)
    layer.intra_mae.fill_(0.1)
    return layer


def test_the_running_mean_is_reset_with_the_weight():
    layer = nf.CContrastiveLoss(6, 9, add_intra_mae=True, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        layer.intra_mae.fill_(float("nan"))
    layer.reset_parameters()
    assert float(layer.intra_mae) == 0
    torch.testing.assert_close(layer.weight.norm(dim=1), torch.ones(9))
    assert layer(*problem()).isfinite()


def test_the_running_mean_comes_and_goes_with_its_option():
    layer = nf.CContrastiveLoss(6, 9)
    assert "intra_mae" not in layer.state_dict()
    layer.add_intra_mae = True
    layer(*problem())
    assert float(layer.state_dict()["intra_mae"]) > 0
    layer.add_intra_mae = False
    assert "intra_mae" not in layer.state_dict() and layer(*problem()).isfinite()


def test_statistics_move_nothing():
    layer, (x, labels) = running(), problem()
    expected = F.c_contrastive_stats(x, layer.weight, labels, neg_margin=2.0)
    torch.testing.assert_close(layer.stats(x, labels), expected)
    assert float(layer.intra_mae) == pytest.approx(0.1) and not layer.stats(x, labels).requires_grad


def test_the_mean_of_a_step_is_of_its_own_sweep(monkeypatch):
    layer, swept = running(), []
    real = functions.swept_rows
    monkeypatch.setattr(
        functions, "swept_rows", lambda *given, **more: swept.append(1) or real(*given, **more)
    )
    layer(*problem())
    assert swept == [1] and float(layer.intra_mae) != pytest.approx(0.1)


def wrapped(layer, x, labels, way):
    if way is None:
        return layer(x, labels)
    if way == "block":  # the features are computed again too; 2 x / |2 x| = x / |x|
        return checkpoint(lambda x, labels: layer(2 * x, labels), x, labels, use_reentrant=False)
    return checkpoint(layer, x, labels, use_reentrant=way == "reentrant")


@pytest.mark.parametrize("way", ["reentrant", "other", "block"])
@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("together", [False, True])
def test_a_pass_that_is_run_again_has_its_margin(way, batches, together):
    """torch.utils.checkpoint: one or more batches, each before its own backward pass or all before one; and
    the same batches again, as an epoch later."""
    results = []
    for chosen in (None, way):
        layer, found = running(), []
        data = [problem(seed) for seed in range(batches)]
        for _ in range(2):
            values = []
            for x, labels in data:
                leaf = x.clone().requires_grad_()
                values.append((wrapped(layer, leaf, labels, chosen), leaf))
                if not together:
                    values[-1][0].backward()
            if together:
                sum(value for value, _ in values).backward()
            found += [t for value, leaf in values for t in (value.detach(), leaf.grad)]
            found += [layer.weight.grad.clone(), layer.intra_mae.clone()]
        results.append(found)
    for i, (plain, again) in enumerate(zip(*results, strict=True)):
        torch.testing.assert_close(again, plain, msg=lambda m, i=i: f"{i}: {m}")


def test_a_pass_that_cannot_be_told_apart_is_refused():
    layer, (x, labels) = running(), problem()
    x.requires_grad_()
    with pytest.raises(RuntimeError, match=r"^CContrastiveLoss: expected `labels` to be those of one"):
        first, second = (checkpoint(layer, x, labels, use_reentrant=False) for _ in range(2))
        (first + second).backward()
    layer = running()
    with pytest.raises(RuntimeError, match=r"got those of 0; give the module labels from outside"):
        checkpoint(lambda x: layer(x, labels.clone()), x, use_reentrant=False).backward()


def test_a_layer_that_has_run_is_copied_and_saved():
    layer, (x, labels) = running(), problem()
    layer(x, labels)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin.intra_mae, layer.intra_mae)
        checkpoint(twin, x.requires_grad_(), labels, use_reentrant=False).backward()
