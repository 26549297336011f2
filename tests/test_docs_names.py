"""Every public function and layer has an example in the documentation that test_docs.py runs."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
from collections.abc import Iterator

import pytest
from test_docs import PAGES, Block, blocks

import normface_ext as nf

PACKAGE = "normface_ext"
MODULES = [
    "",
    "functional",
    "recipes",
    "reference",
    "theory",
    "evaluation",
    "distributed",
    "caffe",
    "formats",
]
MODULES += ["testing", "optim"]
#: What runs on a GPU alone: its example stands in a block that no test runs, ```py.
ON_A_GPU = {"graphed"}


def public(name: str) -> dict[str, object]:
    """What a user calls: functions, and classes that are no mere record of results."""
    module = importlib.import_module(f"{PACKAGE}.{name}" if name else PACKAGE)
    own = [n for n, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    names = getattr(module, "__all__", None) or [n for n in own if not n.startswith("_")]
    found = {n: getattr(module, n) for n in names}
    return {n: value for n, value in found.items() if inspect.isroutine(value) or is_made_by_users(value)}


def is_made_by_users(value: object) -> bool:
    return inspect.isclass(value) and not (issubclass(value, tuple) or dataclasses.is_dataclass(value))


class Uses(ast.NodeVisitor):
    """The objects of the package that code names, by ``import`` and by attribute."""

    def __init__(self) -> None:
        self.names: dict[str, object] = {}
        self.seen: list[object] = []

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name.split(".")[0] == PACKAGE:
                whole = importlib.import_module(alias.name)
                self.names[alias.asname or PACKAGE] = (
                    whole if alias.asname else importlib.import_module(PACKAGE)
                )

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.module and node.module.split(".")[0] == PACKAGE:
            module = importlib.import_module(node.module)
            for alias in node.names:
                self.names[alias.asname or alias.name] = getattr(module, alias.name)

    def visit_Name(self, node: ast.Name) -> None:
        self.seen.append(self.names.get(node.id))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        owner = self.object_of(node.value)
        if inspect.ismodule(owner):
            self.seen.append(getattr(owner, node.attr, None))
        self.generic_visit(node)

    def object_of(self, node: ast.expr) -> object:
        if isinstance(node, ast.Name):
            return self.names.get(node.id)
        if isinstance(node, ast.Attribute) and inspect.ismodule(owner := self.object_of(node.value)):
            return getattr(owner, node.attr, None)
        return None


def run_blocks() -> Iterator[list[Block]]:
    for page, text in PAGES.items():
        yield [block for block in blocks(page, text) if block.language == "python" and not block.not_run]


def used_in(pages: Iterator[list[Block]]) -> set[int]:
    """By identity: classes of margins compare as they like."""
    found: set[int] = set()
    for page in pages:
        uses = Uses()
        for block in page:
            uses.visit(ast.parse(block.text))
        found |= {id(value) for value in uses.seen if value is not None}
    return found


@pytest.fixture(scope="module")
def used() -> set[int]:
    return used_in(run_blocks())


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_has_an_example_that_runs(module, used):
    names = public(module)
    assert names, "nothing is public: is this the right module?"
    assert [name for name, value in names.items() if id(value) not in used and name not in ON_A_GPU] == []


def test_what_needs_a_gpu_has_an_example_that_waits_for_one():
    waiting = "".join(
        b.text for page, text in PAGES.items() for b in blocks(page, text) if b.language == "py"
    )
    for name in ON_A_GPU:
        assert f"nf.{name}(" in waiting and hasattr(nf, name)


def test_names_in_prose_and_in_other_modules_do_not_count():
    code = "from normface_ext import reference as r\n# functional.normalize\nr.normalize\n"
    page = f"functional.normalize\n\n```python\n{code}```\n"
    found = used_in(iter([blocks("x.md", page)]))
    assert id(nf.reference.normalize) in found and id(nf.functional.normalize) not in found
    with_alias = "```python\nimport normface_ext as nf\nF = nf.functional\nnf.functional.normalize\n```\n"
    assert id(nf.functional.normalize) in used_in(iter([blocks("x.md", with_alias)]))
