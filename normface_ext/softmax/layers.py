"""Layers: parameters and state only; every formula is in ``functional``."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from . import _checks, functional, theory
from ._arguments import POSITIVE, flag, integer, number, size
from .margins import Margin


def gaussian_unitball_(weight: Tensor, eps: float = 1e-12) -> Tensor:
    """Rows drawn from N(0, 1) and divided by sqrt(sum w^2 + eps): uniform on the unit sphere.

    In place. Caffe's ``gaussian_unitball`` filler.
    """
    with torch.no_grad():
        weight.normal_()
        return weight.copy_(functional.normalize(weight, dim=1, eps=eps))


def unit_rows_(weight: Tensor, eps: float, owner: str) -> Tensor:
    """Divides the rows by sqrt(sum w^2 + eps), in place and outside autograd; a zero row stays zero.

    A row with NaN or infinity raises ValueError on the CPU, with nothing changed, and stays as it is on
    CUDA, where looking would stall the GPU at every step.
    """
    with torch.no_grad():
        finite = torch.isfinite(weight).all(dim=1, keepdim=True)
        if _checks.readable(weight) and not finite.all():
            row = int((~finite).nonzero()[0, 0])
            raise ValueError(f"{owner}: expected finite weights, got row {row} that is not")
        return weight.copy_(torch.where(finite, functional.normalize(weight, dim=1, eps=eps), weight))


class _ScaledHead(nn.Module):
    """A weight [classes, features] and a scale s, fixed (a float) or learned (a 0-d parameter)."""

    weight: nn.Parameter
    scale: float | nn.Parameter
    eps: float

    def __init__(
        self,
        classes: int,
        features: int,
        scale: float,
        learn_scale: bool,
        min_scale: float,
        max_scale: float | None,
        eps: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        scale = number(owner, "scale", scale, POSITIVE)
        self.min_scale = number(owner, "min_scale", min_scale, POSITIVE)
        self.max_scale = math.inf if max_scale is None else number(owner, "max_scale", max_scale, POSITIVE)
        if not self.min_scale <= scale <= self.max_scale:
            raise ValueError(
                f"{owner}: expected `scale` in [{self.min_scale:g}, {self.max_scale:g}], got {scale:g}"
            )
        self.eps = _checks.eps(owner, eps)
        self.weight = nn.Parameter(torch.empty(classes, features, device=device, dtype=dtype))
        self.learn_scale = flag(owner, "learn_scale", learn_scale)
        if self.learn_scale:
            self.scale = nn.Parameter(torch.tensor(scale, device=device, dtype=torch.float32))
        else:
            self.scale = scale
        self._initial_scale = scale
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight rows uniform on the unit sphere; a learned scale back to its first value."""
        self._reset_weight()
        if isinstance(self.scale, nn.Parameter):
            with torch.no_grad():
                self.scale.fill_(self._initial_scale)

    def _reset_weight(self) -> None:
        gaussian_unitball_(self.weight)

    def bounded_scale(self) -> float | Tensor:
        """The scale after a learned one was moved into [min_scale, max_scale] in place.

        As in Caffe's Scale layer the gradient is not masked, so a scale at a bound can come back. The
        move does not count as a modification for autograd: it can change the value only right after an
        optimizer step, when no graph holds it.
        """
        if isinstance(self.scale, nn.Parameter):
            self.scale.data.clamp_(self.min_scale, self.max_scale)
        return self.scale

    def renormalize_(self) -> None:
        """Overwrites the weight by its unit rows: Caffe's ``normalize: true``, when it is asked for.

        Not needed for the output, which depends on the directions only; see
        ``caffe.renormalize_after_step``. A row with NaN or infinity raises ValueError on the CPU, with
        nothing changed, and is left alone on CUDA.
        """
        unit_rows_(self.weight, self.eps, type(self).__name__)

    def _scale_value(self) -> float:
        if not isinstance(self.scale, Tensor):
            return self.scale
        return self._initial_scale if self.scale.is_meta else float(self.scale.detach())

    def _scale_repr(self) -> str:
        return f"scale={self._scale_value():g}" + (", learn_scale=True" if self.learn_scale else "")


class NormalizeLayer(nn.Module):
    """Normalises along one axis: y = x / n (Caffe ``Normalize``; paper section 3.1).

    Args are those of ``functional.normalize``; so are shapes, dtypes and errors.
    """

    def __init__(self, dim: int = 1, p: int = 2, eps: float = 1e-12, return_norm: bool = False) -> None:
        super().__init__()
        owner = type(self).__name__
        self.dim, self.p = integer(owner, "dim", dim), _checks.exponent(owner, p)
        self.eps, self.return_norm = _checks.eps(owner, eps), flag(owner, "return_norm", return_norm)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if self.return_norm:
            return functional.normalize(x, self.dim, self.p, self.eps, return_norm=True)
        return functional.normalize(x, self.dim, self.p, self.eps)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, p={self.p}, eps={self.eps:g}, return_norm={self.return_norm}"


