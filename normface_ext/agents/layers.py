"""The losses over agents as layers: parameters and state only; every formula is in ``functions``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..distances.layers import Agents
from ..engine import checks
from ..engine.arguments import flag, size
from ..engine.options import HoldsOptions, holds, takes
from ..engine.state import Passes, WideState, recomputing
from ..engine.statistics import Statistics
from . import functions, losses
from .losses import AgentRows, Losses
from .options import (
    ContrastiveLayerKeywords,
    ContrastiveLayerOptions,
    TripletKeywords,
    TripletOptions,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack


class AgentLoss(HoldsOptions, Agents):
    """A loss over agents of its own, and the options of its function."""

    #: The names of the functions, for what they say.
    LOSS: ClassVar[str]
    STATS: ClassVar[str]
    options: Losses

    def __init__(
        self,
        features: int,
        classes: int,
        options: Losses,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        owner = type(self).__name__
        features = size(owner, "in_features", features)
        classes = size(owner, "num_classes", classes)
        super().__init__(features, classes, device, dtype)
        self.in_features: int = features
        self.num_classes: int = classes
        self.keep_options(options)

    def forward(
        self,
        features: Tensor,
        labels: Tensor,
        sample_weight: Tensor | None = None,
        *,
        return_statistics: bool = False,
        labels_b: Tensor | None = None,
        lam: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Statistics]:
        statistics = flag(type(self).__name__, "return_statistics", return_statistics)
        rows, loss = self._rows_and_loss(features, labels, sample_weight, None, labels_b, lam, statistics)
        return losses.with_statistics(self.options, rows, loss, statistics)

    def stats(self, features: Tensor, labels: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """Two means over the batch, without a gradient, of another sweep: nothing moves by it."""
        return self._stats(features, labels, sample_weight, None)

    def _rows_and_loss(
        self,
        features: Tensor,
        labels: Tensor,
        sample_weight: Tensor | None,
        margin: Tensor | None,
        labels_b: Tensor | None,
        lam: float | Tensor | None,
        need_largest: bool,
    ) -> tuple[AgentRows, Tensor]:
        """What is known of the rows, and what is made of it; a `margin` stands in for the options'."""
        given = labels, sample_weight, self.options, margin, labels_b, lam
        return functions.rows_and_loss(self.LOSS, features, self.weight, *given, need_largest=need_largest)

    def _stats(
        self, features: Tensor, labels: Tensor, sample_weight: Tensor | None, margin: Tensor | None
    ) -> Tensor:
        return functions.agent_stats(
            self.STATS, features, self.weight, labels, sample_weight, self.options, margin
        )

    def extra_repr(self) -> str:
        return ", ".join([f"{self.in_features}, {self.num_classes}", *self.options.shown()])


