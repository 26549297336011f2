"""The functions under test: how each is called, its formula, and what its calls are drawn from."""

from __future__ import annotations

from . import formulas, metric, softmax
from .call import Call, F, Op, Outputs, Tensors, scale_of

__all__ = ["OPS", "Call", "Op", "Outputs", "Tensors"]

OPS: dict[str, Op] = {
    "normalize": Op(
        lambda t, o: F.normalize(t["x"], o["dim"], o["p"], o["eps"], return_norm=True),
        softmax.formula_normalize,
        softmax.draw_normalize,
    ),
    "norm_linear": Op(
        lambda t, o: (
            F.norm_linear(
                t["x"], t["weight"], scale_of(t, o), eps=o["eps"], normalize_input=o["normalize_input"]
            ),
        ),
        lambda t, o, r: (
            formulas.scaled_cosines(t["x"], t["weight"], scale_of(t, o), o["eps"], o["normalize_input"], r),
        ),
        softmax.draw_norm_linear,
    ),
    "normface_loss": Op(softmax.run_normface_loss, softmax.formula_normface_loss, softmax.draw_normface_loss),
    **{
        op: Op(
            lambda t, o, op=op: metric.run_agents(t, o, op),
            lambda t, o, r, op=op: metric.formula_agents(t, o, r, op),
            lambda draw, budget, op=op: metric.draw_agents(draw, budget, op),
            detached=1,
        )
        for op in ("c_contrastive_loss", "c_triplet_loss")
    },
    "inner_distance": Op(
        lambda t, o: (F.inner_distance(t["x"], t["weight"], labels=t.get("labels"), **o),),
        metric.formula_inner_distance,
        metric.draw_inner_distance,
    ),
    "pair_contrastive_loss": Op(
        lambda t, o: (F.pair_contrastive_loss(t["a"], t["b"], t["same"], **o),),
        lambda t, o, r: (formulas.contrastive_of_pairs(t["a"], t["b"], t["same"], r=r, **o),),
        metric.draw_pairs,
    ),
    "triplet_loss": Op(
        lambda t, o: (F.triplet_loss(t["anchor"], t["positive"], t["negative"], **o),),
        lambda t, o, r: (formulas.triplets_of_rows(t["anchor"], t["positive"], t["negative"], r=r, **o),),
        metric.draw_triplets,
    ),
}
