"""The metric losses of Caffe over a matrix of distances, with their released values and gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..agents.options import (
    ContrastiveTermKeywords,
    ContrastiveTerms,
    TripletTermKeywords,
    TripletTerms,
)
from ..distances.ops import with_gradient
from ..engine import checks
from ..engine.arguments import flag
from ..engine.dtypes import accumulator
from ..engine.options import takes
from . import released_losses

if TYPE_CHECKING:
    from typing_extensions import Unpack


@takes(ContrastiveTerms)
def general_contrastive_loss(
    distances: Tensor,
    labels: Tensor,
    *,
    check_finite: bool = False,
    **options: Unpack[ContrastiveTermKeywords],
) -> tuple[Tensor, Tensor]:
    """Caffe's GeneralContrastiveLoss: its value and its gradient, which is not everywhere that of the value.

    ``released_losses`` lists the deviations; ``functional.c_contrastive_loss`` and
    ``reference.contrastive_of_distances`` are the loss without them. The released nets put in front of it

        unit = nf.functional.normalize(x)
        distances = nf.functional.inner_distance(unit, weight, normalize=True)

    Args:
        distances: [N, C].
        labels: [N] int64 or int32 in [0, C); none is ignored.
        check_finite: look for NaN and infinity in the distances first.

    The others are those of ``functional.c_contrastive_loss``.

    Returns:
        The layer's two tops: the loss, a 0-d tensor, and [mean positive hinge, mean negative hinge], without
        a gradient; float64 for float64 input, float32 otherwise. Second derivatives raise.

    Raises:
        TypeError: dtypes, types.
        ValueError: shapes, devices, values; with ``check_finite`` rows that are not finite, by their numbers.
        IndexError: a label out of range.
    """
    op = "general_contrastive_loss"
    chosen = ContrastiveTerms.of(op, options)
    distances, labels = distances_and_labels(op, distances, labels)
    if isinstance(chosen.neg_margin, Tensor):
        checks.same_device(op, "neg_margin", chosen.neg_margin, "distances", distances)
    if flag(op, "check_finite", check_finite):
        checks.finite_rows(op, "distances", distances)
    return released_contrastive(distances, labels, chosen)


@takes(TripletTerms)
def general_triplet_loss(
    distances: Tensor,
    labels: Tensor,
    *,
    check_finite: bool = False,
    **options: Unpack[TripletTermKeywords],
) -> tuple[Tensor, Tensor]:
    """Caffe's GeneralTripletLoss, as :func:`general_contrastive_loss`: (loss, [mean distance to the label's
    agent, mean distance to the others]). The options are those of ``functional.c_triplet_loss``, with the
    defaults there; Caffe's own are ``margin=0.2, add_center_loss=True``."""
    op = "general_triplet_loss"
    chosen = TripletTerms.of(op, options)
    distances, labels = distances_and_labels(op, distances, labels)
    if flag(op, "check_finite", check_finite):
        checks.finite_rows(op, "distances", distances)
    return released_triplet(distances, labels, chosen)


def distances_and_labels(op: str, distances: object, labels: object) -> tuple[Tensor, Tensor]:
    """[N, C], accumulated in at least float32, and [N] in [0, C)."""
    checked = checks.matrix(op, "distances", distances, "[N, C]")
    if checked.shape[1] == 0:
        raise ValueError(
            f"{op}: expected `distances` to have at least one class, got shape {list(checked.shape)}"
        )
    rows = checks.labels(op, labels, checked, checked.shape[1], None)
    return checked.to(accumulator(checked.dtype)), rows


def released_contrastive(
    distances: Tensor, labels: Tensor, options: ContrastiveTerms
) -> tuple[Tensor, Tensor]:
    """(loss, statistics) with options that have been checked."""
    found = released_losses.contrastive(distances.detach(), labels, options)
    return _differentiable("contrastive_of_distances", distances, *found)


def released_triplet(distances: Tensor, labels: Tensor, options: TripletTerms) -> tuple[Tensor, Tensor]:
    found = released_losses.triplet(distances.detach(), labels, options)
    return _differentiable("triplet_of_distances", distances, *found)


def _differentiable(formula: str, distances: Tensor, *found: Any) -> tuple[Tensor, Tensor]:
    """`formula`: the function of ``reference`` that has second derivatives."""
    value, gradient, statistics = found
    return with_gradient(formula, distances, value, gradient), statistics
