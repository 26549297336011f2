"""Every .cu compiles for two generations without a spill, within the recorded registers; no GPU needed."""

import os
import shutil

import ptxas_report
import pytest

HAS_NVCC = shutil.which("nvcc") or os.access("/usr/local/cuda/bin/nvcc", os.X_OK)

# As printed by nvcc 13.0, demangled.
REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'void nf::(anonymous namespace)::fold<float, 4>(float*)' for 'sm_90'
ptxas info    : Function properties for void nf::(anonymous namespace)::fold<float, 4>(float*)
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 30 registers, used 1 barriers, 16 bytes cumulative stack size, 256 bytes smem
ptxas info    : Compile time = 2.0 ms
ptxas info    : Compiling entry function 'nf::plain(int)' for 'sm_90'
ptxas info    : Function properties for nf::plain(int)
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
"""


def line(**costs):
    return {"sm_90": {"a.cu": {"nf::plain": {"registers": 8, "shared": 0} | costs}}}


def test_reports_are_read():
    fold, plain = ptxas_report.parse(REPORT, "sm_90", "a.cu")
    assert fold == ptxas_report.Kernel("sm_90", "a.cu", "nf::fold<float, 4>", 30, 256, stack=16, spill=20)
    assert plain == ptxas_report.Kernel("sm_90", "a.cu", "nf::plain", 8, 0, stack=0, spill=0)


@pytest.mark.parametrize(
    ("kernel", "budget", "expected"),
    [
        ({}, line(), []),
        ({"registers": 7}, line(), []),
        ({"registers": 9}, line(), ["sm_90 a.cu nf::plain: registers expected at most 8, got 9"]),
        ({"spill": 4}, line(), ["sm_90 a.cu nf::plain: spill expected at most 0, got 4"]),
        ({"spill": 4}, line(spill=4, reason="why"), []),
        ({}, {}, ["sm_90 a.cu nf::plain: not in the budget"]),
        (
            {"name": "nf::new"},
            line(),
            ["not in the budget", "sm_90 a.cu nf::plain: gone, but in the budget"],
        ),
    ],
)
def test_the_budget_can_say_no(kernel, budget, expected):
    values = {
        "arch": "sm_90",
        "file": "a.cu",
        "name": "nf::plain",
        "registers": 8,
        "shared": 0,
        "stack": 0,
        "spill": 0,
    }
    said = ptxas_report.complaints([ptxas_report.Kernel(**values | kernel)], budget, same_nvcc=True)
    assert len(said) == len(expected)
    assert all(sentence.endswith(end) for sentence, end in zip(said, expected, strict=True))


def test_update_records_a_fault_only_with_a_reason():
    spilling = ptxas_report.Kernel("sm_90", "a.cu", "nf::plain", 8, 0, stack=0, spill=4)
    assert ptxas_report.updated([spilling], line()) == line()
    reasoned = line(reason="why", stack=0, spill=0)
    assert ptxas_report.updated([spilling], reasoned) == line(stack=0, spill=4, reason="why")


@pytest.mark.skipif(not HAS_NVCC, reason="nvcc not found")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_kernels_keep_within_the_budget(arch, capsys):
    status = ptxas_report.main(["--arch", arch, "--jobs", str(os.cpu_count())])
    assert status == 0, capsys.readouterr().out
