"""The emulation of Hopper can say no: as tests/test_emulation.py, for emulation/faults_hopper.cu."""

from __future__ import annotations

import math
import re

import gpu_twins
import pytest
import torch
from emulation import build
from gpu_twins import ON_HOPPER, needs_nvcc

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=f"{build.unavailable()}")

ORDERS = ["forward", "reverse", "1", "2"]

COPY = "a bulk copy to the barrier"
STORE = "a bulk store of thread"
WAIT = "and this thread has not waited for that"
EARLY = f"wgmma of .* reads .*, which ({COPY} .* {WAIT}|nobody wrote)"
FREED = f"{COPY} .* writes .*, which wgmma of threads .* read, {WAIT}"
TOUCHED = "is touched between wgmma and the wgmma_wait for it"
MISSED = "a phase of the barrier ends before thread .*, which waited for the one before, could see that one"
NOT_FENCED = "stored with no fence_shared_for_bulk before it met thread"

#: fault: what it is told
FAULTS = {
    "no_wait_for_loads": EARLY,
    "wrong_parity_of_consumers": f"{EARLY}|deadlock: .* of 1 arrivals|{MISSED}",
    "wrong_parity_of_producer": "deadlock: thread 0 waits? in barrier_wait .* 2 of 2 arrivals",
    "too_few_bytes": "load_box of 8192 bytes .*, which expects 8064 more in this phase",
    "too_many_bytes": "deadlock: .* where 0 of 1 arrivals and 128 of 24704 bytes are missing",
    "loaded_twice": f"{COPY} .* writes .* {WAIT}|more than 1 arrivals",
    "freed_before_wgmma_wait": FREED,
    "freed_one_too_early": FREED,
    "freed_by_one_of_many": f"{COPY} .* writes .*, which thread .* read with no barrier between",
    "factor_overwritten": f"writes .*, which (wgmma of threads .* read, {WAIT}|{COPY} .* wrote)",
    "read_before_wgmma_wait": f"register 0 of d {TOUCHED}",
    "written_before_wgmma_wait": f"register 31 of d {TOUCHED}",
    "no_wgmma_wait": f"{FREED}|register 0 of d {TOUCHED}",
    "no_wgmma_commit": f"{FREED}|register 0 of d {TOUCHED}",
    "no_wgmma_fence": "registers of d of thread (128|256), and no wgmma_fence of them",
    "no_wgmma_fence_of_a": "registers of a of thread (128|256), and no wgmma_fence of them",
    "strides_exchanged": "b .* rows of k, .* cannot have a leading offset of 1024 and a stride of 8192 bytes",
    "lies_otherwise": "b lies as columns of k, whose descriptor cannot have a leading offset of 8192",
    "begins_between": "b lies as columns of k and cannot begin 16 bytes after a multiple of 1024",
    "misplaced_box": "load_box at .* in shared memory, which is not a multiple of 1024",
    "lost_row": f"{STORE} .* reads byte 8064 of the shared array .*, which nobody wrote",
    "count_too_high": "deadlock: .* where 1 of 3 arrivals",
    "count_too_low": f"{FREED}|{MISSED}",
    "arrives_twice": f"{FREED}|{MISSED}|more than 2 arrivals",
    "no_fence_of_barriers": "a barrier that (thread 0|was) made with no fence_barriers after",
    "no_sync_of_barriers": "of a barrier that thread 0 makes, with no sync_block between|is no barrier",
    "gives_up_unheard": "exits after a barrier_wait with no barriers_held",
    "factor_not_fenced": f"wgmma of threads .* reads .*, which thread .* {NOT_FENCED}",
    "no_fence_for_bulk": f"{STORE} .* reads .*, which thread .* {NOT_FENCED}",
    "fence_after_meeting": f"{STORE} .* reads .*, which thread .* {NOT_FENCED}",
    "no_meeting_before_store": f"{STORE} .* reads .*, which (nobody wrote|thread .* no barrier between)",
    "buffer_reused": f"writes .*, which {STORE} .* read, {WAIT}",
    "no_commit_of_stores": "exits with a store_box that no commit_stores closed",
    "no_wait_for_stores": "exits with a store_box that no wait_stores waited for",
    "too_many_registers": "deadlock: .* in registers_up .* for 240 registers a thread, with 56 more",
    "registers_by_half": "registers_down .* waits for thread .*, which exited|deadlock: .* registers_down",
    "wrong_threads": "deadlock: .* for 128 more threads at barrier",
    "no_turn_given": "deadlock: .* for 128 more threads at barrier 3",
}
#: Only the numbers tell: bytes are written and read as the rules want, at the wrong places.
WRONG_NUMBERS = ["not_swizzled"]


def faults():
    return build.load("faults_hopper")


@pytest.fixture(params=ORDERS)
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("NORMFACE_EMULATION_ORDER", request.param)
    return request.param


def factors(
    m: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16, turned: tuple[bool, bool] = (False, False)
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, k, generator=generator).to(dtype) for size in (m, n))
    return a.T.contiguous() if turned[0] else a, b.T.contiguous() if turned[1] else b