class NormLinear(_ScaledHead):
    """s * cos(x, w_j) for every class: [N, in_features] -> [N, out_features], no bias.

    Caffe's Normalize + InnerProduct + Scale with the gradient through both norms (paper section 3.2).

    Args:
        in_features: D.
        out_features: C; the weight is [C, D], rows uniform on the unit sphere.
        scale: s; ``learn_scale`` makes it a parameter kept within [min_scale, max_scale].
        normalize_input: ``False`` normalises the weight only.
        eps: inside both norms.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        scale: float = 1.0,
        learn_scale: bool = False,
        min_scale: float = 0.01,
        max_scale: float | None = None,
        normalize_input: bool = True,
        eps: float = 1e-12,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        owner = type(self).__name__
        in_features = size(owner, "in_features", in_features)
        out_features = size(owner, "out_features", out_features)
        super().__init__(
            out_features, in_features, scale, learn_scale, min_scale, max_scale, eps, device, dtype
        )
        self.in_features, self.out_features = in_features, out_features
        self.normalize_input = flag(owner, "normalize_input", normalize_input)

    def forward(self, x: Tensor) -> Tensor:
        return functional.norm_linear(
            x, self.weight, self.bounded_scale(), self.eps, normalize_input=self.normalize_input
        )

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self._scale_repr()}, eps={self.eps:g}"


class NormFaceLoss(_ScaledHead):
    """The normalised softmax head and its loss in one: (features [N, D], labels [N]) -> loss.

    ``forward`` also takes ``sample_weight`` [N].

    Args:
        in_features: D.
        num_classes: C; ``weight`` is [C, D], rows uniform on the unit sphere.
        scale: s, or "auto": the smallest scale whose loss bound is ``theory.AUTO_SCALE_BOUND``.
        learn_scale: make s a parameter, kept within [min_scale, max_scale]. It needs no weight decay:
            ``parameter_groups`` gives it a group without.

    ``margin``, ``reduction``, ``ignore_index``, ``eps``, ``class_weight``, ``label_smoothing``, ``workspace``
    and ``check_finite`` are those of ``functional.normface_loss``; ``class_weight`` becomes a buffer.

    Constructor and forward call raise what ``functional.normface_loss`` raises. To classify use
    ``functional.norm_linear(x, head.weight, head.scale)``; to verify, compare normalised features.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        scale: float | str = "auto",
        learn_scale: bool = False,
        margin: Margin | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
        eps: float = 1e-12,
        min_scale: float = 0.01,
        max_scale: float | None = None,
        class_weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        workspace: int | None = None,
        check_finite: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        owner = type(self).__name__
        in_features = size(owner, "in_features", in_features)
        num_classes = size(owner, "num_classes", num_classes)
        if isinstance(scale, str):
            if scale != "auto":
                raise ValueError(f"{owner}: expected `scale` to be a number or 'auto', got {scale!r}")
            scale = theory.auto_scale(num_classes)
        super().__init__(
            num_classes, in_features, scale, learn_scale, min_scale, max_scale, eps, device, dtype
        )
        self.in_features, self.num_classes = in_features, num_classes
        _checks.margin(owner, margin)
        _checks.reduction(owner, reduction)
        self.margin, self.reduction = margin, reduction
        self.ignore_index = _checks.ignore_index(owner, ignore_index)
        self.label_smoothing = _checks.smoothing(owner, label_smoothing)
        self.workspace = _checks.workspace(owner, workspace)
        self.check_finite = flag(owner, "check_finite", check_finite)
        self.class_weight: Tensor | None
        if class_weight is not None:
            _checks.factors(owner, "class_weight", class_weight, num_classes)
        self.register_buffer("class_weight", class_weight)

    def forward(self, features: Tensor, labels: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        return functional.normface_loss(
            features,
            self.weight,
            labels,
            self.bounded_scale(),
            margin=self.margin,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            eps=self.eps,
            sample_weight=sample_weight,
            class_weight=self.class_weight,
            label_smoothing=self.label_smoothing,
            workspace=self.workspace,
            check_finite=self.check_finite,
        )

    def loss_lower_bound(self) -> float:
        """The paper's bound at the present scale: print it beside the loss (host sync on CUDA)."""
        return theory.loss_lower_bound(self.num_classes, self._scale_value())

    def extra_repr(self) -> str:
        margin = "" if self.margin is None else f", margin={self.margin}"
        return f"{self.in_features}, {self.num_classes}, {self._scale_repr()}{margin}"