@holds(ContrastiveLayerOptions)
class CContrastiveLoss(WideState, AgentLoss):
    """C-contrastive loss with agents of its own: (features [N, D], labels [N]) -> loss.

    ``forward`` also takes ``sample_weight`` [N], and ``labels_b`` [N] with ``lam``; with
    ``return_statistics=True`` it gives (loss, ``Statistics``). ``stats`` takes features, labels and
    ``sample_weight`` and returns
    [mean positive hinge, mean negative hinge], see ``functional.c_contrastive_stats``.

    Args:
        in_features: D.
        num_classes: C; ``weight`` is [C, D], rows uniform on the unit sphere.
        add_intra_mae: the negative margin grows with the spread of the classes: ``neg_margin`` plus the
            running mean (factor 0.99) of the batches' mean positive hinge, capped at
            ``max_negative_margin`` (the mean is, not the sum, as in Caffe). The margin of a step comes
            from the steps before it. The mean is the buffer ``intra_mae``, float32 or wider, saved with the
            module, and moves in training mode only; Caffe keeps one per net, test nets too, and saves none.
            A batch whose mean is not finite moves nothing. A forward pass that ``torch.utils.checkpoint``
            runs again has the margin it had and moves nothing.

    The others are those of ``functional.c_contrastive_loss``; each is an attribute, which can be set. What is
    wrong raises here as it does there.
    """

    LOSS: ClassVar[str] = "c_contrastive_loss"
    STATS: ClassVar[str] = "c_contrastive_stats"
    options: ContrastiveLayerOptions
    intra_mae: Tensor

    @takes(ContrastiveLayerOptions)
    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[ContrastiveLayerKeywords],
    ) -> None:
        chosen = ContrastiveLayerOptions.of(type(self).__name__, options)
        super().__init__(in_features, num_classes, chosen, device, dtype)
        self._keep_mean()
        self._passes = Passes()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "add_intra_mae":
            self._keep_mean()

    def _keep_mean(self) -> None:
        """The buffer, where there is to be one."""
        if not self.options.add_intra_mae:
            self._buffers.pop("intra_mae", None)
        elif "intra_mae" not in self._buffers:
            zero = torch.zeros((), dtype=torch.float32, device=self.weight.device)
            self.register_buffer("intra_mae", zero)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "intra_mae" in self._buffers:
            self.intra_mae.zero_()

    def forward(
        self,
        features: Tensor,
        labels: Tensor,
        sample_weight: Tensor | None = None,
        *,
        return_statistics: bool = False,
        labels_b: Tensor | None = None,
        lam: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Statistics]:
        options = self.options
        if not options.add_intra_mae:
            return super().forward(
                features,
                labels,
                sample_weight,
                return_statistics=return_statistics,
                labels_b=labels_b,
                lam=lam,
            )
        statistics = flag(type(self).__name__, "return_statistics", return_statistics)
        mean, again = self._mean_of(labels)
        margin = options.neg_margin + mean
        rows, loss = self._rows_and_loss(features, labels, sample_weight, margin, labels_b, lam, statistics)
        if self.training and not again:
            with torch.no_grad():
                spread = rows.reduced(losses.positives(options, rows.target), "mean")
                spread = spread.to(self.intra_mae.dtype)
                moved = (0.99 * self.intra_mae + 0.01 * spread).clamp(max=options.max_negative_margin)
                # One NaN in the running mean would stay for good.
                self.intra_mae.copy_(torch.where(spread.isfinite(), moved, self.intra_mae))
        return losses.with_statistics(self.options, rows, loss, statistics)

    def _mean_of(self, labels: Tensor) -> tuple[Tensor, bool]:
        """(the mean for a forward pass, whether the pass is one that a backward pass runs again)."""
        if not (self.training and isinstance(labels, Tensor) and checks.has_values(labels)):
            return self.intra_mae, False
        if recomputing():
            return self._passes.state(type(self).__name__, labels), True
        self._passes.add(labels, self.intra_mae.clone())
        return self.intra_mae, False

    def stats(self, features: Tensor, labels: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """[mean positive hinge, mean negative hinge] at the present margin, without a gradient, of another
        sweep: nothing moves by it."""
        options = self.options
        margin = options.neg_margin + self.intra_mae if options.add_intra_mae else None
        return self._stats(features, labels, sample_weight, margin)


@holds(TripletOptions)
class CTripletLoss(AgentLoss):
    """C-triplet loss with agents of its own: (features [N, D], labels [N]) -> loss.

    ``forward`` also takes ``sample_weight`` [N], and ``labels_b`` [N] with ``lam``; with
    ``return_statistics=True`` it gives (loss, ``Statistics``). ``stats`` takes features, labels and
    ``sample_weight`` and returns
    [mean distance to the label's agent, to the others], see ``functional.c_triplet_stats``.

    Args:
        in_features: D.
        num_classes: C; ``weight`` is [C, D], rows uniform on the unit sphere.

    The others are those of ``functional.c_triplet_loss``; each is an attribute, which can be set. What is
    wrong raises here as it does there.
    """

    LOSS: ClassVar[str] = "c_triplet_loss"
    STATS: ClassVar[str] = "c_triplet_stats"
    options: TripletOptions

    @takes(TripletOptions)
    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[TripletKeywords],
    ) -> None:
        chosen = TripletOptions.of(type(self).__name__, options)
        super().__init__(in_features, num_classes, chosen, device, dtype)
