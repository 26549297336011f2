"""The options of normalize and norm_linear, once: ``functional`` says what they mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from ..engine import checks
from ..engine.arguments import flag, integer
from ..engine.options import Options, declared, option


@declared
@dataclass(frozen=True)
class NormalizeOptions(Options):
    dim: int = option(1, integer)
    p: int = option(2, checks.exponent)
    eps: float = option(1e-12, checks.eps)
    return_norm: bool = option(False, flag)


@declared
@dataclass(frozen=True)
class LinearOptions(Options):
    normalize_input: bool = option(True, flag)
    eps: float = option(1e-12, checks.eps)


class LinearKeywords(TypedDict, total=False):
    """The same for static type checkers."""

    normalize_input: bool
    eps: float
