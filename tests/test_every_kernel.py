"""scripts/every_kernel.py leaves nothing out and can say no."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator

import every_kernel
import pytest
import torch
from emulation import build
from kernel_cases import TABLES, Case
from lanes import LANES
from torch.utils._python_dispatch import TorchDispatchMode

from normface_ext import functional

FLOATS = [torch.float32, torch.bfloat16]


class Recorder(TorchDispatchMode):
    """The ops of ours that are really dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


def all_cases(dtypes: list[torch.dtype]) -> Iterator[Case]:
    return (case for dtype in dtypes for table in TABLES.values() for case in table(dtype))


def test_every_registered_op_is_dispatched() -> None:
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("normface_ext::")}
    with Recorder() as recorder:
        for case in all_cases([torch.float32]):
            case.ours(*case.inputs)
    ran = {name for name in recorder.names if name.startswith("normface_ext::")}
    assert len(registered) >= 16 and registered - ran == set(), "missing in scripts/kernel_cases"


@pytest.mark.slow
@pytest.mark.skipif(build.unavailable() is not None, reason=f"{build.unavailable()}")
def test_every_kernel_is_launched() -> None:
    """By the names that the sources launch them under."""
    sources = [path.read_text() for path in sorted((build.CSRC / "cuda").rglob("*.cu*"))]
    calls = [first for text in sources for first in re.findall(r"\blaunch\(\s*([^,]*),", text)]
    names = {name for first in calls for name in re.findall(r'"(\w+)"', first)}
    library = ctypes.CDLL(str(build.build("emulation")))
    library.nf_emulation_launched.restype = ctypes.c_char_p
    lane = next(lane for lane in LANES if lane.name == "emulated")
    launched: set[str] = set()
    with lane.active():
        library.nf_emulation_launched()
        for case in all_cases([torch.float32, torch.float16, torch.bfloat16, torch.float64]):
            case.ours(*case.inputs)
            launched |= set(library.nf_emulation_launched().decode().split())
            if names <= launched:  # kernels have no names of their own for a dtype
                break
    assert len(names) > 40 and names - launched == set(), "missing in scripts/kernel_cases"


@pytest.mark.slow
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_the_cpu_kernels_agree(table: str, dtype: torch.dtype) -> None:
    tolerance = every_kernel.TOLERANCE[dtype]
    found = {case.name: every_kernel.complaint(case, "cpu", tolerance) for case in TABLES[table](dtype)}
    assert {name: text for name, text in found.items() if text} == {}
    assert len(found) == len(list(TABLES[table](dtype))) > 5  # names tell the cases apart


def test_a_wrong_kernel_is_noticed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    right = functional.norm_linear
    monkeypatch.setattr(functional, "norm_linear", lambda *given, **options: right(*given, **options) * 1.001)
    count, wrong = every_kernel.run("cpu", [torch.float32], "norm_linear (17, 40, 101)")
    assert count == wrong == 2
    assert re.search(r"WRONG norm_linear .*result 0: relative error 1\.0\de-03", capsys.readouterr().out)


def test_what_no_gpu_has_run_comes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that traps takes the process's GPU with it: the others have been seen by then."""
    came: list[str] = []
    monkeypatch.setattr(every_kernel, "complaint", lambda case, *_: came.append(case.name))
    assert every_kernel.run("cpu", FLOATS) == (len(came), 0)
    assert sorted(came) == sorted(case.name for case in all_cases(FLOATS))
    new = [any(word in name for word in every_kernel.unseen()) for name in came]
    assert new == sorted(new) and any(new) == bool(every_kernel.unseen())


def fills_its_memory(x: torch.Tensor, weight: torch.Tensor) -> bool:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        functional.norm_linear(x, weight, 2.0)
    return "aten::fill_" in {event.name for event in profiler.events()}


def test_what_no_kernel_writes_is_nan() -> None:
    half = Case(
        "half", lambda x: [torch.cat([x, torch.empty(3)])], lambda x: [torch.cat([x, 0 * x])], [torch.ones(3)]
    )
    inputs = torch.ones(3, 4), torch.ones(5, 4)
    assert not fills_its_memory(*inputs)
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    try:
        every_kernel.unwritten_is_nan()
        complaint = every_kernel.complaint(half, "cpu", 1e-5)
        assert complaint == "result 0: relative error nan above 1e-05"
        assert fills_its_memory(*inputs)  # the ops' own outputs too
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def test_a_selection_of_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["every_kernel.py", "--device", "cpu", "--select", "no such case"])
    with pytest.raises(SystemExit, match="no case has 'no such case' in its name"):
        every_kernel.main()
