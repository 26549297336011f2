"""Margins that look at the batch: what may be set, what copies are, and what one of one's own may return; and
what pairs are told by."""

import copy
import io
import math
from typing import ClassVar

import batch_margin_jobs as jobs
import pytest
import torch
from dense_head import problem
from ranks import ranks
from torch.utils.checkpoint import checkpoint

import normface_ext as nf

# Attributes -------------------------------------------------------------------------------------------

KINDS = [
    nf.AdaFace, nf.MagFace, nf.ElasticArcFace, nf.ElasticCosFace, nf.CurricularFace, nf.MVSoftmax,
    nf.SphereFace, nf.CircleSoftmax,
]  # fmt: skip
BAD = {
    "m": ["x", None, -0.1, math.nan, True, torch.tensor([0.3])],
    "h": [-3, "x", math.inf],
    "t_alpha": [-0.1, 1.5, None],
    "sync": ["zz", None, 1],
    "l_margin": [-0.1, 0.9, "x"],
    "u_margin": [0.1, 4.0, None],
    "l_a": [0, 110, 200.0, "x"],
    "u_a": [10, 1.0, -1, math.inf],
    "lambda_g": [-1, "x"],
    "std": [-0.1, math.nan, "x"],
    "plus": ["zz", 1, None],
    "alpha": [-0.1, 1.5, None],
    "t": [-0.1, math.inf, "x"],
    "kind": ["cos", None, 1],
    "adaptive": ["yes", 1, None],
    "base": [-1, math.inf, "x"],
    "gamma": [-0.1, math.nan, None],
    "power": [-1, "x"],
    "lambda_min": [-0.1, None],
    "detached": ["yes", 1, None],
}
CASES = [(kind, name, bad) for kind in KINDS for name in kind.CHECKS for bad in BAD[name]]


@pytest.mark.parametrize("kind, name, bad", CASES)
def test_what_the_constructor_refuses_no_attribute_takes(kind, name, bad):
    margin = kind()
    before = repr(margin), getattr(margin, name)
    with pytest.raises((TypeError, ValueError), match=rf"^{kind.__name__}: expected `{name}` ") as refused:
        setattr(margin, name, bad)
    assert (repr(margin), getattr(margin, name)) == before
    with pytest.raises(refused.type) as constructed:
        kind(**{name: bad})
    if not name.startswith("l_"):  # there the other end of the range is to blame
        assert str(constructed.value) == str(refused.value)


GOOD = {
    "m": 1, "h": 0, "t_alpha": 1, "sync": "global", "l_margin": 0.8, "u_margin": 0.45, "l_a": 100, "u_a": 11,
    "lambda_g": 0, "std": 0, "plus": "released",
    "alpha": 1, "t": 0, "kind": "am", "adaptive": False,
    "base": 3, "gamma": 0, "power": 2, "lambda_min": 0, "detached": False,
}  # fmt: skip


@pytest.mark.parametrize("kind, name", [(kind, name) for kind in KINDS for name in kind.CHECKS])
def test_an_attribute_is_as_the_constructors(kind, name):
    margin, made = kind(), kind(**{name: GOOD[name]})
    setattr(margin, name, GOOD[name])
    assert repr(margin) == repr(made)
    assert type(getattr(margin, name)) is type(getattr(made, name))
    results = []
    for given in (margin, made):
        torch.manual_seed(0)
        results.append(nf.functional.normface_loss(*problem(), 16.0, margin=given))
    assert torch.equal(*results)


def test_a_margin_of_ones_own_may_have_checks():
    class Mine(nf.BatchMargin):
        CHECKS: ClassVar = {"size": lambda owner, name, value: float(value)}

    mine = Mine()
    mine.size, mine.other = 1, "anything"
    assert type(mine.size) is float and mine.other == "anything"


# Files and copies -------------------------------------------------------------------------------------


