"""head.resize_classes: kept classes train on as if nothing had happened, in head, optimizer and options."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import normface_ext as nf
from normface_ext.distributed import RowAdamW, RowSGD

N, D, C = 24, 8, 7


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def made(classes=C, **options):
    torch.manual_seed(0)
    return nf.NormFaceLoss(D, classes, scale=20.0, **options)


def batch(seed, classes):
    draw = generator(seed)
    return torch.randn(N, D, generator=draw), torch.randint(classes, (N,), generator=draw)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.5),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.01),
    "row sgd": lambda p: RowSGD(p, lr=0.1, momentum=0.9),
    "row adamw": lambda p: RowAdamW(p, lr=0.01),
}
KEEPS = {
    "grow": (10, None),
    "shrink": (4, None),
    "one": (1, [3]),
    "drop": (5, [0, 1, 3, 5, 6]),
    "reorder": (C, [6, 5, 4, 3, 2, 1, 0]),
    "replace": (C, [0, None, 2, 3, -1, 5, 6]),
    "all at once": (9, torch.tensor([6, -1, 0, 1, -1, 2, 3, 5, -1])),
    "twice": (8, [0, 1, 2, 3, 4, 5, 6, 6]),
}


def source_of(n, keep):
    if keep is None:
        return [i if i < C else -1 for i in range(n)]
    return [-1 if i is None else int(i) for i in keep]


def trained(kind, steps=3):
    head = made()
    optimizer = OPTIMIZERS[kind](head.parameters())
    for seed in range(steps):
        head(*batch(seed, C)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return head, optimizer


def step_by_rows(head, optimizer, gradient):
    head.weight.grad = gradient.clone()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.covering(1)
def test_kept_classes_go_on_bit_for_bit(kind, keep):
    """The same gradients to the head that was resized and to the one that was not: the rows stay the same."""
    n, keep = KEEPS[keep]
    source = source_of(n, keep)
    kept = [(new, old) for new, old in enumerate(source) if old >= 0]
    head, optimizer = trained(kind)
    whole, its = copy.deepcopy((head, optimizer))
    head.resize_classes(n, keep, optimizer=optimizer)
    assert head.num_classes == n == head.weight.shape[0] and head.weight.shape[1] == D
    for seed in range(3):
        gradient = torch.randn(C, D, generator=generator(seed))
        mine = torch.randn(n, D, generator=generator(seed + 100))
        for new, old in kept:
            mine[new] = gradient[old]
        step_by_rows(whole, its, gradient)
        step_by_rows(head, optimizer, mine)
        for new, old in kept:
            assert torch.equal(head.weight[new], whole.weight[old])
    for name, value in its.state[whole.weight].items():
        got = optimizer.state[head.weight][name]
        if isinstance(value, torch.Tensor) and value.dim():
            for new, old in kept:
                assert torch.equal(got[new], value[old]), name
        else:
            assert got == value


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_new_rows_start_without_a_past(kind):
    head, optimizer = trained(kind)
    head.resize_classes(C + 3, [*range(C), None, None, None], optimizer=optimizer)
    first = {"step_size": 0.01, "sum": 0.5, "ax": head.weight[C:]}
    per_class = [name for name, value in optimizer.state[head.weight].items() if torch.as_tensor(value).dim()]
    assert per_class or kind == "sgd"
    for name in per_class:
        rows = optimizer.state[head.weight][name][C:]
        assert torch.equal(rows, torch.as_tensor(first.get(name, 0.0)).expand_as(rows).to(rows)), name
    head(*batch(9, C + 3)).backward()
    before = head.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(head.weight[C:], before[C:])


def test_before_the_first_step_there_is_no_state():
    head = made()
    optimizer = torch.optim.Adam(
        [{"params": [torch.nn.Parameter(torch.ones(1))]}, {"params": head.parameters()}]
    )
    head.resize_classes(9, optimizer=optimizer)
    assert optimizer.param_groups[1]["params"][0] is head.weight and not optimizer.state
    head(*batch(0, 9)).backward()
    before = head.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(head.weight, before)


def test_several_optimizers_and_options_of_groups_stay():
    head = made(learn_scale=True)
    one = torch.optim.SGD(nf.parameter_groups(head, weight_decay=0.1), lr=0.1, momentum=0.9)
    two = torch.optim.Adam([head.weight])
    options = [{k: v for k, v in g.items() if k != "params"} for g in one.param_groups]
    head(*batch(0, C)).backward()
    one.step(), two.step()
    head.resize_classes(9, optimizer=[one, two])
    assert sum(p is head.weight for o in (one, two) for g in o.param_groups for p in g["params"]) == 2
    assert [{k: v for k, v in g.items() if k != "params"} for g in one.param_groups] == options
    assert one.state[head.scale]["momentum_buffer"].shape == (1,)
    assert two.state[head.weight]["step"] == 1


def test_the_parameter_stays_where_its_shape_does():
    head, optimizer = trained("adam")
    weight, state = head.weight, optimizer.state[head.weight]
    average, rows = state["exp_avg"], state["exp_avg"].clone()
    head.resize_classes(C, list(range(C))[::-1], optimizer=optimizer)
    assert head.weight is weight and optimizer.state[weight] is state and state["exp_avg"] is average
    assert torch.equal(average, rows.flip(0))
    version = weight._version
    head.resize_classes(C, optimizer=optimizer)
    assert weight._version == version
    head.resize_classes(C + 1, optimizer=optimizer)
    assert head.weight is not weight and weight not in optimizer.state


def test_a_waiting_gradient_and_marks_follow():
    head = made()
    head(*batch(0, C)).backward()
    head.weight.mark = "mine"
    grad = head.weight.grad.clone()
    head.resize_classes(9, [3, None, 1, 0, 2, 4, 5, 6, -1])
    assert torch.equal(head.weight.grad[[0, 2, 3, 4, 5, 6, 7]], grad[[3, 1, 0, 2, 4, 5, 6]])
    assert not head.weight.grad[[1, 8]].any() and head.weight.mark == "mine"
    again = head.weight.grad.clone()
    head.resize_classes(9, range(8, -1, -1))
    assert torch.equal(head.weight.grad, again.flip(0))
    frozen = made().requires_grad_(False)
    frozen.resize_classes(9)
    assert not frozen.weight.requires_grad


def test_class_weight_follows():
    head = made(class_weight=torch.arange(1.0, C + 1, dtype=torch.float64), margin=nf.CosFace(0.2))
    head.resize_classes(5, [6, None, 0, 2, -1])
    assert head.class_weight.tolist() == [7, 1, 1, 3, 1] and head.class_weight.dtype == torch.float64
    assert head.margin == nf.CosFace(0.2) and "class_weight" not in head.state_dict()
    head(*batch(0, 5)).backward()


def test_margins_per_class_follow():
    given = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
    head = made(5, margin=nf.CombinedMargin(1.0, torch.tensor(0.3), given, guard="easy"))
    head.resize_classes(3, [4, -1, 0])
    torch.testing.assert_close(head.margin.m3, torch.tensor([0.5, 0.3, 0.1]))
    assert head.margin.m2 == 0.3 and head.margin.guard == "easy" and len(given) == 5
    head(*batch(0, 3)).backward()
    head.resize_classes(3, [2, 1, 0])
    torch.testing.assert_close(head.margin.m3, torch.tensor([0.1, 0.3, 0.5]))
    rows = nf.RowMargin(m3=torch.full((3,), 0.2))  # of a batch of as many rows as classes
    head.margin = rows
    head.resize_classes(7)
    assert head.margin is rows


def test_learned_margins_follow_with_their_optimizer():
    learned = torch.nn.Parameter(torch.full((C,), 0.3))
    head = made(margin=nf.CosFace(learned))
    optimizer = torch.optim.Adam([head.weight, learned], lr=0.01)
    head(*batch(0, C)).backward()
    optimizer.step()
    average = optimizer.state[learned]["exp_avg"].clone()
    head.resize_classes(9, [1, 0, None, 2, 3, 4, 5, 6, -1], optimizer)
    assert optimizer.param_groups[0]["params"][0] is head.weight
    assert optimizer.param_groups[0]["params"][1] is head.margin.m and len(optimizer.state) == 2
    kept = [0, 1, 3, 4, 5, 6, 7]
    assert torch.equal(head.margin.m[kept], learned[[1, 0, 2, 3, 4, 5, 6]])
    assert torch.equal(optimizer.state[head.margin.m]["exp_avg"][kept], average[[1, 0, 2, 3, 4, 5, 6]])
    head(*batch(1, 9)).backward()
    optimizer.step()
    parameter = head.margin.m
    head.resize_classes(9, list(range(9))[::-1], optimizer)
    assert head.margin.m is parameter
    head.margin = nf.CosFace(parameter * 2)
    with pytest.raises(ValueError, match="expected a margin of leaf tensors"):
        head.resize_classes(10, optimizer=optimizer)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_random_rows_are_the_constructors(dtype):
    head = made(dtype=dtype)
    before = head.weight.detach().clone()
    head.resize_classes(C + 500, generator=generator(3))
    torch.manual_seed(3)
    assert torch.equal(head.weight[C:], nf.NormFaceLoss(D, 500, dtype=dtype).weight)
    assert torch.equal(head.weight[:C], before) and head.weight.dtype == dtype and head.weight.requires_grad
    other = made(dtype=dtype)
    torch.manual_seed(3)
    other.resize_classes(C + 500)
    assert torch.equal(other.weight, head.weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_imprinted_rows_are_the_mean_direction(dtype):
    x = torch.randn(60, D, generator=generator(1)) * torch.logspace(-3, 3, 60)[:, None]
    x, y = x.to(dtype), torch.arange(60) % 6 + 3
    y[:4] = -100
    head = made(dtype=torch.float64 if dtype == torch.float64 else None)
    before = head.weight.detach().clone()
    source = [0, 1, 2, 3, 4, -1, 6, None, -1]
    head.resize_classes(9, source, init="imprint", features=x, labels=y)
    for new, old in enumerate(source_of(9, source)):
        rows = torch.nn.functional.normalize(x[y == new].double())
        want = torch.nn.functional.normalize(rows.mean(0), dim=0) if old < 0 else before[old]
        torch.testing.assert_close(head.weight[new], want.to(head.weight.dtype))


def test_weight_for():
    head = made()
    with torch.no_grad():
        head.weight.mul_(torch.arange(1.0, C + 1)[:, None])
    labels = torch.tensor([3, 3, 0], dtype=torch.int32)
    rows = head.weight_for(labels)
    torch.testing.assert_close(rows, torch.nn.functional.normalize(head.weight[labels.long()]))
    rows.sum().backward()
    assert head.weight.grad[[0, 3]].abs().sum() > 0 and not head.weight.grad[[1, 2, 4, 5, 6]].any()
    assert head.weight_for(torch.empty(0, dtype=torch.int64)).shape == (0, D)
    for bad, error in (([7], IndexError), ([-1], IndexError), ([[1]], ValueError), ([0.5], TypeError)):
        with pytest.raises(error, match=r"weight_for: expected `labels`"):
            head.weight_for(torch.tensor(bad))


FEATURES, LABELS = torch.randn(6, D, generator=generator()), torch.tensor([7, 7, 8, 8, 0, 1])
SIGNS = torch.tensor([[1], [1], [1], [-1]])
OTHERS = torch.optim.SGD([torch.ones(2, requires_grad=True)])


def imprint(features, labels):
    return {"init": "imprint", "features": features, "labels": labels}


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"n": 0}, ValueError, "`n` >= 1, got 0"),
        ({"n": 2.0}, TypeError, "`n` to be an int, got float"),
        ({"keep": 3}, TypeError, "`keep` to be a sequence of old classes, got int"),
        ({"keep": [0] * 8}, ValueError, "`keep` to have one entry for each of the 9 classes, got 8"),
        ({"keep": [0] * 8 + [7]}, ValueError, r"`keep\[8\]` in \[-1, 6\], got 7"),
        ({"keep": [-2] + [0] * 8}, ValueError, r"`keep\[0\]` in \[-1, 6\], got -2"),
        ({"keep": [0.5] * 9}, TypeError, r"`keep\[0\]` to be an int or None, got float"),
        ({"keep": [True] * 9}, TypeError, r"`keep\[0\]` to be an int or None, got bool"),
        ({"keep": torch.ones(9)}, TypeError, r"`keep\[0\]` to be an int or None, got float"),
        ({"optimizer": "adam"}, TypeError, "`optimizer` to be an Optimizer, got str"),
        ({"optimizer": OTHERS}, ValueError, "the head's weight"),
        ({"init": "zeros"}, ValueError, "`init` to be one of random, imprint, got 'zeros'"),
        ({"features": FEATURES}, ValueError, "`init` to be 'imprint'"),
        ({"init": "imprint"}, ValueError, "`features` and `labels`"),
        (imprint(FEATURES[:, 1:], LABELS), ValueError, r"`features` to be \[N, 8"),
        (imprint(FEATURES, LABELS[1:]), ValueError, "`labels` to have shape"),
        (imprint(FEATURES, LABELS + 1), IndexError, r"in \[0, 9\).*got 9 at row 2"),
        (imprint(FEATURES, 0 * LABELS), ValueError, "got none for 7, 8"),
        (imprint(FEATURES / 0, LABELS), ValueError, "to be finite"),
        (imprint(FEATURES[[0, 1, 2, 2]] * SIGNS, LABELS[:4]), ValueError, "cancel out for 8"),
    ],
)
def test_errors_change_nothing(arguments, error, text):
    head, optimizer = trained("adam")
    before = copy.deepcopy((head.state_dict(), optimizer.state_dict()))
    weight = head.weight
    with pytest.raises(error, match=f"resize_classes: expected .*{text}"):
        head.resize_classes(**{"n": 9, "optimizer": optimizer, **arguments})
    torch.testing.assert_close((head.state_dict(), optimizer.state_dict()), before, rtol=0, atol=0)
    assert head.weight is weight and head.num_classes == C


@pytest.mark.parametrize("classes", [C, C + 2])
def test_a_weight_that_is_made_of_others_is_refused(classes):
    """The optimizer has what it is made of, whose rows nobody knows."""
    head = torch.nn.utils.parametrizations.weight_norm(made(), "weight")
    before = head.weight.detach().clone()
    with pytest.raises(ValueError, match="resize_classes: expected `weight` to be a parameter of the head"):
        head.resize_classes(classes, list(range(C))[::-1] + [None] * (classes - C))
    assert torch.equal(head.weight, before) and head.num_classes == C


def test_what_has_no_rows_is_refused():
    head = made()
    with pytest.raises(TypeError, match="LBFGS"):
        head.resize_classes(9, optimizer=torch.optim.LBFGS(head.parameters()))
    odd = torch.optim.SGD(head.parameters())
    odd.state[head.weight]["history"] = [torch.zeros(3)]
    with pytest.raises(TypeError, match="got list in SGD's `history`"):
        head.resize_classes(9, optimizer=odd)
    with pytest.raises(ValueError, match="on the meta device"):
        nf.NormFaceLoss(D, C, device="meta").resize_classes(9)
    head.weight.grad = torch.zeros(C, D).to_sparse(1)
    with pytest.raises(ValueError, match="sparse gradient"):
        head.resize_classes(9)


def test_a_head_among_ranks_is_refused_where_one_process_is_meant(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        head = made()
        fully_shard(head, mesh=mesh)
        for call in (
            lambda: head.resize_classes(9),
            lambda: head.weight_for(torch.zeros(1, dtype=torch.int64)),
        ):
            with pytest.raises(TypeError, match="expected a head of one process"):
                call()
        head = nf.distributed.shard_head(made(), mesh)
        with pytest.raises(TypeError, match="save_head: expected `head` of one process"):
            nf.save_head(head, tmp_path / "head.pt")
        with pytest.raises(ValueError, match=r"expected a dense matrix in 'weight', got TypeError"):
            nf.load_head(head.state_dict())
        assert nf.load_head(nf.distributed.full_state_dict(head))[0].num_classes == C
    finally:
        dist.destroy_process_group()
