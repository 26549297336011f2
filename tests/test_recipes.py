"""Each recipe against the formula of its paper, at random and at edge inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import recipe_formulas as formulas
import torch
from dense_head import assert_equal_to_1e10

import normface_ext as nf
from normface_ext import recipes

D, C = 8, 5
COUNTS = [3, 50, 7, 400, 20]


@dataclass(frozen=True)
class Recipe:
    """How it is made, (classes, **options) -> module; what it is, (x, weight, labels) -> losses of rows."""

    make: Callable[..., Any]
    formula: Callable[..., Any]
    of_rows: bool = True
    least: int = 1  # classes
    options: dict[str, Any] = field(default_factory=dict)

    def module(self, classes=C, dtype=torch.float64, **options):
        torch.manual_seed(100)
        return self.make(classes, **{"dtype": dtype, **self.options, **options})


def simple(kind):
    return lambda classes, **options: kind(D, classes, **options)


def ldam(classes, **options):
    return recipes.LDAM(D, classes, COUNTS[:classes], **options)


def kappaface(classes, **options):
    return nf.NormFaceLoss(D, classes, scale=64.0, margin=recipes.KappaFace(COUNTS[:classes], D), **options)


RECIPES = {
    "NormSoftmax": Recipe(simple(recipes.NormSoftmax), formulas.norm_softmax),
    "LDAM": Recipe(ldam, lambda x, w, y: formulas.ldam(x, w, y, COUNTS[: len(w)])),
    "KappaFace": Recipe(kappaface, lambda x, w, y: formulas.kappaface(x, w, y, [0.8] * len(w))),
    "AdaCos": Recipe(simple(recipes.AdaCos), formulas.adacos, least=3),
    "AdaCos fixed": Recipe(
        simple(recipes.AdaCos), lambda *given: formulas.adacos(*given, dynamic=False), least=3,
        options={"dynamic": False},
    ),
    "ProxyNCA": Recipe(simple(recipes.ProxyNCA), formulas.proxy_nca, least=2),
    "ProxyNCA pml": Recipe(
        simple(recipes.ProxyNCA), lambda *given: formulas.proxy_nca(*given, 3.0, target_in_the_sum=True),
        least=2, options={"form": "pml", "softmax_scale": 3.0},
    ),
    "P2SGrad": Recipe(simple(recipes.P2SGrad), formulas.p2sgrad),
    "P2SGrad pml": Recipe(
        simple(recipes.P2SGrad), lambda x, w, y: formulas.p2sgrad(x, w, y, 1 / len(w)),
        options={"form": "pml"},
    ),
    "ProxyAnchor": Recipe(simple(recipes.ProxyAnchor), formulas.proxy_anchor, of_rows=False),
    "SoftTriple": Recipe(
        simple(recipes.SoftTriple), lambda *given: formulas.soft_triple(*given, centers=3),
        options={"centers": 3},
    ),
    "SoftTriple one centre": Recipe(
        simple(recipes.SoftTriple), lambda *given: formulas.soft_triple(*given, centers=1),
        options={"centers": 1},
    ),
    "UniFace": Recipe(simple(recipes.UniFace), formulas.uniface),
    "UniFace weighed": Recipe(
        simple(recipes.UniFace),
        lambda *given: formulas.uniface(*given, scale=20.0, margin=0.1, negative_weight=0.3),
        options={"scale": 20.0, "margin": 0.1, "negative_weight": 0.3},
    ),
}  # fmt: skip
every = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
of_rows = pytest.mark.parametrize(
    "recipe", [r for r in RECIPES.values() if r.of_rows], ids=[n for n, r in RECIPES.items() if r.of_rows]
)
NONE_IGNORED = torch.tensor([0, 4, 1, 1, 2, 0, 3])


def rows(count=7, seed=0, lengths=(0.5, 5.0)):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, D, generator=generator, dtype=torch.float64)
    low, high = lengths
    return x / x.norm(dim=1, keepdim=True) * torch.linspace(low, high, count, dtype=torch.float64)[:, None]


def found(module, x, labels, *given, autocast=False):
    """[value, dx, dweight] of the module; the value summed with slopes that differ."""
    x = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = module(x, labels, *given)
    upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype, device=loss.device)
    return [loss.detach(), *torch.autograd.grad(loss, (x, module.weight), upstream.reshape(loss.shape))]


def expected(recipe, module, x, labels, row_weight=None, reduction="mean"):
    """The same of the formula; only rows of a weight that is not 0 are shown to it."""
    weights = torch.ones(len(x), dtype=torch.float64) if row_weight is None else row_weight.double()
    weights = torch.where(labels == -100, 0, weights)
    kept = weights != 0
    x = x.detach().double().clone().requires_grad_()
    weight = module.weight.detach().cpu().double().requires_grad_()
    if not recipe.of_rows:
        loss = recipe.formula(x[kept], weight, labels[kept], weights[kept])
    else:
        losses = weights[kept] * recipe.formula(x[kept], weight, labels[kept])
        if reduction == "none":
            loss = torch.zeros(len(x), dtype=torch.float64).index_put((kept.nonzero()[:, 0],), losses)
        else:
            loss = losses.sum() / (1 if reduction == "sum" or not kept.any() else weights.sum())
    upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=torch.float64).reshape(loss.shape)
    return [loss.detach(), *torch.autograd.grad(loss, (x, weight), upstream, materialize_grads=True)]


@every
def test_it_is_the_formula_of_the_paper(lane, recipe):
    x, labels = rows(), NONE_IGNORED
    module = recipe.module().to(lane.device)
    truth = expected(recipe, module, x, labels)
    assert_equal_to_1e10(found(module, lane.tensor(x), lane.tensor(labels)), truth)


@pytest.mark.covering(2)
@of_rows
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("ignored", [-100, None, 9])
def test_rows_that_do_not_count_reach_nothing(recipe, reduction, weighed, ignored):
    x, labels = rows(), NONE_IGNORED.clone()
    row_weight = torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0, 3.0, 0.25], dtype=torch.float64) if weighed else None
    if ignored is not None:
        labels[5] = -100
    module = recipe.module(reduction=reduction, ignore_index=ignored)
    truth = expected(recipe, module, x, labels, row_weight, reduction)
    poisoned = x.clone()
    poisoned[3 if weighed else 5 if ignored is not None else 7 :][:1] = math.nan
    given = labels if ignored is None else labels.where(labels != -100, ignored)
    results = found(module, poisoned, given, *([row_weight] if weighed else []))
    assert_equal_to_1e10(results, truth)


def test_rows_of_proxy_anchor_that_do_not_count(lane):
    recipe, x, labels = RECIPES["ProxyAnchor"], rows(), NONE_IGNORED.clone()
    labels[5], x[5] = -100, math.nan
    row_weight = torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0, 3.0, 0.25], dtype=torch.float64)
    module = recipe.module().to(lane.device)
    truth = expected(recipe, module, x.nan_to_num(1.0), labels, row_weight)
    x[3] = math.inf
    assert_equal_to_1e10(found(module, *map(lane.tensor, (x, labels, row_weight))), truth)
    # A row of weight 2 counts as two rows.
    x, labels = rows(), NONE_IGNORED
    twice = torch.tensor([0, 1, 1, 2, 3, 4, 5, 6])
    doubled = found(module, lane.tensor(x), lane.tensor(labels), lane.tensor([1.0, 2, 1, 1, 1, 1, 1]))[0]
    assert doubled.item() == pytest.approx(module(lane.tensor(x[twice]), lane.tensor(labels[twice])).item())


@every
@pytest.mark.parametrize("fast", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_gradcheck(recipe, fast):
    module, x = recipe.module().eval(), rows(4, seed=1).requires_grad_()
    labels = torch.tensor([1, 4, -100, 1])
    names, parameters = zip(*module.named_parameters(), strict=True)

    def loss(x, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x, labels))

    assert torch.autograd.gradcheck(loss, (x, *parameters), fast_mode=fast)


@every
@pytest.mark.parametrize("length", [1e-3, 1.0, 1e3])
def test_cosines_of_one_and_minus_one(recipe, length):
    """The target's and another class's; there KappaFace's formula has no derivative."""
    module = recipe.module(eps=0.0)
    with torch.no_grad():
        module.weight.copy_(torch.nn.functional.normalize(module.weight))
    centers = len(module.weight) // C
    own = module.weight.detach()[::centers]
    x, labels = length * torch.stack([own[0], -own[1], own[2], -own[3]]), torch.tensor([0, 1, 3, 2])
    results = found(module, x, labels)
    assert all(t.isfinite().all() for t in results)
    if module.__class__ is nf.NormFaceLoss:
        # The sine of an angle has a floor of 1e-4 in the kernels, and with it psi an error of as much.
        assert abs(results[0] - expected(recipe, module, x, labels)[0]) <= 64 * 1e-4
        return
    truth = expected(recipe, module, x, labels)
    scale = max(1.0, 1 / length)  # of dx
    assert_equal_to_1e10([t / s for t, s in zip(results, (1, scale, 1), strict=True)],
                         [t / s for t, s in zip(truth, (1, scale, 1), strict=True)])  # fmt: skip


