"""Every .cu compiles for two generations without a spill, within its launch bounds; no GPU needed."""

import json
import os

import ptxas_report
import pytest
from emulation import build

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


def test_reports_are_read():
    fold, plain = ptxas_report.parse(REPORT, "sm_90", "a.cu")
    assert fold == ptxas_report.Kernel("sm_90", "a.cu", "nf::fold<float, 4>", 30, 256, stack=16, spill=20)
    assert plain == ptxas_report.Kernel("sm_90", "a.cu", "nf::plain", 8, 0, stack=0, spill=0)


FREE: dict = {"local_memory": {}}
REASONED = {"local_memory": {"nf::fold": {"stack": 16, "spill": 4, "reason": "why"}}}


def instance(name):
    """The budget of one instance, beside that of all."""
    limits = {name: {"stack": 32, "spill": 8, "reason": "why"}}
    return {"local_memory": REASONED["local_memory"] | limits}


@pytest.mark.parametrize(
    ("kernel", "budget", "expected"),
    [
        ({}, FREE, []),
        ({"registers": 255, "shared": 9000}, FREE, []),
        ({"spill": 4}, FREE, ["sm_90 a.cu nf::fold<float>: spill expected at most 0, got 4"]),
        ({"stack": 8}, FREE, ["sm_90 a.cu nf::fold<float>: stack expected at most 0, got 8"]),
        ({"stack": 16, "spill": 4}, REASONED, []),
        ({"spill": 5}, REASONED, ["sm_90 a.cu nf::fold<float>: spill expected at most 4, got 5"]),
        ({"spill": 8}, instance("nf::fold<float>"), []),
        ({"spill": 9}, instance("nf::fold<float>"), ["spill expected at most 8, got 9"]),
        ({}, instance("nf::gone"), ["nf::gone: in the budget, but no such kernel"]),
        ({}, instance("nf::fold<double>"), ["nf::fold<double>: in the budget, but no such kernel"]),
    ],
)
def test_the_budget_can_say_no(kernel, budget, expected):
    values = {"arch": "sm_90", "file": "a.cu", "name": "nf::fold<float>", "registers": 8}
    values |= {"shared": 0, "stack": 0, "spill": 0}
    said = ptxas_report.complaints([ptxas_report.Kernel(**values | kernel)], budget)
    assert len(said) == len(expected)
    assert all(sentence.endswith(end) for sentence, end in zip(said, expected, strict=True))


LISTING = """\
	.section	.text._ZN2nf12_GLOBAL__N_15scoreIfEEvPf,"ax",@progbits
.text._ZN2nf12_GLOBAL__N_15scoreIfEEvPf:
        /*0610*/                   HGMMA.64x256x16.F32 R24, gdesc[UR12], R24, UP0 ;
        /*1490*/                   UTMALDG.2D [UR4], [UR8] ;
	.section	.text._ZN2nf5plainEi,"ax",@progbits
        /*0000*/                   EXIT ;
"""


def test_machine_code_is_read():
    found = ptxas_report.instructions(LISTING)
    assert found == {"nf::score<float>": {"HGMMA", "UTMALDG"}, "nf::plain": set()}


@pytest.mark.parametrize(
    ("kernel", "ends"),
    [
        ({}, []),
        ({"registers": 200}, ["registers expected 168, got 200"]),
        ({"registers": 128}, ["registers expected 168, got 128"]),
        ({"instructions": {"HGMMA", "USETMAXREG"}}, ["expected UTMALDG in its machine code, got none"]),
        (
            {"name": "nf::other<float>"},
            [
                "expected it in the budget's sm_90a, and it is not",
                "nf::score: in the budget, but no such kernel",
            ],
        ),
    ],
)
def test_kernels_of_warpgroups_are_held_one_by_one(kernel, ends):
    wanted = {"registers": 168, "instructions": ["HGMMA", "UTMALDG", "USETMAXREG"]}
    budget = FREE | {"sm_90a": {"nf::score": wanted}}
    values = {"arch": "sm_90a", "file": "a.cu", "name": "nf::score<float>", "registers": 168}
    values |= {"shared": 0, "stack": 0, "spill": 0}
    values |= {"instructions": {"HGMMA", "UTMALDG", "SYNCS", "USETMAXREG"}}
    said = ptxas_report.complaints([ptxas_report.Kernel(**values | kernel)], budget)
    assert len(said) == len(ends)
    assert all(sentence.endswith(end) for sentence, end in zip(said, ends, strict=True))


def test_every_exception_has_a_reason():
    budget = json.loads(ptxas_report.BUDGET.read_text())
    for name, limits in budget["local_memory"].items():
        assert limits.keys() == {"stack", "spill", "reason"} and len(limits["reason"]) > 20, name


@pytest.mark.slow
@pytest.mark.skipif(build.nvcc() is None, reason="nvcc not found")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])  # the latter with sm_90a
def test_kernels_keep_within_the_budget(arch, capsys):
    status = ptxas_report.main(["--arch", arch, "--jobs", str(os.cpu_count())])
    assert status == 0, capsys.readouterr().out
