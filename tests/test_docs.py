"""The documentation's Python runs: every ```python block of README.md and docs/, page by page.

The blocks of a page run in order, in one namespace, in a folder with the files of tests/prototxt. A fence
with title="FILE" is a file in it. A block below a comment <!-- not run: REASON --> is not run.
scripts/check builds the site.
"""

from __future__ import annotations

import os
import re
import shutil
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import normface_ext as nf
from normface_ext import evaluation

ROOT = Path(__file__).parent.parent
FENCE = re.compile(
    r"^(?P<indent>[ ]*)```(?P<language>\w*)(?P<info>[^\n]*)\n(?P<text>.*?)^(?P=indent)```[ ]*$", re.M | re.S
)
NOT_RUN = re.compile(r"<!-- not run: (?P<reason>.+?) -->\s*\Z")
#: What may stand unrun, by page: a new one has to be put here by hand.
UNRUN = {"docs/migrating/insightface.md": 1, "docs/frameworks.md": 1}
#: What takes longer: frameworks are imported.
SLOW = {"docs/frameworks.md"}


@dataclass(frozen=True)
class Block:
    """A fenced block: where its text begins, its language and title, and why it does not run, if so."""

    page: str
    line: int
    language: str
    title: str
    text: str
    not_run: str


def blocks(page: str, markdown: str) -> list[Block]:
    found = []
    for match in FENCE.finditer(markdown):
        title = re.search(r'title="([^"]+)"', match["info"])
        excuse = NOT_RUN.search(markdown[: match.start()])
        found.append(
            Block(
                page,
                markdown.count("\n", 0, match.start("text")) + 1,
                match["language"],
                title[1] if title else "",
                textwrap.dedent(match["text"]),
                excuse["reason"] if excuse else "",
            )
        )
    return found


def run(found: list[Block], folder: Path) -> dict[str, object]:
    """Executes the Python blocks; a traceback names page and line."""
    namespace: dict[str, object] = {"__name__": "__docs__"}
    for block in found:
        if block.title:
            (folder / block.title).write_text(block.text)
        if block.language == "python" and not block.not_run:
            # Blank lines before it, so that line numbers are the page's.
            source = "\n" * (block.line - 1) + block.text
            exec(compile(source, str(ROOT / block.page), "exec"), namespace)
    return namespace


PAGES = {
    page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8")
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
RUNNABLE = [
    page
    for page, text in PAGES.items()
    if any(b.language == "python" and not b.not_run for b in blocks(page, text))
]


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.slow) if page in SLOW else page for page in RUNNABLE]
)
def test_python_of_the_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for file in (ROOT / "tests" / "prototxt").glob("*.prototxt"):  # the pages' examples
        shutil.copy(file, tmp_path)
    environment, state = dict(os.environ), torch.get_rng_state()
    torch.manual_seed(0)
    try:
        run(blocks(page, PAGES[page]), tmp_path)
    finally:
        torch.set_rng_state(state)
        os.environ.clear()
        os.environ.update(environment)


def test_what_does_not_run_is_known() -> None:
    unrun = {page: sum(bool(b.not_run) for b in blocks(page, text)) for page, text in PAGES.items()}
    assert {page: count for page, count in unrun.items() if count} == UNRUN


def test_pages_with_python_are_found() -> None:
    assert {"README.md", "docs/index.md", "docs/how-it-works.md"} <= set(RUNNABLE)
    assert sum(page.startswith("docs/migrating/") for page in RUNNABLE) == 5


def test_a_wrong_block_fails_and_is_named(tmp_path: Path) -> None:
    page = "# Title\n\n```python\na = 1\n```\n\n    ```python\n    assert a == 2\n    ```\n"
    assert [(b.line, b.text) for b in blocks("x.md", page)] == [(4, "a = 1\n"), (8, "assert a == 2\n")]
    with pytest.raises(AssertionError) as caught:
        run(blocks("x.md", page), tmp_path)
    last = caught.traceback[-1]
    assert (Path(str(last.path)).name, last.lineno + 1) == ("x.md", 8)


def test_files_and_excuses(tmp_path: Path) -> None:
    page = (
        '```text title="a.txt"\nhello\n```\n\n<!-- not run: needs the moon -->\n\n```python\n1 / 0\n```\n'
        "```python\nb = 3\n```\n```bash\nexit 1\n```\n"
    )
    assert [b.not_run for b in blocks("x.md", page)] == ["", "needs the moon", "", ""]
    assert run(blocks("x.md", page), tmp_path)["b"] == 3
    assert (tmp_path / "a.txt").read_text() == "hello\n"


def documented() -> set[str]:
    """Dotted names with an entry of their own in docs/api: `::: name`, and the `members` listed below one."""
    names = set()
    for page, text in PAGES.items():
        if page.startswith("docs/api/"):
            for name, options in re.findall(r"^::: ([\w.]+)\n((?:    .*\n)?)", text + "\n", re.M):
                members = re.search(r"members: \[(.*?)\]", options.replace("inherited_members", ""))
                listed = [m.strip() for m in members[1].split(",") if m.strip()] if members else []
                names |= {name, *(f"{name}.{member}" for member in listed)}
    return names


def test_every_public_name_is_on_an_api_page() -> None:
    last = {name.rpartition(".")[2] for name in documented()}
    assert set(nf.__all__) - last == set()
    evaluated = {n.rpartition(".")[2] for n in documented() if n.startswith("normface_ext.evaluation.")}
    assert set(evaluation.__all__) - evaluated == set()
    # Pages of whole modules: what they show is what is public.
    assert {
        f"normface_ext.{m}" for m in ("functional", "theory", "reference", "testing", "caffe")
    } <= documented()
