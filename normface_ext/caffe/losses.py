"""The losses at the end of a head: SoftmaxWithLoss and the metric losses over distances."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from .. import functional, reference
from ..agents.functions import agent_loss_and_stats
from ..agents.options import ContrastiveOptions, TripletOptions
from ..engine import checks
from ..engine.options import Options
from ..softmax.batch_margins import Psi
from ..softmax.functions import loss_of_psi
from ..softmax.margins import Margin
from ..softmax.options import HeadKeywords, HeadOptions
from . import released_losses
from .general_losses import distances_and_labels, released_contrastive, released_triplet
from .layer import Layer, MovingLayer
from .spec import Context, Spec

#: -log(FLT_MIN): what a row costs at most in Caffe's SoftmaxWithLoss.
LOSS_CAP = -math.log(torch.finfo(torch.float32).tiny)


def scores_and_labels(op: str, scores: object, labels: object, ignored: int) -> tuple[Tensor, Tensor]:
    checked = checks.matrix(op, "bottom 0", scores, "[N, C]")
    return checked, checks.labels(op, labels, checked, checked.shape[1], ignored)


class SoftmaxWithLoss(Layer):
    """-log softmax(scores)[label], averaged as `loss_param` says; a second top has the probabilities."""

    BOTTOMS: ClassVar[tuple[int, int]] = (2, 2)
    TOPS: ClassVar[tuple[int, int]] = (1, 2)
    LOSS: ClassVar[float] = 1.0
    LABELS: ClassVar[tuple[int, ...]] = (1,)
    BOTTOM_NAMES: ClassVar[str] = "the second is the label"
    BLOCKS: ClassVar[tuple[str, ...]] = ("softmax_param", "loss_param")
    FUSED: ClassVar[str] = "NormFaceLoss"

    def __init__(self, spec: Spec, context: Context) -> None:
        super().__init__(spec, context)
        self.cap: bool = context.caffe
        self.return_probability: bool = len(spec.tops) == 2
        spec.only("softmax_param.axis", 1)
        spec.only("softmax_param.normalize_type", "Softmax")
        gpu = "Caffe has it on the GPU only"
        spec.only("softmax_param.label_smooth_factor", 0.0, gpu)
        for name in ("hard_ratio", "cutting_point", "hard_mining_label"):
            spec.never(f"softmax_param.{name}", gpu)
        spec.never(
            "softmax_param.class_weight", "in Caffe it needs a third bottom, and forward and backward differ"
        )
        names = ("FULL", "VALID", "BATCH_SIZE", "NONE")
        self.normalization: str = names[spec.get("loss_param.normalization")]
        if spec.has("loss_param.normalize") and not spec.has("loss_param.normalization"):
            self.normalization = "VALID" if spec.get("loss_param.normalize") else "BATCH_SIZE"
        given = spec.has("loss_param.ignore_label")
        self.ignore_label: int = checks.ignored(spec.get("loss_param.ignore_label") if given else None)

    def averaged(self, total: Tensor, batch: int, valid: Tensor | int) -> Tensor:
        if self.normalization == "NONE":
            return total
        return total / torch.as_tensor(valid if self.normalization == "VALID" else batch).clamp_min(1)

    def tops(
        self,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        eps: float,
        scale: float | Tensor,
        margin: Margin | Psi | None,
    ) -> tuple[Tensor, ...]:
        """The loss of features x [N, D] and class weights [C, D], fused; the margin is one of the label's
        cosine, or a function of those [N]."""
        mean = self.normalization == "VALID"
        given: HeadKeywords = {
            "reduction": "mean" if mean else "sum",
            "ignore_index": self.ignore_label,
            "eps": eps,
        }
        if margin is None or isinstance(margin, Margin):
            given["margin"] = margin
            value = functional.normface_loss(x, weight, labels, scale, **given)
        else:
            options = HeadOptions.of("normface_loss", given)
            value, _ = loss_of_psi(x, weight, labels, scale, margin, None, None, options)
        return (value if mean else self.averaged(value, len(labels), len(labels)),)

    def forward(self, scores: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        scores, labels = scores_and_labels("SoftmaxWithLoss", scores, labels, self.ignore_label)
        wide = scores if scores.dtype == torch.float64 else scores.float()
        logs = log_softmax(wide, 1)
        kept = labels != self.ignore_label
        losses = -logs.gather(1, torch.where(kept, labels, 0)[:, None]).squeeze(1)
        if self.cap:  # -log(max(p, FLT_MIN)) in value, p - 1 in gradient
            losses = losses + (losses.detach().clamp_max(LOSS_CAP) - losses.detach())
        total = torch.where(kept, losses, torch.zeros_like(losses)).sum()
        loss = self.averaged(total, len(labels), kept.sum())
        return (loss, logs.exp()) if self.return_probability else (loss,)


class DistanceLoss(Layer):
    """A metric loss over given distances [N, C]; a second top has its statistics, without a gradient."""

    BOTTOMS: ClassVar[tuple[int, int]] = (2, 2)
    TOPS: ClassVar[tuple[int, int]] = (1, 2)
    LOSS: ClassVar[float] = 1.0
    STATISTICS: ClassVar[tuple[int, ...]] = (1,)
    LABELS: ClassVar[tuple[int, ...]] = (1,)
    BOTTOM_NAMES: ClassVar[str] = "the second is the label"
    #: The option names of normface_ext where Caffe's differ.
    RENAMED: ClassVar[dict[str, str]] = {"positive_weight": "pos_weight", "negative_weight": "neg_weight"}
    FUSED: ClassVar[str]

    def __init__(self, spec: Spec, context: Context) -> None:
        super().__init__(spec, context)
        self.released: bool = context.caffe
        self.return_statistics: bool = len(spec.tops) == 2

    def given(self, spec: Spec, kind: type[Options]) -> dict[str, Any]:
        """The file's options under the names of normface_ext; what `kind` does not take is refused, at its
        line, and left out."""
        (block,) = self.BLOCKS
        found = {}
        for field in spec.get(block).DESCRIPTOR.fields:
            name, path = self.RENAMED.get(field.name, field.name), f"{block}.{field.name}"
            found[name] = spec.get(path)
            if name in kind.CHECKS and spec.has(path):
                try:
                    kind.CHECKS[name]("", field.name, found[name])
                except ValueError as error:
                    spec.refuse(str(error).removeprefix(": "), path)
                    del found[name]
        return found

    def of_distances(self, distances: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(loss, statistics)"""
        raise NotImplementedError

    def of_agents(self, x: Tensor, weight: Tensor, labels: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """The same of features [N, D] and agents [C, D], fused."""
        raise NotImplementedError

    def forward(self, distances: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        return self._tops(*self.of_distances(*distances_and_labels(self.FUSED, distances, labels)))

    def tops(self, x: Tensor, weight: Tensor, labels: Tensor, eps: float) -> tuple[Tensor, ...]:
        return self._tops(*self.of_agents(x, weight, labels, eps))

    def _tops(self, loss: Tensor, statistics: Tensor) -> tuple[Tensor, ...]:
        return (loss, statistics) if self.return_statistics else (loss,)


class GeneralContrastiveLoss(DistanceLoss, MovingLayer):
    """C-contrastive; its statistics are (mean positive, mean negative hinge)."""

    BLOCKS: ClassVar[tuple[str, ...]] = ("general_contrastive_loss_param",)
    RENAMED: ClassVar[dict[str, str]] = {
        **DistanceLoss.RENAMED,
        "positive_margin": "pos_margin",
        "negative_margin": "neg_margin",
        "max_negative_only": "hardest_only",
    }
    FUSED: ClassVar[str] = "CContrastiveLoss"
    intra_mae: Tensor

    add_intra_mae: bool
    cap: float

    def __init__(self, spec: Spec, context: Context) -> None:
        super().__init__(spec, context)
        (block,) = self.BLOCKS
        options = self.given(spec, ContrastiveOptions)
        if not spec.has(f"{block}.normalize_negative"):
            options["normalize_negative"] = None
        if spec.has(f"{block}.square"):
            spec.note("`square` is declared in caffe.proto but no Caffe code reads it", f"{block}.square")
        del options["square"]
        self.add_intra_mae, self.cap = (options.pop(n) for n in ("add_intra_mae", "max_negative_margin"))
        self.options: ContrastiveOptions = ContrastiveOptions.of(str(spec), {**options, "ignore_index": None})
        if self.add_intra_mae:
            self.register_buffer("intra_mae", torch.zeros((), device=context.device, dtype=torch.float32))

    def of_distances(self, distances: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        options, mean, moves = self.options, None, False
        if self.add_intra_mae:
            mean, moves = self.state_of(labels, self.intra_mae)
            options = replace(options, neg_margin=options.neg_margin + mean)
        if self.released:
            return self._moved(*released_contrastive(distances, labels, options), mean, moves)
        loss = reference.contrastive_of_distances(distances, labels, **vars(options))
        stats = released_losses.contrastive_stats(distances.detach(), labels, options)
        return self._moved(loss, stats, mean, moves)

    def of_agents(self, x: Tensor, weight: Tensor, labels: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        options, margin, mean, moves = replace(self.options, eps=eps), None, None, False
        if self.add_intra_mae:
            mean, moves = self.state_of(labels, self.intra_mae)
            margin = options.neg_margin + mean
        found = agent_loss_and_stats("c_contrastive_loss", x, weight, labels, options, margin)
        return self._moved(*found, mean, moves)

    def _moved(
        self, loss: Tensor, statistics: Tensor, mean: Tensor | None, moves: bool
    ) -> tuple[Tensor, Tensor]:
        """The running mean of the positive hinge moves, and is a statistic too."""
        if mean is None:
            return loss, statistics
        spread = statistics[0].to(mean)
        # One NaN in the running mean would stay for good.
        moved = torch.where(spread.isfinite(), (0.99 * mean + 0.01 * spread).clamp_max(self.cap), mean)
        if moves:
            self.intra_mae.copy_(moved)
        return loss, torch.cat([statistics, moved.to(statistics)[None]])


class GeneralTripletLoss(DistanceLoss):
    """C-triplet; its statistics are (mean positive, mean negative distance)."""

    BLOCKS: ClassVar[tuple[str, ...]] = ("general_triplet_loss_param",)
    FUSED: ClassVar[str] = "CTripletLoss"

    def __init__(self, spec: Spec, context: Context) -> None:
        super().__init__(spec, context)
        given = self.given(spec, TripletOptions)
        self.options: TripletOptions = TripletOptions.of(str(spec), {**given, "ignore_index": None})

    def of_distances(self, distances: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if self.released:
            return released_triplet(distances, labels, self.options)
        loss = reference.triplet_of_distances(distances, labels, **vars(self.options))
        return loss, released_losses.triplet_stats(distances.detach(), labels)

    def of_agents(self, x: Tensor, weight: Tensor, labels: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        options = replace(self.options, eps=eps)
        return agent_loss_and_stats("c_triplet_loss", x, weight, labels, options)
