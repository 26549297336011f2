"""Measures every published head against the plain one: time, memory, error.

    python benchmarks/bench_heads.py                two minutes of one core
    python benchmarks/bench_heads.py --quick        seconds, on toy sizes: does it work at all?

One process, one set of inputs, forward and backward to raw features and raw weights. In a round every head
runs once, in turns from the front and from the back; `ratio` is the median over the rounds of a head's time
over the plain head's in the same round. On a CPU the time is that of its processors, of all threads together,
which other programs disturb least. Before that every head is compared with float64 (normface_ext.reference);
one that is wrong ends the run with exit status 1. heads.jsonl has a row per head, heads.md the table.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cases
import machine
import measure
import torch
import truth
from torch import Tensor

import normface_ext as nf

PLAIN = "NormFace"
#: What is allowed of a head in float32 against float64: relative, by the Frobenius norm.
MOST = 1e-4


class Head(NamedTuple):
    """What is asked of ``normface_loss``, or with a `bias` of ``sphereface2_loss``."""

    options: Callable[[], dict[str, object]] = dict
    scale: float = 64.0
    bias: float | None = None


def of(kind: Callable[..., nf.BatchMargin | object], *given: object, **options: object) -> Head:
    """A head with this margin, and the published scale of it."""
    scale = float(options.pop("scale", 64.0))  # type: ignore[arg-type]
    return Head(lambda: {"margin": kind(*given), **options}, scale)


HEADS: dict[str, Head] = {
    PLAIN: Head(),
    "CosFace": of(nf.CosFace),
    "ArcFace": of(nf.ArcFace),
    "ArcFace, straight": of(nf.ArcFace, margin_gradient="straight"),
    "ArcFace, 3 sub-centres": of(nf.ArcFace, sub_centers=3),
    "AdaFace": of(nf.AdaFace),
    "MagFace": of(nf.MagFace),
    "ElasticFace-Arc": of(nf.ElasticArcFace, 0.5, 0.0),
    "ElasticFace-Cos": of(nf.ElasticCosFace, 0.35, 0.0),
    "SphereFace": of(nf.SphereFace, scale=1.0, normalize_input=False),
    "SphereFace, m 1.7": of(nf.SphereFace, 1.7, 0.0, 0.0, 0.0, 0.0, scale=30.0),
    "CurricularFace": of(nf.CurricularFace),
    "MV-Arc-Softmax": of(nf.MVSoftmax, scale=32.0),
    "MV-AM-Softmax": of(nf.MVSoftmax, 0.35, 0.2, "am", scale=32.0),
    "CosFace + filter": of(nf.CosFace, 0.4, filter_threshold=0.4),
    "Circle loss": of(nf.CircleSoftmax, scale=256.0),
    "SphereFace2-C": Head(bias=-8.0),
    "SphereFace2-A": Head(lambda: {"form": "A", "m": 0.15, "r": 32.0}, bias=-8.0),
}


def loss_of(head: Head, functions: object, options: dict[str, object]) -> Callable[..., Tensor]:
    """(x, weight, labels) -> loss, by `functions`: ``nf.functional`` or ``nf.reference``."""
    if head.bias is not None:
        return lambda x, w, y: functions.sphereface2_loss(x, w, y, head.bias, **options)  # type: ignore[attr-defined]
    centers = int(options.get("sub_centers", 1))  # type: ignore[call-overload]
    # Of as many rows of the weight, so of fewer classes.
    return lambda x, w, y: functions.normface_loss(  # type: ignore[attr-defined]
        x, w, y % (len(w) // centers), head.scale, **options
    )


def frozen(head: Head) -> dict[str, object]:
    """With a state that does not move, so that two calls are of one formula."""
    options = head.options()
    margin = options.get("margin")
    if isinstance(margin, torch.nn.Module):
        margin.eval()
    return options


def step(loss: Callable[..., Tensor], inputs: cases.Inputs) -> Tensor:
    inputs.clear_gradients()
    made = loss(inputs.x, inputs.weight, inputs.labels)
    made.backward()
    return made.detach()


def errors(head: Head, inputs: cases.Inputs) -> dict[str, float]:
    """Relative, of loss, dx and dw."""
    found = step(loss_of(head, nf.functional, frozen(head)), inputs), inputs.x.grad, inputs.weight.grad
    x, w = (t.detach().double().requires_grad_() for t in (inputs.x, inputs.weight))
    exact = loss_of(head, nf.reference, frozen(head))(x, w, inputs.labels)
    exact.backward()
    right = exact.detach(), x.grad, w.grad
    return {
        name: truth.relative_errors(value, wanted)[0]
        for name, value, wanted in zip(truth.QUANTITIES, found, right, strict=False)
    }


def milliseconds(call: Callable[[], object], device: str) -> float:
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (clock() - start)


def table(rows: list[dict[str, object]], common: dict[str, object]) -> str:
    lines = [
        f"{common['device']}, {common['threads']} thread(s), torch {common['torch']}; {rows[0]['case']},"
        f" {rows[0]['dtype']}, forward + backward, {rows[0]['rounds']} interleaved rounds",
        "",
        "| head | s | median ms | time / plain | extra MiB | err loss | err dx | err dw |",
        "|--|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        extra = "-" if row["peak_extra_mib"] is None else f"{row['peak_extra_mib']:.0f}"
        err = " | ".join(f"{row[f'err_{name}']:.0e}" for name in ("loss", "dx", "dw"))
        lines.append(
            f"| {row['head']} | {row['scale'] or '-'} | {row['median_ms']:.1f} | {row['ratio']:.2f}"
            f" | {extra} | {err} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="toy sizes; for tests")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--rounds", type=int, help="of timing (default: 15; with --quick 2)")
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("bench_results"))
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    rounds = options.rounds or (2 if options.quick else 15)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case = cases.head(32, 16, 102) if options.quick else cases.head(256, 512, cases.CASIA)
    common = {**machine.about(device), "load": round(machine.load(), 1)}
    inputs = cases.make_inputs(case, device)
    found = {name: errors(head, inputs) for name, head in HEADS.items()}
    for name, error in found.items():
        if not max(error.values()) <= MOST:
            print(f"WRONG RESULT, not timed: {name}: {error}", file=sys.stderr)
            return 1
    calls = {
        name: functools.partial(step, loss_of(head, nf.functional, head.options()), inputs)
        for name, head in HEADS.items()
    }
    extra = {name: measure.extra_mib(call, inputs, device) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for count in range(-1, rounds):
        for name in calls if count % 2 else reversed(calls):
            ms = milliseconds(calls[name], device)
            if count >= 0:
                times[name].append(ms)
    rows = []
    for name, head in HEADS.items():
        p20, median, p80 = measure.quantiles(times[name])
        ratios = [a / b for a, b in zip(times[name], times[PLAIN], strict=True)]
        rows.append({
            "case": case.name, "N": case.batch, "D": case.dim, "C": case.classes, "dtype": case.dtype,
            "head": name, "scale": head.scale if head.bias is None else None, "median_ms": median,
            "p20_ms": p20, "p80_ms": p80, "ratio": measure.quantiles(ratios)[1], "rounds": rounds,
            "peak_extra_mib": extra[name], **{f"err_{k}": v for k, v in found[name].items()}, **common,
        })  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "heads.jsonl"
    shortened = ({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in r.items()} for r in rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in shortened))
    path.with_suffix(".md").write_text(table(rows, common))
    print(table(rows, common))
    print(f"written: {path}, {path.with_suffix('.md')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
