"""The layers at the end of a head: SoftmaxWithLoss, the metric losses over distances, Accuracy."""

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
from . import released_losses
from .general_losses import distances_and_labels, released_contrastive, released_triplet
from .layer import Layer
from .spec import Context, Spec

#: -log(FLT_MIN): what a row costs at most in Caffe's SoftmaxWithLoss.
LOSS_CAP = -math.log(torch.finfo(torch.float32).tiny)


def scores_and_labels(op: str, scores: object, labels: object, ignored: int) -> tuple[Tensor, Tensor]:
    checked = checks.matrix(op, "bottom 0", scores, "[N, C]")
    return checked, checks.labels(op, labels, checked, checked.shape[1], ignored)


class SoftmaxWithLoss(Layer):
    """-log softmax(scores)[label], averaged as `loss_param` says; a second top has the probabilities."""

    BOTTOMS, TOPS, LOSS = (2, 2), (1, 2), 1.0
    BOTTOM_NAMES = "the second is the label"
    BLOCKS = ("softmax_param", "loss_param")
    FUSED = "NormFaceLoss"

    def __init__(self, spec: Spec, context: Context) -> None:
        super().__init__(spec, context)
        self.cap, self.return_probability = context.caffe, len(spec.tops) == 2
        spec.only("softmax_param.axis", 1)
        spec.only("softmax_param.normalize_type", "Softmax")
        gpu = "Caffe has it on the GPU only"
        spec.only("softmax_param.label_smooth_factor", 0.0, gpu)
        for name in ("hard_ratio", "cutting_point", "hard_mining_label"):
            spec.never(f"softmax_param.{name}", gpu)
        spec.never(
            "softmax_param.class_weight", "in Caffe it needs a third bottom, and forward and backward differ"
        )
        self.normalization = ("FULL", "VALID", "BATCH_SIZE", "NONE")[spec.get("loss_param.normalization")]
        if spec.has("loss_param.normalize") and not spec.has("loss_param.normalization"):
            self.normalization = "VALID" if spec.get("loss_param.normalize") else "BATCH_SIZE"
        given = spec.has("loss_param.ignore_label")
        self.ignore_label = checks.ignored(spec.get("loss_param.ignore_label") if given else None)

    def averaged(self, total: Tensor, batch: int, valid: Tensor | int) -> Tensor:
        if self.normalization == "NONE":
            return total
        return total / torch.as_tensor(valid if self.normalization == "VALID" else batch).clamp_min(1)

    def tops(
        self, x: Tensor, weight: Tensor, labels: Tensor, eps: float, scale: float | Tensor
    ) -> tuple[Tensor, ...]:
        """The loss of features x [N, D] and class weights [C, D], fused."""
        mean = self.normalization == "VALID"
        value = functional.normface_loss(
            x,
            weight,
            labels,
            scale,
            reduction="mean" if mean else "sum",
            ignore_index=self.ignore_label,
            eps=eps,
        )
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

    BOTTOMS, TOPS, LOSS, STATISTICS = (2, 2), (1, 2), 1.0, (1,)
    BOTTOM_NAMES = "the second is the label"
    #: The option names of normface_ext where Caffe's differ.
    RENAMED: ClassVar[dict[str, str]] = {"positive_weight": "pos_weight", "negative_weight": "neg_weight"}
    FUSED: ClassVar[str]

    def __init__(self, spec: Spec, context: Context) -> None:
        super().__init__(spec, context)
        self.released, self.return_statistics = context.caffe, len(spec.tops) == 2

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


