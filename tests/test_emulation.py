"""The emulation can say no: every fault in emulation/faults.cu is caught, and its correct twin is right."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Callable

import gpu_twins
import pytest
import torch
from emulation import build
from gpu_twins import needs_nvcc

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=f"{build.unavailable()}")

ORDERS = ["forward", "reverse", "1", "2"]
BLOCK = 64


def by_block(
    change: Callable[[torch.Tensor], torch.Tensor], block: int = BLOCK
) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: change(x.view(-1, block)).flatten()


def same(x: torch.Tensor) -> torch.Tensor:
    return x


def swapped(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, 2).flip(1).flatten()


def lower_half(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    return by_block(lambda warps: torch.cat([change(warps[:, :16]), warps[:, 16:]], 1), 32)


reverse = by_block(lambda blocks: blocks.flip(1))
shift = by_block(lambda blocks: torch.nn.functional.pad(blocks, (1, -1)))


def block_sums(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([part.sum().expand(len(part)) for part in x.split(BLOCK)])


#: fault: elements of x, what the correct twin computes, what the faulty one is told
FAULTS: dict[str, tuple[int, Callable[[torch.Tensor], torch.Tensor], str]] = {
    "missing_barrier": (128, reverse, "which (nobody wrote|thread .* with no barrier between)"),
    "missing_warp_barrier": (
        128,
        by_block(lambda warps: warps.flip(1), 32),
        "which (nobody|thread .* no barrier)",
    ),
    "barrier_of_half_a_warp": (
        128,
        by_block(lambda halves: halves.flip(1), 16),
        "which (nobody|thread .* no barrier)",
    ),
    "plain_increment": (
        128,
        lambda x: torch.full_like(x, BLOCK),
        "thread .* (wrote|read) with no barrier between",
    ),
    "missing_second_barrier": (
        128,
        lambda x: 3 * reverse(x),
        "thread .* (wrote|read) with no barrier between",
    ),
    "tail_in_shared": (128, shift, "writes 4 bytes of shared memory that are not all in one array"),
    "uninitialised_shared": (
        100,
        block_sums,
        "block .1, 0., .* byte 144 of the shared array .* which nobody wrote",
    ),
    "wrong_mask": (
        128,
        lower_half(lambda half: swapped(half).view(-1, 16)),
        "deadlock: .* exited|, which exited",
    ),
    "different_masks": (128, swapped, "shuffle_xor .* with mask .*, while thread .* waits .* with mask"),
    "source_outside_mask": (128, lower_half(lambda half: half.flip(1)), "which mask 0000ffff leaves out"),
    "exited_lane": (128, swapped, "waits for thread 40, which exited|deadlock: .*thread 40 exited"),
    "index_overflow": (128, same, "integer overflow at .*faults.cu"),
    "divergent_barrier": (
        128,
        same,
        "sync_block at faults.cu:.*, while thread .* waits in the one at faults.cu",
    ),
    "early_exit": (100, same, "deadlock: threads 0-35 wait in sync_block .*; threads 36-63 exited"),
    "missing_copy_wait": (128, reverse, "which an asynchronous copy that nobody waited for is still writing"),
    "missing_copy_barrier": (128, reverse, "which (nobody|thread .* no barrier|an asynchronous copy)"),
    "wrong_copy_group": (128, same, "which an asynchronous copy that nobody waited for is still writing"),
    "misaligned_vector": (768, same, "load_vector of 16 bytes at 0x.*, which is not a multiple of 16"),
    "take_too_much": (128, same, "takes 260 bytes of shared memory after 0, but the launch gave 256"),
    "take_differently": (128, same, "takes .* as shared array 0, but another thread took"),
    "broken_promise": (128, same, "block .1, 0., thread 63: expected less than 128, got 128"),
    "neighbour_in_global": (
        128,
        same,
        "global memory at .*, which (thread .* no barrier|another block of the launch)",
    ),
    "blocks_in_one_place": (
        128,
        lambda x: x.new_full((1,), len(x) // BLOCK, dtype=torch.int32),
        "writes global memory at .*, which another block of the launch wrote",
    ),
    "missing_arrival": (
        192,
        lambda x: 2 * x,
        "global memory at .*, which (another block of the launch|thread .* no barrier)",
    ),
    "late_write": (192, same, "s global memory after it came to last_to_arrive, and not as the last"),
    "too_much_shared": (128, same, r"bytes of shared memory in \[0, 232448\], got 232449"),
    "too_large_grid": (128, same, r"blocks along y in \[0, 65535\], got 65536"),
    "too_many_threads": (128, same, r"threads per block in \[1, 1024\], got 1056"),
}


def faults():
    return build.load("faults")


@pytest.fixture(params=ORDERS)
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("NORMFACE_EMULATION_ORDER", request.param)
    return request.param


def counting(n: int, device: str = "cpu") -> torch.Tensor:
    return torch.arange(1.0, n + 1, device=device)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_reported_and_its_twin_is_right(name: str, order: str) -> None:
    n, meaning, message = FAULTS[name]
    x = counting(n)
    with pytest.raises(RuntimeError, match=f"{name}: .*{message}"):
        getattr(faults(), name)(x, True)
    # Afterwards, so that it also proves that nothing is left of the fault.
    torch.testing.assert_close(getattr(faults(), name)(x, False), meaning(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", FAULTS)
def test_what_a_twin_computes_lies_where_its_input_does(name: str) -> None:
    """On a GPU it is compared with what the GPU returned. (Here no GPU, but a device that is not the CPU.)"""
    n, meaning, _ = FAULTS[name]
    assert meaning(counting(n, "meta")).is_meta


def test_the_order_of_threads_can_be_turned_round(monkeypatch: pytest.MonkeyPatch) -> None:
    def arrivals(order: str) -> list[int]:
        monkeypatch.setenv("NORMFACE_EMULATION_ORDER", order)
        return faults().arrivals(counting(128)).tolist()

    assert arrivals("forward") == list(range(128))
    assert arrivals("reverse") == list(range(127, -1, -1))
    assert sorted(arrivals("1")) == list(range(128))
    assert arrivals("1") == arrivals("1") != arrivals("2")


def test_nothing_is_launched_for_nothing() -> None:
    assert faults().missing_barrier(torch.empty(0), True).numel() == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "n", "message"),
    [
        ("tail_in_global", 100, "heap-buffer-overflow(.|\n)*tail_in_global: block .1, 0., thread 36"),
        ("tail_in_shared", 128, "use-after-poison(.|\n)*tail_in_shared: block .0, 0., thread 63"),
        ("index_overflow", 128, r"faults.cu:\d+.*signed integer overflow"),
    ],
)
def test_the_sanitizers_watch_the_kernels(name: str, n: int, message: str) -> None:
    build.build("faults", sanitize=True)
    code = f"""
