"""A call: what it is made of, and what all families draw alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st
from torch import Tensor

import normface_ext as nf

from . import inputs
from .inputs import Labels, Recipe, Rows, Scalar
from .rounding import Rounding

F = nf.functional
Tensors = dict[str, Tensor | None]
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Call:
    """One call: recipes of its tensors, its other arguments, and the seed of the gradients that go back."""

    op: str
    tensors: dict[str, Recipe]
    options: dict[str, Any] = field(default_factory=dict)
    upstream: int = 0

    def code(self, lane: str) -> str:
        """Lines of Python that repeat the check of this call, with PYTHONPATH=tests."""
        return f"from fuzz.inputs import *\nfrom fuzz.calls import Call, check\ncheck({self!r}, {lane!r})"

    def make(self) -> Tensors:
        return {name: recipe.make() for name, recipe in self.tensors.items()}


@dataclass(frozen=True)
class Op:
    run: Callable[[Tensors, dict[str, Any]], Outputs]
    formula: Callable[[Tensors, dict[str, Any], Rounding], Outputs]
    draw: Callable[..., Call]


GRAD = st.booleans() | st.just(True)
EPS = st.sampled_from((1e-12,) * 4 + (1e-6, 0.5, 0.0))
REDUCTION = st.sampled_from(("mean", "sum", "none"))


def draw_pair(
    draw: Any, budget: int, *, limits: dict[str, int] = inputs.EXPONENTS, eps: float = 1e-12
) -> tuple[Rows, Rows]:
    """Features and weight."""
    n, d, c = draw(inputs.sizes(budget))
    dtype = draw(st.sampled_from(("f32", "f32", "f64", "f16", "bf16")))
    other = dtype if dtype == "f64" else draw(st.sampled_from((dtype, dtype, "f32", "f16", "bf16")))
    made = []
    for rows, kind in ((n, dtype), (c, other)):
        kinds = draw(inputs.kinds(kind, eps, limits))
        made.append(Rows(rows, d, kind, kinds, draw(inputs.SEEDS), draw(inputs.layouts()), draw(GRAD)))
    return made[0], made[1]


def draw_labels(draw: Any, count: int, classes: int, ignored: bool = True) -> Labels:
    kinds = ("random", "same", "ends") + (("some ignored", "ignored") if ignored else ())
    ignore = (
        draw(st.sampled_from((-100, -100, -1, 0, classes - 1, 2**40, -(2**63), 2**63 - 1)))
        if ignored
        else -100
    )
    return Labels(
        count, classes, draw(st.sampled_from(kinds)), ignore, draw(inputs.SEEDS), draw(st.booleans())
    )


def draw_scale(draw: Any, values: tuple[float, ...]) -> Scalar | float:
    value = draw(st.sampled_from(values))
    if draw(st.booleans()):
        return Scalar(value, draw(st.sampled_from(("f32", "f32", "f64", "bf16"))), draw(GRAD))
    return value


def with_scale(tensors: dict[str, Recipe], options: dict[str, Any], scale: Scalar | float) -> None:
    if isinstance(scale, Scalar):
        tensors["scale"] = scale
    else:
        options["scale"] = scale


def scale_of(t: Tensors, o: dict[str, Any]) -> Tensor | float:
    given = t.get("scale")
    return o["scale"] if given is None else given


def workspace_of(t: Tensors, o: dict[str, Any]) -> Any:
    """What the plan calls the "least", or twice that, "some"; anything else is itself."""
    given, x, weight = o["workspace"], t["x"], t.get("weight")
    if not (isinstance(given, str) and given in ("least", "some")):
        return given
    if (
        not all(isinstance(m, Tensor) and m.dim() == 2 and m.is_floating_point() for m in (x, weight))
        or 0 in weight.shape
    ):
        return None
    centers, device = o.get("sub_centers", 1), nf.engine.calls.plan_device(x)
    if not isinstance(centers, int) or centers < 1:  # which the op is to refuse
        return None
    shape = len(x), x.shape[1], weight.shape[0] // centers, nf.engine.calls.product_dtype(x, weight)
    try:
        nf.plan(*shape, device, workspace=0, sub_centers=centers)
    except ValueError as error:
        least = int(str(error).split("at least ")[1].split()[0])
        return least if given == "least" else 2 * least
    raise AssertionError("a plan without any workspace")
