"""NormFaceLoss with sub_centers: the layer, its state, its classes that come and go, its files."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import normface_ext as nf
from normface_ext.softmax.centers import as_rows, by_class

N, D, C, K = 12, 8, 6, 3


def made(classes=C, centers=K, **options):
    torch.manual_seed(0)
    return nf.NormFaceLoss(D, classes, **{"scale": 16.0, "sub_centers": centers, **options})


def batch(seed=0, classes=C):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(N, D, generator=draw), torch.randint(classes, (N,), generator=draw)


def cosines(head, x):
    return F.linear(F.normalize(x), F.normalize(head.weight)).view(len(x), -1, head.sub_centers)


def test_the_layer():
    head = made(margin=nf.ArcFace(0.2))
    assert head.weight.shape == (C * K, D) and head.num_classes == C and head.sub_centers == K
    assert "sub_centers=3" in repr(head) and "sub_centers" not in repr(made(centers=1))
    torch.testing.assert_close(head.weight.norm(dim=1), torch.ones(C * K))
    assert made(scale="auto").scale == made(scale="auto", centers=1).scale  # by the classes, not by the rows
    x, labels = batch()
    expected = nf.functional.normface_loss(
        x, head.weight, labels, 16.0, sub_centers=K, margin=nf.ArcFace(0.2)
    )
    assert torch.equal(head(x, labels), expected)
    before = head.weight.detach().clone()
    head.reset_parameters()
    assert head.weight.shape == before.shape and not torch.equal(head.weight, before)


@pytest.mark.parametrize("name", ["arcface", "cosface", "normface"])
def test_presets(name):
    head = nf.NormFaceLoss.preset(name, D, C, sub_centers=K)
    x, labels = batch()
    assert head(x, labels).isfinite() and head.weight.shape == (C * K, D)


def test_logits_classes_and_hits():
    head = made()
    x, labels = batch()
    pooled = 16 * cosines(head, x).max(2).values
    torch.testing.assert_close(head(x), pooled)
    torch.testing.assert_close(head.logits(x), pooled)
    assert torch.equal(head.predict(x), pooled.argmax(1))
    hits = (pooled.topk(3, dim=1).indices == labels[:, None]).any(1).double().mean()
    torch.testing.assert_close(head.accuracy(x, labels, topk=(1, 3))[1], hits)
    assert torch.equal(head.centers_of(x, labels), cosines(head, x)[torch.arange(N), labels].argmax(1))


def test_the_gradient_of_the_logits_is_the_nearest_centre_s():
    head = made(dtype=torch.float64)
    x = batch()[0].double().requires_grad_()
    found = torch.autograd.grad(head.logits(x).sin().sum(), [x, head.weight])
    expected = torch.autograd.grad((16 * cosines(head, x).max(2).values).sin().sum(), [x, head.weight])
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)


def test_all_centres_of_a_label():
    head = made()
    labels = torch.tensor([4, 0, 4])
    found = head.weight_for(labels)
    assert found.shape == (3, K, D)
    torch.testing.assert_close(found, F.normalize(head.weight, dim=1).view(C, K, D)[labels])


def test_their_number_stays():
    head = made()
    head.sub_centers = 3
    with pytest.raises(ValueError, match=r"NormFaceLoss: expected `sub_centers` to stay 3, .* got 2"):
        head.sub_centers = 2
    with pytest.raises(ValueError, match="NormFaceLoss: expected `label_smoothing` 0 with `sub_centers`"):
        head.label_smoothing = 0.1
    assert head.sub_centers == 3 and head.label_smoothing == 0


def test_a_learned_scale_and_sgd_train_the_nearest_only():
    head = made(learn_scale=True)
    x, labels = batch()
    head(x, labels).backward()
    assert head.scale.grad.abs() > 0
    nearest = cosines(head, x).argmax(2)  # [N, C]
    won = torch.zeros(C, K, dtype=torch.bool)
    won[torch.arange(C).expand(N, C), nearest] = True
    assert torch.equal(head.weight.grad.view(C, K, D).abs().sum(2) > 0, won)


def test_under_autocast():
    head = made()
    x, labels = batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss = head(x, labels)
    torch.testing.assert_close(loss, head(x, labels), rtol=0.05, atol=0.05)


# State ------------------------------------------------------------------------------------------------------


def test_a_state_goes_to_a_head_of_as_many_centres():
    head, other = made(margin=nf.ArcFace(0.2)), made(margin=nf.ArcFace(0.2))
    other.reset_parameters()
    other.load_state_dict(head.state_dict())
    assert torch.equal(other.weight, head.weight)
    assert torch.equal(copy.deepcopy(head)(*batch()), head(*batch()))


@pytest.mark.parametrize("given, wanted", [((6, 3), (18, 1)), ((18, 1), (6, 3)), ((6, 3), (9, 2))])
def test_a_state_of_other_classes_is_refused(given, wanted):
    """The weights have one shape; what would be loaded has others' rows in its classes."""
    head, other = made(*given), made(*wanted)
    before = other.weight.detach().clone()
    sentence = f"expected a state_dict of sub_centers={wanted[1]}, got one of {given[1]}"
    with pytest.raises(ValueError, match=sentence):
        other.load_state_dict(head.state_dict())
    assert torch.equal(other.weight, before)


