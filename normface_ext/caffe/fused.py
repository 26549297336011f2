"""A chain of layers from the features to a loss, without the N x C matrix between."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import functional
from ..softmax.batch_margins import Psi
from ..softmax.margins import Margin
from .agents import Agents
from .layer import Layer
from .losses import DistanceLoss, SoftmaxWithLoss
from .margins import TargetMargin
from .scale import Scale
from .sphere import MarginInnerProduct


def fused_tops(chain: Sequence[Layer], bottoms: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The tops of a fused step: a product, what lies between, a loss; bottoms are the features, the weight
    where it is one, and the labels."""
    agents, loss, labels = chain[0], chain[-1], bottoms[-1]
    assert isinstance(agents, Agents)
    if isinstance(agents, MarginInnerProduct):
        return _angular(agents, loss, bottoms[0], labels)
    if bottoms[0].dim() > 2 and bottoms[0][:1, :1].numel() > 1:
        # Normalised at every position and then flattened, which is not one norm per row.
        units = [functional.normalize(bottom, 1, 2, agents.eps) for bottom in bottoms[:-1]]
        scores = agents(*units)[0]
        for layer in chain[1:-1]:
            scores = layer(scores, labels)[0] if isinstance(layer, TargetMargin) else layer(scores)[0]
        tops: tuple[Tensor, ...] = loss(scores, labels)
        return tops
    x, weight = agents.operands(tuple(bottoms[:-1]))
    if isinstance(loss, DistanceLoss):
        return loss.tops(x, weight, labels, agents.eps)
    assert isinstance(loss, SoftmaxWithLoss)
    scale: Tensor | None = None
    margin: Margin | None = None
    for layer in chain[1:-1]:
        if isinstance(layer, Scale):
            scale = layer.bounded_scale()
        elif isinstance(layer, TargetMargin):
            margin = layer.margin(labels, scale)
    return loss.tops(x, weight, labels, agents.eps, 1.0 if scale is None else scale, margin)


def _angular(agents: MarginInnerProduct, loss: Layer, features: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """The features' norms are scales of their rows."""
    assert isinstance(loss, SoftmaxWithLoss)
    x, weight = agents.operands((features,))
    blend = agents.weight_of_cosine(labels)
    norms = functional.normalize(x, 1, 2, agents.eps, return_norm=True)[1].squeeze(1)
    psi: Psi | None = None if agents.m == 1 else lambda cosine: agents.psi(cosine, blend)
    (value,) = loss.tops(x, weight, labels, agents.eps, norms, psi)
    return agents.with_lambda(value, blend)
