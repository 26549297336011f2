"""RowSGD and RowAdamW: torch's update for dense gradients; for sparse ones, each row on its own."""

import pytest
import torch
from torch import nn

from normface_ext.distributed import RowAdamW, RowSGD

OPTIMIZERS = {
    "sgd": (RowSGD, torch.optim.SGD, {"lr": 0.1}),
    "momentum": (RowSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "nesterov": (RowSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adamw": (RowAdamW, torch.optim.AdamW, {"lr": 0.1}),
    "adam": (RowAdamW, torch.optim.Adam, {"lr": 0.1, "weight_decay": 0.0, "betas": (0.8, 0.95)}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_dense_gradients_get_torchs_update(name):
    mine, theirs, options = OPTIMIZERS[name]
    torch.manual_seed(0)
    for shape in [(5, 3), (4,), (), (2, 3, 4)]:
        a = nn.Parameter(torch.randn(shape))
        b = nn.Parameter(a.detach().clone())
        ours, torchs = mine([a], **options), theirs([b], **options)
        for _ in range(5):
            a.grad = torch.randn(shape)
            b.grad = a.grad.clone()
            ours.step()
            torchs.step()
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sparse_gradients_train_each_row_on_its_own(name):
    """A row behaves as a parameter of its own that has a gradient in some of the steps."""
    mine, theirs, options = OPTIMIZERS[name]
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(6, 3, generator=generator))
    rows = [nn.Parameter(row.clone()) for row in weight.detach()]
    ours, torchs = mine([weight], **options), [theirs([row], **options) for row in rows]
    for touched in ([0, 2, 5], [2, 3], [], [5, 2], [0]):
        values = torch.randn(len(touched), 3, generator=generator)
        weight.grad = torch.sparse_coo_tensor(
            torch.tensor([touched], dtype=torch.int64), values, (6, 3), check_invariants=True
        )
        before = weight.detach().clone()
        ours.step()
        for row, value in zip(touched, values, strict=True):
            rows[row].grad = value.clone()
            torchs[row].step()
        torch.testing.assert_close(
            weight.detach(), torch.stack([r.detach() for r in rows]), rtol=1e-5, atol=1e-6
        )
        left = [row for row in range(6) if row not in touched]
        assert torch.equal(weight[left], before[left])


def test_repeated_rows_are_added():
    weight = nn.Parameter(torch.zeros(3, 1))
    weight.grad = torch.sparse_coo_tensor(
        torch.tensor([[1, 1]]), torch.tensor([[2.0], [3.0]]), (3, 1), check_invariants=True
    )
    RowSGD([weight], lr=1.0).step()
    assert weight.flatten().tolist() == [0.0, -5.0, 0.0]


def test_closures_schedulers_and_state_dicts_work():
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = RowAdamW([weight], lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) == 4.0
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.05
    other = RowAdamW([weight], lr=0.1)
    other.load_state_dict(optimizer.state_dict())
    assert torch.equal(other.state[weight]["exp_avg"], optimizer.state[weight]["exp_avg"])


def test_loaded_counts_go_past_what_bfloat16_can_count():
    weight = nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    optimizer, other = RowAdamW([weight]), RowAdamW([weight])
    optimizer.prepare()
    optimizer.state[weight]["row_step"].fill_(1001)
    other.load_state_dict(optimizer.state_dict())
    weight.grad = torch.ones_like(weight)
    other.step()
    assert other.state[weight]["row_step"].tolist() == [1002, 1002]
    assert other.state[weight]["exp_avg"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda p: RowSGD(p, lr=-1.0), "RowSGD: expected `lr` >= 0, got -1.0"),
        (lambda p: RowSGD(p, nesterov=True), "RowSGD: expected `momentum` > 0 for nesterov, got 0"),
        (lambda p: RowAdamW(p, betas=(0.9, 1.0)), r"RowAdamW: expected `betas` in \[0, 1\), got"),
        (lambda p: RowAdamW(p, weight_decay=float("nan")), "RowAdamW: expected `weight_decay` >= 0, got nan"),
    ],
)
def test_bad_numbers_are_named(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make([nn.Parameter(torch.ones(1))])
