"""KappaFace: a margin for every class, by how scattered its features are and how many images it has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..cosine.functions import normalize
from ..engine import checks
from ..engine.arguments import ANGLE, NOT_NEGATIVE, SHARE, choice, number, size
from ..engine.dtypes import accumulator
from ..engine.options import Check
from ..engine.state import recomputing
from ..softmax.batch_margins import BatchMargin, Rows
from ..softmax.class_margins import image_counts
from ..softmax.margins import RowMargin

#: Of 1 - r^2, and of a deviation beside its mean: what is below is no scatter but rounding.
TIGHT = 1e-5
#: The most images of a class, times this, has half a period of the cosine.
LONGEST = 1.05


class KappaFace(BatchMargin):
    """``psi = cos(theta + m_y)``, ``m_j = m (gamma (1 - sigmoid(T z_j)) + (1 - gamma) v_j)`` (Oinar, Le and
    Woo, *KappaFace: Adaptive Additive Angular Margin Loss for Deep Face Recognition*, 2022): a ``margin=``
    of ``NormFaceLoss``, without an N x C matrix.

    ``v_j = (cos(pi n_j / (1.05 max n)) + 1) / 2`` is 1 for rare classes. z_j is the concentration kappa_j of
    the class's features less the classes' mean, in units of their (unbiased) deviation, where
    ``kappa = r (D - r^2) / (1 - r^2)`` and r is the length of the mean of the normalised features. A margin
    is large for classes that are scattered or rare. There is no guard past pi, and the margins have no
    gradient.

    ``collect(features, labels)`` after each training step adds up each class's features, [C, D] numbers
    instead of a memory of all of them, and ``update()`` at the end of the epoch makes the margins of the next
    from them. Until the first update every margin is m. The authors also have a variant with the features of
    a momentum encoder: hand those to ``collect``. Defaults are the released configuration's, m 0.8, T 0.4,
    gamma 0.7; the released classes have m 0.62 and T 0.55.

    A class of which nothing was collected keeps its margin and is left out of mean and deviation (the
    released code has kappa 0 for it). One whose features are all but equal, as a single image's are, gets the
    largest kappa of the others (so does the released code where its rounding gives infinity, and not a huge
    or a negative number). r is the mean over what was collected; the released code divides by all images of
    the class.

    The buffers ``margins`` [C], ``sums`` [C, D] and ``seen`` [C] are saved with the head, so that training
    resumes within an epoch; they stay float32 or wider. DistributedDataParallel hands out the first rank's
    buffers, sums among them: give it ``broadcast_buffers=False`` if the margin is in it.

    Args:
        counts: [C] images of each class, all positive.
        in_features: D.
        m: in [0, pi).
        T: at least 0.
        gamma: in [0, 1].
        sync: "global": ``update`` adds up what all ranks of the default process group have collected, where
            there is one, so that they have one set of margins; "local" does not.
        device: of the buffers.

    m, T, gamma and sync are attributes, checked when they are set.

    Raises:
        TypeError, ValueError: an argument out of range.
        IndexError: from ``collect`` and the head, a label that is no class of `counts`.
    """

    CHECKS: ClassVar[dict[str, Check]] = {
        "m": lambda owner, name, value: number(owner, name, value, ANGLE),
        "T": lambda owner, name, value: number(owner, name, value, NOT_NEGATIVE),
        "gamma": lambda owner, name, value: number(owner, name, value, SHARE),
        "sync": lambda owner, name, value: choice(owner, name, value, ("local", "global")),
    }
    m: float
    T: float
    gamma: float
    sync: str
    margins: Tensor
    sums: Tensor
    seen: Tensor

    def __init__(
        self,
        counts: Tensor | Sequence[int],
        in_features: int,
        m: float = 0.8,
        T: float = 0.4,
        gamma: float = 0.7,
        sync: str = "global",
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.m, self.T, self.gamma, self.sync = m, T, gamma, sync
        images = image_counts("KappaFace", counts)
        features = size("KappaFace", "in_features", in_features)
        device = checks.device_or_none("KappaFace", device)
        self._rarity = ((math.pi / LONGEST * images / images.max()).cos() + 1) / 2
        classes = images.shape[0]
        self.register_buffer("margins", torch.empty(classes, dtype=torch.float64, device=device))
        self.register_buffer("sums", torch.empty(classes, features, dtype=torch.float32, device=device))
        self.register_buffer("seen", torch.empty(classes, dtype=torch.float64, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Every margin m, nothing collected."""
        self.margins.fill_(self.m)
        self.sums.zero_()
        self.seen.zero_()

    def of(self, rows: Rows) -> RowMargin:
        labels = torch.where(rows.counts, rows.labels, 0)
        if checks.readable(labels):
            checks.label_range("KappaFace", labels, self.margins.shape[0], None)
        margins = self.margins.to(labels.device)  # elsewhere only if these are on the meta device
        return RowMargin(m2=margins[labels], guard="none")

    @torch.no_grad()
    def collect(self, features: Tensor, labels: Tensor, ignore_index: int | None = -100) -> None:
        """Adds the normalised features [N, D] of a step to their classes'. In training mode, and not where
        ``torch.utils.checkpoint`` runs a forward again; rows that are ignored or not finite are left out."""
        classes, dim = self.sums.shape
        x = checks.matrix("KappaFace", "features", features, "[N, D]")
        if x.shape[1] != dim:
            raise ValueError(f"KappaFace: expected `features` to be [N, {dim}], got shape {list(x.shape)}")
        ignored = checks.ignore_index("KappaFace", "ignore_index", ignore_index)
        y = checks.labels("KappaFace", labels, x, classes, ignored)
        if not self.training or recomputing():
            return
        self.follow("KappaFace", x.device)
        follows = (y != checks.ignored(ignored)) & x.isfinite().all(1)
        wide = torch.where(follows[:, None], x, 1).to(accumulator(x.dtype))
        units = torch.where(follows[:, None], normalize(wide), 0).to(self.sums.dtype)
        index = (torch.where(follows, y, 0),)  # index_put adds in a fixed order
        self.sums.index_put_(index, units, accumulate=True)
        self.seen.index_put_(index, follows.to(self.seen.dtype), accumulate=True)

    @torch.no_grad()
    def update(self) -> None:
        """New margins from what was collected, of which nothing is kept."""
        if self.sync == "global" and dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.sums)
            dist.all_reduce(self.seen)
        found = self.seen > 0
        r = torch.where(found, torch.linalg.vector_norm(self.sums.double(), dim=1) / self.seen, 0)
        tight, squared = found & (1 - r.square() < TIGHT), r.square()
        kappa = r * (self.sums.shape[1] - squared) / torch.where(tight, 1, 1 - squared)
        kappa = torch.where(tight, torch.where(found & ~tight, kappa, 0).max(), kappa)
        mean = torch.where(found, kappa, 0).sum() / found.sum()
        variance = torch.where(found, (kappa - mean).square(), 0).sum() / (found.sum() - 1)
        spread = variance.sqrt()
        z = torch.where(spread > TIGHT * mean, (kappa - mean) / spread, 0)  # of one class, or all alike: 0
        scattered = 1 - (self.T * z).sigmoid()
        made = self.m * (self.gamma * scattered + (1 - self.gamma) * self._rarity.to(scattered.device))
        self.margins.copy_(torch.where(found, made, self.margins))
        self.sums.zero_()
        self.seen.zero_()

    def extra_repr(self) -> str:
        sync = "" if self.sync == "global" else f", sync={self.sync!r}"
        return f"[{len(self.margins)}], m={self.m:g}, T={self.T:g}, gamma={self.gamma:g}{sync}"
