"""The plan: budgets kept, choices monotone, numbers that add up, errors that say what would do."""

import re
import types

import pytest
import torch

import normface_ext as nf
from normface_ext.engine.plan import DEFAULT_WORKSPACE

SHAPES = [
    (0, 8, 5),
    (1, 1, 1),
    (3, 7, 2),
    (64, 128, 10_575),
    (256, 512, 360_232),
    (1024, 512, 1_000_000),
    (4096, 128, 10_000_000),
]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
DEVICES = ["cpu", "cuda"]
TENSOR = ("tensor cores", "tensor cores")
BUDGETS = [1 << power for power in range(14, 44)]


def plans(shape, dtype, device):
    """(budget, plan) for every budget that is enough."""
    found = []
    for budget in BUDGETS:
        try:
            found.append((budget, nf.plan(*shape, dtype, device, workspace=budget)))
        except ValueError:
            assert not found, f"{budget} bytes are too few, but less was enough"
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_budgets_are_kept_and_more_never_hurts(shape, dtype, device):
    batch, dim, classes = shape
    found = plans(shape, dtype, device)
    assert found
    for budget, plan in found:
        assert 0 <= plan.workspace_bytes <= budget
        assert plan.store == (plan.algorithm == "stored")
        assert 1 <= plan.class_chunk <= classes
        # The chunks cover the classes, and none of them is empty.
        assert (plan.chunks - 1) * plan.class_chunk < classes <= plan.chunks * plan.class_chunk
        products = {"stored": 3, "recompute": 4, "single sweep": 4}[plan.algorithm]
        assert plan.flops == 2 * products * batch * dim * classes
    algorithms = [plan.algorithm for _, plan in found]
    assert algorithms == sorted(algorithms)  # recompute, then a single sweep, then stored
    for algorithm in set(algorithms):
        chunks = [plan.class_chunk for _, plan in found if plan.algorithm == algorithm]
        assert chunks == sorted(chunks)
    # Where there is room for everything, only a faster algorithm does not use it.
    assert found[-1][1].store or (dtype.itemsize == 2 and dim <= 64 and batch * classes > 1e7)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_counts_every_score(dtype, device):
    batch, dim, classes = 96, 128, 100_000
    scores = batch * classes * (dtype.itemsize if device == "cuda" else max(4, dtype.itemsize))
    stored = nf.plan(batch, dim, classes, dtype, device, workspace=1 << 40)
    assert stored.store and stored.workspace_bytes >= scores
    again = nf.plan(batch, dim, classes, dtype, device, workspace=stored.workspace_bytes)
    assert again == stored  # just enough is enough
    less = nf.plan(batch, dim, classes, dtype, device, workspace=stored.workspace_bytes - 1)
    assert less.algorithm == ("single sweep" if device == "cuda" and dtype.itemsize == 2 else "recompute")
    assert less.workspace_bytes < stored.workspace_bytes
    item = dtype.itemsize if device == "cuda" else max(4, dtype.itemsize)
    inputs_and_gradients = 2 * (batch * dim + classes * dim) * item
    for plan in (stored, less):
        assert plan.bytes_moved >= inputs_and_gradients
    assert stored.bytes_moved >= inputs_and_gradients + 2 * scores
    assert less.bytes_moved < stored.bytes_moved and less.flops > stored.flops


@pytest.mark.parametrize("device", DEVICES)
def test_the_least_budget_is_named_and_is_the_least(device):
    shape = 256, 512, 360_232
    with pytest.raises(ValueError, match=r"^plan: expected `workspace` of at least \d+ bytes") as raised:
        nf.plan(*shape, device=device, workspace=1000)
    message = str(raised.value)
    assert "N=256, D=512, C=360232" in message and message.endswith("got 1000")
    least = int(re.search(r"at least (\d+) bytes", message)[1])
    plan = nf.plan(*shape, device=device, workspace=least)
    assert plan.class_chunk == 1 and plan.workspace_bytes == least
    with pytest.raises(ValueError):
        nf.plan(*shape, device=device, workspace=least - 1)


@pytest.mark.parametrize(("workspace", "text"), [(0, r"of at least \d+ bytes"), (-1, ">= 0, got -1")])
def test_no_budget_at_all_is_an_error(workspace, text):
    with pytest.raises(ValueError, match=f"^plan: expected `workspace` {text}"):
        nf.plan(4, 4, 4, workspace=workspace)


def test_defaults_are_float32_on_the_cpu_within_the_default_budget():
    small = nf.plan(64, 128, 10_575)
    assert small == nf.plan(64, 128, 10_575, torch.float32, "cpu", workspace=DEFAULT_WORKSPACE["cpu"])
    assert small == nf.plan(64, 128, 10_575, torch.float32, torch.device("cpu"))
    assert small.store
    large = nf.plan(1024, 128, 1_000_000)
    assert not large.store and large.workspace_bytes <= DEFAULT_WORKSPACE["cpu"]


