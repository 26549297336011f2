"""What the recipes share: a weight with its options, and the rows of a call, checked and cleaned."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..cosine.functions import norm_linear
from ..distances.layers import Agents
from ..engine import checks
from ..engine.arguments import INT64_MAX, integer, size
from ..engine.dtypes import accumulator, full_precision
from ..engine.options import HoldsOptions
from ..engine.reduce import weighted
from .options import BatchOptions


class Batch(NamedTuple):
    """The rows of a call. What stands in a row that does not count is nobody's business: its features are
    ones, its label is -1, its weight 0."""

    x: Tensor  # [N, D] float64 or float32
    agents: Tensor  # the weight in the same dtype
    labels: Tensor  # [N] int64
    counts: Tensor  # [N] bool: not ignored, and of a sample_weight that is not 0
    row_weight: Tensor  # [N]

    @property
    def columns(self) -> Tensor:
        """The labels [N, 1] for gather and scatter: 0 where the row does not count."""
        return self.labels.clamp(min=0)[:, None]

    def cosines(self, eps: float) -> Tensor:
        """[N, C], in float32 at least: 16 bits, also those of autocast, would cost the loss its digits."""
        with full_precision(self.x):
            return norm_linear(self.x, self.agents, eps=eps)

    def reduced(self, losses: Tensor, reduction: str) -> Tensor:
        """Losses of rows [N] -> the loss, in x's dtype."""
        of_rows = torch.where(self.counts, losses * self.row_weight, 0)
        return weighted(of_rows, self.row_weight.sum(), reduction).to(self.x.dtype)


class Recipe(HoldsOptions, Agents):
    """A weight [num_classes * centers, in_features], rows uniform on the unit sphere, and options."""

    options: BatchOptions

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        options: BatchOptions,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        *,
        least: int = 1,
        centers: int = 1,
    ) -> None:
        owner = type(self).__name__
        features = size(owner, "in_features", in_features)
        classes = integer(owner, "num_classes", num_classes, least, INT64_MAX)
        super().__init__(features, classes * centers, device, dtype)
        self.in_features: int = features
        self.num_classes: int = classes
        self.keep_options(options)

    def batch(self, x: object, labels: object, sample_weight: object) -> Batch:
        """Checks and cleans what a forward call is given."""
        op, classes, ignored = type(self).__name__, self.num_classes, self.options.ignore_index
        features, agents = checks.features_and_weight(op, x, self.weight)
        y = checks.labels(op, labels, features, classes, ignored)
        given = checks.weights(op, "sample_weight", sample_weight, features, features.shape[0])
        kept = y != checks.ignored(ignored)
        if y.is_cuda or torch.compiler.is_compiling():
            # The host cannot look, and a label beyond the classes must not pass for a row without a target.
            wrong = kept & ((y < 0) | (y >= classes))
            torch._assert_async(~wrong.any(), f"{op}: expected `labels` in [0, {classes}) or ignore_index")
        counts = checks.weighed(kept, given)
        wide = accumulator(features.dtype)
        row_weight = counts.to(wide) if given is None else torch.where(counts, given, 0)
        clean = torch.where(counts[:, None], features, 1).to(wide)
        return Batch(clean, agents.to(wide), torch.where(counts, y, -1), counts, row_weight)

    def extra_repr(self) -> str:
        return ", ".join([f"{self.in_features}, {self.num_classes}", *self.options.shown()])
