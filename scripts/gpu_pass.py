"""Everything a machine with a GPU should run, without network, the most telling first.

    scripts/gpu_pass.sh OUT              all steps, some 40 minutes at most
    scripts/gpu_pass.sh OUT --quick      under 5 minutes with an installed package; builds if there is none
    scripts/gpu_pass.sh OUT --only ops   that step, and again even if it passed

Each step has a time limit and a log of its own, OUT/<step>.log; one that fails or is stopped does not keep
the next from running. Called again with the same OUT, it goes on: what passed with this build of the package
is not run again. OUT/summary.txt has a line for each step, and is up to date after each. The exit status is
the number of steps that did not pass. The steps are in scripts/gpu_steps.py; docs/gpu.md says what each
shows.
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
            stored = json.loads(self.file.read_text())
            if (stored["build"], stored["device"]) == (build, device):
                self.results = {name: Result(**result) for name, result in stored["steps"].items()}

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


def stop(process: subprocess.Popen[bytes]) -> None:
    """The whole group: a step may have started others."""
    for signal_number, seconds in ((signal.SIGINT, GRACE), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, signal_number)
            process.wait(seconds)
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
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                stop(process)
            except BaseException:
                stop(process)
                raise
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
    # As an interrupt, so that a step does not outlive the script.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    state = State(options.out, build_of_the_package(), options.device)
    steps = wanted(given)
    done: set[str] = set()
    for step in steps:
        before = state.results.get(step.name)
        if before is not None and before.covers(options) and not given.only:
            continue
        print(f"{step.name} ...", flush=True)
        result = run(step, options)
        done.add(step.name)
        state.renew(build_of_the_package(), done)
        state.add(step.name, result)
        (options.out / "summary.txt").write_text(table(state.results, done) + "\n")
    text = table(state.results, done)
    (options.out / "summary.txt").write_text(text + "\n")
    print(text)
    return sum(not state.results[step.name].good for step in steps)


if __name__ == "__main__":
    sys.exit(main())
