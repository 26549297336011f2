"""What the NormFace paper (section 3.2) proves about scale and loss, as functions.

Pure arithmetic, no tensors. ``num_classes`` is n, ``scale`` is s = l**2, the squared length both sides
are normalised to.
"""

from __future__ import annotations

import math

from .engine.arguments import NOT_NEGATIVE, POSITIVE, number, size
from .softmax.margins import Margin, margin_argument

#: ``scale="auto"`` takes the smallest scale whose bound is this low: 12 for 10 classes, 21 for the
#: 10,575 of CASIA-WebFace (the paper: "say 20 or 30"), 25 for a million.
AUTO_SCALE_BOUND = 1e-5

#: What the papers of ArcFace and CosFace, and most after them, take for every number of classes.
MARGIN_SCALE = Margin.least_scale


def loss_lower_bound(num_classes: int, scale: float = 1.0) -> float:
    """The least softmax loss balanced classes can reach: log(1 + (n-1) exp(-s n/(n-1))).

    Proposition 2 of the paper. It is attained when the n weights form a regular simplex, which needs
    n <= D + 1; otherwise the loss stays above it. 8.27 for n = 10,575 and s = 1.

    Raises:
        TypeError: ``num_classes`` that is no int, a number that is none.
        ValueError: ``num_classes`` below 1, or a scale that is negative or not finite.
    """
    n = size("loss_lower_bound", "num_classes", num_classes)
    scale = number("loss_lower_bound", "scale", scale, NOT_NEGATIVE)
    if n == 1:
        return 0.0
    return math.log1p((n - 1) * math.exp(-scale * n / (n - 1)))


def scale_for_bound(num_classes: int, bound: float) -> float:
    """The scale whose lower bound is ``bound``: s = (n-1)/n * ln((n-1) / (exp(bound) - 1)).

    The inverse of ``loss_lower_bound``. Zero where even s = 0 stays below ``bound``.

    Raises:
        TypeError: ``num_classes`` that is no int, a number that is none.
        ValueError: ``num_classes`` below 1, or a bound that is not a positive finite number.
    """
    n = size("scale_for_bound", "num_classes", num_classes)
    bound = number("scale_for_bound", "bound", bound, POSITIVE)
    if n == 1:
        return 0.0
    # ln(exp(b) - 1) without overflow for a large b.
    log_excess = bound + math.log1p(-math.exp(-bound)) if bound > 1 else math.log(math.expm1(bound))
    return max(0.0, (n - 1) / n * (math.log(n - 1) - log_excess))


def max_probability(num_classes: int, scale: float = 1.0) -> float:
    """The largest probability the target can get: e^s / (e^s + (n-1) e^-s).

    Equation 5 of the paper, all other cosines at -1: 0.45 for n = 10 and 0.007 for n = 1000 at s = 1.

    Raises:
        TypeError: ``num_classes`` that is no int, a number that is none.
        ValueError: ``num_classes`` below 1, or a scale that is negative or not finite.
    """
    n = size("max_probability", "num_classes", num_classes)
    scale = number("max_probability", "scale", scale, NOT_NEGATIVE)
    return 1.0 / (1.0 + (n - 1) * math.exp(-2.0 * scale))


def auto_scale(num_classes: int, margin: object = None) -> float:
    """What ``scale="auto"`` means.

    Without a margin the scale whose loss bound is ``AUTO_SCALE_BOUND``, at least 1. A margin takes psi(1) =
    cos(m2) - m3 as the largest target cosine, so that the loss needs the larger scale s / psi(1) to come as
    low; and no recipe with a margin trains below ``MARGIN_SCALE``, which is the least that it gives (256 with
    ``CircleSoftmax``). Where psi(1) <= 0, or the margin is not three numbers (it is adaptive, or one per
    class), it gives just that.

    Args:
        num_classes: n.
        margin: what ``margin=`` of ``NormFaceLoss`` takes.

    Raises:
        TypeError: ``num_classes`` that is no int, a margin that is none.
        ValueError: ``num_classes`` below 1.
    """
    given = margin_argument("auto_scale", "margin", margin)
    plain = scale_for_bound(num_classes, AUTO_SCALE_BOUND)
    if given is None:
        return max(1.0, plain)
    numbers = [getattr(margin, name, None) for name in ("m1", "m2", "m3")]
    factor, angle, cosine = (float(m) if isinstance(m, (int, float)) else math.nan for m in numbers)
    if (factor, angle, cosine) == (1, 0, 0):
        return max(1.0, plain)
    most = math.cos(angle) - cosine  # NaN, where there are no numbers, is not above 0
    return max(given.least_scale, plain / most) if most > 0 else given.least_scale
