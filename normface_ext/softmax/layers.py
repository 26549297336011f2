"""The softmax head as a layer: parameters and state only; every formula is in ``functions``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import theory
from ..cosine.options import LinearOptions
from ..engine.arguments import choice, flag, size
from ..engine.extra_state import unpack
from ..engine.options import holds, takes
from ..engine.scale import MIN_SCALE
from ..engine.statistics import Statistics, given_back
from . import functions, ranking, resize
from .centers import pooled
from .margins import Margin
from .options import HeadKeywords, HeadOptions
from .presets import PRESETS
from .state import margin_change, margin_state
from .tensors import HoldsTensors

if TYPE_CHECKING:
    from typing_extensions import Unpack

Head = TypeVar("Head", bound="NormFaceLoss")


@holds(HeadOptions)
class NormFaceLoss(HoldsTensors):
    """The normalised softmax head and its loss in one: (features [N, D], labels [N]) -> loss.

    ``forward`` also takes ``sample_weight`` [N], and ``labels_b`` [N] with ``lam``, second labels, as
    ``functional.normface_loss`` has them; with ``return_statistics=True`` it gives (loss, ``Statistics``),
    from the same sweep over the classes. Without labels it gives the logits s cos [N, C], without the margin:
    ``head(x)`` is ``head.logits(x)``. ``head.predict(x)`` gives the classes [N],
    ``head.accuracy(x, labels)`` the hits; both without an N x C matrix.

    Args:
        in_features: D.
        num_classes: C; ``weight`` is [C, D], rows uniform on the unit sphere. With ``sub_centers`` K it is
            [C * K, D], row j K + k being centre k of class j; K stays what it was made with.
        scale: s, a number or a tensor of one; or "auto": the smallest scale whose loss bound is
            ``theory.AUTO_SCALE_BOUND``, and with a margin at least 64 (``theory.auto_scale``), or 1 without
            ``normalize_input``. It goes by the margin that the constructor is given: one that is set later
            does not change the scale.
        learn_scale: make s a parameter [1], used within [min_scale, max_scale]. It needs no weight decay:
            ``parameter_groups`` gives it a group without.
        class_weight: [C], becomes a buffer on the weight's device. It is an option of the loss, not what is
            learned, so the ``state_dict`` has none, and ``to_empty`` does not empty it.
        device, dtype: of the parameters.

    ``margin``, ``margin_gradient``, ``filter_threshold``, ``sub_centers``, ``reduction``, ``ignore_index``,
    ``eps``, ``class_weight``, ``label_smoothing``, ``workspace``, ``check_finite`` and ``normalize_input``
    are those of ``functional.normface_loss``. These and ``scale``, ``min_scale`` and ``max_scale`` are
    attributes, checked when they are set as here.

    Tensors of a margin become the head's: a Parameter, which is learned, its parameter, another a buffer as
    class_weight is one; ``ArcFace``'s m is ``margin_m``.

    A fixed scale, a learned one's bounds and the margin's numbers are saved in the ``state_dict`` and
    restored from it; where one replaces what the head was made with, a UserWarning says so. What
    numbers cannot make (a ``BatchMargin``, tensors) stays as the head was made, with a UserWarning where it
    is another.

    Constructor and forward call raise what ``functional.normface_loss`` raises. To verify, compare
    normalised features.
    """

    if TYPE_CHECKING:
        margin: Margin | None

    @takes(HeadOptions)
    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        scale: float | Tensor | str = "auto",
        learn_scale: bool = False,
        min_scale: float = MIN_SCALE,
        max_scale: float | None = None,
        class_weight: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[HeadKeywords],
    ) -> None:
        owner = type(self).__name__
        in_features = size(owner, "in_features", in_features)
        num_classes = size(owner, "num_classes", num_classes)
        chosen = HeadOptions.of(owner, options)
        if class_weight is not None:
            self.check_class_weight(class_weight, num_classes)
        self.check_margin(chosen.margin, num_classes)
        if isinstance(scale, str):
            if scale != "auto":
                raise ValueError(f"{owner}: expected `scale` to be a number or 'auto', got {scale!r}")
            scale = theory.auto_scale(num_classes, chosen.margin) if chosen.normalize_input else 1.0
        rows = num_classes * chosen.sub_centers
        super().__init__(rows, in_features, scale, learn_scale, min_scale, max_scale, device, dtype)
        self.in_features: int = in_features
        self.num_classes: int = num_classes
        self.keep_tensors(chosen, class_weight)

    @classmethod
    def preset(cls: type[Head], name: str, in_features: int, num_classes: int, **changes: Any) -> Head:
        """The head of a published recipe.

        Args:
            name: a key of ``softmax.presets.PRESETS``: "arcface" (s = 64, ``ArcFace(0.5)``), "cosface"
                (s = 64, ``CosFace(0.35)``), "normface" (no margin, s learned, from "auto" on), "circle"
                (s = 256, ``CircleSoftmax(0.25)``), "sphereface" (features as long as they are, s = 1,
                ``SphereFace()``), "sphereface-opensphere" (s = 30, m 1.7 without a blend, the straight
                gradient).
            in_features: D.
            num_classes: C.
            changes: arguments of the constructor, in the place of the recipe's or beside them.

        Raises:
            ValueError: an unknown name; and what the constructor raises.
        """
        recipe = PRESETS[choice(f"{cls.__name__}.preset", "name", name, PRESETS)]
        return cls(in_features, num_classes, **{**recipe(), **changes})

    def forward(
        self,
        features: Tensor,
        labels: Tensor | None = None,
        sample_weight: Tensor | None = None,
        *,
        return_statistics: bool = False,
        labels_b: Tensor | None = None,
        lam: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Statistics]:
        if labels is None:
            given = {"sample_weight": sample_weight, "labels_b": labels_b, "lam": lam}
            return self._without_labels(features, return_statistics, **given)
        return given_back(
            functions.head_loss(
                "normface_loss",
                features,
                self.weight,
                labels,
                self.bounded_scale(),
                sample_weight,
                self.class_weight,
                self.present_options(),
                labels_b,
                lam,
                statistics=flag(type(self).__name__, "return_statistics", return_statistics),
            )
        )

    def _without_labels(self, features: Tensor, return_statistics: bool, **given: object) -> Tensor:
        owner = type(self).__name__
        wanted = flag(owner, "return_statistics", return_statistics)
        for name, value in {**given, "return_statistics": wanted or None}.items():
            if value is not None:
                raise ValueError(f"{owner}: expected `labels` together with `{name}`, got None")
        return self.logits(features)

    def logits(self, x: Tensor) -> Tensor:
        """s cos(x_i, w_j) [N, C], or s <x_i, w_j> / |w_j| without ``normalize_input``; differentiable,
        without the margin: ``functional.norm_linear`` of this head, and its dtypes. Of several sub-centres
        the largest, out of an [N, C * sub_centers] matrix."""
        return pooled(self.scaled_cosine(x), self.options.sub_centers)

    def linear_options(self) -> LinearOptions:
        return LinearOptions(self.options.normalize_input, self.options.eps)

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """The class of the largest logit, int64 [N]; of several the first. Without an N x C matrix: this is
        ``functional.nearest_class``, the scale being positive."""
        options = self.present_options()
        return ranking.nearest_class(
            x,
            self.weight,
            sub_centers=options.sub_centers,
            eps=options.eps,
            workspace=options.workspace,
        )[0]

    @torch.no_grad()
    def accuracy(self, x: Tensor, labels: Tensor, topk: Sequence[int] = (1, 5)) -> Tensor:
        """The share of rows whose label is among the k largest logits, for each k: [len(topk)] float64, on
        x's device.

        Without the margin, and without an N x C matrix. Ignored rows do not count; if none does, it is 0.
        ``functional.target_rank`` gives the places themselves.
        """
        chosen = ranking.topk_argument(type(self).__name__, topk)
        return ranking.accuracy_of(self._ranks(x, labels), chosen)

    def _ranks(self, x: Tensor, labels: Tensor) -> Tensor:
        options = self.present_options()
        return ranking.target_rank(
            x,
            self.weight,
            labels,
            sub_centers=options.sub_centers,
            ignore_index=options.ignore_index,
            eps=options.eps,
            workspace=options.workspace,
        )

    @torch.no_grad()
    def centers_of(self, x: Tensor, labels: Tensor) -> Tensor:
        """Which of its class's ``sub_centers`` each row is nearest to, int64 [N] in [0, K), of equal ones the
        first; -1 where the row is ignored. The centre that wins most often is where a class's clean images
        gather."""
        options, owner = self.present_options(), type(self).__name__
        given = options.sub_centers, options.ignore_index, options.eps
        return ranking.nearest_center(owner, x, self.weight, labels, *given)

    def _plain_state(self) -> dict[str, Any]:
        state = {**super()._plain_state(), "margin": margin_state(self.options.margin)}
        centers = self.options.sub_centers
        return state if centers == 1 else {**state, "sub_centers": centers}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        extra, owner = state_dict.get(f"{prefix}_extra_state"), type(self).__name__
        values = {} if extra is None else unpack(owner, extra)
        centers = self.options.sub_centers
        if values and (given := values.get("sub_centers", 1)) != centers:
            raise ValueError(
                f"{owner}: expected a state_dict of sub_centers={centers}, got one of {given}: the same rows"
                " of the weight would be other classes"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _take_plain_state(self, values: dict[str, Any]) -> list[str]:
        if "margin" not in values:
            return super()._take_plain_state(values)
        change = margin_change(type(self).__name__, values["margin"], self.options.margin)
        said = super()._take_plain_state(values)
        if change.margin is not self.options.margin:
            self.margin = change.margin
        if change.numbers:
            vars(change.margin).update(change.numbers)
        return said + [change.said] * bool(change.said)

    def weight_for(self, labels: Tensor) -> Tensor:
        """The unit rows w_y / |w_y| [N, D] of labels [N], differentiable; [N, K, D], those of all K
        sub-centres, where a class has several. IndexError for a label out of range (on CUDA the device's
        own). All ranks of a class-parallel head call it together, each with its own labels; the gradient of
        the weight is that of the sum over the ranks."""
        return resize.weight_for(self._resizing(), labels)

    def resize_classes(
        self,
        n: int,
        keep: Sequence[int | None] | Tensor | None = None,
        optimizer: Optimizer | Iterable[Optimizer] | None = None,
        init: str = "random",
        features: Tensor | None = None,
        labels: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Classes come, go or change places; what is kept trains on as if nothing had happened.

        Where the shape changes ``weight`` becomes another Parameter: hooks on the old one, and wrappers such
        as DistributedDataParallel, have to be made again. With n classes as before it stays the same object.

        Args:
            n: C from now on.
            keep: for each new class the old one that it was, or None or -1: [n]. By default the first n.
            optimizer: those that train the weight. Without them they would go on with the old one: give every
                one there is. Momentum, Adam's averages and other state by row follow; a new row begins
                with none. Adam counts its steps for all rows together, so a new row's first ones
                are up to (1 - beta1) / sqrt(1 - beta2) times as long as at the start of a training.
            init: of new rows. "random" as the constructor; "imprint": the normalised mean of the class's
                normalised features (Qi et al. 2018). Of several sub-centres the first is that mean, and the
                others stand a tenth of a radian or less from it at random: equal ones would stay equal, and
                only the first of them would ever be trained.
            features: [N, D] for "imprint", some of each new class; rows of other classes do not matter.
            labels: [N] of them, in the new numbering.
            generator: of the random rows, of any device.

        Sub-centres go with their class, and a gradient that waits for its step follows. ``class_weight`` is 1
        for a new class, and a margin with a number per class has its mean there. A fixed scale stays, also
        one that was "auto".

        All ranks of a class-parallel head call it together with the same arguments, of ``features`` and
        ``labels`` each with its own, which may be none. Rows move to the rank that has them then, in parts,
        so that no rank ever has all. New random rows are those of one process on the CPU, by the generator of
        the first rank. An error on one rank is one on all.

        Raises:
            TypeError: arguments; a head that fully_shard has spread over ranks; an optimizer without rows.
            ValueError: arguments; an optimizer without the weight; a new class without features.
            IndexError: a label out of range.
        """
        resize.resize_classes(self._resizing(), n, keep, optimizer, init, features, labels, generator)

    def _resizing(self) -> resize.Resizing:
        return resize.Resizing(self)

    def loss_lower_bound(self) -> float:
        """The paper's bound at the present scale: print it beside the loss (host sync on CUDA). 0 without
        ``normalize_input``, since no length of a feature is the last."""
        if not self.options.normalize_input:
            return 0.0
        return theory.loss_lower_bound(self.num_classes, self.scale_value())

    def extra_repr(self) -> str:
        parts = [str(self.in_features), str(self.num_classes), *self.scale_repr(), *self.options.shown()]
        if self.class_weight is not None:
            parts.append(f"class_weight=[{self.class_weight.numel()}]")
        return ", ".join(parts)