def test_a_head_of_one_centre_has_the_state_it_always_had():
    assert torch.equal(
        made(centers=1).state_dict()["_extra_state"],
        nf.NormFaceLoss(D, C, scale=16.0).state_dict()["_extra_state"],
    )


# Classes that come and go -----------------------------------------------------------------------------------


OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.01),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("keep", [[5, 0, 1], [0, 1, 2, 3, 4, 5, -1, None], [3, -1, 3, 2, 1, 0]])
def test_whole_classes_move(kind, keep):
    head = made(class_weight=torch.arange(1.0, C + 1), margin=nf.ArcFace(torch.linspace(0.1, 0.5, C)))
    optimizer = OPTIMIZERS[kind](head.parameters())
    for seed in range(3):
        head(*batch(seed)).backward()
        optimizer.step()
        optimizer.zero_grad()
    before, state = head.weight.detach().clone(), copy.deepcopy(optimizer.state[head.weight])
    head.resize_classes(len(keep), keep, optimizer)
    assert head.num_classes == len(keep) and head.weight.shape == (len(keep) * K, D)
    now = by_class(head.weight.detach(), K)
    for new, old in enumerate(keep):
        if old is None or old < 0:
            torch.testing.assert_close(now[new].norm(dim=1), torch.ones(K))
            continue
        assert torch.equal(now[new], by_class(before, K)[old])
        for name, value in optimizer.state[head.weight].items():
            if isinstance(value, torch.Tensor) and value.shape == head.weight.shape:
                assert torch.equal(by_class(value, K)[new], by_class(state[name], K)[old])
    x, labels = batch(9, len(keep))
    head(x, labels).backward()
    optimizer.step()


def test_imprinted_centres_are_near_the_mean_and_apart():
    head = made()
    x = torch.randn(40, D, generator=torch.Generator().manual_seed(1)) + 2
    labels = torch.full((40,), C)
    head.resize_classes(C + 1, init="imprint", features=x, labels=labels)
    mean = F.normalize(F.normalize(x).mean(0), dim=0)
    mine = head.weight_for(torch.tensor([C]))[0]
    torch.testing.assert_close(mine[0], mean)
    assert (mine @ mean > 0.99).all()
    apart = (mine @ mine.T)[~torch.eye(K, dtype=torch.bool)]
    assert (apart < 1 - 1e-5).all()
    drawn = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    twins = [copy.deepcopy(made()) for _ in drawn]
    for each, generator in zip(twins, drawn, strict=True):
        each.resize_classes(C + 1, init="imprint", features=x, labels=labels, generator=generator)
    assert torch.equal(twins[0].weight, twins[1].weight)


def test_the_layouts_are_one_memory():
    rows = torch.arange(C * K * D).view(C * K, D)
    assert torch.equal(by_class(rows, K)[2, 1], rows[2 * K + 1])
    assert as_rows(by_class(rows, K)).data_ptr() == rows.data_ptr()


# Files ------------------------------------------------------------------------------------------------------


def test_our_own_file_says_how_many(tmp_path):
    head = made(margin=nf.CosFace(0.2))
    nf.save_head(head, tmp_path / "own.pt")
    found = nf.load_head(tmp_path / "own.pt").head
    assert (found.num_classes, found.sub_centers) == (C, K)
    assert torch.equal(found(*batch()), head(*batch()))


@pytest.mark.parametrize("format", ["pytorch-metric-learning", "insightface", "linear"])
def test_other_files_are_told(tmp_path, format):
    head = made()
    nf.save_head(head, tmp_path / "other.pt", format)
    found = nf.load_head(tmp_path / "other.pt", sub_centers=K, scale=16.0).head
    assert found.num_classes == C and torch.equal(found(*batch()), head(*batch()))
    assert nf.load_head(tmp_path / "other.pt").head.num_classes == C * K
    with pytest.raises(ValueError, match="sub_centers=4 rows for each class"):
        nf.load_head(tmp_path / "other.pt", sub_centers=4)
    with pytest.raises(ValueError, match="load_head: expected `sub_centers` >= 1, got 0"):
        nf.load_head(tmp_path / "other.pt", sub_centers=0)


def test_a_rank_s_file_has_whole_classes(tmp_path):
    head = made(classes=7)
    nf.save_head(head, tmp_path, "insightface", ranks=3)
    rows = [
        torch.load(path)["state_dict_softmax_fc"]["weight"].shape[0] for path in sorted(tmp_path.iterdir())
    ]
    assert rows == [9, 6, 6]
    assert torch.equal(nf.load_head(tmp_path, sub_centers=K).head.weight, head.weight)


def test_metric_learning_s_weight_is_read(tmp_path):
    """SubCenterArcFaceLoss: W is [D, C K], and its logits are those of nn.functional."""
    torch.manual_seed(0)
    columns = torch.randn(D, C * K)
    head = nf.load_head({"W": columns}, "pytorch-metric-learning", sub_centers=K, scale=1.0).head
    x, _ = batch()
    cosine = F.normalize(x) @ F.normalize(columns, dim=0)
    torch.testing.assert_close(head(x), cosine.view(-1, C, K).max(2).values)
