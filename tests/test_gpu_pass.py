"""scripts/gpu_pass.py without a GPU: what it keeps, stops and says, and that every command line runs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import every_kernel
import gpu_pass
import gpu_steps
import pytest
from emulation import build
from gpu_pass import STEPS, Step

TESTS = Path(__file__).resolve().parent
SCRIPT = TESTS.parent / "scripts" / "gpu_pass.sh"


def step(name: str, script: str, seconds: int = 30, evidence: str = r"\S", **more: object) -> Step:
    return Step(name, seconds, seconds, lambda options: ["sh", "-c", script], evidence, **more)  # type: ignore[arg-type]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture):
    """call(steps, *arguments) -> (exit status, what was printed, lines of the summary)."""
    monkeypatch.setattr(gpu_pass, "GRACE", 0.5)
    monkeypatch.setattr(gpu_pass, "build_of_the_package", lambda: "one build")
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest's own stay

    def run(steps: list[Step], *arguments: str) -> tuple[int, str, dict[str, str]]:
        monkeypatch.setattr(gpu_pass, "STEPS", steps)
        monkeypatch.setattr(sys, "argv", ["gpu_pass.py", str(tmp_path), *arguments])
        status = gpu_pass.main()
        lines = (tmp_path / "summary.txt").read_text().splitlines()
        printed = capsys.readouterr().out
        assert printed.endswith("\n".join(lines) + "\n")  # the table comes last
        return status, printed, {line.split()[0]: line for line in lines}

    return run


# What it does with steps ----------------------------------------------------------------------------


def test_a_failure_and_a_stop_do_not_keep_the_next_from_running(call, tmp_path: Path) -> None:
    steps = [
        step("first", "echo fine"),
        step("second", "echo so far so good; exit 3"),
        step("third", "echo begun; sleep 60", seconds=1),
        step("fourth", "true"),
        Step("fifth", 9, 9, lambda options: ["/no/such/program"], r"\S"),
        step("sixth", "echo 4 passed", evidence="passed"),
    ]
    status, _, lines = call(steps)
    assert status == 4
    assert re.fullmatch(r"first +passed +\d+\.\d  fine", lines["first"])
    assert re.fullmatch(r"second +failed +\d+\.\d  so far so good", lines["second"])
    assert re.fullmatch(r"third +stopped +\d+\.\d  begun", lines["third"])
    assert re.fullmatch(r"fourth +showed nothing +\d+\.\d  ", lines["fourth"])
    assert re.fullmatch(r"fifth +failed +\d+\.\d  .*/no/such/program.*", lines["fifth"])
    assert "passed" in lines["sixth"]
    assert (tmp_path / "second.log").read_text() == "so far so good\n"


def test_a_second_call_goes_on_where_the_first_stopped(call, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    script = f"echo $name >> {runs}; echo done"

    def steps(failing: str) -> list[Step]:
        return [
            step(name, f"name={name}; {script}" + (f"; exit {int(name == failing)}"))
            for name in ("first", "second", "third")
        ]

    assert call(steps("second"))[0] == 1
    status, _, lines = call(steps(""))
    assert status == 0 and runs.read_text().split() == ["first", "second", "third", "second"]
    assert "passed (before)" in lines["first"] and "before" not in lines["second"]
    assert call(steps(""))[0] == 0 and len(runs.read_text().split()) == 4


@pytest.mark.parametrize("what", ["build_of_the_package", "device_at_hand"])
def test_another_build_or_gpu_starts_anew(
    call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, what: str
) -> None:
    runs = tmp_path / "runs"
    steps = [step("first", f"echo x >> {runs}; echo done")]
    call(steps)
    monkeypatch.setattr(gpu_pass, what, lambda *_: "another")
    _, _, lines = call(steps)
    assert runs.read_text().split() == ["x", "x"] and "before" not in lines["first"]


def test_the_gpus_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho NVIDIA H100\necho NVIDIA L4\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert gpu_pass.device_at_hand("cuda") == "cuda, NVIDIA H100, NVIDIA L4"
    assert gpu_pass.device_at_hand("emulated") == "emulated"
    monkeypatch.setenv("PATH", "/nowhere")
    assert gpu_pass.device_at_hand("cuda") == "cuda"


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"build": "one build", "device": "cuda", "steps": {"a": {}}}']
)
def test_a_state_that_is_none_is_refused(call, monkeypatch, tmp_path: Path, text: str) -> None:
    monkeypatch.setattr(gpu_pass, "device_at_hand", lambda device: device)
    (tmp_path / "steps.json").write_text(text)
    with pytest.raises(
        SystemExit, match=r"gpu_pass: expected .*steps.json to be what a call of this script wrote"
    ):
        call([step("first", "echo done")])


def test_what_is_found_about_a_build_that_a_step_replaces_is_forgotten(
    call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    built = tmp_path / "built"
    monkeypatch.setattr(gpu_pass, "build_of_the_package", lambda: str(built.exists()))
    tests = step("tests", "echo done")
    call([tests])
    _, _, lines = call([step("library", f"touch {built}; echo built"), tests])
    assert "before" not in lines["tests"]
    assert json.loads((tmp_path / "steps.json").read_text())["build"] == "True"


def test_a_build_replaced_in_a_second_call(call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What passed before it is forgotten and counts as not passed, but for what is no matter of the build."""
    built = tmp_path / "built"
    monkeypatch.setattr(gpu_pass, "build_of_the_package", lambda: str(built.exists()))
    first = [step("machine", "echo one", of_build=False), step("early", "echo two")]
    assert call([*first, step("library", "echo no nvcc; exit 1")])[0] == 1
    steps = [*first, step("library", f"touch {built}; echo built")]
    status, _, lines = call(steps)
    assert status == 1 and "passed (before)" in lines["machine"] and "early" not in lines
    status, _, lines = call(steps)
    assert status == 0 and "before" not in lines["early"] and "passed (before)" in lines["library"]
    assert [each.name for each in gpu_steps.STEPS if not each.of_build] == ["machine"]


