"""Legal calls with one argument broken: each has to end in a sentence that names the argument."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from .functions import OPS, Call, Tensors
from .inputs import Labels, Rows, Scalar
from .judge import Wrong, bits

NUMBERS: tuple[Any, ...] = (math.nan, math.inf, -math.inf, "1", [1.0], True, 1j, 10**400, -(10**400))
INTEGERS: tuple[Any, ...] = (1.5, "1", [1], (0, 1), math.nan, True, 2**70, -(2**70), 1j)
FLAGS: tuple[Any, ...] = (None, 0, 1, "yes", [], 0.5)
NAMES: tuple[Any, ...] = (None, "", "Mean", 1, [], b"mean", math.nan)
#: What breaks an option, by its name; options that are not here are numbers.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "dim": (*INTEGERS[:-3], None, 1j),
    "p": (0, 3, 1.5, "2", None, True, math.nan, [2]),
    "ignore_index": INTEGERS,
    "workspace": INTEGERS,
    "active_limit": (*INTEGERS, -1),
    "reduction": NAMES,
    "label_smoothing": (*NUMBERS, 1.0, -0.1),
    "eps": (*NUMBERS, -1e-12, None),
    "scale": (*NUMBERS, None),
    **dict.fromkeys(
        (
            "normalize_input",
            "normalize",
            "hardest_only",
            "positive_first",
            "add_center_loss",
            "max_positive_only",
            "exp_negative_weight",
        ),
        FLAGS,
    ),
}
#: Options that a call may not break alone, or that are no plain value.
LEFT_OUT = ("margin of normface_loss", "update_center_only of inner_distance")


def broken_options(call: Call) -> list[tuple[str, Any]]:
    names = [name for name in call.options if f"{name} of {call.op}" not in LEFT_OUT]
    return [(name, value) for name in names for value in OPTIONS.get(name, NUMBERS)]


def broken_tensors(name: str, t: Tensor, recipe: Any) -> list[Any]:
    """Values that an argument must not have, in place of the tensor `t`."""
    broken: list[Any] = [[1.0], "x", t.detach().to("meta")]
    if not isinstance(recipe, Scalar):
        broken += [3.0, t.detach().float().numpy()]
    if isinstance(recipe, Rows):
        wider = t.detach().new_zeros(t.shape[0], t.shape[1] + 1)
        broken += [t.detach().long(), t.detach().to(torch.complex64), t.detach().bool()]
        broken += [t.detach()[0] if len(t) else t.detach()[:, 0], t.detach()[None], t.detach().sum(), wider]
        broken += [t.detach().float() if t.dtype == torch.float64 else t.detach().double()]
    elif isinstance(recipe, Labels):
        broken += [
            t.float(),
            t.short(),
            t[:, None],
            torch.cat([t, t, t[:1] if len(t) else torch.zeros(1).long()]),
        ]
        if len(t):
            high, low = t.clone(), t.clone()
            high[-1], low[0] = recipe.classes, -1 if recipe.ignore != -1 else -2
            broken += [low] + ([high] if recipe.ignore != recipe.classes else [])
    else:
        broken += [t.int() if t.dim() == 0 or t.is_floating_point() else t.float()]
        broken += [t[None, None] if t.dim() == 0 else t[None]]  # one of shape [1] is a number
    return broken


@st.composite
def broken_calls(draw: Any, op: str) -> tuple[Call, str, int]:
    """(a call, the argument to break, which of its broken values)."""
    call = OPS[op].draw(draw, 600)
    # The reference, which takes a matrix of distances, leaves bad input to the functions.
    assume(not op.startswith("c_") or "weight" in call.tensors)
    names = [name for name in (*call.tensors, *call.options) if f"{name} of {op}" not in LEFT_OUT]
    return call, draw(st.sampled_from(names)), draw(st.integers(0, 30))


def check_refused(call: Call, name: str, which: int) -> None:
    tensors, options = dict(call.make()), dict(call.options)
    before = {n: bits(t) for n, t in tensors.items()}
    given: Tensors = dict(tensors)
    if name in options:
        values = OPTIONS.get(name, NUMBERS)
        options[name] = value = values[which % len(values)]
    else:
        broken = broken_tensors(name, tensors[name], call.tensors[name])
        if call.op == "normalize":  # any shape and floating dtype, on any device, is fine
            broken = [b for b in broken if not isinstance(b, Tensor) or not b.is_floating_point()]
        given[name] = value = broken[which % len(broken)]
    said = value if not isinstance(value, Tensor) else f"{value.dtype} {list(value.shape)} on {value.device}"
    try:
        OPS[call.op].run(given, options)
    except (TypeError, ValueError, IndexError) as error:
        # Of two arguments that do not match either may be named.
        pair = [n for n in call.tensors if isinstance(call.tensors[n], Rows)] if name in tensors else []
        names = {name, *pair, *(("labels", "same") if pair and name in pair else ())}
        if not any(str(error).startswith(f"{call.op}: expected `{n}` ") for n in names):
            raise Wrong(f"{call.op}, `{name}` = {said}: {type(error).__name__}: {error}") from None
        if len(str(error)) > 300:
            raise Wrong(f"{call.op}, `{name}` = {said}: a sentence of {len(str(error))} characters") from None
    except Exception as error:
        raise Wrong(f"{call.op}, `{name}` = {said}: {type(error).__name__}: {str(error)[:200]}") from None
    else:
        raise Wrong(f"{call.op}: accepted `{name}` = {said}")
    if any(bits(t) != before[n] for n, t in tensors.items()):
        raise Wrong(f"{call.op}: a refused call changed its inputs")
