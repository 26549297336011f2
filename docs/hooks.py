"""What mkdocs.yml cannot say."""

from __future__ import annotations

import re
from pathlib import Path

from markdown import Markdown
from markdown.extensions import Extension
from markdown.inlinepatterns import SimpleTextInlineProcessor
from markdown.preprocessors import Preprocessor
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


class Roles(Preprocessor):
    """`:func:` and the like before a name in backticks, as Sphinx has it, is left out."""

    def run(self, lines: list[str]) -> list[str]:
        return [re.sub(r":(?:func|class|meth|mod|attr):(?=`)", "", line) for line in lines]


class Docstrings(Extension):
    """Leaves `d_ij - (m - d_iy)_+` and `<x_i, w_j>` alone: no emphasis by underscores, and no inline HTML."""

    def extendMarkdown(self, md: Markdown) -> None:
        md.inlinePatterns.register(SimpleTextInlineProcessor("(_+)"), "underscores", 61)  # emphasis has 60
        md.inlinePatterns.deregister("html")
        md.preprocessors.register(Roles(md), "roles", 0)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.markdown_extensions.append(Docstrings())
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Pictures of benchmarks/results are part of the site, under results/."""
    for picture in sorted(RESULTS.rglob("*.png")):
        where = f"results/{picture.relative_to(RESULTS).as_posix()}"
        files.append(File.generated(config, where, abs_src_path=str(picture)))
    return files
