"""One case: every competitor is built, held against float64, and only then timed, in turns.

Rounds go A B C, C B A, A B C, ...: drift of the machine meets everyone alike, and round i of one can be
compared with round i of another. Who fails, or takes longer than it may, is out and has its row at once;
the others go on. What is known when a run is interrupted is written all the same.
"""

from __future__ import annotations

import time
from argparse import Namespace
from pathlib import Path

import floor
import peers
import torch
import truth
from cases import SCALE, Case, make_inputs
from competitors import EAGER, OURS, Provider
from measure import FLOOR, quantiles
from processes import Dropped, OverBudget, Worker
from report import Record, Row

LEAST = 4  # rounds, however long they take


class WrongKernel(Exception):
    """Ours differs from float64 by more than eager PyTorch's own error allows."""


class CompileBudget:
    """Seconds that all compilations of a run may take together."""

    def __init__(self, seconds: float) -> None:
        self.total = self.left = seconds


class Contest:
    def __init__(
        self, case: Case, device: str, options: Namespace, compiling: CompileBudget, record: Record
    ) -> None:
        self.case, self.device, self.options, self.compiling = case, device, options, compiling
        self.record = record
        self.mode = "fwd" if options.forward_only else "fwd+bwd"
        self.rows: dict[str, Row] = {}
        self.workers: dict[str, Worker] = {}
        self.errors: dict[str, dict[str, float]] = {}
        self.times: dict[str, list[float]] = {}
        self.ended = "interrupted"

    def run(self, folder: Path) -> None:
        """`folder` is for the float64 values, which every competitor's process reads."""
        right = folder / "right.pt"
        able = self._able()
        try:
            self._save_truth(right)
        except torch.OutOfMemoryError:
            self.rows = {name: self._row(name, provider) for name, provider in able.items()}
            for row in self.rows.values():
                row.outcome, row.note = "failed", "no memory for the float64 values"
            self.record.write(*self.rows.values())
            return
        floor_ms = floor.cuda_ms(self.case, self.mode) if self.device == "cuda" else None
        if self.device == "cuda":
            torch.cuda.empty_cache()
        try:
            for name, provider in able.items():
                self._enter(name, provider, right)
                if name == EAGER:
                    self._judge()
            self._rounds()
            self.ended = "measured"
        except WrongKernel:
            self.ended = "wrong"
            raise
        finally:
            self._finish(floor_ms)

    def _save_truth(self, path: Path) -> None:
        values = truth.truth(self.case, make_inputs(self.case, self.device), SCALE)
        if "dw" in values and self.case.precision.operand.itemsize <= 2:
            # Half the file, and still four digits more than operands of 16 bits can have.
            values["dw"] = values["dw"].float()
        torch.save({name: value.cpu() for name, value in values.items()}, path)

    def _able(self) -> dict[str, Provider]:
        """Those who can do the case; the others have their rows."""
        able, refused = {}, []
        for name, provider in peers.taking_part(self.case).items():
            if reason := self._obstacle(provider):
                row = self._row(name, provider)
                row.outcome, row.note = "unavailable", reason
                refused.append(row)
            else:
                able[name] = provider
        self.record.write(*refused)
        return able

    def _row(self, name: str, provider: Provider) -> Row:
        case, package = self.case, peers.installed(provider.package)
        return Row(
            case.name, case.batch, case.dim, case.classes, case.dtype, name, self.mode, package=package
        )

    def _worker(self, name: str) -> Worker:
        threads, budget = torch.get_num_threads(), self.options.budget
        self.workers[name] = Worker(name, self.case, self.mode, self.device, threads, budget)
        return self.workers[name]

    def _enter(self, name: str, provider: Provider, right: Path) -> None:
        self.rows[name] = row = self._row(name, provider)
        worker = self._worker(name)
        try:
            row.peak_extra_mib = self._first(provider, worker)
            self.errors[name] = errors = worker.ask("errors", right)
            for quantity in truth.QUANTITIES:
                setattr(row, f"err_{quantity}", errors.get(quantity))
            start = time.monotonic()
            worker.ask("turn")
            took = time.monotonic() - start
            if LEAST * took > worker.left:
                left = f"{worker.left:.0f} of {worker.budget:.0f} s are left"
                raise OverBudget(f"a turn takes {took:.1f} s, {LEAST} are needed, {left}")
        except Dropped as dropped:
            if name == OURS and not isinstance(dropped, OverBudget):
                raise WrongKernel(f"{self.case.name}: {dropped}") from dropped
            self._drop(name, dropped)
            return
        notes = [provider.remark(self.case)]
        if name not in (OURS, EAGER):
            found = truth.complaints(errors, self.errors.get(EAGER, {}), self.case.precision.operand)
            notes += ["inexact, " + found[0]] if found else []
        notes += ["page faults amortised"] if self.options.amortise_page_faults else []
        row.note = "; ".join(filter(None, notes))

    def _obstacle(self, provider: Provider) -> str:
        if reason := provider.obstacle(self.case):
            return reason
        if provider.compiles and self.options.quick:
            return "compiles, which --quick does not"
        if provider.compiles and self.compiling.left < 1:
            return self._used_up()
        return ""

    def _used_up(self) -> str:
        return f"the {self.compiling.total:.0f} s for compiling are used up (--compile-limit)"

    def _first(self, provider: Provider, worker: Worker) -> float | None:
        if not provider.compiles:
            return worker.ask("first")
        if self.compiling.left < 1:
            raise OverBudget(self._used_up())
        start = time.monotonic()
        try:
            return worker.ask("first", limit=self.compiling.left)
        finally:
            self.compiling.left -= time.monotonic() - start

    def _judge(self) -> None:
        if OURS in self.errors:
            eager = self.errors.get(EAGER, {})
            if found := truth.complaints(self.errors[OURS], eager, self.case.precision.operand):
                raise WrongKernel(f"{self.case.name}: " + "; ".join(found))

    def _drop(self, name: str, why: Dropped) -> None:
        """Out, with its row written."""
        self.workers.pop(name).close()
        self.times.pop(name, None)
        if name in self.rows:
            row = self.rows.pop(name)
            row.outcome, row.note = why.outcome, str(why)
            self.record.write(row)

    def _rounds(self) -> None:
        if self.device == "cpu":
            self._worker(FLOOR)
            try:
                self.workers[FLOOR].ask("first")
            except Dropped as dropped:
                self._drop(FLOOR, dropped)
        self.times = {name: [] for name in self.workers}
        order, start, count = list(self.workers), time.monotonic(), 0
        most = LEAST if self.options.quick else 60
        while count < LEAST or (count < most and time.monotonic() - start < self.options.seconds):
            for name in order if count % 2 == 0 else reversed(order):
                if name not in self.workers:
                    continue
                try:
                    self.times[name].append(self.workers[name].ask("turn"))
                except OverBudget as over:
                    if count >= LEAST:  # enough is known of it: the rounds end, and it keeps its row
                        return
                    self._drop(name, over)
                except Dropped as dropped:
                    self._drop(name, dropped)
            count += 1

    def _finish(self, floor_ms: float | None) -> None:
        """Writes the rows that are left, with the rounds that everyone in them has ended."""
        for worker in self.workers.values():
            worker.close()
        rounds = min(map(len, self.times.values()), default=0)
        if self.times.get(FLOOR) and rounds:
            floor_ms = quantiles(self.times[FLOOR][:rounds])[1]
        for name, row in self.rows.items():
            row.outcome, row.floor_ms = self.ended, floor_ms
            if rounds:
                mine = self.times[name][:rounds]
                row.p20_ms, row.median_ms, row.p80_ms = quantiles(mine)
                if EAGER in self.times:
                    ratios = [a / b for a, b in zip(mine, self.times[EAGER][:rounds], strict=True)]
                    row.ratio_to_eager = quantiles(ratios)[1]
                row.percent_of_floor = 100 * floor_ms / row.median_ms if floor_ms else None
            if self.ended == "interrupted":
                row.note = "; ".join(filter(None, (row.note, f"after {rounds} rounds")))
        self.record.write(*self.rows.values())