def is_product(
    out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, turned: tuple[bool, bool] = (False, False)
) -> bool:
    """Whether out begins with a bᵀ, as exact as float32 sums are, and nothing was written beyond."""
    if a.dtype == torch.float32:  # what the tensor core reads of it
        a, b = ((x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (a, b))
    a, b = (x.double().T if t else x.double() for x, t in zip((a, b), turned, strict=True))
    n = len(b)
    bound = a.shape[1] * 2**-23 * (a.abs() @ b.abs().T) + 1e-30
    return bool(((out[:, :n].double() - a @ b.T).abs() <= bound).all() and out[:, n:].isnan().all())


@pytest.mark.covering(1)
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_reported_and_its_twin_is_right(name: str, order: str) -> None:
    turned = (False, name == "strides_exchanged")
    a, b = factors(128, 64, 256, turned=turned)
    with pytest.raises(RuntimeError, match=f"{name}: .*({FAULTS[name]})"):
        getattr(faults(), name)(a, b, True)
    check_twin(name, a, b, turned)


def check_twin(
    name: str, a: torch.Tensor, b: torch.Tensor, turned: tuple[bool, bool], device: str = "cpu"
) -> None:
    out = getattr(faults(), name)(a.to(device), b.to(device), False).cpu()
    if (
        name == "factor_not_fenced"
    ):  # which changes the signs of the first 256 of each 4096 values, as they lie
        a = a.clone()
        rows = a.view(2, 64, -1, 64)
        rows[:, :4] *= -1
    assert is_product(out, a, b, turned)


@pytest.mark.parametrize("name", WRONG_NUMBERS)
def test_a_comparison_tells(name: str) -> None:
    a, b = factors(128, 64, 256)
    assert not is_product(getattr(faults(), name)(a, b, True), a, b)
    assert is_product(getattr(faults(), name)(a, b, False), a, b)


def test_every_fault_has_its_test() -> None:
    source = (build.HERE / "faults_hopper.cu").read_text()
    listed = source[source.index("#define FOR_EACH_FAULT") : source.index("// clang-format on")]
    for name in (*FAULTS, *WRONG_NUMBERS):
        assert f"DO({name})" in listed
    assert listed.count(" DO(") == len(FAULTS) + len(WRONG_NUMBERS)


#: dtype, columns of a tile
TILES = [
    (torch.bfloat16, 64),
    (torch.bfloat16, 192),
    (torch.bfloat16, 256),
    (torch.float16, 128),
    (torch.float32, 64),
]


@pytest.mark.covering(2)
@pytest.mark.parametrize("in_registers", [False, True])
@pytest.mark.parametrize("turned", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize(("dtype", "columns"), TILES)
def test_products(dtype: torch.dtype, columns: int, turned: tuple[bool, bool], in_registers: bool) -> None:
    check_product(dtype, columns, turned, in_registers, "cpu")


def check_product(
    dtype: torch.dtype, columns: int, turned: tuple[bool, bool], in_registers: bool, device: str
) -> None:
    if (dtype == torch.float32 and any(turned)) or (in_registers and turned[0]):
        return  # no such instruction
    a, b = factors(136, columns + 8, 200, dtype, turned)
    out = faults().product(a.to(device), b.to(device), *turned, in_registers, columns)
    assert is_product(out.cpu(), a, b, turned)


def test_what_lies_beyond_a_matrix_is_zeros() -> None:
    """A kernel that must not count it has to leave it out by itself."""
    a, b = factors(128, 60, 64)
    out = faults().beyond(a, b)
    assert is_product(torch.where(torch.arange(out.shape[1]) < 60, out, math.nan), a, b)
    assert (out[:, 60:64] == 0).all()
    assert out[:, 64:].isnan().all()


@pytest.mark.parametrize("k", [250, 8 * 31 + 4])
def test_matrices_that_the_driver_refuses(k: int) -> None:
    with pytest.raises(RuntimeError, match=rf"product: no bulk copies of \[.*, {k}\] with stride {k}"):
        faults().product(*factors(128, 64, k), False, False, False, 64)


@pytest.mark.slow
@needs_nvcc
def test_nvcc_compiles_the_same_source_to_the_instructions_meant() -> None:
    library, said = build.build_faults_with_nvcc("faults_hopper")
    ptx = library.read_bytes()
    for instruction in [
        b"mbarrier.init.shared::cta.b64 ",
        b"mbarrier.arrive.expect_tx.shared::cta.b64 ",
        b"mbarrier.try_wait.parity.shared::cta.b64 ",
        b", %globaltimer_hi;",  # by which a wait gives up: a try may end sooner than it was told
        b"cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes ",
        b"cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group ",
        b"fence.proxy.async.shared::cta;",
        b"wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 ",
        b"wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 ",
        b"wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 ",
        b"wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 ",
        b"wgmma.mma_async.sync.aligned.m64n64k8.f32.tf32.tf32 ",
        b"setmaxnreg.dec.sync.aligned.u32 40;",
        b"setmaxnreg.inc.sync.aligned.u32 232;",
    ]:
        assert instruction in ptx, instruction
    # What the compiler mends by itself, at a price: only where a fault (number 0 is none) left something out.
    for function in re.findall(r"\(C75\d\d\).*function '(\w+)'", said):
        assert "ELi0EEEv" not in function, said


@pytest.mark.slow
@needs_nvcc
@pytest.mark.skipif(not ON_HOPPER, reason="no GPU of compute capability 9.0")
def test_the_twins_are_right_on_a_gpu() -> None:
    gpu_twins.check_alone("faults_hopper", "test_emulation_hopper")


def check_on_gpu() -> None:
    gpu_twins.load("faults_hopper")
    for name in FAULTS:
        turned = (False, name == "strides_exchanged")
        check_twin(name, *factors(128, 64, 256, turned=turned), turned, "cuda")
    for dtype, columns in TILES:
        for turned in ((False, False), (True, False), (False, True), (True, True)):
            for in_registers in (False, True):
                check_product(dtype, columns, turned, in_registers, "cuda")
