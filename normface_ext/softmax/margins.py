"""Margins: what a loss asks of the target cosine before the softmax.

A margin is three numbers and a formula, by default ``psi(cos theta) = cos(m1 * theta + m2) - m3`` (ArcFace,
section 2.2), and only the target column meets it. The formulas are in ``csrc/math/margins/margin.h`` and, as
the specification, in ``normface_ext.reference.FORMULAS``; docs/architecture.md says how to add one. Margins
that look at the batch first are in ``batch_margins``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ..engine import checks
from ..engine.arguments import ANGLE, FINITE, POSITIVE, Range, below, choice, number

if TYPE_CHECKING:
    Number = float | Tensor
else:
    Number = (
        Any  # OmegaConf, with which Hydra and Lightning's loggers look at a dataclass, takes no such union
    )

#: What a number may be; a tensor's values are not looked at.
LIMITS = {"m1": POSITIVE, "m2": ANGLE, "m3": below(0.0, math.inf)}
#: ``guard`` -> the code of ``math::Guard`` in csrc/math/margins/margin.h
GUARDS: dict[str | None, int] = {None: 0, "shift": 1, "join": 2, "easy": 3, "none": 4}


class Margin:
    """What ``margin=`` takes: a value with the three numbers ``m1``, ``m2``, ``m3``, and a guard.

    Each is a number, a 0-d tensor, or a 1-D tensor with one number per class, of which a row takes its
    label's; the tensors may have gradients. Two margins are equal if their numbers, their guards and, by
    identity, their tensors are: ``CosFace(0.3) == CombinedMargin(m3=0.3)``. They are frozen dataclasses, so
    ``dataclasses.replace`` makes a changed copy, and ``torch.load(weights_only=True)`` knows them.

    ``guard`` says what is done past ``m1 * theta + m2 = pi``, where the cosine would rise again:

    - ``"shift"``: ``cos theta - m2 sin m2 - m3``, as most ArcFace implementations do. The default for m1 = 1.
    - ``"join"``: ``cos theta - k - m3`` with the k that leaves no jump. The default for other m1.
    - ``"easy"``: nothing there, but ``cos theta - m3`` wherever ``cos theta <= 0`` (MagFace, MV-Softmax).
    - ``"none"``: nothing.
    """

    m1: float | Tensor
    m2: float | Tensor
    m3: float | Tensor
    guard: str | None = None
    #: What ``scale="auto"`` is at least.
    least_scale: ClassVar[float] = 64.0
    #: What a 1-D tensor counts: the rows of the batch, or the classes.
    per_row: ClassVar[bool] = False
    #: The number of what psi is in the tables of csrc/math/margins/margin.h and ``reference.FORMULAS``.
    formula: ClassVar[int]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if not hasattr(cls, "formula"):  # else it would be ArcFace's, without a word
            raise TypeError(f"{cls.__name__}: expected `formula` to be the number of its formula, got none")

    def numbers(self) -> list[float | Tensor]:
        return [m if isinstance(m, Tensor) else float(m) for m in (self.m1, self.m2, self.m3)]

    def _key(self) -> tuple[object, ...]:
        numbers = [(id(m),) if isinstance(m, Tensor) else m for m in self.numbers()]
        return (*numbers, self.guard, self.per_row, self.formula)

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, Margin) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        given = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        shown = (
            f"{name}={f'<tensor {list(value.shape)}>' if isinstance(value, Tensor) else repr(value)}"
            for name, value in given.items()
            if name != "guard" or value is not None
        )
        return f"{type(self).__name__}({', '.join(shown)})"

    def _keep(self, name: str, limits: Range = FINITE) -> None:
        """Checks a field, and stores what is no Python number (NumPy's) as one."""
        owner, value = type(self).__name__, getattr(self, name)
        if isinstance(value, Tensor):
            checks.floating(owner, name, value)
            if value.dim() > 1:
                each = "row" if self.per_row else "class"
                raise ValueError(
                    f"{owner}: expected `{name}` to be a number, a 0-d tensor or a 1-D tensor of a number per"
                    f" {each}, got shape {list(value.shape)}"
                )
            return
        plain = number(owner, name, value, limits)
        if type(value) not in (int, float):  # NumPy's float64 is a float, which weights_only does not know
            object.__setattr__(self, name, plain)

    def _check_guard(self) -> None:
        if self.guard is not None:
            choice(type(self).__name__, "guard", self.guard, [name for name in GUARDS if name is not None])


Value = TypeVar("Value", bound=type[Margin])


def _value(kind: Value) -> Value:
    """Of a frozen dataclass: to be set to what it holds changes nothing, and is no error. Lightning does that
    to all hyper-parameters (apply_to_collection), and dies of what refuses it."""
    refuse = kind.__setattr__

    def __setattr__(self: Margin, name: str, value: object) -> None:
        if name not in vars(self) or vars(self)[name] is not value:
            refuse(self, name, value)

    kind.__setattr__ = __setattr__  # type: ignore[method-assign, assignment]
    return kind


# Every class has fields of its own and inherits none: torch.compile builds a dataclass from its fields, and
# the Dynamo of torch 2.11 cannot follow an __init__ that takes others.


@_value
@dataclass(frozen=True, eq=False, repr=False)
class CombinedMargin(Margin):
    """``psi = cos(m1 * theta + m2) - m3``, angles in radians.

    Past ``m1 * theta + m2 = pi`` the cosine would rise again; there ``psi`` goes on as a line of slope
    one in the cosine (monotone guard), so a harder sample never pays less. ``guard`` chooses another way.

    Args:
        m1: angular factor (SphereFace), above 0.
        m2: additive angle in radians (ArcFace), in [0, pi).
        m3: additive cosine (CosFace), at least 0.
        guard: None, "shift", "join", "easy" or "none".

    Each may be a tensor, 0-d or [C], whose values are not checked.

    Raises:
        TypeError: a tensor that is not floating.
        ValueError: a number that is not finite or out of range, another shape, another guard.
    """

    m1: Number = 1.0
    m2: Number = 0.0
    m3: Number = 0.0
    guard: str | None = field(default=None, kw_only=True)
    formula: ClassVar[int] = 0

    def __post_init__(self) -> None:
        for name in LIMITS:
            self._keep(name, LIMITS[name])
        self._check_guard()


@_value
@dataclass(frozen=True, eq=False, repr=False)
class RowMargin(Margin):
    """``psi = cos(m1 * theta + m2) - m3`` with numbers of each row's own: as ``CombinedMargin``, and 1-D
    tensors are [N], one number per row of the batch."""

    m1: Number = 1.0
    m2: Number = 0.0
    m3: Number = 0.0
    guard: str | None = field(default=None, kw_only=True)
    per_row: ClassVar[bool] = True
    formula: ClassVar[int] = 0

    def __post_init__(self) -> None:
        for name in LIMITS:
            self._keep(name, LIMITS[name])
        self._check_guard()


@_value
@dataclass(frozen=True, eq=False, repr=False)
class CosFace(Margin):
    """``psi = cos theta - m`` (Wang et al. 2018; AM-Softmax). ``m`` is a cosine, 0.35 by custom; it may be a
    tensor, 0-d or [C]."""

    m: Number = 0.35
    formula: ClassVar[int] = 0

    def __post_init__(self) -> None:
        self._keep("m", LIMITS["m3"])

    m1: ClassVar[float] = 1.0  # type: ignore[misc]
    m2: ClassVar[float] = 0.0  # type: ignore[misc]

    @property
    def m3(self) -> float | Tensor:  # type: ignore[override]
        return self.m


@_value
@dataclass(frozen=True, eq=False, repr=False)
class ArcFace(Margin):
    """``psi = cos(theta + m)`` (Deng et al. 2019). ``m`` is an angle in radians, 0.5 by custom; it may be a
    tensor, 0-d or [C].

    The gradient goes through theta exactly; past ``theta + m = pi``, ``psi = cos theta - m sin m``, or what
    ``guard`` says.
    """

    m: Number = 0.5
    guard: str | None = field(default=None, kw_only=True)
    formula: ClassVar[int] = 0

    def __post_init__(self) -> None:
        self._keep("m", LIMITS["m2"])
        self._check_guard()

    m1: ClassVar[float] = 1.0  # type: ignore[misc]
    m3: ClassVar[float] = 0.0  # type: ignore[misc]

    @property
    def m2(self) -> float | Tensor:  # type: ignore[override]
        return self.m


NO_MARGIN = CombinedMargin()

# A checkpoint that holds a margin loads with weights_only=True.
torch.serialization.add_safe_globals([CombinedMargin, RowMargin, CosFace, ArcFace])


def margin_argument(op: str, name: str, value: object) -> Margin | None:
    if value is not None and (not isinstance(value, Margin) or type(value) is Margin):
        # A configuration file's, which Hydra makes a margin of where it is told to.
        hint = "; hydra.utils.instantiate or OmegaConf.to_object makes a margin of it" * isinstance(
            value, Mapping
        )
        raise TypeError(
            f"{op}: expected `{name}` to be CosFace, ArcFace, CombinedMargin, RowMargin, a BatchMargin or"
            f" None, got {type(value).__name__}{hint}"
        )
    return value


def of_rows(op: str, name: str, value: Tensor, per_row: bool, labels: Tensor, classes: int) -> Tensor:
    """A margin's tensor for the rows whose labels these are, [] or [N]; a row that is ignored gets anyone's.

    The gradient of numbers per class adds up in a fixed order: in float64, by index_put, whose addition is
    sorted on CUDA and serial on the CPU."""
    checks.same_device(op, f"margin.{name}", value, "labels", labels)
    if value.dim() == 0:
        return value
    count, meaning = (labels.shape[0], "row") if per_row else (classes, "class")
    if value.shape[0] != count:
        raise ValueError(
            f"{op}: expected `margin.{name}` to have shape [{count}], a number per {meaning},"
            f" got {list(value.shape)}"
        )
    return value.contiguous() if per_row else value.double()[labels.clamp(0, classes - 1)]
