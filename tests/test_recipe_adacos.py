"""AdaCos: what moves its scale, and what must not."""

import copy
import math
import pickle

import pytest
import recipe_formulas as formulas
import torch
from torch.utils.checkpoint import checkpoint

import normface_ext as nf

D, C = 8, 5
FIRST = math.sqrt(2) * math.log(C - 1)


def problem(seed=0, count=6):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(C, (count,), generator=generator)
    return torch.randn(count, D, generator=generator, dtype=torch.float64), labels


def adacos(**given):
    torch.manual_seed(100)
    return nf.recipes.AdaCos(D, C, **{"dtype": torch.float64, **given})


def scale_after(module, batches, before=FIRST):
    for x, labels in batches:
        before = formulas.adacos_scale(x, module.weight.detach(), labels, before)
    return before


def test_the_scale_follows_the_batches():
    module, batches = adacos(), [problem(seed, 5 + seed) for seed in range(3)]
    assert float(module.scale) == pytest.approx(FIRST, rel=1e-15)
    for x, labels in batches:
        module(x, labels)
    assert float(module.scale) == pytest.approx(scale_after(module, batches), rel=1e-12)


def test_the_median_is_the_lower_one_and_held_at_a_quarter_of_pi():
    module = adacos()
    with torch.no_grad():
        module.weight.copy_(torch.eye(D, dtype=torch.float64)[:C])
    angles = torch.tensor([0.3, 0.9, 0.5, 0.1], dtype=torch.float64)
    x = torch.zeros(4, D, dtype=torch.float64)
    x[:, 0], x[:, D - 1] = angles.cos(), angles.sin()
    for chosen, median in (([0, 1, 2, 3], 0.3), ([0, 1, 2], 0.5), ([1], math.pi / 4)):
        module.reset_parameters()
        with torch.no_grad():
            module.weight.copy_(torch.eye(D, dtype=torch.float64)[:C])
        module(x[chosen], torch.zeros(len(chosen)).long())
        assert float(module.scale) == pytest.approx(math.log(C - 1) / math.cos(median), rel=1e-11)


@pytest.mark.parametrize("still", ["eval", "fixed", "nothing counts", "empty", "not positive"])
def test_what_moves_nothing(still):
    x, labels = problem()
    module = adacos(dynamic=still != "fixed").train(still != "eval")
    if still == "not positive":  # all others lie opposite: B < 1
        module = nf.recipes.AdaCos(D, 3, dtype=torch.float64)
        with torch.no_grad():
            module.weight.copy_(torch.eye(D, dtype=torch.float64)[:1] * torch.tensor([[1.0], [-1], [-1]]))
        x, labels = torch.eye(D, dtype=torch.float64)[:1], torch.tensor([0])
    elif still == "nothing counts":
        labels = torch.full_like(labels, -100)
    elif still == "empty":
        x, labels = x[:0], labels[:0]
    before = module.scale.clone()
    loss = module(x, labels)
    assert torch.equal(module.scale, before) and loss.isfinite()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_that_do_not_count_or_are_not_finite_move_nothing(bad):
    (x, labels), module = problem(), adacos()
    expected = scale_after(module, [(x[3:], labels[3:])])
    x[:3], labels[1] = bad, -100
    sample_weight = torch.tensor([1.0, 1, 0, 1, 1, 1])
    module(x, labels, sample_weight)
    assert float(module.scale) == pytest.approx(expected, rel=1e-12)


def test_training_resumes_where_it_was():
    whole, batches = adacos(), [problem(seed) for seed in range(4)]
    for x, labels in batches[:2]:
        whole(x, labels)
    resumed = adacos()
    resumed.load_state_dict(whole.state_dict())
    for x, labels in batches[2:]:
        assert torch.equal(whole(x, labels), resumed(x, labels))
    assert torch.equal(whole.scale, resumed.scale)
    for twin in (copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))):
        assert torch.equal(twin.scale, whole.scale)
        assert torch.equal(twin(*batches[0]), copy.deepcopy(whole)(*batches[0]))


def test_the_scale_stays_wide_and_comes_from_the_meta_device():
    module = adacos(dtype=torch.float32)
    for narrow in (module.half(), module.bfloat16()):
        assert narrow.scale.dtype == torch.float64 and narrow.weight.dtype != torch.float64
    module = adacos(device="meta").to_empty(device="cpu")
    module.reset_parameters()
    assert float(module.scale) == pytest.approx(FIRST) and module(*problem()).isfinite()


@pytest.mark.parametrize("way", ["reentrant", "other"])
@pytest.mark.parametrize("together", [False, True])
def test_a_pass_that_is_run_again_has_its_scale_and_moves_nothing(way, together):
    results = []
    for checkpointed in (False, True):
        module, found, losses = adacos(), [], []
        for x, labels in [problem(seed) for seed in range(3)]:
            x.requires_grad_()
            if checkpointed:
                loss = checkpoint(module, x, labels, use_reentrant=way == "reentrant")
            else:
                loss = module(x, labels)
            losses.append(loss)
            found += [loss.detach(), x]
            if not together:
                loss.backward()
        if together:
            torch.stack(losses).sum().backward()
        found = [t.grad if t.requires_grad else t for t in found]
        results.append([*found, module.weight.grad, module.scale])
    for plain, again in zip(*results, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-12, atol=1e-12)


def test_dynamic_can_be_switched():
    module, (x, labels) = adacos(), problem()
    module.dynamic = False
    before = module.scale.clone()
    module(x, labels)
    assert torch.equal(module.scale, before) and "dynamic=False" in repr(module)
