"""A margin as plain values, for the state_dict, and back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from torch import nn

from .margins import Margin


def margin_state(margin: Margin | None) -> dict[str, Any]:
    """{"margin": its kind and fields}. Empty for a margin that is a module, whose own state is in the
    state_dict, and for one of tensors, which the code that made it gives again."""
    if margin is None:
        return {"margin": None}
    if isinstance(margin, nn.Module) or not is_dataclass(margin):
        return {}
    values = {f.name: getattr(margin, f.name) for f in fields(margin)}
    if not all(value is None or isinstance(value, (int, float, str)) for value in values.values()):
        return {}
    return {"margin": {"kind": type(margin).__name__, **values}}


def margin_of(op: str, state: object) -> Margin | None:
    """The margin of ``margin_state``. ValueError for anything else."""
    if state is None:
        return None
    values = dict(state) if isinstance(state, dict) else {}
    kind = values.pop("kind", None)
    for known in _kinds(Margin):
        if known.__name__ == kind:
            try:
                return known(**values)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{op}: expected a margin in the state_dict, got {error}") from None
    raise ValueError(f"{op}: expected a margin in the state_dict that is known here, got {kind!r}")


def _kinds(base: type[Margin]) -> Iterator[type[Margin]]:
    for kind in base.__subclasses__():
        if is_dataclass(kind) and not issubclass(kind, nn.Module):
            yield kind
        yield from _kinds(kind)