def test_a_quick_pass_is_not_a_full_one(call, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    both = step("both", f"echo both >> {runs}; echo done")
    slow = Step("slow", 9, None, lambda options: ["sh", "-c", f"echo slow >> {runs}; echo done"], r"\S")
    _, _, lines = call([both, slow], "--quick")
    assert "passed (quick)" in lines["both"] and "slow" not in lines
    call([both, slow], "--quick")
    call([both, slow])
    _, _, lines = call([both, slow], "--quick")  # a full one is a quick one, too
    assert "passed (before)" in lines["both"] and "passed (before)" in lines["slow"]
    assert runs.read_text().split() == ["both", "both", "slow"]


def test_only_runs_that_step_again_and_keeps_the_rest(call, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    steps = [step(name, f"echo {name} >> {runs}; echo done") for name in ("first", "second", "third")]
    call(steps)
    status, _, lines = call(steps, "--only", "third", "--only", "first")
    assert status == 0 and runs.read_text().split()[3:] == ["first", "third"]
    assert list(lines) == ["step", "first", "second", "third"]
    with pytest.raises(SystemExit, match="2"):
        call(steps, "--only", "fourth")


def test_what_a_gpu_alone_can_show(call) -> None:
    """Skipped tests, or none, end well and have shown nothing."""
    for script, state in (("echo 3 skipped", "no GPU here"), ("exit 5", "no GPU here"), ("exit 1", "failed")):
        steps = [step("gpu", script, evidence="passed", needs_gpu=True)]
        assert state in call(steps, "--device", "emulated")[2]["gpu"]
        status, _, lines = call(steps, "--device", "cuda")
        assert status == 1 and "no GPU here" not in lines["gpu"]


def running(group: int) -> list[str]:
    """Processes of the group that are more than a line in the table of processes."""
    stats = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            stats.append(path.read_text())
    fields = [stat.rpartition(")")[2].split() for stat in stats]  # state, parent, group, ...
    return [state for state, _, its_group, *_ in fields if int(its_group) == group and state not in "ZX"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_script_leaves_no_step_behind(tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "out"
    code = f"""
import sys
import gpu_pass
from gpu_steps import Step
def step(name, script):
    return Step(name, 300, 300, lambda options: ["sh", "-c", script], ".")
gpu_pass.GRACE = 0.5
gpu_pass.STEPS = [step("first", "echo fine"), step("second", "echo $$; sleep 300 & wait")]
sys.argv = ["gpu_pass.py", {str(out)!r}]
gpu_pass.main()
"""
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent)}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=TESTS, env=environment)
    log, limit = out / "second.log", time.monotonic() + 60
    while not (log.exists() and log.read_text().strip()):
        assert time.monotonic() < limit and process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(30) == 128 + number
    limit = time.monotonic() + 10
    while left := running(int(log.read_text())):  # killed, and not gone at once
        assert time.monotonic() < limit, left
    assert list(json.loads((out / "steps.json").read_text())["steps"]) == ["first"]


# The steps themselves -------------------------------------------------------------------------------


def test_the_steps_come_in_the_order_of_their_worth_and_quick_ends_in_time() -> None:
    names = [step.name for step in STEPS]
    assert names == ["machine", "library", "kernels", "ops", "gpu", "hopper", "bench", *names[7:]]
    assert sorted(names[7:]) == ["initcheck", "memcheck", "racecheck", "synccheck"]
    built = 10  # what `library` takes when there is nothing to build
    assert built + sum(s.quick_seconds for s in STEPS if s.quick_seconds and s.name != "library") <= 300


def test_every_file_of_op_tests_is_in_it() -> None:
    files = set(gpu_steps.op_files())
    assert files >= {f"test_{name}.py" for name in ("normalize", "metric_losses", "inner_distance")}
    assert files >= {f"test_{name}.py" for name in ("loss_weights", "class_shards", "agent_shards")}
    assert not files & {"test_theory.py", "test_gpu_pass.py", "test_caffe_loader.py"}
    assert all((TESTS / name).exists() for name in gpu_steps.GPU_FILES)
    twins = {path.name for path in TESTS.glob("test_emulation*.py") if "_on_a_gpu(" in path.read_text()}
    assert "test_emulation_hopper.py" in twins and twins <= set(gpu_steps.GPU_FILES)


@pytest.mark.parametrize(
    ("cores", "plugin", "workers"), [(16, True, "8"), (8, True, "4"), (4, True, None), (16, False, None)]
)
def test_processes_share_the_gpu_where_there_are_cores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cores: int, plugin: bool, workers: str | None
) -> None:
    monkeypatch.setattr(gpu_steps.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(gpu_steps.importlib.util, "find_spec", lambda name: plugin or None)
    command = gpu_steps.ops(gpu_steps.Options(tmp_path, "cuda", quick=True, select=""))
    assert command[-2:] == ["-n", workers] if workers else "-n" not in command
    assert "--all" not in command and command[command.index("-k") + 1] == "cuda"


@pytest.mark.parametrize("quick", [True, False])
def test_quick_command_lines_ask_for_less(tmp_path: Path, quick: bool) -> None:
    options = gpu_steps.Options(tmp_path, "cuda", quick, select="")
    commands = {step.name: step.command(options) for step in STEPS}
    assert ("--quick" in commands["bench"]) == quick
    assert ("--all" in commands["gpu"]) == ("--all" in commands["ops"]) == (not quick)
    for name, dtypes in (("kernels", 4), ("memcheck", 2 if quick else 4)):
        after = commands[name].index("scripts/every_kernel.py") + 1
        given = every_kernel.arguments(commands[name][after:])
        assert len(given.dtypes) == dtypes and given.device == "cuda"


SANITIZER = """#!/bin/sh
# In place of compute-sanitizer: takes its options, runs the program, has nothing to report.
tool=$2
while case $1 in --*) true ;; *) false ;; esac; do shift 2; done
echo "========= COMPUTE-SANITIZER"
"$@" || exit
echo "$tool" >> "$SANITIZER_CALLS"
echo "========= ERROR SUMMARY: 0 errors"
"""


@pytest.mark.slow
@pytest.mark.skipif(build.unavailable() is not None, reason=f"{build.unavailable()}")
def test_every_command_line_runs(tmp_path: Path) -> None:
    """All of it, on a few cases of the emulated kernels; and once more, when there is nothing left to do."""
    sanitizer, calls, out = tmp_path / "sanitizer", tmp_path / "calls", tmp_path / "out"
    sanitizer.write_text(SANITIZER)
    sanitizer.chmod(0o755)
    stand_ins = {
        "PYTHON": sys.executable,
        "NORMFACE_SANITIZER": str(sanitizer),
        "SANITIZER_CALLS": str(calls),
    }
    command = [SCRIPT, out, "--device", "emulated", "--select", "near_rows"]
    ran = subprocess.run(
        command, env={**os.environ, **stand_ins}, cwd="/", capture_output=True, text=True, timeout=1500
    )
    assert ran.returncode == 0, ran.stdout + "".join(path.read_text()[-2000:] for path in out.glob("*.log"))
    table = (out / "summary.txt").read_text().splitlines()[1:]
    assert [line.split()[0] for line in table] == [step.name for step in STEPS]
    states = {line.split()[0]: " ".join(line.split()[1:]) for line in table}
    assert states.pop("gpu").startswith("no GPU here")
    assert all(state.startswith("passed ") for state in states.values()), states
    assert "8 cases, all agree" in states["kernels"] and "12 passed" in states["ops"]
    assert calls.read_text().split() == ["memcheck", "racecheck", "initcheck", "synccheck"]
    assert list((out / "bench").iterdir())

    again = subprocess.run(command, env={**os.environ, **stand_ins}, cwd="/", capture_output=True, text=True)
    assert again.returncode == 0 and "..." not in again.stdout and again.stdout.count("before)") == len(STEPS)