class GeneralContrastiveLoss(DistanceLoss):
    """C-contrastive; its statistics are (mean positive, mean negative hinge)."""

    BLOCKS = ("general_contrastive_loss_param",)
    RENAMED: ClassVar[dict[str, str]] = {
        **DistanceLoss.RENAMED,
        "positive_margin": "pos_margin",
        "negative_margin": "neg_margin",
        "max_negative_only": "hardest_only",
    }
    FUSED = "CContrastiveLoss"
    intra_mae: Tensor

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
        self.options = ContrastiveOptions.of(str(spec), {**options, "ignore_index": None})
        if self.add_intra_mae:
            self.register_buffer("intra_mae", torch.zeros((), device=context.device, dtype=context.dtype))

    def of_distances(self, distances: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        options = self.options
        if self.add_intra_mae:
            options = replace(options, neg_margin=options.neg_margin + self.intra_mae)
        if self.released:
            return self._moved(*released_contrastive(distances, labels, options))
        loss = reference.contrastive_of_distances(distances, labels, **vars(options))
        return self._moved(loss, released_losses.contrastive_stats(distances.detach(), labels, options))

    def of_agents(self, x: Tensor, weight: Tensor, labels: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        options = replace(self.options, eps=eps)
        margin = options.neg_margin + self.intra_mae if self.add_intra_mae else None
        return self._moved(*agent_loss_and_stats("c_contrastive_loss", x, weight, labels, options, margin))

    def _moved(self, loss: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor]:
        """The running mean of the positive hinge moves, and is a statistic too."""
        if not self.add_intra_mae:
            return loss, statistics
        moved = (0.99 * self.intra_mae + 0.01 * statistics[0].to(self.intra_mae)).clamp_max(self.cap)
        if self.training:
            self.intra_mae.copy_(moved)
        return loss, torch.cat([statistics, moved.to(statistics)[None]])


class GeneralTripletLoss(DistanceLoss):
    """C-triplet; its statistics are (mean positive, mean negative distance)."""

    BLOCKS = ("general_triplet_loss_param",)
    FUSED = "CTripletLoss"

    def __init__(self, spec: Spec, context: Context) -> None:
        super().__init__(spec, context)
        given = self.given(spec, TripletOptions)
        self.options = TripletOptions.of(str(spec), {**given, "ignore_index": None})

    def of_distances(self, distances: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if self.released:
            return released_triplet(distances, labels, self.options)
        loss = reference.triplet_of_distances(distances, labels, **vars(self.options))
        return loss, released_losses.triplet_stats(distances.detach(), labels)

    def of_agents(self, x: Tensor, weight: Tensor, labels: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        options = replace(self.options, eps=eps)
        return agent_loss_and_stats("c_triplet_loss", x, weight, labels, options)


def accuracy(
    scores: Tensor,
    labels: Tensor,
    *,
    min_is_better: bool = False,
    top_k: int = 1,
    ignore_label: int | None = None,
) -> Tensor:
    """The fraction of rows whose label is among the ``top_k`` best scores (Caffe ``Accuracy``).

    Ties go as in Caffe, which sorts (score, class) pairs: to the larger class where larger is better, to
    the smaller class with ``min_is_better`` (distances).

    Args:
        scores: [N, C], similarities or distances.
        labels: [N] int64.
        ignore_label: rows with it do not count. Without a row the accuracy is 0 / 0, NaN, as in Caffe.

    Returns:
        A 0-d tensor, float64 for float64 scores and float32 otherwise.

    Raises:
        ValueError: shapes, top_k, NaN among the scores.
        IndexError: a label out of range.
    """
    ignored = checks.ignored(ignore_label)
    scores, labels = scores_and_labels("accuracy", scores, labels, ignored)
    if not 1 <= top_k <= scores.shape[1]:
        raise ValueError(f"accuracy: expected `top_k` in [1, {scores.shape[1]}], got {top_k}")
    if scores.isnan().any():
        row = int(scores.isnan().any(1).nonzero()[0])
        raise ValueError(f"accuracy: expected `scores` without NaN, got one in row {row}")
    kept = labels != ignored
    safe = torch.where(kept, labels, 0)[:, None]
    own, columns = scores.gather(1, safe), torch.arange(scores.shape[1], device=scores.device)
    if min_is_better:
        before = (scores < own) | ((scores == own) & (columns < safe))
    else:
        before = (scores > own) | ((scores == own) & (columns > safe))
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    return ((before.sum(1) < top_k) & kept).sum().to(wide) / kept.sum()


class Accuracy(Layer):
    BOTTOMS, STATISTICS = (2, 2), (0,)
    BOTTOM_NAMES = "the second is the label"
    BLOCKS = ("accuracy_param",)

    def __init__(self, spec: Spec, context: Context) -> None:
        super().__init__(spec, context)
        spec.only("accuracy_param.axis", 1)
        self.min_is_better, self.top_k = (
            spec.get("accuracy_param.min_is_better"),
            spec.get("accuracy_param.top_k"),
        )
        ignored = spec.has("accuracy_param.ignore_label")
        self.ignore_label = spec.get("accuracy_param.ignore_label") if ignored else None

    @torch.no_grad()
    def forward(self, scores: Tensor, labels: Tensor) -> tuple[Tensor]:
        return (
            accuracy(
                scores,
                labels,
                min_is_better=self.min_is_better,
                top_k=self.top_k,
                ignore_label=self.ignore_label,
            ),
        )
