"""Drawn calls of every function and layer against the formulas; ``pytest --fuzz`` makes 100,000 of them.

What a seed draws is the same on every machine. A call that fails is made as small as possible and printed
as lines of Python that repeat it, to be run with PYTHONPATH=tests.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fuzz import calls, functions, illegal, layers
from fuzz.functions import OPS, Call
from fuzz.inputs import Labels, Rows
from fuzz.judge import Wrong
from fuzz_options import calls_of
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from lanes import LANES, Lane

#: Of all calls: what a lane's share is, and the most numbers in a tensor there.
SHARES = {"cpu": (0.80, 4000), "emulated": (0.06, 700), "cuda": (0.80, 4000)}
LAYER_SHARE, REFUSED_SHARE = 0.04, 0.10
every_op = pytest.mark.parametrize("op", OPS)
some_lanes = pytest.mark.parametrize(
    "fuzzed", [lane for lane in LANES if lane.name in SHARES], ids=lambda lane: lane.name
)


def draw(config: pytest.Config, share: float, check: Callable[[Any], None]) -> None:
    """Calls check(data) for its share of the calls, the ops having equal parts."""
    seed = config.getoption("--fuzz-seed")
    every = settings(
        max_examples=max(1, round(calls_of(config) * share / len(OPS))),
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    print(f"--fuzz-seed {seed}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are small
    try:
        seeded(seed)(every(given(st.data())(check)))()
    finally:
        torch.set_num_threads(threads)


def report(error: Exception, code: str) -> AssertionError:
    return AssertionError(f"{error}\n\nTo repeat it, with PYTHONPATH=tests:\n\n{code}\n")


@every_op
@some_lanes
def test_functions(op: str, fuzzed: Lane, request: pytest.FixtureRequest) -> None:
    share, budget = SHARES[fuzzed.name]

    def check(data: st.DataObject) -> None:
        call = OPS[op].draw(data.draw, budget)
        try:
            calls.check(call, fuzzed.name)
        except Exception as error:
            raise report(error, call.code(fuzzed.name)) from None

    draw(request.config, share, check)


@every_op
def test_layers(op: str, request: pytest.FixtureRequest) -> None:
    def check(data: st.DataObject) -> None:
        call = OPS[op].draw(data.draw, 1000)
        if not layers.usable(call):
            return
        try:
            layers.check_layer(call)
        except Exception as error:
            code = call.code("cpu").replace("check(", "check_layer(").replace(", 'cpu'", "")
            raise report(error, f"from fuzz.layers import check_layer\n{code}") from None

    draw(request.config, LAYER_SHARE, check)


@every_op
def test_refused_calls(op: str, request: pytest.FixtureRequest) -> None:
    def check(data: st.DataObject) -> None:
        broken = data.draw(illegal.broken_calls(op))
        try:
            illegal.check_refused(*broken)
        except Exception as error:
            head = "from fuzz.inputs import *\nfrom fuzz.functions import Call"
            code = f"{head}\nfrom fuzz.illegal import check_refused\ncheck_refused(*{broken!r})"
            raise report(error, code) from None

    draw(request.config, REFUSED_SHARE, check)


# The fuzzer finds what is wrong ---------------------------------------------------------------------

PLAIN = {
    "norm_linear": Call(
        "norm_linear",
        {"x": Rows(5, 7), "weight": Rows(6, 7, seed=1)},
        {"scale": 8.0, "eps": 1e-12, "normalize_input": True},
    ),
    "normalize": Call("normalize", {"x": Rows(5, 7)}, {"dim": 1, "p": 2, "eps": 1e-12}),
    "inner_distance": Call(
        "inner_distance",
        {"x": Rows(5, 7), "weight": Rows(6, 7, seed=1)},
        {"p": 2, "normalize": False, "update_center_only": False, "eps": 1e-12},
    ),
}


TICKS = itertools.count()


@pytest.mark.parametrize("op", PLAIN)
@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda out: out * (1 + 1e-5), "times the allowed"),
        (lambda out: out + 1e-5 * out.detach()[0].abs().max(), "times the allowed"),
        (
            lambda out: out - out.detach() + out.detach() * (1 + next(TICKS) * 1e-6),
            "other bits|times the allowed|whether gradients",
        ),
        (lambda out: out.detach() + 0 * out, "gradient of"),
        (lambda out: out.detach() + (out - out.detach()) * (1 + 1e-5), "gradient of"),
        (lambda out: torch.where(out == out.max(), torch.nan, out), "out of place"),
        (lambda out: out[:-1], "shape"),
        (lambda out: out.detach(), "no gradient"),
    ],
)
def test_what_is_slightly_wrong_is_found(op, spoil, sentence, monkeypatch):
    right = OPS[op]
    calls.check(PLAIN[op], "cpu")
    wrong = functions.Op(lambda t, o: tuple(spoil(out) for out in right.run(t, o)), right.formula, right.draw)
    monkeypatch.setitem(OPS, op, wrong)
    with pytest.raises(Wrong, match=sentence):
        calls.check(PLAIN[op], "cpu")


def test_a_changed_input_is_found(monkeypatch):
    right = OPS["norm_linear"]

    def run(t, o):
        with torch.no_grad():
            t["x"].mul_(1)
        return right.run(t, o)

    monkeypatch.setitem(OPS, "norm_linear", functions.Op(run, right.formula, right.draw))
    with pytest.raises(Wrong, match="`x` was changed"):
        calls.check(PLAIN["norm_linear"], "cpu")


def test_a_poisoned_row_stays_where_it_is():
    """A NaN row that a result does not show is found, and so is one that spreads."""
    call = Call("normalize", {"x": Rows(4, 3, kinds=("plain", "nan"))}, {"dim": 1, "p": 2, "eps": 1e-12})
    calls.check(call, "cpu")
    right = OPS["normalize"]
    for spoil, sentence in (
        (lambda y: y.nan_to_num(0.0), "should not be"),
        (lambda y: y + 0 * y.sum(), "out of place"),
    ):
        spoiled = functions.Op(
            lambda t, o, spoil=spoil: tuple(map(spoil, right.run(t, o))), right.formula, right.draw
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(OPS, "normalize", spoiled)
            with pytest.raises(Wrong, match=sentence):
                calls.check(call, "cpu")


def test_a_failing_call_prints_what_repeats_it(monkeypatch):
    call = PLAIN["norm_linear"]
    right = OPS["norm_linear"]
    run = lambda t, o: (1.001 * right.run(t, o)[0],)  # noqa: E731
    monkeypatch.setitem(OPS, "norm_linear", functions.Op(run, right.formula, right.draw))
    with pytest.raises(Wrong) as first:
        calls.check(call, "cpu")
    with pytest.raises(Wrong, match=f"^{re.escape(str(first.value))}$"):
        exec(call.code("cpu"), {})


def test_recipes_make_the_same_tensor_every_time():
    for layout in ("contiguous", "transposed", "sliced", "offset", "expanded"):
        rows = Rows(5, 4, "bf16", ("mixed", "denormal", "spike"), 3, layout)
        assert torch.equal(rows.make(), rows.make()) and rows.make().is_leaf
        assert rows.make().is_contiguous() == (layout in ("contiguous", "offset"))
    labels = Labels(9, 4, "some ignored", -1, 5, True).make()
    assert not labels.is_contiguous() and set(labels.tolist()) <= {-1, 0, 1, 2, 3} and -1 in labels
