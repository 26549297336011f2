"""The table of docs/heads.md: what it says a head takes works, and what not is refused by its name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import normface_ext as nf

ROWS, DIM, CLASSES = 9, 6, 7
X = torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.arange(ROWS) % CLASSES
FACTOR = torch.linspace(0, 2, ROWS, dtype=torch.float64)
CLASS_WEIGHT = torch.linspace(0.5, 2, CLASSES, dtype=torch.float64)
COLUMNS = ["sample_weight", "class_weight", "label_smoothing", "labels_b, lam", "reduction"]


def pairs(loss):
    return lambda x, **given: loss(x, x.flip(0), LABELS % 2 == 0, **given)


def triplets(loss):
    return lambda x, **given: loss(x, x.flip(0), x.roll(1, 0), **given)


class Labelled:
    """A head called with the labels."""

    def __init__(self, head):
        self.head = head

    def __call__(self, x, **given):
        return self.head(x, LABELS, **given)


def classified(make, *more):
    """A head by its options, of DIM features and CLASSES classes, on the same weight."""

    def made(**options):
        torch.manual_seed(0)
        return Labelled(make(DIM, CLASSES, *more, dtype=torch.float64, **options))

    return made


def with_margin(margin=None, **fixed):
    return lambda **options: classified(nf.NormFaceLoss)(scale=8.0, margin=margin, **fixed, **options)


COUNTS = torch.arange(1, CLASSES + 1)
HEADS = {
    "`NormFaceLoss`": with_margin(nf.ArcFace(0.3)),
    "`NormFaceLoss`, `CurricularFace`": lambda **options: with_margin(nf.CurricularFace(alpha=0))(**options),
    "`NormFaceLoss`, `MVSoftmax`": with_margin(nf.MVSoftmax()),
    "`NormFaceLoss`, `filter_threshold`": with_margin(filter_threshold=0.2),
    "`SphereFace2Loss`": classified(nf.SphereFace2Loss),
    "`CContrastiveLoss`": classified(nf.CContrastiveLoss),
    "`CTripletLoss`": classified(nf.CTripletLoss),
    "`PairContrastiveLoss`": lambda **options: pairs(nf.PairContrastiveLoss(**options)),
    "`TripletLoss`": lambda **options: triplets(nf.TripletLoss(**options)),
    "`InnerDistance`": lambda **options: nf.InnerDistance(DIM, CLASSES, dtype=torch.float64, **options),
    "`recipes.NormSoftmax`": classified(nf.recipes.NormSoftmax),
    "`recipes.LDAM`": classified(nf.recipes.LDAM, COUNTS),
    "`recipes.AdaCos`": lambda **options: classified(nf.recipes.AdaCos)(dynamic=False, **options),
    "`recipes.ProxyNCA`": classified(nf.recipes.ProxyNCA),
    "`recipes.P2SGrad`": classified(nf.recipes.P2SGrad),
    "`recipes.SoftTriple`": classified(nf.recipes.SoftTriple),
    "`recipes.UniFace`": classified(nf.recipes.UniFace),
    "`recipes.ProxyAnchor`": classified(nf.recipes.ProxyAnchor),
}


def table() -> list[tuple[str, str, str]]:
    """(head, option, what the cell says)"""
    page = (Path(__file__).parents[1] / "docs" / "heads.md").read_text("utf-8")
    _, _, after = page.partition("| Head | sample_weight")
    lines = re.findall(r"^\| (`.*) \|$", after.partition("\n\n")[0], re.M)
    cells = [[cell.strip() for cell in line.split(" | ")] for line in lines]
    return [(head, name, said) for head, *row in cells for name, said in zip(COLUMNS, row, strict=True)]


def works(made, name):
    plain = made(reduction="none")
    each = plain(X)
    if name == "sample_weight":
        torch.testing.assert_close(plain(X, sample_weight=FACTOR), FACTOR * each)
        torch.testing.assert_close(made()(X, sample_weight=FACTOR), (FACTOR * each).sum() / FACTOR.sum())
        spoilt = X.clone()
        spoilt[0] = torch.nan  # of weight 0
        assert made()(spoilt, sample_weight=FACTOR).isfinite() or made in NEIGHBOURS
    elif name == "class_weight":
        of_rows = CLASS_WEIGHT[LABELS]
        got = made(class_weight=CLASS_WEIGHT)(X)
        torch.testing.assert_close(got, (of_rows * each).sum() / of_rows.sum())
    elif name == "label_smoothing":
        assert not torch.allclose(made(label_smoothing=0.2)(X), made()(X))
    elif name == "labels_b, lam":
        other = LABELS.flip(0)
        head = plain.head
        got = head(X, LABELS, labels_b=other, lam=FACTOR / 2)
        torch.testing.assert_close(got, FACTOR / 2 * each + (1 - FACTOR / 2) * head(X, other))
    else:
        total = each.sum()
        for reduction, divisor in (("mean", ROWS), ("batchmean", ROWS), ("sum", 1)):
            torch.testing.assert_close(made(reduction=reduction)(X), total / divisor)
        weighted = made(reduction="batchmean")(X, sample_weight=FACTOR)
        torch.testing.assert_close(weighted, (FACTOR * each).sum() / ROWS)
        with pytest.raises(ValueError, match="expected `reduction`"):
            made(reduction="average")


#: Whose rows are each other's neighbours: one that holds NaN is beside others.
NEIGHBOURS = (HEADS["`PairContrastiveLoss`"], HEADS["`TripletLoss`"])


def refused(made, name):
    values = {
        "sample_weight": {"sample_weight": FACTOR},
        "class_weight": {"class_weight": CLASS_WEIGHT},
        "label_smoothing": {"label_smoothing": 0.1},
        "labels_b, lam": {"labels_b": LABELS, "lam": 0.5},
        "reduction": {"reduction": "mean"},
    }[name]
    called = name in ("sample_weight", "labels_b, lam")
    with pytest.raises((TypeError, ValueError), match=f"[`']{next(iter(values))}[`']"):
        made()(X, **values) if called else made(**values)


def test_every_head_is_in_the_table():
    assert list(dict.fromkeys(head for head, _, _ in table())) == list(HEADS)


@pytest.mark.parametrize(("head", "name", "said"), table(), ids=lambda value: str(value)[:30])
def test_the_table_is_true(head, name, said):
    assert said.startswith(("yes", "no: "))
    if head == "`recipes.ProxyAnchor`" and said.startswith("yes"):
        made = HEADS[head]()  # no losses of rows: a row of weight 2 is two rows
        twice = nf.recipes.ProxyAnchor(DIM, CLASSES, dtype=torch.float64)
        twice.load_state_dict(made.head.state_dict())
        doubled = twice(torch.cat([X, X[:1]]), torch.cat([LABELS, LABELS[:1]]))
        weight = torch.ones(ROWS, dtype=torch.float64)
        weight[0] = 2
        torch.testing.assert_close(made(X, sample_weight=weight), doubled)
    elif head == "`recipes.LDAM`" and name == "class_weight":
        ldam = nf.recipes.LDAM(DIM, CLASSES, COUNTS, reweight_from=1)
        ldam.set_epoch(1)
        assert torch.equal(ldam.class_weight, nf.recipes.drw_weights(COUNTS))
    else:
        (works if said.startswith("yes") else refused)(HEADS[head], name)


def test_reasons_are_in_the_sentences():
    for make, option, why in (
        (nf.CContrastiveLoss, {"class_weight": CLASS_WEIGHT}, r"sample_weight=class_weight\[labels\]"),
        (nf.SphereFace2Loss, {"label_smoothing": 0.1}, "no distribution over the classes"),
        (nf.recipes.ProxyAnchor, {"reduction": "sum"}, "a row has no loss of its own"),
    ):
        with pytest.raises(TypeError, match=f"`{next(iter(option))}`: .*{why}"):
            make(DIM, CLASSES, **option)
    with pytest.raises(TypeError, match="its rows have no classes"):
        nf.TripletLoss(class_weight=CLASS_WEIGHT)
    with pytest.raises(TypeError, match="it gives distances and no loss"):
        nf.functional.inner_distance(X, X, reduction="mean")


@pytest.mark.parametrize("name", ["pair_contrastive_loss", "triplet_loss"])
@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum", "none"])
def test_weights_of_pairs_and_triplets(lane, name, reduction):
    a, b, c = (lane.randn(ROWS, DIM, dtype=torch.float64, seed=k, grad=True) for k in range(3))
    given = (a, b, lane.tensor(LABELS % 2)) if name == "pair_contrastive_loss" else (a, b, c)
    leaves = [t for t in given if t.requires_grad]
    factor = lane.tensor(FACTOR)
    got = getattr(nf.functional, name)(*given, sample_weight=factor, reduction=reduction)
    truth = getattr(nf.reference, name)(*given, sample_weight=factor, reduction=reduction)
    torch.testing.assert_close(got, truth)
    for mine, theirs in zip(
        torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(truth.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(mine, theirs)
        assert not mine[0].any()


@pytest.mark.parametrize("name", ["pair_contrastive_loss", "triplet_loss"])
def test_a_pair_of_weight_0_reaches_nothing(lane, name):
    a, b, c = (lane.randn(ROWS, DIM, seed=k) for k in range(3))
    a[0], b[0], c[0] = torch.nan, torch.inf, torch.nan
    given = [t.requires_grad_() for t in (a, b, c)]
    if name == "pair_contrastive_loss":
        given[2] = lane.tensor(LABELS % 2)
    loss = getattr(nf.functional, name)(*given, sample_weight=lane.tensor(FACTOR, torch.float32))
    loss.backward()
    assert loss.isfinite() and a.grad.isfinite().all() and not a.grad[0].any()


def test_a_miners_tuple_is_refused_with_how_to_convert_it():
    head = nf.NormFaceLoss(DIM, CLASSES, scale=8.0)
    mined = tuple(torch.arange(3) for _ in range(4))
    with pytest.raises(TypeError, match=r"indices_tuple has to be converted.*convert_to_weights.*batchmean"):
        head(X.float(), LABELS, mined)


def test_batchmean_is_pytorch_metric_learnings_mean_of_mined_rows():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    from pytorch_metric_learning import miners
    from pytorch_metric_learning.utils.loss_and_miner_utils import convert_to_weights

    x, labels = X.float(), LABELS % 4
    head = nf.NormFaceLoss(DIM, CLASSES, scale=16.0, margin=nf.CosFace(0.35), reduction="batchmean")
    theirs = losses.CosFaceLoss(CLASSES, DIM, margin=0.35, scale=16)
    theirs.load_state_dict({"W": head.weight.detach().T.contiguous()})
    for miner in (miners.MultiSimilarityMiner(), miners.BatchHardMiner()):
        mined = miner(x, labels)
        weight = convert_to_weights(mined, labels, dtype=x.dtype)
        torch.testing.assert_close(head(x, labels, weight), theirs(x, labels, mined))


def test_batchmean_counts_ignored_rows_and_is_0_of_none():
    head = nf.NormFaceLoss(DIM, CLASSES, scale=8.0, reduction="batchmean", dtype=torch.float64)
    labels = LABELS.clone()
    labels[:3] = -100
    mean = head(X, labels)
    head.reduction = "sum"
    torch.testing.assert_close(mean, head(X, labels) / ROWS)
    for loss in (head, nf.SphereFace2Loss(DIM, CLASSES), nf.CTripletLoss(DIM, CLASSES)):
        loss.reduction = "batchmean"
        assert loss(X[:0].to(loss.weight.dtype), labels[:0]).item() == 0
