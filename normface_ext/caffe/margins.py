"""Layers that change the label's score before the softmax: LabelSpecificAdd (AM-Softmax), CombinedMargin and
CosinAddm (ArcFace)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import reference
from ..engine import checks
from ..softmax import margins as values
from ..softmax.margins import Margin
from .layer import Layer, MovingLayer
from .spec import Context, Spec


def with_target(scores: Tensor, labels: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Scores [N, C] with those of the labels [N] changed: (them [N], the labels) -> new ones. A row whose
    label is no class stays as it is: the loss ignores or refuses it."""
    kept = (labels >= 0) & (labels < scores.shape[1])
    safe = torch.where(kept, labels, 0)
    target = scores.gather(1, safe[:, None]).squeeze(1)
    changed = torch.where(kept, change(target, safe).to(scores.dtype), target)
    return scores.scatter(1, safe[:, None], changed[:, None])


class TargetMargin(Layer):
    """A layer that changes the scores of the labels."""

    BOTTOMS: ClassVar[tuple[int, int]] = (2, 2)
    LABELS: ClassVar[tuple[int, ...]] = (1,)
    BOTTOM_NAMES: ClassVar[str] = "the second is the label"

    def width(self, width: int | None) -> int | None:
        return width

    def fuses(self, scaled: bool) -> bool:
        """Whether ``margin`` says what the layer does to cosines or (scaled) to a scale times them."""
        return not scaled

    def margin(self, labels: Tensor, scale: Tensor | None) -> Margin | None:
        """The layer as a margin of the cosine, which was multiplied by `scale` before it."""
        raise NotImplementedError

    def scores_and_labels(self, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        checked = checks.matrix(self._get_name(), "bottom 0", scores, "[N, C]")
        return checked, checks.label_rows(self._get_name(), labels, checked)


class LabelSpecificAdd(TargetMargin, MovingLayer):
    """The label's score plus a bias (AM-Softmax: -m), in training only. Mode "caffe" adds it only to scores
    above -bias, as the released layer does. With ``bias_base`` the bias is
    base + (1 + gamma t)^power - 1 within [bias_min, bias_max], t the count of passes; a second top has it."""

    TOPS: ClassVar[tuple[int, int]] = (1, 2)
    STATISTICS: ClassVar[tuple[int, ...]] = (1,)
    BLOCKS: ClassVar[tuple[str, ...]] = ("label_specific_add_param",)
    iteration: Tensor

    bias: float
    base: float
    gamma: float
    power: float
    least: float
    most: float

    def __init__(self, spec: Spec, context: Context) -> None:
        super().__init__(spec, context)
        (block,) = self.BLOCKS
        names = ("bias", "bias_base", "bias_gamma", "bias_power", "bias_min", "bias_max")
        self.bias, self.base, self.gamma, self.power, self.least, self.most = (
            float(spec.get(f"{block}.{name}")) for name in names
        )
        self.anneals: bool = spec.has(f"{block}.bias_base")
        self.released: bool = context.caffe
        self.return_bias: bool = len(spec.tops) == 2
        if spec.get(f"{block}.transform_test"):
            spec.note("`transform_test` has no effect, as in Caffe", f"{block}.transform_test")
        if not context.caffe:
            spec.note("adds its bias to every label's score; Caffe leaves a score up to -bias as it is")
        if self.anneals:
            first = int(spec.get(f"{block}.iteration"))
            self.register_buffer("iteration", torch.tensor(first, dtype=torch.int64, device=context.device))

    def bias_of(self, labels: Tensor) -> Tensor | float:
        """The bias of this pass; the schedule moves on."""
        if not self.anneals:
            return self.bias
        passed, moves = self.state_of(labels, self.iteration)
        bias = self.base + (1 + self.gamma * passed.double()) ** self.power - 1
        if moves:
            self.iteration += 1
        return bias.clamp(min=self.least).clamp(max=self.most)

    def fuses(self, scaled: bool) -> bool:
        return not self.return_bias and (self.anneals or self.bias <= 0)

    def margin(self, labels: Tensor, scale: Tensor | None) -> Margin | None:
        if not self.training:
            return None
        bias = self.bias_of(labels)
        return values.CosFace(-bias if scale is None else -bias / scale)

    def forward(self, scores: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        if not self.training:
            return (scores, *[scores.new_zeros(1)] * self.return_bias)
        given, (scores, rows) = labels, self.scores_and_labels(scores, labels)
        bias = self.bias_of(given)

        def change(target: Tensor, _: Tensor) -> Tensor:
            return torch.where(target > -bias, target + bias, target) if self.released else target + bias

        changed = with_target(scores, rows, change)
        return (changed, *[torch.as_tensor(bias).to(scores).reshape(1)] * self.return_bias)


class CosineMargin(TargetMargin):
    """A margin of the label's cosine, in both phases, as in the released layers."""

    value: Margin

    def keep(self, spec: Spec, kind: type[Any], names: tuple[str, ...], guard: str | None) -> None:
        (block,) = self.BLOCKS
        if spec.get(f"{block}.transform_test"):
            spec.note("`transform_test` has no effect, as in Caffe", f"{block}.transform_test")
        numbers = {name: float(spec.get(f"{block}.{name}")) for name in names}
        self.value = kind()
        try:
            self.value = kind(**numbers, guard=guard)
        except ValueError as error:
            spec.refuse(str(error), f"{block}.{next((n for n in names if f'`{n}`' in str(error)), names[0])}")

    def margin(self, labels: Tensor, scale: Tensor | None) -> Margin:
        return self.value

    def forward(self, scores: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        scores, rows = self.scores_and_labels(scores, labels)
        return (with_target(scores, rows, lambda c, y: reference.margin(c.double(), self.value, y)),)

    def extra_repr(self) -> str:
        return f"{self.wiring}, {self.value}"


class CombinedMargin(CosineMargin):
    """cos(m1 theta + m2) - m3 of the label's cosine, without a guard past pi."""

    BLOCKS: ClassVar[tuple[str, ...]] = ("combined_margin_param",)

    def __init__(self, spec: Spec, context: Context) -> None:
        super().__init__(spec, context)
        self.keep(spec, values.CombinedMargin, ("m1", "m2", "m3"), "none")


class CosinAddm(CosineMargin):
    """cos(theta + m) of the label's cosine, past pi cos theta - m sin m (ArcFace)."""

    BLOCKS: ClassVar[tuple[str, ...]] = ("cosin_add_m_param",)

    def __init__(self, spec: Spec, context: Context) -> None:
        super().__init__(spec, context)
        self.keep(spec, values.ArcFace, ("m",), "shift")
