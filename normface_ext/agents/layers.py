"""The losses over agents as layers: parameters and state only; every formula is in ``functions``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..distances.layers import Agents
from ..engine import checks
from ..engine.arguments import flag, number, size
from . import functions
from .functions import check_mode
from .options import AgentOptions, ContrastiveOptions, TripletOptions


class _AgentLoss(Agents):
    """A loss over agents of its own, and the options of its function."""

    def __init__(
        self, features: int, classes: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        owner = type(self).__name__
        features = size(owner, "in_features", features)
        classes = size(owner, "num_classes", classes)
        super().__init__(features, classes, device, dtype)
        self.in_features, self.num_classes = features, classes

    def _keep(
        self,
        given: AgentOptions,
        margin: str,
        ignore_index: int,
        reduction: str,
        mode: str,
        return_stats: bool,
        eps: float,
        workspace: int | None,
        active_limit: int | None,
        check_finite: bool,
    ) -> float:
        """Checks all options and keeps them but for the one called `margin`, which it returns."""
        owner = type(self).__name__
        checks.reduction(owner, "reduction", reduction)
        check_mode(owner, mode, reduction)
        self.options: dict[str, Any] = {
            **vars(given.checked(owner, mode)),
            "ignore_index": checks.ignore_index(owner, "ignore_index", ignore_index),
            "reduction": reduction,
            "mode": mode,
            "eps": checks.eps(owner, "eps", eps),
            "workspace": checks.workspace(owner, "workspace", workspace),
            "active_limit": checks.active_limit(owner, "active_limit", active_limit),
            "check_finite": flag(owner, "check_finite", check_finite),
        }
        self.mode, self.eps = mode, self.options["eps"]
        self.return_stats = flag(owner, "return_stats", return_stats)
        kept: float = self.options.pop(margin)
        return kept


class CContrastiveLoss(_AgentLoss):
    """C-contrastive loss with agents of its own: (features [N, D], labels [N]) -> loss.

    Args:
        in_features: D.
        num_classes: C; ``weight`` is [C, D], rows uniform on the unit sphere.
        add_intra_mae: the negative margin grows with the spread of the classes: ``neg_margin`` plus the
            running mean (factor 0.99) of the batches' mean positive hinge, capped at
            ``max_negative_margin`` (the mean is, not the sum, as in Caffe). The margin of a step comes
            from the steps before it. The mean is the buffer ``intra_mae``, saved with the module, and
            moves in training mode only; Caffe keeps one per net, test nets too, and saves none.
        return_stats: return (loss, stats), see below.

    The others are those of ``functional.c_contrastive_loss``.

    With ``return_stats`` stats is [mean positive hinge, mean negative hinge], and the running mean where
    ``add_intra_mae``.
    """

    intra_mae: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        pos_margin: float = 0.0,
        neg_margin: float = 1.0,
        pos_weight: float = 1.0,
        neg_weight: float = 1.0,
        hardest_only: bool = False,
        max_positive_only: bool = False,
        positive_outlier_thresh: float = 4.0,
        positive_first: bool = False,
        positive_upper_bound: float = 1.0,
        exp_negative_weight: bool = False,
        normalize_negative: float | None = None,
        add_intra_mae: bool = False,
        max_negative_margin: float = 1.2,
        ignore_index: int = -100,
        reduction: str = "mean",
        mode: str = "math",
        return_stats: bool = False,
        eps: float = 1e-12,
        workspace: int | None = None,
        active_limit: int | None = None,
        check_finite: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, num_classes, device, dtype)
        owner = type(self).__name__
        given = ContrastiveOptions(
            pos_margin,
            neg_margin,
            pos_weight,
            neg_weight,
            hardest_only,
            max_positive_only,
            positive_outlier_thresh,
            positive_first,
            positive_upper_bound,
            exp_negative_weight,
            normalize_negative,
        )
        self.neg_margin = self._keep(
            given,
            "neg_margin",
            ignore_index,
            reduction,
            mode,
            return_stats,
            eps,
            workspace,
            active_limit,
            check_finite,
        )
        self.add_intra_mae = flag(owner, "add_intra_mae", add_intra_mae)
        self.max_negative_margin = number(owner, "max_negative_margin", max_negative_margin)
        if self.add_intra_mae:
            self.register_buffer("intra_mae", torch.zeros((), dtype=torch.float32, device=device))

    def forward(self, features: Tensor, labels: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        margin = self.neg_margin + self.intra_mae if self.add_intra_mae else self.neg_margin
        loss, stats = functions.c_contrastive_loss(
            features,
            self.weight,
            labels,
            neg_margin=margin,
            return_stats=True,
            **self.options,
        )
        if self.add_intra_mae:
            if self.training:
                with torch.no_grad():
                    self.intra_mae.mul_(0.99).add_(0.01 * stats[0].to(self.intra_mae.dtype))
                    self.intra_mae.clamp_(max=self.max_negative_margin)
            stats = torch.cat([stats, self.intra_mae.to(stats.dtype)[None]])
        return (loss, stats) if self.return_stats else loss

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.num_classes}, neg_margin={self.neg_margin:g}, mode={self.mode!r}"


class CTripletLoss(_AgentLoss):
    """C-triplet loss with agents of its own: (features [N, D], labels [N]) -> loss.

    Args:
        in_features: D.
        num_classes: C; ``weight`` is [C, D], rows uniform on the unit sphere.
        return_stats: return (loss, [mean distance to the label's agent, to the others]).

    The others are those of ``functional.c_triplet_loss``.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        margin: float = 0.8,
        pos_weight: float = 1.0,
        neg_weight: float = 1.0,
        hardest_only: bool = False,
        add_center_loss: bool = False,
        positive_first: bool = False,
        positive_upper_bound: float = 1.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        mode: str = "math",
        return_stats: bool = False,
        eps: float = 1e-12,
        workspace: int | None = None,
        active_limit: int | None = None,
        check_finite: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, num_classes, device, dtype)
        given = TripletOptions(
            margin,
            pos_weight,
            neg_weight,
            hardest_only,
            add_center_loss,
            positive_first,
            positive_upper_bound,
        )
        self.margin = self._keep(
            given,
            "margin",
            ignore_index,
            reduction,
            mode,
            return_stats,
            eps,
            workspace,
            active_limit,
            check_finite,
        )

    def forward(self, features: Tensor, labels: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        loss, stats = functions.c_triplet_loss(
            features, self.weight, labels, margin=self.margin, return_stats=True, **self.options
        )
        return (loss, stats) if self.return_stats else loss

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.num_classes}, margin={self.margin:g}, mode={self.mode!r}"
