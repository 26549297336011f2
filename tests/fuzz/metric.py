"""The losses over agents, the distances, and the losses of pairs and triplets: draws and formulas."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from normface_ext import reference

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
    workspace_of,
)
from .inputs import Factors, Recipe, Rows, Same
from .rounding import Rounding

# the losses over agents -----------------------------------------------------------------------------

THRESHOLDS = st.sampled_from((1.0, 0.5, 1.5, 1.9, 2.5, 0.0, 4.5, -0.5))
WEIGHTS = st.sampled_from((1.0, 1.0, 0.5, 2.0, 0.0))


def draw_agents(draw: Any, budget: int, op: str) -> Call:
    eps = draw(EPS)
    x, weight = draw_pair(draw, budget, eps=eps)
    tensors: dict[str, Recipe] = {"x": x, "weight": weight}
    if draw(st.integers(0, 7)) == 7:  # the matrix of distances itself
        tensors = {"x": Rows(x.rows, weight.rows, x.dtype, ("plain", "ones"), x.seed, x.layout, x.grad)}
    labels = tensors["labels"] = draw_labels(draw, x.rows, weight.rows)
    options: dict[str, Any] = {
        "pos_weight": draw(WEIGHTS),
        "neg_weight": draw(WEIGHTS),
        "hardest_only": draw(st.integers(0, 3)) == 3,
        "positive_first": draw(st.integers(0, 3)) == 3,
        "positive_upper_bound": draw(THRESHOLDS),
        "ignore_index": labels.ignore,
        "reduction": draw(REDUCTION),
        "eps": eps,
        "workspace": draw(st.sampled_from((None, None, "least", "some"))),
        "active_limit": draw(st.sampled_from((None, None, 0, 1, 3, 1000))),
    }
    if op == "c_triplet_loss":
        options |= {"margin": draw(THRESHOLDS), "add_center_loss": draw(st.booleans())}
    else:
        options |= {
            "pos_margin": draw(st.sampled_from((0.0, 0.0, 0.3, -0.1))),
            "neg_margin": draw(THRESHOLDS),
            "max_positive_only": draw(st.integers(0, 3)) == 3,
            "positive_outlier_thresh": draw(st.sampled_from((4.0, 4.0, 1.0, 0.2))),
            "exp_negative_weight": draw(st.integers(0, 3)) == 3,
            "normalize_negative": draw(st.sampled_from((None, None, None, 0.1, 1.0, 30.0))),
        }
    if draw(st.integers(0, 3)) == 3:
        dtypes = ("f64",) if x.dtype == "f64" else ("f32", "f16")
        tensors["sample_weight"] = Factors(
            x.rows, draw(st.sampled_from(dtypes)), "random", draw(inputs.SEEDS)
        )
    return Call(op, tensors, options, draw(inputs.SEEDS))


def run_agents(t: Tensors, o: dict[str, Any], op: str) -> Outputs:
    """(the loss, the statistics); of a matrix of distances there is the loss alone."""
    given = {**o, "workspace": workspace_of(t, o)}
    x, labels, factors = t["x"], t["labels"], {"sample_weight": t.get("sample_weight")}
    if "weight" not in t:
        return (getattr(reference, f"{op[2:-5]}_of_distances")(x, labels, **factors, **given),)
    return tuple(
        getattr(F, name)(x, t["weight"], labels, **factors, **given)
        for name in (op, op.replace("_loss", "_stats"))
    )


def formula_agents(t: Tensors, o: dict[str, Any], r: Rounding, op: str) -> Outputs:
    given = {name: value for name, value in o.items() if name not in ("workspace", "active_limit")}
    formula = formulas.triplet_over_agents if op == "c_triplet_loss" else formulas.contrastive_over_agents
    found = formula(t["x"], t.get("weight"), t["labels"], t.get("sample_weight"), r=r, **given)
    return found if "weight" in t else found[:1]


# distances ------------------------------------------------------------------------------------------


def draw_inner_distance(draw: Any, budget: int) -> Call:
    eps = draw(EPS)
    x, weight = draw_pair(draw, budget, limits=inputs.SQUARABLE, eps=eps)
    tensors: dict[str, Recipe] = {"x": x, "weight": weight}
    options = {"p": draw(st.sampled_from((2, 2, 1))), "normalize": draw(st.integers(0, 3)) == 3, "eps": eps}
    if options["normalize"]:  # what an infinity leaves of the others in its row, 0 or NaN, nobody says
        finite = tuple(kind for kind in weight.kinds if kind != "inf") or ("plain",)
        tensors["weight"] = weight = replace(weight, kinds=finite)
    options["update_center_only"] = draw(st.integers(0, 3)) == 3
    if options["update_center_only"]:
        tensors["labels"] = draw_labels(draw, x.rows, weight.rows, ignored=False)
    return Call("inner_distance", tensors, options, draw(inputs.SEEDS))


def formula_inner_distance(t: Tensors, o: dict[str, Any], r: Rounding) -> Outputs:
    given = {name: o[name] for name in ("p", "normalize", "eps")}
    return (formulas.distances_to_agents(t["x"], t["weight"], labels=t.get("labels"), r=r, **given),)


def _rows_of_tuples(draw: Any, budget: int, names: tuple[str, ...]) -> dict[str, Recipe]:
    n, d, _ = draw(inputs.sizes(budget))
    first = draw(st.sampled_from(tuple(inputs.DTYPES)))
    tensors: dict[str, Recipe] = {}
    for name in names:
        dtype = first if first == "f64" else draw(st.sampled_from((first, first, "f32", "f16", "bf16")))
        kinds = draw(inputs.kinds(dtype, 1.0, inputs.SQUARABLE))
        tensors[name] = Rows(n, d, dtype, kinds, draw(inputs.SEEDS), draw(inputs.layouts()), draw(GRAD))
    return tensors


def draw_pairs(draw: Any, budget: int) -> Call:
    tensors = _rows_of_tuples(draw, budget, ("a", "b"))
    tensors["same"] = Same(tensors["a"].rows, draw(inputs.SEEDS), draw(st.booleans()))
    options = {
        "margin": draw(st.sampled_from((1.0, 0.2, 30.0, 0.0, -1.0, 1e6))),
        "reduction": draw(REDUCTION),
    }
    return Call("pair_contrastive_loss", tensors, options, draw(inputs.SEEDS))


def draw_triplets(draw: Any, budget: int) -> Call:
    tensors = _rows_of_tuples(draw, budget, ("anchor", "positive", "negative"))
    options = {"margin": draw(st.sampled_from((0.2, 1.0, 100.0, 0.0, -1.0))), "reduction": draw(REDUCTION)}
    return Call("triplet_loss", tensors, options, draw(inputs.SEEDS))
