"""Options are declared once: what else names them must name the same."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys

import pytest
import touched

import normface_ext as nf
from normface_ext.engine.options import Options

SOURCES = [path for name, path in touched.modules().items() if name.startswith(touched.PACKAGE)]


def families() -> list[type[Options]]:
    """Every dataclass of options, those that only others inherit from left out."""
    found, waiting = [], [Options]
    while waiting:
        below = waiting.pop().__subclasses__()
        waiting += below
        found += [cls for cls in below if not cls.__subclasses__()]
    return sorted(found, key=lambda cls: cls.__name__)


def public(name: str) -> list[object]:
    """The public callables of this name: of functional, of the package, of distributed."""
    return [getattr(place, name) for place in (nf, nf.functional, nf.distributed) if hasattr(place, name)]


@pytest.mark.parametrize("options", families(), ids=lambda cls: cls.__name__)
def test_keywords_are_the_fields(options):
    module = sys.modules[options.__module__]
    fields = {f.name: f.type for f in dataclasses.fields(options)}
    told = [
        {name: kind.__forward_arg__ for name, kind in found.__annotations__.items()}
        for name, found in vars(module).items()
        if name.endswith("Keywords")
    ]
    taken = any(f"takes({options.__name__})" in path.read_text("utf-8") for path in SOURCES)
    assert not taken or any(keywords == fields for keywords in told)
    assert set(options.CHECKS) == set(fields)


@pytest.mark.parametrize("options", families(), ids=lambda cls: cls.__name__)
def test_every_default_passes_its_own_check(options):
    for field in dataclasses.fields(options):
        if field.default is not dataclasses.MISSING:
            assert options.CHECKS[field.name]("op", field.name, field.default) == field.default


@pytest.mark.parametrize("name", ["normface_loss", "NormFaceLoss"])
def test_the_signature_shows_them(name):
    from normface_ext.softmax.options import HeadOptions

    for call in public(name):
        shown = inspect.signature(call).parameters
        for field in dataclasses.fields(HeadOptions):
            assert shown[field.name].default == field.default
            assert shown[field.name].kind is inspect.Parameter.KEYWORD_ONLY
        assert all(p.kind is not p.VAR_KEYWORD for p in shown.values())


def test_what_is_no_option_is_named():
    with pytest.raises(TypeError, match="normface_loss: got an unexpected keyword argument `marginn`"):
        nf.functional.normface_loss(None, None, None, 1.0, marginn=None)
    with pytest.raises(TypeError, match="NormFaceLoss: got an unexpected keyword argument `marginn`"):
        nf.NormFaceLoss(3, 4, marginn=None)


def documented() -> list[tuple[str, object]]:
    """Public functions and classes whose docstrings have a section of arguments."""
    places = {"nf": nf, "functional": nf.functional, "distributed": nf.distributed, "theory": nf.theory}
    found = [
        (f"{place}.{name}", getattr(module, name)) for place, module in places.items() for name in dir(module)
    ]
    return [(name, call) for name, call in found if callable(call) and "Args:" in (call.__doc__ or "")]


@pytest.mark.parametrize(
    ("name", "call"), documented(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_documented_arguments_are_those_of_the_signature(name, call):
    section = re.split(r"\n\n|\n {0,8}\w+:\n", inspect.getdoc(call).split("Args:\n", 1)[1])[0]
    names = re.findall(r"^ {4}(\w+(?:, \w+)*):", section, re.MULTILINE)
    told = {part for entry in names for part in entry.split(", ")}
    assert told and told <= set(inspect.signature(call).parameters), name
