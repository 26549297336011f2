"""normalize, norm_linear and normface_loss: what calls are drawn from, and their formulas."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

import normface_ext as nf

from . import formulas, inputs
from .call import (
    EPS,
    GRAD,
    REDUCTION,
    Call,
    F,
    Outputs,
    Tensors,
    draw_labels,
    draw_pair,
    draw_scale,
    scale_of,
    with_scale,
    workspace_of,
)
from .inputs import Factors, Recipe, Rows
from .rounding import Rounding

# normalize and norm_linear --------------------------------------------------------------------------


def draw_normalize(draw: Any, budget: int) -> Call:
    n, d, _ = draw(inputs.sizes(budget))
    dtype, eps = draw(st.sampled_from(tuple(inputs.DTYPES))), draw(EPS)
    kinds = draw(inputs.kinds(dtype, eps))
    x = Rows(n, d, dtype, kinds, draw(inputs.SEEDS), draw(inputs.layouts()), draw(GRAD))
    options = {
        "dim": draw(st.sampled_from((1, 1, -1, 0, -2))),
        "p": draw(st.sampled_from((2, 1))),
        "eps": eps,
    }
    # A column may be all zero where eps is 0, and what an empty sum is divided by is nobody's business.
    if eps == 0 or n == 0:
        options["dim"] = 1
    return Call("normalize", {"x": x}, options, draw(inputs.SEEDS))


def formula_normalize(t: Tensors, o: dict[str, Any], r: Rounding) -> Outputs:
    if t["x"].shape[0] == 0:
        return t["x"] * 1, t["x"].sum(o["dim"], keepdim=True)
    return formulas.unit(t["x"], o["dim"], o["p"], o["eps"], r)


def draw_norm_linear(draw: Any, budget: int) -> Call:
    eps = draw(EPS)
    x, weight = draw_pair(draw, budget, eps=eps)
    tensors: dict[str, Recipe] = {"x": x, "weight": weight}
    options = {"eps": eps, "normalize_input": draw(st.booleans() | st.just(True))}
    with_scale(tensors, options, draw_scale(draw, (1.0, 30.0, 1e-3, -7.0, 0.0)))
    return Call("norm_linear", tensors, options, draw(inputs.SEEDS))


# the softmax head -----------------------------------------------------------------------------------

MARGINS = ((1.0, 0.0, 0.0),) * 3 + (
    (1.0, 0.0, 0.35),
    (1.0, 0.5, 0.0),
    (1.0, 3.0, 0.0),
    (1.2, 0.3, 0.1),
    (4.0, 0.0, 0.0),
    (0.9, 0.4, 0.15),
    (0.5, 0.0, 0.0, "none"),
    (1.0, 0.5, 0.1, "join"),
    (1.5, 0.2, 0.0, "none"),
    (2.0, 0.3, 0.0, "shift"),
)
SCALES = (30.0, 30.0, 64.0, 1.0, 1e-3, 200.0, 1000.0, -7.0, 0.0)


def draw_normface_loss(draw: Any, budget: int) -> Call:
    eps = draw(EPS)
    x, weight = draw_pair(draw, budget, eps=eps)
    tensors: dict[str, Recipe] = {"x": x, "weight": weight}
    centers = draw(st.sampled_from([k for k in (1, 1, 1, 2, 3, 5) if weight.rows % k == 0]))
    classes = weight.rows // centers
    labels = tensors["labels"] = draw_labels(draw, x.rows, classes)
    options = {
        "margin": draw(st.sampled_from(MARGINS)),
        "sub_centers": centers,
        "reduction": draw(REDUCTION),
        "ignore_index": labels.ignore,
        "eps": eps,
        "label_smoothing": draw(st.sampled_from((0.0, 0.0, 0.1, 0.9))) if centers == 1 else 0.0,
        "workspace": draw(st.sampled_from((None, None, "least", "some"))),
    }
    # What a row of weight zero costs that holds no numbers, nobody says.
    wholesome = not x.has(*inputs.POISON) and not weight.has(*inputs.POISON)
    kinds = ("random", "some zero") if wholesome else ("random",)
    if draw(st.integers(0, 3)) == 3:
        tensors["sample_weight"] = Factors(
            x.rows, draw(_factor_dtypes(x)), draw(st.sampled_from(kinds)), draw(inputs.SEEDS)
        )
    if draw(st.integers(0, 3)) == 3:
        # With smoothing the loss of a row whose class has weight 0 is not nothing, but its mean is over none.
        kinds = kinds if options["label_smoothing"] == 0 else ("random",)
        tensors["class_weight"] = Factors(
            classes, draw(_factor_dtypes(x)), draw(st.sampled_from(kinds)), draw(inputs.SEEDS)
        )
    with_scale(tensors, options, draw_scale(draw, SCALES))
    return Call("normface_loss", tensors, options, draw(inputs.SEEDS))


def _factor_dtypes(x: Rows) -> st.SearchStrategy[str]:
    return st.sampled_from(("f64",) if x.dtype == "f64" else ("f32", "f32", "f16", "f64"))


def run_normface_loss(t: Tensors, o: dict[str, Any]) -> Outputs:
    given = {name: o[name] for name in ("sub_centers", "reduction", "ignore_index", "eps", "label_smoothing")}
    return (
        F.normface_loss(
            t["x"],
            t["weight"],
            t["labels"],
            scale_of(t, o),
            margin=nf.CombinedMargin(*o["margin"][:3], guard=(*o["margin"], None)[3]),
            sample_weight=t.get("sample_weight"),
            class_weight=t.get("class_weight"),
            workspace=workspace_of(t, o),
            **given,
        ),
    )


def formula_normface_loss(t: Tensors, o: dict[str, Any], r: Rounding) -> Outputs:
    given = {name: o[name] for name in ("margin", "sub_centers", "reduction", "ignore_index", "eps")}
    weights = {name: t.get(name) for name in ("sample_weight", "class_weight")}
    s = scale_of(t, o)
    return (
        formulas.softmax_loss(
            t["x"], t["weight"], t["labels"], s, smoothing=o["label_smoothing"], r=r, **given, **weights
        ),
    )
