"""scripts/hopper.py without a GPU: it runs every new product's cases, and reads a profile rightly."""

from types import SimpleNamespace

import hopper
import pytest
import torch
from emulation import build
from kernel_cases.softmax import is_here

H100 = "NVIDIA H100 80GB HBM3"
SHAPE = hopper.Shape(1024, 512, 1_000_000)


def test_every_new_product_has_a_choice_and_is_never_chosen_by_itself():
    new = {product.name for product in hopper.native.PRODUCTS if product.name.startswith(hopper.NEW)}
    new = {name for name in new if is_here(name)}
    assert new == {product for product, _ in hopper.new_choices().values()} and new
    assert all(product.results is None for product in hopper.native.PRODUCTS if product.name in new)


@pytest.mark.slow
@pytest.mark.skipif(build.unavailable() is not None, reason=f"{build.unavailable()}")
def test_right_or_wrong_on_the_emulated_device(capsys):
    assert hopper.main(["--device", "emulated"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"hopper: {len(hopper.new_choices())} choices, all right"
    assert all(": right of " in line for line in said[:-1])


def test_a_wrong_one_is_said(monkeypatch, capsys):
    monkeypatch.setattr(hopper.every_kernel, "run", lambda device, dtypes, select: (7, 1))
    assert not hopper.right_or_wrong("cpu") and "WRONG in 1 of 7 cases" in capsys.readouterr().out
    monkeypatch.setattr(hopper.every_kernel, "run", lambda device, dtypes, select: (0, 0))
    assert not hopper.right_or_wrong("cpu")


def test_a_kernel_beside_its_floor():
    # 1.024e9 cells: 1.05e12 operations at 766 TFLOP/s take 1.369 ms.
    score = hopper.row(H100, SHAPE, "sm90_scores", "nf::sm90_score_kernel<nf::X>", 1.5)
    assert score.tflops == pytest.approx(699.1, abs=0.1) and score.of_floor == pytest.approx(0.9126, abs=1e-3)
    # 6.144e9 bytes at 3.0 TB/s take 2.048 ms.
    classes = hopper.row("NVIDIA H100 80GB HBM3", SHAPE, "auto", "nf::class_gradients_kernel<float>", 3.08)
    assert classes.gbytes == pytest.approx(1994.8, abs=0.1) and classes.of_floor == pytest.approx(
        0.665, abs=1e-3
    )
    # 256 x 512 x 85,742: 2.247e10 operations, as three products of tf32 at 383 TFLOP/s 0.176 ms.
    wide = hopper.Shape(256, 512, 85_742, torch.float32)
    plain = hopper.row(H100, wide, "sm80_tf32x3", "nf::tf32_score_kernel<nf::X>", 0.352)
    assert plain.tflops == pytest.approx(63.85, abs=0.1) and plain.of_floor == pytest.approx(0.5, abs=1e-3)
    # 307.2e6 bytes at 3.0 TB/s take 102.4 us.
    rows = hopper.ROWS[1]
    backward = hopper.row(H100, rows, "auto", "nf::normalize_rows_backward_kernel<c10::BFloat16>", 0.128)
    assert backward.of_floor == pytest.approx(0.8, abs=1e-3) and "100000 x 512, rows, bfloat16" in str(
        backward
    )
    other = hopper.row("NVIDIA H100 80GB HBM3", SHAPE, "auto", "nvjet_hsh_128x256", 1.7)
    assert other.of_floor is None and "of the floor" not in str(other)


def test_a_profile_is_read():
    def event(key, device, microseconds):
        return SimpleNamespace(key=key, device_type=device, self_device_time_total=microseconds)

    cuda, cpu = torch.profiler.DeviceType.CUDA, torch.profiler.DeviceType.CPU
    events = [
        event("void nf::(anonymous namespace)::f<float>(nf::Task)", cuda, 3000.0),
        event("void nf::(anonymous namespace)::f<float>(nf::Task)", cuda, 3000.0),
        event("aten::mm", cpu, 500.0),
    ]
    assert hopper.kernel_times(events, 3) == {"nf::f<float>(nf::Task)": pytest.approx(2.0)}