@every
@pytest.mark.parametrize("lengths", [(1e-3, 1e-3), (1e3, 1e3), (1e-3, 1e3)])
def test_long_and_short_features(recipe, lengths):
    module, x = recipe.module(eps=0.0), rows(lengths=lengths)
    results, truth = found(module, x, NONE_IGNORED), expected(recipe, module, x, NONE_IGNORED)
    own = x.norm(dim=1, keepdim=True)
    assert_equal_to_1e10([results[0], results[1] * own, results[2]], [truth[0], truth[1] * own, truth[2]])


@every
def test_one_row_one_class_no_row(recipe):
    module, x = recipe.module(), rows(1)
    assert_equal_to_1e10(found(module, x, torch.tensor([2])), expected(recipe, module, x, torch.tensor([2])))
    if recipe.least == 1:
        single, three = recipe.module(1), rows(3)
        zeros = torch.zeros(3).long()
        assert_equal_to_1e10(found(single, three, zeros), expected(recipe, single, three, zeros))
    for none in (rows(2)[:0], rows(2)):
        loss, dx, dweight = found(module, none, torch.full((len(none),), -100))
        assert loss == 0 and dx.shape == none.shape and not dx.any() and not dweight.any()


def test_too_few_classes():
    for kind, least in ((recipes.AdaCos, 3), (recipes.ProxyNCA, 2)):
        with pytest.raises(ValueError, match=rf"{kind.__name__}: expected `num_classes` >= {least}, got"):
            kind(D, least - 1)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_narrow_features(recipe, dtype):
    """The loss is of float32 or better whatever the features are; a gradient has its operand's roundings."""
    module, x = recipe.module(dtype=dtype), rows().to(dtype)
    loss, dx, dweight = found(module, x, NONE_IGNORED)
    truth = expected(recipe, module, x, NONE_IGNORED)
    assert loss.dtype == torch.float32 and (dx.dtype, dweight.dtype) == (dtype, dtype)
    assert loss.item() == pytest.approx(truth[0].item(), rel=3e-5)
    tolerance = max(3e-5, 4 * torch.finfo(dtype).eps)
    for f, t in zip((dx, dweight), truth[1:], strict=True):
        assert (f.double() - t).norm() <= tolerance * t.norm()


@every
def test_autocast_costs_no_digits(recipe):
    module, x = recipe.module(dtype=torch.float32), rows().float()
    plain = found(module.eval(), x, NONE_IGNORED)
    torch.testing.assert_close(found(module, x, NONE_IGNORED, autocast=True), plain)


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(recipe, id=name, marks=[] if name in ("AdaCos", "UniFace") else pytest.mark.slow)
        for name, recipe in RECIPES.items()
    ],
)
def test_compiled_whole(recipe, compile_fully):
    x, labels = rows(), NONE_IGNORED.clone()
    labels[2] = -100
    plain, compiled = recipe.module(), recipe.module()
    call = compile_fully(compiled)
    for seed in range(2):
        x = rows(seed=seed)
        leaf = x.clone().requires_grad_()
        loss = call(leaf, labels)
        grads = torch.autograd.grad(loss / 2, (leaf, compiled.weight))
        assert_equal_to_1e10([loss.detach(), *grads], found(plain, x, labels))
    for (name, a), b in zip(plain.state_dict().items(), compiled.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
