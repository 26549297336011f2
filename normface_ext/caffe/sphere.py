"""The layers of SphereFace and L-Softmax: products with an angular margin on the label, blended with the
plain product by a weight that a schedule lowers."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from .. import functional
from ..engine import checks
from ..softmax.sphereface import annealed
from .agents import Agents, UnitRows
from .layer import MovingLayer
from .margins import with_target
from .spec import Context, Spec


def angular(cosine: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """phi = (-1)^k cos(m theta) - 2k with k = floor(m theta / pi), and d phi / d cos."""
    c = cosine
    polynomial, slope = {
        1: (c, torch.ones_like(c)),
        2: (2 * c * c - 1, 4 * c),
        3: ((4 * c * c - 3) * c, 12 * c * c - 3),
        4: (8 * c * c * (c * c - 1) + 1, (32 * c * c - 16) * c),
    }[m]
    # cos(j pi / m): the cosines below which k is at least j.
    steps = {1: (), 2: (0.0,), 3: (0.5, -0.5), 4: (math.sqrt(0.5), 0.0, -math.sqrt(0.5))}[m]
    k = torch.zeros_like(c)
    for step in steps:
        k = k + (c < step)
    sign = 1 - 2 * (k % 2)
    return sign * polynomial - 2 * k, sign * slope


class MarginInnerProduct(Agents, MovingLayer):
    """|x| cos theta_j, and for the label |x| (lambda cos theta + phi(theta)) / (1 + lambda), with
    lambda = max(lambda_min, base (1 + gamma t)^-power) in pass t (A-Softmax). A second top has lambda.

    t is counted in training and saved; a pass in evaluation has the lambda of the next one in training. The
    gradient is that of the value; mode "caffe" has that of the released layer, which is that of no function.
    """

    BOTTOMS: ClassVar[tuple[int, int]] = (2, 2)
    LABELS: ClassVar[tuple[int, ...]] = (1,)
    BOTTOM_NAMES: ClassVar[str] = "the second is the label"
    TOPS: ClassVar[tuple[int, int]] = (1, 2)
    STATISTICS: ClassVar[tuple[int, ...]] = (1,)
    BLOCKS: ClassVar[tuple[str, ...]] = ("margin_inner_product_param",)
    BLOBS: ClassVar[tuple[str, ...]] = ("weight",)
    SIZE: ClassVar[str] = "margin_inner_product_param.num_output"
    block = "margin_inner_product_param"
    NORMALIZED: ClassVar[bool] = True  # the rows of the weight
    iteration: Tensor

    base: float
    gamma: float
    power: float
    least: float

    def __init__(self, spec: Spec, context: Context) -> None:
        super().__init__(spec, context, True, self.NORMALIZED)
        self.m: int = int(spec.get(f"{self.block}.type")) + 1
        names = ("base", "gamma", "power", "lambda_min")
        self.base, self.gamma, self.power, self.least = (
            float(spec.get(f"{self.block}.{name}")) for name in names
        )
        if not self.least > -1:
            spec.refuse(f"expected `lambda_min` > -1, got {self.least:g}", f"{self.block}.lambda_min")
        self.return_lambda: bool = len(spec.tops) == 2
        if self.NORMALIZED and not context.caffe and self.m > 1:
            spec.note("has the gradient of its value; Caffe's backward pass has another (mode='caffe')")
        first = int(spec.get(f"{self.block}.iteration"))
        self.register_buffer("iteration", torch.tensor(first, dtype=torch.int64, device=context.device))

    def weight_of_cosine(self, labels: Tensor) -> Tensor:
        """lambda of this pass, a 0-d float64 tensor; the schedule moves on."""
        passed, moves = self.state_of(labels, self.iteration)
        if moves:
            self.iteration += 1
        return annealed(passed + 1, self.base, self.gamma, self.power, self.least)

    def psi(self, cosine: Tensor, blend: Tensor) -> Tensor:
        """What stands for the cosine of the label."""
        if self.m == 1:
            return cosine
        blend = blend.to(cosine.dtype)
        return (blend * cosine + angular(cosine, self.m)[0]) / (1 + blend)

    def with_lambda(self, top: Tensor, blend: Tensor) -> tuple[Tensor, ...]:
        return (top, blend.to(top.dtype).reshape(1)) if self.return_lambda else (top,)

    def forward(self, features: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        x, weight = self.operands((features,))
        blend = self.weight_of_cosine(labels)
        norms = functional.normalize(x, 1, 2, self.eps, return_norm=True)[1].squeeze(1)
        if self.NORMALIZED and not self.hard:
            scores = functional.norm_linear(x, weight, normalize_input=False, eps=self.eps)
            lengths = torch.ones_like(weight[:, 0])
        else:
            w = UnitRows.apply(weight, self.eps) if self.NORMALIZED else weight
            scores = linear(x, w.to(x.dtype))
            lengths = functional.normalize(w, 1, 2, self.eps, return_norm=True)[1].squeeze(1)
        rows = checks.label_rows(self._get_name(), labels, scores)
        if self.hard and self.NORMALIZED:
            return self.with_lambda(self._released(x, w, rows, scores.detach(), norms.detach(), blend), blend)

        def change(target: Tensor, label: Tensor) -> Tensor:
            length = (norms * lengths[label]).to(target.dtype)
            return length * self.psi(target / length, blend)

        return self.with_lambda(with_target(scores, rows, change), blend)

    def _released(
        self, x: Tensor, w: Tensor, labels: Tensor, scores: Tensor, norms: Tensor, blend: Tensor
    ) -> Tensor:
        """Caffe's value and its gradient: for the weight that of the plain product; for the feature, the two
        parts of the label's slope, along w and along x, divided by the length of the pair."""
        blend = blend.to(x.dtype)
        of_weight, of_features = linear(x.detach(), w.to(x.dtype)), linear(x, w.detach().to(x.dtype))
        squared = (x * x.detach()).sum(1)

        def value(target: Tensor, _: Tensor) -> Tensor:
            return norms * self.psi(target / norms, blend)

        def along(target: Tensor, _: Tensor) -> Tensor:
            cosine = target.detach() / norms
            phi, slope = angular(cosine, self.m)
            inward = (phi - cosine * slope) / norms
            length = torch.hypot(slope, inward)
            pulled = (slope * target + inward * squared) / length
            return (blend * target + pulled) / (1 + blend)

        of_features = with_target(of_features, labels, along)
        gradient: Tensor = of_weight - of_weight.detach() + of_features - of_features.detach()
        return with_target(scores, labels, value) + gradient


class LargeMarginInnerProduct(MarginInnerProduct):
    """The same with the length of the label's weight row: |w_j| |x| cos theta_j (L-Softmax)."""

    BLOCKS: ClassVar[tuple[str, ...]] = ("largemargin_inner_product_param",)
    SIZE: ClassVar[str] = "largemargin_inner_product_param.num_output"
    block = "largemargin_inner_product_param"
    NORMALIZED: ClassVar[bool] = False
