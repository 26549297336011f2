"""Microseconds of the host for one small call, ours beside eager, by cause: one table.

    python benchmarks/bench_host.py [--device cuda] [--out benchmarks/results/NAME]

Whole calls are timed as `host.py` times them. The causes are timed one by one, each in a loop of its own, so
they are hot and add up to a little less than the call: "checks" of the arguments, "plan" (remembered, as in
every step but the first), and "op" as the dispatcher is given it from Python. Of that, "dispatch" is the op
on no rows and one class: all of its arguments through the dispatcher, and their checks; "allocation" three
small tensors as Python makes them, which is more than the kernels pay; "launch and arithmetic" what is left.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import machine
import torch
from cases import CASIA, SCALE, Case, head, make_inputs
from competitors import EAGER, OURS
from host import calls_of, microseconds
from torch import Tensor

from normface_ext.softmax import arguments, ops
from normface_ext.softmax.options import HeadOptions


def causes(case: Case, device: str) -> dict[str, Callable[[], object]]:
    """The parts of a call without gradient."""
    made = make_inputs(case, device)
    assert made.weight is not None and made.labels is not None
    x, weight, labels, options = made.x.detach(), made.weight.detach(), made.labels, HeadOptions.DEFAULTS
    assert isinstance(options, HeadOptions)
    rows, classes = x.shape[0], weight.shape[0]
    told = arguments.loss_options(SCALE, options, x, weight, rows, classes)

    def op_on(*tensors: Tensor) -> Callable[[], object]:
        x, weight, labels = tensors
        given = x, weight, None, ops.NUMBERS, labels, None, None, ops.NO_INPUTS, told, (False,) * 6, False
        return lambda: ops.softmax_loss(*given)

    return {
        "checks": lambda: arguments.checked_inputs("host", x, weight, labels, SCALE, None, None, options),
        "plan": lambda: arguments.loss_options(SCALE, options, x, weight, rows, classes),
        "op": op_on(x, weight, labels),
        "of it dispatch": op_on(x[:0], weight[:1], labels[:0]),
        "of it allocation": lambda: [torch.empty(64, device=device) for _ in range(3)],
    }


def measured(case: Case, device: str) -> dict[str, dict[str, float]]:
    """By line of the table, by provider."""
    table: dict[str, dict[str, float]] = {}
    for _ in range(2):  # the better of two, interleaved
        for provider in (OURS, EAGER):
            for name, call in calls_of(case, device, provider).items():
                best = table.setdefault(name, {})
                best[provider] = min(microseconds(call, device), best.get(provider, float("inf")))
    with torch.no_grad():
        for name, call in causes(case, device).items():
            table[name] = {OURS: microseconds(call, device)}
    left = table["op"][OURS] - table["of it dispatch"][OURS] - table["of it allocation"][OURS]
    table["of it launch and arithmetic"] = {OURS: left}
    return table


def shown(case: Case, table: dict[str, dict[str, float]]) -> str:
    lines = [f"{case.name}", f"{'':28}{'ours':>9}{'eager':>9}{'ratio':>8}"]
    for name, of in table.items():
        eager = f"{of[EAGER]:9.1f}{of[OURS] / of[EAGER]:8.2f}" if EAGER in of else ""
        lines.append(f"{name:28}{of[OURS]:9.1f}{eager}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, help="folder for bench_host.jsonl")
    given = parser.parse_args()
    if given.device == "cpu":
        torch.set_num_threads(1)
    cases = [head(32, 64, 100)] + ([head(256, 512, CASIA)] if given.device == "cuda" else [])
    rows = []
    for case in cases:
        table = measured(case, given.device)
        print(shown(case, table), flush=True)
        rows += [
            {"case": case.name, "part": name, "us": of} | machine.about(given.device)
            for name, of in table.items()
        ]
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "bench_host.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
