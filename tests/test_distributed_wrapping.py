"""Class-parallel heads beside and inside what data-parallel training wraps models in: as in one process."""

from __future__ import annotations

import pytest
import torch
import wrapping_jobs as jobs
from ranks import ranks


def close(found, expected):
    (losses, values), (whole_losses, whole) = found, expected
    torch.testing.assert_close(losses, whole_losses, rtol=1e-4, atol=1e-5)
    assert values.keys() == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(
            values[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("kind", jobs.HEADS)
@pytest.mark.parametrize("how", ["ddp", "fsdp2", "ddp beside", "fsdp2 beside"])
@pytest.mark.covering(1)
def test_a_model_with_a_head_trains_as_in_one_process(kind, how):
    for found, expected in ranks(2).run(jobs.wrapped, kind, how):
        close(found, expected)


@pytest.mark.parametrize("kind", jobs.HEADS)
def test_a_head_in_ddp_trains_or_says_what_to_do(kind):
    for answer in ranks(2).run(jobs.head_in_ddp, kind):
        if kind in ("learned", "sphereface2"):
            close(*answer)
        else:
            assert (
                "Sharded" in answer
                and "expected no DistributedDataParallel around a class-parallel" in answer
            )


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("kind", jobs.HEADS)
@pytest.mark.covering(1)
def test_running_averages_are_those_of_one_process(kind, whole):
    (found, expected, keys), *_ = ranks(2).run(jobs.averaged, kind, whole)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5)
    assert set(expected[0]) <= set(keys)


def test_which_weights_wrappers_leave_alone():
    for before, held, alone, same, ignored, said in ranks(2).run(jobs.names):
        assert not before and held == ["heads.0.weight", "heads.3.weight"] and alone == ["weight"] and same
        assert ignored == ["body.bias", *held]
        assert (
            all("expected `model` to be a Module, got list" in sentence for sentence in said)
            and len(said) == 2
        )
