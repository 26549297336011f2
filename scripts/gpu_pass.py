"""Everything a machine with a GPU should run, without network, the most telling first.

    scripts/gpu_pass.sh OUT              all steps; with an installed package under 38 minutes
    scripts/gpu_pass.sh OUT --quick      under 5 minutes with an installed package; builds if there is none
    scripts/gpu_pass.sh OUT --only ops   that step, and again even if it passed

Each step has a time limit and a log of its own, OUT/<step>.log; one that fails or is stopped does not keep
the next from running. Called again with the same OUT, it goes on: what passed with this build of the package
on such a GPU is not run again. OUT/summary.txt has a line for each step, and is up to date after each. The
exit status is the number of steps that did not pass. The steps are in scripts/gpu_steps.py; docs/gpu.md says
what each shows.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from gpu_steps import STEPS, Options, Step

#: After an interrupt, for pytest to say what failed so far and for the benchmark to close its files.
GRACE = 10.0
#: Those that asked this script to end. They are only noted: an exception in the middle of starting a step
#: would leave the step behind.
signals: list[int] = []
#: pytest's exit status when nothing was collected.
NO_TESTS = 5
PASSED, FAILED, STOPPED, EMPTY, NO_GPU = "passed", "failed", "stopped", "showed nothing", "no GPU here"


@dataclass(frozen=True)
class Result:
    state: str
    exit: int | None
    seconds: float
    quick: bool
    select: str
    said: str  # the log's last line

    @property
    def good(self) -> bool:
        return self.state in (PASSED, NO_GPU)

    def covers(self, options: Options) -> bool:
        """Whether it says all that another run would."""
        return self.good and self.select == options.select and (options.quick or not self.quick)


class State:
    """What was found so far: OUT/steps.json, written anew after each step."""

    def __init__(self, out: Path, build: str, device: str) -> None:
        self.file, self.build, self.device = out / "steps.json", build, device
        self.results: dict[str, Result] = {}
        if self.file.exists():
            try:
                stored = json.loads(self.file.read_text())
                if (stored["build"], stored["device"]) == (build, device):
                    self.results = {name: Result(**result) for name, result in stored["steps"].items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                sys.exit(
                    f"gpu_pass: expected {self.file} to be what a call of this script wrote, got {error!r}"
                )

    def renew(self, build: str, keep: set[str]) -> None:
        """Another build: what was found before says nothing about it."""
        if build != self.build:
            self.build = build
            self.results = {name: result for name, result in self.results.items() if name in keep}

    def add(self, name: str, result: Result) -> None:
        self.results[name] = result
        steps = {name: asdict(result) for name, result in self.results.items()}
        text = json.dumps({"build": self.build, "device": self.device, "steps": steps}, indent=1)
        written = self.file.with_suffix(".new")
        written.write_text(text + "\n")
        written.replace(self.file)


def build_of_the_package() -> str:
    """A name for what is installed; passing says something about that alone."""
    importlib.invalidate_caches()
    spec = importlib.util.find_spec("normface_ext")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(path for folder in folders for path in Path(folder).rglob("*.*") if path.is_file())
    digest = hashlib.sha256()
    for path in files:
        if path.suffix in (".py", ".so"):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def device_at_hand(device: str) -> str:
    """With the names of the GPUs, so that results of different ones do not mix in one folder."""
    if device != "cuda":
        return device
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split(
            "\n"
        )
    except (OSError, subprocess.SubprocessError):
        names = []
    return ", ".join(["cuda", *(name.strip() for name in names if name.strip())])


def stop(process: subprocess.Popen[bytes]) -> None:
    """The whole group: a step may have started others. What hangs in the driver is not waited for."""
    for number in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(GRACE)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def last_line(log: Path) -> str:
    lines = [line.strip(" =") for line in log.read_text(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "")


def run(step: Step, options: Options) -> Result:
    limit = step.quick_seconds if options.quick and step.quick_seconds else step.seconds
    log, start = options.out / f"{step.name}.log", time.monotonic()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **dict(step.environment)}
    code: int | None = None
    with log.open("wb") as file:
        try:
            process = subprocess.Popen(
                step.command(options),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=step.folder,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            file.write(f"{error}\n".encode())
            process = None
        if process is not None:
            while (code := process.poll()) is None and time.monotonic() - start < limit and not signals:
                time.sleep(0.05)
            if code is None:
                stop(process)
    if signals:
        sys.exit(128 + signals[0])
    shown = re.search(step.evidence, log.read_text(errors="replace")) is not None
    if process is not None and code is None:
        state = STOPPED
    elif step.needs_gpu and options.device != "cuda" and code in (0, NO_TESTS) and not shown:
        state = NO_GPU
    elif code != 0:
        state = FAILED
    else:
        state = PASSED if shown else EMPTY
    seconds = round(time.monotonic() - start, 1)
    return Result(state, code, seconds, options.quick, options.select, last_line(log))


def table(results: dict[str, Result], done: set[str]) -> str:
    """One line per step that has a result; those that are not `done` were before, in another call."""
    lines = [f"{'step':<10} {'state':<22} {'seconds':>8}  said"]
    for step in STEPS:
        if (result := results.get(step.name)) is None:
            continue
        notes = [*(["quick"] if result.quick else []), *([] if step.name in done else ["before"])]
        state = result.state + (f" ({', '.join(notes)})" if notes else "")
        lines.append(f"{step.name:<10} {state:<22} {result.seconds:>8.1f}  {result.said[:100]}")
    return "\n".join(lines)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the results, made if it is missing")
    parser.add_argument("--quick", action="store_true", help="the quick cases and tests, memcheck alone")
    names = [step.name for step in STEPS]
    text = f"this step, and again if it passed; may be repeated. One of {', '.join(names)}"
    parser.add_argument("--only", action="append", metavar="STEP", choices=names, default=[], help=text)
    parser.add_argument("--select", metavar="WORD", default="", help="only tests and cases so named")
    parser.add_argument(
        "--device", choices=["cuda", "emulated"], default="cuda", help="emulated: to test this script"
    )
    return parser.parse_args(argv)


def wanted(given: argparse.Namespace) -> list[Step]:
    if given.only:
        return [step for step in STEPS if step.name in given.only]
    return [step for step in STEPS if step.quick_seconds is not None or not given.quick]


def main() -> int:
    given = arguments()
    given.out.mkdir(parents=True, exist_ok=True)
    options = Options(given.out.resolve(), given.device, given.quick, given.select)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: signals.append(number))
    state = State(options.out, build_of_the_package(), device_at_hand(options.device))
    steps = wanted(given)
    done: set[str] = set()
    for step in steps:
        before = state.results.get(step.name)
        if before is not None and before.covers(options) and not given.only:
            continue
        print(f"{step.name} ...", flush=True)
        result = run(step, options)
        done.add(step.name)
        state.renew(build_of_the_package(), done | {step.name for step in STEPS if not step.of_build})
        state.add(step.name, result)
        (options.out / "summary.txt").write_text(table(state.results, done) + "\n")
    text = table(state.results, done)
    (options.out / "summary.txt").write_text(text + "\n")
    print(text)
    # One that was left out as passed before may have been forgotten since, with its build.
    return sum(not (step.name in state.results and state.results[step.name].good) for step in steps)


if __name__ == "__main__":
    sys.exit(main())
