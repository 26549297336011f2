"""A margin as plain values, for the state_dict, and back."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from .margins import ArcFace, CombinedMargin, CosFace, Margin, RowMargin

#: Of ours those that a state_dict can bring: values, which hold nothing but their numbers.
VALUES: tuple[type[Margin], ...] = (CombinedMargin, RowMargin, CosFace, ArcFace)
#: Entries of a state that are no numbers of the margin. A number of one of these names has "_" after it.
_KIND, _TENSORS = "kind", "tensors"


def _entry(name: str) -> str:
    return f"{name}_" if name.rstrip("_") in (_KIND, _TENSORS) else name


def _name(entry: str) -> str:
    return entry[:-1] if entry.rstrip("_") in (_KIND, _TENSORS) else entry


def tensor_fields(margin: Margin | None) -> tuple[str, ...]:
    """The fields of a margin that is a value in which it has tensors."""
    if isinstance(margin, nn.Module) or not is_dataclass(margin):
        return ()
    return tuple(f.name for f in fields(margin) if isinstance(getattr(margin, f.name), Tensor))


def margin_state(margin: Margin | None) -> dict[str, Any] | None:
    """Its kind, and its fields or what its constructor takes, as far as they are plain; the names of those
    that are tensors, whose values are in the state_dict if they are parameters."""
    if margin is None:
        return None
    names = [name for name in _names(margin) if hasattr(margin, name)]
    values = {name: getattr(margin, name) for name in names}
    state: dict[str, Any] = {_KIND: _kind_of(type(margin))}
    state |= {_entry(name): v for name, v in values.items() if v is None or isinstance(v, (int, float, str))}
    tensors = [name for name, value in values.items() if isinstance(value, Tensor)]
    return {**state, _TENSORS: tensors} if tensors else state


def _names(margin: Margin) -> list[str]:
    if is_dataclass(margin):
        return [f.name for f in fields(margin)]
    return list(inspect.signature(type(margin)).parameters)


def _kind_of(kind: type) -> str:
    """Ours by name; another by its module too, since a name like ours does not make it ours."""
    ours = kind.__module__.partition(".")[0] == __name__.partition(".")[0]
    return kind.__name__ if ours else f"{kind.__module__}.{kind.__qualname__}"


def shown(state: Mapping[str, Any] | None) -> str:
    """As the margin's repr, tensors without their values."""
    if state is None:
        return "None"
    numbers = (f"{name}={value!r}" for name, value in _numbers(state).items() if value is not None)
    tensors = (f"{name}=<tensor>" for name in state.get(_TENSORS, ()))
    return f"{state[_KIND]}({', '.join([*tensors, *numbers])})"


def _numbers(state: Mapping[str, Any]) -> dict[str, Any]:
    return {_name(entry): value for entry, value in state.items() if entry not in (_KIND, _TENSORS)}


def checked_state(op: str, state: object) -> dict[str, Any] | None:
    """ValueError for what ``margin_state`` cannot have made."""
    if state is None:
        return None
    if not isinstance(state, dict) or not isinstance(state.get(_KIND), str):
        raise ValueError(f"{op}: expected a margin in the state_dict, got {type(state).__name__}")
    tensors = state.get(_TENSORS, [])
    if not isinstance(tensors, list) or not all(isinstance(name, str) for name in tensors):
        raise ValueError(f"{op}: expected the names of a margin's tensors in the state_dict, got others")
    return state


def margin_of(
    op: str,
    state: Mapping[str, Any] | None,
    tensors: Mapping[str, Tensor] | None = None,
    like: Margin | None = None,
) -> Margin | None:
    """The margin of a checked state, with these tensors. None where it cannot be made from it: it is a
    module, or unknown here, or misses a tensor; ValueError for numbers that are none of it."""
    if state is None:
        return None
    wanted, given = state.get(_TENSORS, []), tensors or {}
    known = next((kind for kind in _known(like) if _kind_of(kind) == state[_KIND]), None)
    if known is None or not set(wanted) <= given.keys():
        return None
    try:
        return known(**_numbers(state), **{name: given[name] for name in wanted})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{op}: expected a margin in the state_dict, got {error}") from None


def _known(like: Margin | None) -> Iterator[type[Margin]]:
    """The classes of values: that of `like` first, ours, and those that are a user's."""
    if like is not None and not isinstance(like, nn.Module) and is_dataclass(like):
        yield type(like)
    yield from VALUES
    yield from _users(Margin)


def _users(base: type[Margin]) -> Iterator[type[Margin]]:
    for kind in base.__subclasses__():
        if is_dataclass(kind) and not issubclass(kind, nn.Module) and _kind_of(kind) != kind.__name__:
            yield kind
        yield from _users(kind)


class MarginChange(NamedTuple):
    """What a state makes of a layer's margin.

    Attributes:
        margin: the layer's from now on.
        numbers: attributes to be set on it, where it is a module that stays.
        said: for the user, or empty.
    """

    margin: Margin | None
    numbers: Mapping[str, Any] = {}
    said: str = ""


def margin_change(op: str, given: object, before: Margin | None) -> MarginChange:
    """A value takes the place of a value. A module, and a value with parameters, stays what the layer was
    made with: what a module's constructor was given is set, where it is one of the same class."""
    state, mine = checked_state(op, given), margin_state(before)
    if state == mine:
        return MarginChange(before)
    same = state is not None and mine is not None and state[_KIND] == mine[_KIND]
    if same and isinstance(before, nn.Module):
        numbers = _module_numbers(op, state or {}, before)
        return MarginChange(before, numbers, f"margin {shown(state)} replaces {before}" if numbers else "")
    stays = MarginChange(before, {}, f"margin {shown(state)} is not taken, {before} stays")
    held = {name: getattr(before, name) for name in tensor_fields(before)}
    if state is not None and state.get(_TENSORS):
        if not same or set(state[_TENSORS]) != held.keys():
            return stays
        made = margin_of(op, state, held, before)
    elif isinstance(before, nn.Module) or any(isinstance(value, nn.Parameter) for value in held.values()):
        return stays
    else:
        made = margin_of(op, state, like=before)
    if made is None and state is not None:
        return stays
    return MarginChange(made, {}, f"margin {made} replaces {before}" if made != before else "")


def _module_numbers(op: str, state: Mapping[str, Any], margin: nn.Module) -> dict[str, Any]:
    """What differs of what its constructor was given. Ours checks it again."""
    held = {name: value for name, value in _numbers(state).items() if name in vars(margin)}
    if _kind_of(type(margin)) == type(margin).__name__:
        try:
            type(margin)(**_numbers(state))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{op}: expected a margin in the state_dict, got {error}") from None
    return {name: value for name, value in held.items() if getattr(margin, name) != value}


def with_tensors(margin: Margin, tensors: Mapping[str, Tensor]) -> Margin:
    """The margin with these tensors: itself, where it has them."""
    if all(getattr(margin, name) is value for name, value in tensors.items()):
        return margin
    return replace(margin, **tensors)  # type: ignore[type-var]
