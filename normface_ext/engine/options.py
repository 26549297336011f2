"""Options: what a family's functions and layers take besides tensors, declared once.

A family's options are a dataclass whose fields are made by :func:`option`: default and check stand there,
and nowhere else. Functions take ``**options`` and make the dataclass with :meth:`Options.of`, which checks
what was given; layers keep one and offer its fields as attributes (:func:`holds`). What static type
checkers are to know of ``**options`` is a TypedDict of the same names beside the dataclass; a test compares.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, TypeVar

from torch import nn

from . import graphs

#: (op, name, value) -> the value as it is kept; raises what is none.
Check = Callable[[str, str, object], Any]
Self = TypeVar("Self", bound="Options")
Layer = TypeVar("Layer", bound=nn.Module)
Decorated = TypeVar("Decorated", bound=Callable[..., Any])


def option(default: Any, check: Check) -> Any:
    """A field of an :class:`Options` dataclass. `default` is kept as it is."""
    return field(default=default, metadata={"check": check})


@dataclass(frozen=True)
class Options:
    """Base of a family's options."""

    #: By name; filled for every subclass by ``declared``.
    CHECKS: ClassVar[Mapping[str, Check]] = {}
    #: Where nothing was given; likewise.
    DEFAULTS: ClassVar[Options]
    #: What others have and these have not, by name: why, and what to do instead.
    WHY_NOT: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def of(cls: type[Self], op: str, given: Mapping[str, object]) -> Self:
        """From keywords, checked. TypeError names what is no option."""
        if not given:
            return cls.DEFAULTS  # type: ignore[return-value]
        checks, kept = cls.CHECKS, {}
        for name, value in given.items():
            if name not in checks:
                why = f": {cls.WHY_NOT[name]}" if name in cls.WHY_NOT else ""
                raise TypeError(f"{op}: got an unexpected keyword argument `{name}`{why}")
            kept[name] = checks[name](op, name, value)
        made = cls(**kept)
        made.agree(op)
        return made

    def agree(self, op: str) -> None:
        """Raises where options that are right one by one contradict each other."""

    def changed(self: Self, op: str, name: str, value: object) -> Self:
        made = replace(self, **{name: self.CHECKS[name](op, name, value)})
        made.agree(op)
        return made

    def shown(self) -> list[str]:
        """For repr: every option that is not its default. A module is shown by the layer that holds it."""
        given = [(f.name, getattr(self, f.name), f.default) for f in fields(self)]
        return [
            f"{name}={value!r}"
            for name, value, default in given
            if not isinstance(value, nn.Module)
            and not (value is default or (type(value) is type(default) and value == default))
        ]


def declared(cls: type[Self]) -> type[Self]:
    """Decorates a dataclass of options once its fields are known."""
    cls.CHECKS = {f.name: f.metadata["check"] for f in fields(cls)}
    cls.DEFAULTS = cls()
    return cls


def takes(options: type[Options]) -> Callable[[Decorated], Decorated]:
    """Gives a function that takes ``**options`` the signature it has for users: help() and IDEs show the
    names and defaults. The function itself is unchanged, so calls cost nothing more."""

    def decorate(function: Decorated) -> Decorated:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        after = [p for p in own if p.kind is p.KEYWORD_ONLY]
        before = [p for p in own if p.kind is not p.KEYWORD_ONLY]
        named = [
            inspect.Parameter(
                f.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=f.default,
                annotation=f.type,
            )
            for f in fields(options)
        ]
        function.__signature__ = signature.replace(parameters=[*before, *named, *after])  # type: ignore[attr-defined]
        return function

    return decorate


class HoldsOptions(nn.Module):
    """A layer whose options are attributes: what is read, shown and used is ``self.options``, and setting one
    checks it as the constructor does."""

    options: Options

    def __prepare_scriptable__(self) -> nn.Module:
        raise graphs.not_scriptable(type(self).__name__)

    def keep_options(self, options: Options) -> None:
        object.__setattr__(self, "options", options)
        for name in options.CHECKS:
            self._follow(name, getattr(options, name))

    def _follow(self, name: str, value: object) -> None:
        """An option that is a module, such as a margin with a state, is a submodule of that name."""
        if isinstance(value, nn.Module):
            self._modules[name] = value
        else:
            self._modules.pop(name, None)

    def __setattr__(self, name: str, value: Any) -> None:
        held = self.__dict__.get("options")
        if held is None or name not in held.CHECKS:
            super().__setattr__(name, value)
            return
        object.__setattr__(self, "options", held.changed(type(self).__name__, name, value))
        self._follow(name, getattr(self.options, name))


def holds(options: type[Options]) -> Callable[[type[Layer]], type[Layer]]:
    """Decorates a layer that :class:`HoldsOptions`: its options can be read as attributes."""

    def decorate(layer: type[Layer]) -> type[Layer]:
        for name in options.CHECKS:
            setattr(layer, name, property(operator.attrgetter(f"options.{name}")))
        return layer

    return decorate