@pytest.mark.parametrize(
    ("shape", "name", "least"),
    [((-1, 4, 4), "batch", 0), ((4, 0, 4), "dim", 1), ((4, 4, 0), "classes", 1)],
)
def test_bad_sizes_are_named(shape, name, least):
    got = min(shape)
    with pytest.raises(ValueError, match=rf"^plan: expected `{name}` >= {least}, got {got}$"):
        nf.plan(*shape)


def test_a_plan_reads_as_a_sentence_and_cannot_be_changed():
    plan = nf.plan(64, 128, 1000, workspace=1 << 30)
    chosen, *others = str(plan).splitlines()
    assert re.fullmatch(
        rf"stored, {plan.scores}: {plan.chunks} chunk\(s\) of {plan.class_chunk} classes,"
        r" workspace [\d.]+ MiB, 0\.05 GFLOP, at least [\d.]+ MiB moved, predicted [\d.]+ ms",
        chosen,
    )
    assert len(others) == len(plan.losers) == 1
    assert re.fullmatch(r"  not recompute by blas: predicted [\d.]+ ms", others[0])
    with pytest.raises(AttributeError):
        plan.class_chunk = 1


# Kernels on CUDA ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dtype", "workspace", "expected"),
    [
        # E stays in the cache; the products are ours, and dW comes out of its product finished.
        ((256, 128, 10_572), torch.bfloat16, None, ("stored", *TENSOR, "sm80_weight_gradient")),
        # A large batch: what follows the product of dW weighs little, and cuBLAS is the faster.
        ((2048, 192, 10_572), torch.bfloat16, None, ("stored", "tensor cores", "cublas", "sm80_scores")),
        # E would be read and written for longer than the scores take a second time; or has no room.
        ((1024, 64, 1_000_000), torch.bfloat16, None, ("single sweep", *TENSOR, "sm80_single_sweep")),
        ((64, 64, 200_000), torch.float16, 60_000_000, ("single sweep", *TENSOR, "sm80_single_sweep")),
        ((1024, 128, 1_000_000), torch.float16, 1 << 30, ("single sweep", *TENSOR, "sm80_single_sweep")),
        # Longer rows: two products at once are slower than E's way to memory and back.
        ((1024, 128, 1_000_000), torch.bfloat16, None, ("stored", "tensor cores", "cublas", "sm80_scores")),
        # Rows that tensor cores do not take; and no GPU promises the shared memory for these.
        ((256, 129, 10_572), torch.bfloat16, None, ("stored", "cublas", "cublas", "cublas")),
        ((256, 1024, 10_572), torch.float16, None, ("stored", "cublas", "cublas", "cublas")),
        # Wide operands: our own products where a step is short, cuBLAS otherwise.
        ((256, 512, 10_572), torch.float32, None, ("stored", "cuda cores", "cuda cores", "simt")),
        ((256, 511, 10_572), torch.float32, None, ("stored", "cublas", "cublas", "cublas")),
        ((1024, 512, 100_000), torch.float32, None, ("stored", "cublas", "cublas", "cublas")),
    ],
)
def test_kernels_by_shape(shape, dtype, workspace, expected):
    plan = nf.plan(*shape, dtype, "cuda", workspace=workspace)
    assert (plan.algorithm, plan.scores, plan.weight_gradient, plan.product) == expected, plan


@pytest.mark.parametrize(
    ("dim", "dtype", "shared", "product"),
    [
        (512, torch.float32, 73_984, "simt"),
        (512, torch.float32, 73_983, "cublas"),
        (512, torch.float32, 65_536, "cublas"),  # compute capability 7.5
        (512, torch.float64, 65_536, "cublas"),
        (256, torch.float32, 65_536, "simt"),
        (256, torch.float64, 65_536, "simt"),
        (128, torch.float16, 65_536, "cublas"),
    ],
)
def test_no_kernel_asks_for_more_shared_memory_than_there_is(monkeypatch, dim, dtype, shared, product):
    card = types.SimpleNamespace(
        name="a card",
        multi_processor_count=40,
        major=7,
        minor=5,
        shared_memory_per_block_optin=shared,
        total_memory=16 << 30,
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert nf.plan(64, dim, 1000, dtype, "cuda").product == product


def test_a_single_sweep_holds_nothing_of_size_batch_times_classes():
    plan = nf.plan(1024, 64, 1_000_000, torch.bfloat16, "cuda")
    assert plan.workspace_bytes < 0.4 * 2 * 1024 * 1_000_000
    half = nf.plan(1024, 64, 1_000_000, torch.bfloat16, "cuda", workspace=plan.workspace_bytes // 2)
    assert half.algorithm == "single sweep" and half.chunks > 1
