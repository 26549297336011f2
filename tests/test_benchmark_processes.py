"""A competitor of the benchmark that hangs, crashes, fails or is slow is out, and takes nobody along."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from bench_folder import Rival, eventually, gone, modules, read


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    with modules() as found:
        yield found


def start(bench: SimpleNamespace, name: str, budget: float) -> object:
    return bench.processes.Worker(name, bench.cases.normalize(2, 3), "fwd", "cpu", 1, budget, Rival)


def test_a_good_one_answers(bench: SimpleNamespace) -> None:
    worker = start(bench, "good", 60)
    assert worker.ask("first") == 1.5
    assert 0 < worker.left < 60
    left = worker.left
    assert worker.ask("first", limit=60.0) == 1.5
    assert worker.left == left, "a call with a limit of its own counts against the budget"
    worker.close()
    assert gone(worker.process.pid)


def test_one_that_hangs_is_stopped(bench: SimpleNamespace) -> None:
    worker = start(bench, "hangs", 60)
    began = time.monotonic()
    with pytest.raises(bench.processes.OverBudget, match="first took longer than the 1 s"):
        worker.ask("first", limit=1.0)
    assert time.monotonic() - began < 60
    assert gone(worker.process.pid)


def test_what_it_started_ends_with_it(bench: SimpleNamespace, tmp_path: Path) -> None:
    """As a compiler would."""
    file = tmp_path / "pid"
    worker = start(bench, "starts another", 60)
    worker.ask("remember", str(file))
    worker.pipe.send(("first", ()))
    assert eventually(lambda: file.exists() and file.read_text())
    worker.close()
    assert eventually(lambda: gone(int(file.read_text())))


def test_one_that_crashes(bench: SimpleNamespace) -> None:
    worker = start(bench, "crashes", 60)
    with pytest.raises(bench.processes.Dropped, match=r"process died in first \(exit code -6\)") as caught:
        worker.ask("first")
    assert caught.value.outcome == "failed"


def test_one_that_raises(bench: SimpleNamespace) -> None:
    worker = start(bench, "raises", 60)
    with pytest.raises(bench.processes.Dropped, match=r"^RuntimeError: no kernel for this size$"):
        worker.ask("first")


class Scripted:
    """A worker in this process; `plans`: name, method -> what comes back or is raised, or a list of these."""

    order: ClassVar[list[str]] = []
    plans: ClassVar[dict[str, dict[str, object]]] = {}

    def __init__(self, name: str, *about: object) -> None:
        self.name, self.budget, self.left, self.closed = name, 60.0, 60.0, False

    def ask(self, method: str, *arguments: object, limit: float | None = None) -> object:
        answer = self.plans.get(self.name, {}).get(method, {"first": 2.0, "errors": {}, "turn": 10.0}[method])
        if method == "turn":
            self.order.append(self.name)
        if isinstance(answer, list):
            answer = answer.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def contest(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> object:
    """Runs one toy case, quick unless told else, with Scripted workers; gives the rows by provider."""
    monkeypatch.setattr(bench.contest, "Worker", Scripted)

    def play(plans: dict[str, dict[str, object]], *arguments: str) -> object:
        Scripted.plans, Scripted.order = plans, []
        options = bench.bench_kernels.arguments([*arguments] or ["--quick"])
        record = bench.report.Record(tmp_path / "kernels.jsonl", {})
        compiling = bench.contest.CompileBudget(60.0)
        play.contest = bench.contest.Contest(bench.cases.head(4, 3, 5), "cpu", options, compiling, record)
        play.rows = record.rows
        play.contest.run(tmp_path)
        return {row["provider"]: row for row in read(tmp_path)}

    play.read = lambda: {row["provider"]: row for row in read(tmp_path)}
    return play


def test_rounds_are_balanced(contest: object) -> None:
    """A B C, C B A; the first turn of each is a trial."""
    contest({})
    names = ["normface_ext", "eager", "torch.lin_ce"]
    forth = [*names, "floor"]
    assert Scripted.order == names + (forth + forth[::-1]) * 2


def test_one_out_in_the_middle_costs_nobody_a_round(bench: SimpleNamespace, contest: object) -> None:
    out = bench.processes.OverBudget("stopped: turn took longer than the 3 s left")
    rows = contest({
        "normface_ext": {"turn": [5.0, 5.0, 5.0, 5.0, 20.0]},
        "torch.lin_ce": {"turn": [10.0, 10.0, out]},
    })  # fmt: skip
    assert (rows["torch.lin_ce"]["outcome"], rows["torch.lin_ce"]["median_ms"]) == ("over budget", None)
    assert rows["normface_ext"]["median_ms"] == 5.0 and rows["normface_ext"]["ratio_to_eager"] == 0.5
    assert rows["eager"]["outcome"] == "measured"
    order = [row.provider for row in contest.rows]
    assert order.index("torch.lin_ce") < order.index("normface_ext"), "its row was known first"


def test_one_that_needs_more_later_ends_the_rounds(bench: SimpleNamespace, contest: object) -> None:
    """It has as many rounds as are needed: nobody loses a row."""
    out = bench.processes.OverBudget("stopped: turn took longer than the 3 s left")
    turns = [10.0] * 5 + [30.0, out]
    rows = contest({"eager": {"turn": turns}}, "--compile-limit", "0")
    assert {rows[name]["outcome"] for name in ("normface_ext", "eager")} == {"measured"}
    assert not turns and rows["eager"]["median_ms"] == 10.0


@pytest.mark.parametrize("when", ["first", "errors", "turn"])
@pytest.mark.parametrize("who", ["eager", "torch.lin_ce"])
def test_one_that_fails_has_its_row(bench: SimpleNamespace, contest: object, who: str, when: str) -> None:
    rows = contest({who: {when: bench.processes.Dropped("RuntimeError: no")}})
    assert (rows[who]["outcome"], rows[who]["note"]) == ("failed", "RuntimeError: no")
    ours = rows["normface_ext"]
    assert ours["median_ms"] == 10.0 and ours["percent_of_floor"] == 100
    assert ours["ratio_to_eager"] == (None if who == "eager" else 1.0)


def test_a_slow_one_is_not_waited_for(bench: SimpleNamespace, contest: object) -> None:
    """After one turn it is known that four would take too long."""

    class Slow(Scripted):
        def ask(self, method: str, *arguments: object, limit: float | None = None) -> object:
            if (self.name, method) == ("torch.lin_ce", "turn"):
                self.left = 0.1
                time.sleep(0.03)
            return super().ask(method, *arguments, limit=limit)

    bench.contest.Worker = Slow  # `contest` restores it
    rows = contest({})
    assert rows["torch.lin_ce"]["outcome"] == "over budget"
    assert "a turn takes 0.0 s, 4 are needed, 0 of 60 s are left" in rows["torch.lin_ce"]["note"]
    assert Scripted.order.count("torch.lin_ce") == 1


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_interrupted_run_keeps_its_rounds(contest: object, stop: type, after: int) -> None:
    turns = [10.0] * (1 + after)
    with pytest.raises(stop):
        contest({"eager": {"turn": [*turns, stop()]}})
    rows = contest.read()
    for name in ("normface_ext", "eager", "torch.lin_ce"):
        assert rows[name]["outcome"] == "interrupted" and f"after {after} rounds" in rows[name]["note"]
        assert rows[name]["median_ms"] == (10.0 if after else None)
    assert all(worker.closed for worker in contest.contest.workers.values())


def test_ours_must_be_right_and_run(bench: SimpleNamespace, contest: object) -> None:
    with pytest.raises(bench.contest.WrongKernel, match=r"dw: error 1\.0e-02, allowed"):
        contest({"normface_ext": {"errors": {"dw": 1e-2}}, "eager": {"errors": {"dw": 1e-7}}})
    assert contest.read()["normface_ext"]["outcome"] == "wrong" and not Scripted.order.count("floor")
    with pytest.raises(bench.contest.WrongKernel, match="RuntimeError: no"):
        contest({"normface_ext": {"first": bench.processes.Dropped("RuntimeError: no")}})


def test_an_inexact_peer_is_named(contest: object) -> None:
    rows = contest({"torch.lin_ce": {"errors": {"dw": 0.9}}, "eager": {"errors": {"dw": 1e-7}}})
    assert rows["torch.lin_ce"]["note"].startswith("inexact, dw: error 9.0e-01")


def test_ours_without_eager_is_judged_too(bench: SimpleNamespace, contest: object) -> None:
    eager = {"first": bench.processes.Dropped("OutOfMemoryError: no")}
    with pytest.raises(bench.contest.WrongKernel, match="dx"):
        contest({"normface_ext": {"errors": {"dx": 1e-3}}, "eager": eager})


def test_compiling_has_a_limit_for_all(bench: SimpleNamespace, contest: object) -> None:
    out = bench.processes.OverBudget("stopped: first took longer than the 60 s left")
    contest({})
    options = bench.bench_kernels.arguments(["--compile-limit", "60"])
    record = bench.report.Record(contest.contest.record.path, {})
    compiling = bench.contest.CompileBudget(60.0)
    case = bench.cases.head(4, 3, 5)
    play = bench.contest.Contest(case, "cpu", options, compiling, record)
    Scripted.plans = {"compile": {"first": out}}
    options.seconds = 0.0

    class Spends(Scripted):
        def ask(self, method: str, *arguments: object, limit: float | None = None) -> object:
            if limit is not None:
                compiling.left -= limit
            return super().ask(method, *arguments, limit=limit)

    bench.contest.Worker = Spends
    play.run(record.path.parent)
    rows = contest.read()
    assert rows["compile"]["outcome"] == "over budget"
    assert rows["torch.lin_ce+compiled-norm"]["note"].startswith("the 60 s for compiling are used up")


def test_a_case_too_large_for_the_truth(
    bench: SimpleNamespace, contest: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has its rows, and the run goes on with the next case."""

    def too_large(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench.truth, "truth", too_large)
    rows = contest({})
    for name in ("normface_ext", "eager"):
        assert (rows[name]["outcome"], rows[name]["median_ms"]) == ("failed", None)
        assert "float64" in rows[name]["note"]
    assert rows["compile"]["outcome"] == "unavailable"
