"""Which module stands for which type of layer."""

from __future__ import annotations

from ..engine.files import clip, quoted
from .accuracy import Accuracy
from .agents import InnerDistance, InnerProduct
from .layer import Layer
from .layers import Normalize, NormalizeRows, Parameter, ScaledNormalize
from .losses import GeneralContrastiveLoss, GeneralTripletLoss, SoftmaxWithLoss
from .margins import CombinedMargin, CosinAddm, LabelSpecificAdd
from .pairs import ContrastiveLoss, TripletLoss
from .scale import ChannelScale, Power, Scale
from .shapes import Concat, Dropout, Eltwise, Flatten, Flip, Silence, Slice, Softmax
from .spec import Report, Spec
from .sphere import LargeMarginInnerProduct, MarginInnerProduct

#: Caffe's name of every type that `load_head` knows.
TYPES: dict[str, type[Layer]] = {
    kind.__name__: kind
    for kind in (
        Accuracy, ChannelScale, CombinedMargin, Concat, ContrastiveLoss, CosinAddm, Dropout, Eltwise, Flatten,
        Flip, GeneralContrastiveLoss, GeneralTripletLoss, InnerDistance, InnerProduct, LabelSpecificAdd,
        LargeMarginInnerProduct, MarginInnerProduct, Normalize, Parameter, Power, Scale, Silence, Slice,
        Softmax, SoftmaxWithLoss, TripletLoss,
    )
}  # fmt: skip
#: What forks call the L2 normalisation of a row.
TYPES |= dict.fromkeys(
    ("L2N", "L2Norm", "L2Normalization", "L2Normalize", "Norm", "NormL2", "Normalization", "NormalizeLayer"),
    NormalizeRows,
)
#: So many layers of an unknown type are named.
MOST_NAMED = 4


def kind_of(spec: Spec) -> type[Layer] | None:
    if spec.type == "Normalize" and spec.has("norm_param"):
        return ScaledNormalize
    return TYPES.get(spec.type)


def refuse_unknown(specs: list[Spec], report: Report) -> None:
    """One problem for every type that is not known, with its layers and their lines."""
    by_type: dict[str, list[Spec]] = {}
    for spec in specs:
        by_type.setdefault(spec.type, []).append(spec)
    for kind, those in by_type.items():
        named = [f"{quoted(spec.name, 30)} (line {spec.lines.line})" for spec in those[:MOST_NAMED]]
        more = f" and {len(those) - MOST_NAMED} more" if len(those) > MOST_NAMED else ""
        report.refuse(
            those[0].lines.of("type"),
            f"the layer type {quoted(clip(kind, 40))} is not part of a NormFace head: layer"
            f"{'s' * (len(those) > 1)} {', '.join(named)}{more}",
        )
