"""The benchmark's adapters to other packages, against stand-ins that have the packages' own signatures.

None of the packages runs without a GPU. The signatures are those of liger-kernel 0.8.5, cut-cross-entropy
25.1.1 and quack-kernels 0.6.5.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import types
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bench_folder import modules
from torch import Tensor

CALLS: list[dict[str, Any]] = []


def losses(x: Tensor, w: Tensor, y: Tensor, temperature: float = 1.0) -> Tensor:
    """What each of the packages computes, after noting what it was given."""
    CALLS.append({"x": x, "w": w, "y": y, "temperature": temperature})
    assert x.dtype == w.dtype, "the packages refuse mixed operands"
    return F.cross_entropy(x.float() @ w.float().t() / temperature, y, reduction="none")


class LigerFusedLinearScaledCrossEntropyFunction:
    @staticmethod
    def apply(
        _input,
        weight,
        target,
        temperature=1.0,
        ignore_index=-100,
        m_tiles_per_cluster=1,
        return_entropy=False,
        selected_token_ids=None,
    ):
        if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
            raise TypeError("temperature must be a real number")
        return losses(_input, weight, target, temperature)


def liger_fused_linear_cross_entropy(
    input,
    weight,
    target,
    bias=None,
    ce_weight=None,
    ignore_index=-100,
    lse_square_scale=0.0,
    label_smoothing=0.0,
    reduction="mean",
    softcap=None,
    return_z_loss=False,
    accum_dtype=None,
    use_token_scaling=False,
    return_token_accuracy=False,
    return_predicted_tokens=False,
    chunk_mem_const=1,
):
    assert type(chunk_mem_const) is int and chunk_mem_const >= 1 and reduction == "mean"
    loss = losses(input, weight, target).mean()
    CALLS[-1]["chunk_mem_const"] = chunk_mem_const
    return loss


def linear_cross_entropy(
    e,
    c,
    targets,
    ignore_index=-100,
    softcap=None,
    reduction="mean",
    shift=False,
    filter_eps="high",
    impl="cce",
):
    loss = losses(e, c, targets).mean()
    CALLS[-1]["filter_eps"] = filter_eps
    return loss


def chunked_linear_cross_entropy(
    x, weight, target, chunk_size=4096, ignore_index=-100, reduction="mean", tuned=True, use_scaled_exp=None
):
    assert x.shape[0] % 8 == 0 and weight.shape[0] % 8 == 0
    return losses(x, weight, target).mean()


STAND_INS = {
    "liger_kernel.ops": LigerFusedLinearScaledCrossEntropyFunction,
    "liger_kernel.transformers.functional": liger_fused_linear_cross_entropy,
    "cut_cross_entropy": linear_cross_entropy,
    "quack.linear_cross_entropy": chunked_linear_cross_entropy,
}
PEERS = ["torch.lin_ce", "liger-scaled", "liger-triton", "cce", "cce-exact", "quack"]


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    with modules() as found:
        yield found


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    CALLS.clear()
    for name, thing in STAND_INS.items():
        parts = name.split(".")
        for count in range(1, len(parts) + 1):
            path = ".".join(parts[:count])
            if path not in sys.modules:
                monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
        monkeypatch.setattr(sys.modules[name], thing.__name__, thing, raising=False)


def gradients(bench: SimpleNamespace, build: Any, case: Any, scale: Any) -> tuple[Tensor, ...]:
    inputs = bench.cases.make_inputs(case, "cpu")
    loss = bench.competitors.step(build(case, "fwd+bwd", "cpu"), inputs, scale, case, "fwd+bwd")
    found = (loss, inputs.x.grad, inputs.weight.grad)
    return (*found, scale.grad) if isinstance(scale, Tensor) else found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "amp-bfloat16", "mixed-bfloat16"])
@pytest.mark.parametrize(
    ("name", "learned"),
    [(name, False) for name in PEERS] + [(name, True) for name in PEERS if name != "liger-scaled"],
)
def test_a_peer_computes_the_head(
    bench: SimpleNamespace, stand_ins: None, name: str, dtype: str, learned: bool
) -> None:
    """Loss and gradients of raw features, raw weights and the scale, those of the float64 specification."""
    provider = bench.peers.PROVIDERS[name]
    assert provider.learns_scale == (name != "liger-scaled")
    case = bench.cases.head(8, 16, 24, dtype)
    scale = torch.tensor(8.0, requires_grad=True) if learned else 8.0
    found = gradients(bench, provider.build, case, scale)
    inputs = bench.cases.make_inputs(case, "cpu")
    right = bench.truth.truth(case, inputs, 8.0)
    tolerance = 1e-5 if dtype == "float32" else 0.03
    for value, quantity in zip(found, bench.truth.QUANTITIES, strict=False):
        error, _ = bench.truth.relative_errors(value, right[quantity])
        assert error < tolerance, f"{quantity}: {error}"
    if name != "torch.lin_ce":
        (call,) = CALLS
        operand = torch.float32 if dtype == "float32" else torch.bfloat16
        assert call["x"].dtype == call["w"].dtype == operand
        torch.testing.assert_close(call["w"].float().norm(dim=1), torch.ones(24), rtol=0.01, atol=0)


def test_what_the_peers_are_told(bench: SimpleNamespace, stand_ins: None) -> None:
    told = {}
    for name in PEERS[1:]:
        case = bench.cases.head(8, 16, 24, "bfloat16")
        gradients(bench, bench.peers.PROVIDERS[name].build, case, 8.0)
        told[name] = CALLS.pop()
    assert told["liger-scaled"]["temperature"] == 1 / 8 and told["cce"]["temperature"] == 1.0
    unit = told["liger-scaled"]["x"].float().norm(dim=1)
    torch.testing.assert_close(unit, torch.ones(8), rtol=0.01, atol=0)
    assert told["cce"]["filter_eps"] == "high" and told["cce-exact"]["filter_eps"] is None
    assert told["liger-triton"]["chunk_mem_const"] == 2


@pytest.mark.parametrize(
    ("batch", "dim", "classes", "rows"),
    [
        (256, 512, 10_752, 256),
        (1024, 512, 1_000_192, 1024),
        (1024, 128, 1_000_192, 1024),
        (8192, 128, 1_000_192, 2048),
        (64, 512, 100, 64),
    ],
)
def test_liger_has_a_sensible_chunk(
    bench: SimpleNamespace, batch: int, dim: int, classes: int, rows: int
) -> None:
    """By Liger's own arithmetic, and never more than 4 GiB of logits; its default would be one row here."""

    def chunk(budget: int) -> int:
        increase = -(-classes // (budget * dim))
        return min(batch, 1 << (-(-batch // increase) - 1).bit_length())

    found = chunk(bench.peers.liger_budget(bench.cases.head(batch, dim, classes, "bfloat16")))
    assert found == rows and 2 * found * classes <= 4 << 30
    if classes > 1_000_000 and batch <= 1024:
        assert chunk(1) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torch.lin_ce", "liger-scaled", "cce"])
def test_the_norm_is_compiled(
    bench: SimpleNamespace, stand_ins: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """One graph, without breaks, and the same numbers."""
    graphs = []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend, fullgraph=True))
    torch._dynamo.reset()
    case = bench.cases.head(8, 16, 24, "amp-bfloat16")
    eager = gradients(bench, bench.peers.PROVIDERS[name].build, case, bench.cases.SCALE)
    build = bench.peers.PROVIDERS[f"{name}+compiled-norm"].build
    compiled = gradients(bench, build, case, bench.cases.SCALE)
    assert len(graphs) == 1
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    torch._dynamo.reset()


def obstacles(bench: SimpleNamespace, case: Any) -> dict[str, str]:
    return {name: provider.obstacle(case) for name, provider in bench.peers.taking_part(case).items()}


def test_who_cannot_take_part_says_why(
    bench: SimpleNamespace, stand_ins: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = bench.cases
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu_only = {n for n, reason in obstacles(bench, cases.head(8, 16, 24)).items() if reason == "needs CUDA"}
    assert gpu_only == {n for n in bench.peers.PROVIDERS if n.startswith(("liger", "cce", "quack"))}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    installed: set[str] = set()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in installed else None)
    found = obstacles(bench, cases.head(8, 16, 24, "bfloat16"))
    assert found["quack"] == "not installed: pip install quack-kernels==0.6.5"
    assert found["cce-exact+compiled-norm"] == "not installed: pip install cut-cross-entropy==25.1.1"

    installed |= {"liger_kernel", "cut_cross_entropy", "quack"}
    found = obstacles(bench, cases.head(8, 16, 24, "bfloat16"))
    assert "nvidia-cutlass-dsl" in found["liger-scaled"] and not found["liger-triton"]
    installed.add("cutlass")
    assert not any(obstacles(bench, cases.head(8, 16, 24, "mixed-bfloat16")).values())
    found = obstacles(bench, cases.head(8, 16, 24))
    assert found["cce"] == found["quack"] == found["liger-scaled"] == "needs 16-bit operands"
    assert "divisible by 8" in obstacles(bench, cases.head(8, 16, 10_572, "bfloat16"))["quack"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert "9.0" in obstacles(bench, cases.head(8, 16, 24, "bfloat16"))["liger-scaled"]


def test_only_plain_heads_have_peers(bench: SimpleNamespace) -> None:
    """They know no margin, and none of the other operations."""
    three = {"normface_ext", "eager", "compile"}
    for case in (bench.cases.head(8, 16, 24, margin="arcface"), bench.cases.normalize(2, 3)):
        assert set(bench.peers.taking_part(case)) == three
    assert len(bench.peers.taking_part(bench.cases.head(8, 16, 24))) == len(three) + 2 * len(PEERS)


def test_quack_says_which_path_it_takes(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    remark = bench.peers.PROVIDERS["quack"].remark
    assert remark(bench.cases.head(256, 512, bench.cases.CASIA_128, "bfloat16")) == "its fast path"
    assert remark(bench.cases.head(1024, 128, bench.cases.MILLION_128, "mixed-bfloat16")) == "its fast path"
    assert "C % 128" in remark(bench.cases.head(256, 512, 10_576, "bfloat16"))


def test_a_gpu_meets_every_peer_on_its_fast_path(bench: SimpleNamespace) -> None:
    cases = bench.cases.choose("cuda", False, False)
    divisible = {(c.batch, c.dim, c.classes) for c in cases if c.batch % 128 == 0 and c.classes % 128 == 0}
    assert divisible >= {(256, 512, 10_752), (1024, 512, 1_000_192), (1024, 128, 1_000_192)}