def by_file(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("copied", [by_file, copy.deepcopy])
@pytest.mark.parametrize("whole", [False, True])
def test_a_copy_goes_on_as_it_would(kind, copied, whole):
    x, weight, labels = problem()
    changed = {"plus": True, "std": 0.1} if "std" in kind.CHECKS else {}
    margin = kind(**changed)
    head = nf.NormFaceLoss(16, 7, scale=16.0, margin=margin, dtype=torch.float64)
    head(x, labels)
    twin = copied(head).margin if whole else copied(margin)
    assert type(twin) is kind and twin is not margin and repr(twin) == repr(margin)
    results = []
    for given in (margin, twin):
        torch.manual_seed(0)
        results.append(nf.functional.normface_loss(2 * x, weight, labels, 16.0, margin=given))
    assert torch.equal(*results)
    assert all(torch.equal(a, b) for a, b in zip(margin.buffers(), twin.buffers(), strict=True))
    name = next(iter(kind.CHECKS))
    with pytest.raises(TypeError, match=f"{kind.__name__}: expected `{name}`"):
        setattr(twin, name, "x" if name != "plus" else 1)
    leaf = x.clone().requires_grad_()
    twin = nf.NormFaceLoss(16, 7, margin=twin, dtype=torch.float64)
    checkpoint(twin, leaf, labels.clone(), use_reentrant=False).backward()
    assert leaf.grad.isfinite().all()


# What a margin of one's own returns -------------------------------------------------------------------


class Says(nf.BatchMargin):
    def __init__(self, found, more=None):
        super().__init__()
        self.found, self.more = [found], [more]  # in lists: no submodules

    def of(self, rows):
        return self.found[0]

    def regularizer(self, rows):
        return self.more[0]


def loss_with(margin, **options):
    return nf.functional.normface_loss(*problem(), 16.0, margin=margin, **options)


@pytest.mark.parametrize("found", [None, "RowMargin", 0.5, torch.ones(9), nf.AdaFace(), [nf.CosFace()]])
def test_of_returns_a_margin_or_a_function(found):
    wanted = r"^normface_loss: expected `Says.of` to return a margin of numbers, such as a RowMargin, or a"
    with pytest.raises(TypeError, match=rf"{wanted} function of the target cosines, got [^ ]+$"):
        loss_with(Says(found))


WRONG = {
    "nothing": (None, TypeError, "None"),
    "a number": (0.5, TypeError, "0.5"),
    "integers": (torch.ones(9, dtype=torch.int64), TypeError, "torch.int64"),
    "one": (torch.ones(()), ValueError, r"shape \[\]"),
    "few": (torch.ones(8), ValueError, r"shape \[8\]"),
    "columns": (torch.ones(9, 1), ValueError, r"shape \[9, 1\]"),
    "elsewhere": (torch.ones(9, device="meta"), ValueError, "meta"),
}


@pytest.mark.parametrize("gradient", ["exact", "straight"])
@pytest.mark.parametrize("given, error, got", WRONG.values(), ids=WRONG)
def test_a_function_of_the_cosines_returns_a_number_per_row(given, error, got, gradient):
    sentence = (
        r"^normface_loss: expected `the function of Says.of` to return a floating tensor of shape \[9\]"
    )
    with pytest.raises(error, match=rf"{sentence}.*, got {got}$"):
        loss_with(Says(lambda cosine: given), margin_gradient=gradient)
    # Torch finishes the one, the kernels the other: the same but for the last digit of a float64.
    right = loss_with(nf.CosFace(0.3))
    torch.testing.assert_close(loss_with(Says(lambda cosine: cosine - 0.3)), right, rtol=1e-14, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("given, error, got", list(WRONG.values())[1:], ids=list(WRONG)[1:])
def test_a_regularizer_returns_a_number_per_row(given, error, got, reduction):
    sentence = r"^normface_loss: expected `Says.regularizer` to return a floating tensor of shape \[9\]"
    with pytest.raises(error, match=rf"{sentence}.*, got {got}$"):
        loss_with(Says(nf.CosFace(0.3), given), reduction=reduction)
    assert loss_with(Says(nf.CosFace(0.3), torch.zeros(9))) == loss_with(nf.CosFace(0.3))


def test_so_it_is_in_a_class_parallel_head():
    of, more = ranks(1).run(jobs.wrong_margins)[0]
    assert "expected `Says.of` to return a margin" in of and of.endswith("got None")
    assert "expected `Says.regularizer` to return" in more and more.endswith("got shape [1]")


# Pairs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_pairs_may_be_told_by_integers(lane, dtype):
    a, b, same = lane.randn(4, 5), lane.randn(4, 5), torch.tensor([True, False, True, False])
    expected = nf.functional.pair_contrastive_loss(a, b, lane.tensor(same))
    assert torch.equal(nf.functional.pair_contrastive_loss(a, b, lane.tensor(same.to(dtype))), expected)
    if lane.device == "cpu":
        with pytest.raises(ValueError, match=r"expected `same` to hold 0 and 1, got \[0, 2\]"):
            nf.functional.pair_contrastive_loss(a, b, 2 * same.to(dtype))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.uint8, torch.float32])
def test_pairs_are_told_by_nothing_else(dtype):
    a = torch.ones(2, 3)
    with pytest.raises(TypeError, match=f"expected `same` to be bool, int64 or int32, got {dtype}"):
        nf.functional.pair_contrastive_loss(a, a, torch.ones(2, dtype=dtype))