import torch
from emulation import build
from gpu_twins import needs_nvcc
op = build.load("faults").{name}
op(torch.ones({n}), False)
print("the twin passed", flush=True)
op(torch.ones({n}), True)
"""
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=build.HERE.parent,
        env=build.sanitizer_environment(),
    )
    assert "the twin passed" in ran.stdout, ran.stderr
    assert ran.returncode != 0
    assert re.search(message, ran.stderr), ran.stderr


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tensor_cores_multiply_matrices(dtype: torch.dtype, order: str) -> None:
    check_tensor_cores(dtype, "cpu")


def check_tensor_cores(dtype: torch.dtype, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(16, 16, generator=generator).to(dtype)
    b = torch.randn(16, 8, generator=generator).to(dtype)
    truth = a.double() @ b.double()
    d = faults().matrix_product(a.to(device), b.to(device), dtype == torch.float16)
    # Products of 16-bit values are exact in float32; 16 additions of float32 are not.
    bound = 16 * 2**-24 * (a.double().abs() @ b.double().abs())
    assert ((d.cpu().double() - truth).abs() <= bound).all()


def test_powers_of_two() -> None:
    check_powers("cpu")


def check_powers(device: str) -> None:
    x = torch.tensor(
        [0.0, 1.0, -1.0, 0.3, 127.9, -125.9, -126.5, -1000.0, 128.0, math.inf, -math.inf, math.nan]
    )
    y = faults().powers(x.to(device)).cpu()
    truth = torch.exp2(x.double())
    truth = torch.where((truth < torch.finfo(torch.float32).tiny), 0.0, truth)
    truth = torch.where(x >= 128, math.inf, truth)
    torch.testing.assert_close(y.double(), truth, rtol=2**-22, atol=0, equal_nan=True)


def test_exchanges(order: str) -> None:
    check_exchanges("cpu")


def check_exchanges(device: str) -> None:
    lane = torch.arange(32)
    *results, by_one, by_two, by_three = faults().exchanges(torch.zeros(1, device=device)).cpu()
    expected = [
        torch.full((32,), 7),
        lane ^ 16,
        torch.where(lane + 3 < 32, lane + 3, lane),
        torch.full((32,), 31),
        lane ^ 1,
        torch.where(lane == 0, 31, lane),
        1 << (31 - lane),
        torch.ones(32, dtype=torch.int64),
        torch.zeros(32, dtype=torch.int64),
        torch.full((32,), 0x55555555),
        31 - lane,
        lane,
        torch.full((32,), 0 + 10 * 1 + 100 * 0 + 1000 * 1),
    ]
    for result, expectation in zip(results, expected, strict=True):
        assert result.tolist() == expectation.tolist()
    # What an atomic returns depends on who comes when; that each came once does not.
    for by, counts in ((1, by_one), (2, by_two), (3, by_three)):
        assert counts.sort().values.tolist() == (by * lane).tolist()


# Against the real headers


@pytest.mark.slow
@needs_nvcc
def test_nvcc_compiles_the_same_source_to_the_instructions_meant() -> None:
    ptx = build.build_faults_with_nvcc()[0].read_bytes()
    for instruction in [
        b"ld.global.v4.",
        b"st.global.v4.",
        b"st.global.cs.v4.",
        b"st.shared.v4.",
        b"st.global.wb.v4.",
        b"ex2.approx.ftz.f32 ",
        b"cp.async.cg.shared.global ",
        b"cp.async.wait_group ",
        b"ldmatrix.sync.aligned.m8n8.x4.shared.b16 ",
        b"ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 ",
        b"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 ",
        b"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 ",
    ]:
        assert instruction in ptx, instruction


def test_faults_use_every_name_of_the_real_headers() -> None:
    """What that source does not use may differ between the two sets of headers unnoticed."""
    sources = [path.read_text() for path in (*(build.CSRC / "cuda").rglob("*.*"), *build.HERE.glob("*.cu"))]
    replaced = {name for text in sources for name in re.findall(r"#include <device/(\w+\.cuh)>", text)}
    assert replaced == {path.name for path in (build.HERE / "device").glob("*.cuh")}
    real = [build.CSRC / "cuda" / "device" / name for name in sorted(replaced)]
    text = "".join(path.read_text() for path in real)
    gone = set(re.findall(r"#undef (NF_\w+)", text))
    text = re.sub(r"namespace detail \{.*?// namespace detail", "", text, flags=re.DOTALL)
    macros = set(re.findall(r"#define (NF_\w+)\(", text)) - gone
    names = [*re.findall(r"NF_DEVICE [^;{}()]*?(\w+)\(", text), *macros]
    assert len(names) > 25
    used = "".join(
        (build.HERE / name).read_text() for name in ("faults.cu", "faults_hopper.cu", "faults_cluster.cu")
    )
    assert [name for name in names if not re.search(rf"\b{name}\b", used)] == []


@pytest.mark.slow
@needs_nvcc
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_twins_are_right_on_a_gpu() -> None:
    gpu_twins.check_alone("faults", "test_emulation")


def check_on_gpu() -> None:
    gpu_twins.load("faults")
    for name, (n, meaning, _) in FAULTS.items():
        x = counting(n, "cuda")
        torch.testing.assert_close(getattr(faults(), name)(x, False), meaning(x), rtol=0, atol=0)
    for dtype in (torch.float16, torch.bfloat16):
        check_tensor_cores(dtype, "cuda")
    check_exchanges("cuda")
    check_powers("cuda")
