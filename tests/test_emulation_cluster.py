"""The emulation of clusters can say no: as tests/test_emulation.py, for emulation/faults_cluster.cu."""

from __future__ import annotations

import gpu_twins
import pytest
import torch
from emulation import build
from gpu_twins import ON_HOPPER, needs_nvcc

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=f"{build.unavailable()}")

COPY = "a bulk copy to the barrier"
OVERWRITTEN = f"{COPY} .* writes .*, which (thread .* no barrier between|{COPY} .* wrote, and this thread)"
#: fault: what it is told
FAULTS = {
    "no_sync_before": "of a barrier that thread .* makes, with no sync_block between|is no barrier",
    "no_sync_after": "which has exited",
    "freed_here_alone": OVERWRITTEN,
    "freed_there_alone": OVERWRITTEN,
    "freed_twice": f"{OVERWRITTEN}|more than 8 arrivals|the one before, could see that one",
    "too_few_bytes": "which expects -?[0-9]+ more|bytes are missing|nobody wrote|has not waited for that",
    "not_of_all": "deadlock: .* 1024 of 2048 bytes are missing",
}


@pytest.fixture(scope="module")
def faults():
    return build.load("faults_cluster")


@pytest.mark.parametrize("order", ["forward", "reverse", "1"])
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_told_from_its_twin(faults, monkeypatch, name, order):
    monkeypatch.setenv("NORMFACE_EMULATION_ORDER", order)
    x = torch.randn(70, 64)  # the last box goes beyond it
    right = getattr(faults, name)(x, 4, False)
    torch.testing.assert_close(right, x.sum(0).expand(4, 64), rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match=FAULTS[name]):
        getattr(faults, name)(x, 4, True)


def test_whole_clusters(faults):
    with pytest.raises(RuntimeError, match="blocks beyond whole clusters"):
        faults.no_sync_before(torch.randn(8, 64), 3, False)


@pytest.mark.slow
@needs_nvcc
def test_nvcc_compiles_the_same_source_to_the_instructions_meant():
    library, said = build.build_faults_with_nvcc("faults_cluster")
    ptx = library.read_bytes()
    for instruction in [
        b"mbarrier::complete_tx::bytes.multicast::cluster ",
        b"mapa.shared::cluster.u32 ",
        b"mbarrier.arrive.release.cluster.shared::cluster.b64 ",
        b"barrier.cluster.arrive.release;",
        b"barrier.cluster.wait.acquire;",
    ]:
        assert instruction in ptx, instruction
    assert "C75" not in said


@pytest.mark.slow
@needs_nvcc
@pytest.mark.skipif(not ON_HOPPER, reason="no GPU of compute capability 9.0")
def test_the_twin_is_right_on_a_gpu():
    gpu_twins.check_alone("faults_cluster", "test_emulation_cluster")


def check_on_gpu():
    gpu_twins.load("faults_cluster")
    sums = build.load("faults_cluster").no_sync_before
    x = torch.randn(70, 64)
    for blocks in (4, 264):
        out = sums(x.cuda(), blocks, False).cpu()
        torch.testing.assert_close(out, x.sum(0).expand(blocks, 64), rtol=1e-5, atol=1e-5)
